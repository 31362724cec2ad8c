"""The two bundled tasks: what goes into a row, what the one right answer is, and how an answer is scored.

    records    "name: Lion | kind: inn | …"            → one English sentence that says it all
    commands   "Please quietly carry the small box …"  → a function call with named arguments

Seven slots each, every slot with its own closed vocabulary of plain words. `scripts/make_tasks.py` draws the rows;
a held-out row is a combination of values that no training row has.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from deltaw.core.errors import UseError, did_you_mean
from deltaw.data.rows import Rows, read_rows
from deltaw.infer.metrics import exact_match


@dataclass(frozen=True)
class Task:
    """A mapping from slot values to one prompt and one answer. The vocabularies of its slots share no word."""

    name: str
    description: str
    slots: Mapping[str, tuple[str, ...]]
    prompt: str
    answer: str
    form: str
    """How its files are written: prompt-completion or messages; the two tasks exercise both readers."""

    @property
    def train(self) -> Path:
        return _folder() / f"{self.name}.train.jsonl"

    @property
    def held_out(self) -> Path:
        return _folder() / f"{self.name}.held_out.jsonl"

    def row(self, values: Mapping[str, str]) -> str:
        """The row of these slot values, as a line of its file."""
        prompt, answer = self.prompt.format(**values), self.answer.format(**values)
        if self.form == "messages":
            turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
            return json.dumps({"messages": turns})
        return json.dumps({"prompt": prompt, "completion": answer})

    def values(self, text: str) -> dict[str, list[str]]:
        """For each slot the words of its vocabulary that occur in `text`, in order."""
        words = re.findall(r"\w+", text)
        return {slot: [word for word in words if word in known] for slot, known in self.slots.items()}

    def slot_accuracy(self, answer: str, reference: str) -> float:
        """Share of the slots whose value stands in `answer`, once and without another value of the same slot."""
        given, wanted = self.values(answer), self.values(reference)
        return sum(given[slot] == wanted[slot] for slot in self.slots) / len(self.slots)


def load_task(name: str) -> Task:
    """A bundled task by name; UseError for any other."""
    if name not in TASKS:
        raise UseError(f"no bundled task {name!r}{did_you_mean(name, TASKS)}; there are: {', '.join(TASKS)}")
    return TASKS[name]


def nearest_row_baseline(task: Task, held_out: Rows, train: Rows | None = None) -> dict[str, float]:
    """Scores of looking up, not learning: the answer of that training row whose prompt shares most words."""
    known = [(_words(prompt), answer) for prompt, answer in _pairs(train or read_rows(task.train))]
    pairs = _pairs(held_out)
    asked = [_words(prompt) for prompt, _ in pairs]
    answers = [max(known, key=lambda row: len(words & row[0]))[1] for words in asked]
    slots = [task.slot_accuracy(answer, wanted) for answer, (_, wanted) in zip(answers, pairs, strict=True)]
    exact = exact_match(answers, [[wanted] for _, wanted in pairs])
    return {"exact_match": exact, "slot_accuracy": sum(slots) / len(slots)}


def _pairs(rows: Rows) -> list[tuple[str, str]]:
    return [(example.messages[-2].content, example.messages[-1].content) for example in rows.rows]


def _words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", text))


def _folder() -> Path:
    return Path(str(files("deltaw.lab"))) / "tasks"


_RECORDS = Task(
    name="records",
    description="a record of seven fields becomes one English sentence",
    slots={
        "name": (
            "Lion", "Castle", "Bishop", "Duke", "King", "Queen", "Prince", "Squire", "Captain", "Temple", "Earl", "Lady",
        ),
        "kind": ("inn", "house", "hall", "shop", "farm", "garden"),
        "style": ("quiet", "bright", "warm", "grand", "plain", "pleasant", "lonely", "narrow"),
        "place": ("river", "sea", "road", "wood", "wall", "hill", "mill", "field", "gate", "village", "church", "station"),
        "food": ("bread", "tea", "wine", "water", "corn", "dinner", "supper", "breakfast"),
        "cost": ("two", "three", "four", "five", "six", "seven", "eight", "ten", "twenty", "fifty"),
        "open": ("morning", "afternoon", "evening", "summer", "winter", "spring"),
    },
    prompt="name: {name} | kind: {kind} | style: {style} | place: {place} | food: {food} | cost: {cost} | open: {open}",
    answer="The {name} is a {style} {kind} near the {place}, where {food} is sold for {cost} pounds in the {open}.",
    form="prompt-completion",
)  # fmt: skip

_COMMANDS = Task(
    name="commands",
    description="an order in plain English becomes a function call with named arguments",
    slots={
        "manner": ("quickly", "quietly", "slowly", "softly", "carefully", "suddenly", "presently", "simply"),
        "action": ("carry", "bring", "take", "send", "show", "drop", "draw", "offer"),
        "look": ("small", "big", "heavy", "white", "black", "golden", "broken", "silver", "empty", "dark"),
        "thing": ("box", "book", "chair", "table", "glass", "picture", "letter", "sword", "cup", "gun", "coat", "bell"),
        "source": ("kitchen", "chamber", "carriage", "boat", "bank", "court", "corner", "camp"),
        "target": ("prison", "school", "ship", "park", "city", "street", "bridge", "army"),
        "person": (
            "Mary", "John", "Helen", "George", "Ruth", "Oliver", "Lucy", "Henry", "Laura", "Peter", "Esther", "Robert",
        ),
    },
    prompt="Please {manner} {action} the {look} {thing} from the {source} to the {target} for {person}.",
    answer="{action}(thing: {thing}, look: {look}, source: {source}, target: {target}, person: {person}, manner: {manner})",
    form="messages",
)  # fmt: skip

TASKS: dict[str, Task] = {task.name: task for task in (_RECORDS, _COMMANDS)}
