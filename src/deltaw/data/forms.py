"""One row of JSON → the turns of a conversation: which form it has, and whether it can be learnt from."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from deltaw.core.errors import did_you_mean

Form = Literal["prompt-completion", "messages", "alpaca"]

NEEDED: dict[Form, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt-completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
}
EXPECTED = "prompt + completion, messages, or instruction + output"
ROLES = ("system", "user", "assistant")

# Fields that carry meaning we would lose, or would learn the wrong way round. Refused by name, never dropped silently.
REFUSED = {
    "chosen": "is half of a preference pair, which sft cannot learn from: keep the better answer as `completion`",
    "rejected": "is half of a preference pair, which sft cannot learn from: keep the better answer as `completion`",
    "label": "judges the answer, and sft would learn bad answers too: keep the good rows and remove the field",
    "tools": "cannot be rendered yet: remove the rows that call tools",
    "images": "cannot be read yet: keep the rows of text",
}


@dataclass(frozen=True)
class Message:
    role: str
    content: str


def detect(row: Mapping[str, Any]) -> tuple[Form | None, str]:
    """The form of a row; or None and what is wrong with it."""
    for key, reason in REFUSED.items():
        if row.get(key) not in (None, "", []) and (key != "label" or isinstance(row[key], bool)):
            return None, f"`{key}` {reason}"
    whole = [form for form, keys in NEEDED.items() if all(key in row for key in keys)]
    if len(whole) == 1:
        return whole[0], ""
    if whole:
        return None, f"it is {' and '.join(whole)} at once: keep the fields of one form"
    for form, keys in NEEDED.items():
        missing = [key for key in keys if key not in row]
        if len(missing) < len(keys):
            given = ", ".join(map(str, row))
            near = did_you_mean(missing[0], [key for key in map(str, row) if key not in keys])
            return None, f"the field `{missing[0]}` is missing (a row of {form}; it has {given}){near}"
    if "text" in row:
        return None, "raw `text` has no answer to supervise: write prompt and completion, or messages"
    if "conversations" in row:
        return None, "`conversations` (ShareGPT) is not read yet: write messages with role and content"
    near = next((d for key in sorted(set().union(*NEEDED.values())) if (d := did_you_mean(key, map(str, row)))), "")
    return None, f"no known form: it has {', '.join(map(str, row)) or 'no field'}, expected {EXPECTED}{near}"


def messages_of(form: Form, row: Mapping[str, Any]) -> tuple[tuple[Message, ...], list[str]]:
    """The turns of a row of this form, and what is wrong with them."""
    if form == "prompt-completion":
        turns, found = _texts(row, [("user", "prompt"), ("assistant", "completion")])
    elif form == "alpaca":
        turns, found = _alpaca(row)
    else:
        turns, found = _messages(row["messages"])
    return tuple(turns), found or _order(turns, "messages" if form == "messages" else "")


def _texts(row: Mapping[str, Any], fields: list[tuple[str, str]]) -> tuple[list[Message], list[str]]:
    found = [f"`{key}` is {_shown(row[key])}: must be text" for _, key in fields if not isinstance(row[key], str)]
    return ([] if found else [Message(role, row[key]) for role, key in fields]), found


def _alpaca(row: Mapping[str, Any]) -> tuple[list[Message], list[str]]:
    row = {**row, "input": row.get("input") or "", "system": row.get("system") or ""}
    texts, found = _texts(
        row, [("system", "system"), ("user", "instruction"), ("user", "input"), ("assistant", "output")]
    )
    history = row.get("history") or []
    pairs = history if isinstance(history, list) else [history]
    if not all(isinstance(p, list | tuple) and len(p) == 2 and all(isinstance(t, str) for t in p) for p in pairs):
        found.append("`history` must be a list of [instruction, answer] pairs of text")
    if found:
        return [], found
    system, instruction, extra, answer = texts
    past = [Message(role, text) for p in pairs for role, text in zip(("user", "assistant"), p, strict=True)]
    asked = instruction.content + (f"\n{extra.content}" if extra.content else "")
    return [*([system] if system.content else []), *past, Message("user", asked), answer], []


def _messages(turns: Any) -> tuple[list[Message], list[str]]:
    if not isinstance(turns, list) or not turns:
        return [], [f"`messages` is {_shown(turns)}: must be a list of turns with role and content"]
    result, found = [], []
    for number, turn in enumerate(turns, 1):
        place = f"message {number}"
        if not isinstance(turn, dict):
            found.append(f"{place} is {_shown(turn)}: must be an object with role and content")
            continue
        missing = [key for key in ("role", "content") if key not in turn]
        if missing:
            found.append(
                f"{place} has no `{missing[0]}`{did_you_mean(missing[0], map(str, turn))} (it has {', '.join(turn)})"
            )
        elif turn["role"] not in ROLES:
            near = did_you_mean(str(turn["role"]), ROLES)
            found.append(f"{place} has the role {turn['role']!r}, expected one of {', '.join(ROLES)}{near}")
        elif turn.get("tool_calls"):
            found.append(f"{place} calls tools, which cannot be rendered yet: remove the row")
        elif not isinstance(turn["content"], str):
            found.append(f"{place} has the content {_shown(turn['content'])}: must be text")
        else:
            result.append(Message(turn["role"], turn["content"]))
    return result, found


def _order(turns: list[Message], form: str) -> list[str]:
    """What is wrong with the order and the answers: [system] user assistant [user assistant …]."""
    found = []
    talk = turns[1:] if turns[0].role == "system" else turns
    roles = [turn.role for turn in talk]
    if "assistant" not in roles:
        return ["no message is the assistant's: there is no answer to learn"]
    wrong = next((i for i, role in enumerate(roles) if role != ROLES[1 + i % 2]), None)
    if wrong is not None:
        number = wrong + 1 + len(turns) - len(talk)
        found.append(
            f"message {number} is the {roles[wrong]}'s, expected the {ROLES[1 + wrong % 2]}'s: turns must alternate"
        )
    elif roles[-1] == "user":
        found.append("the last message is the user's and has no answer: remove it")
    for number, turn in enumerate(turns, 1):
        place = f"message {number}, the {turn.role}'s," if form else _PLACES[turn.role]
        if turn.role == "assistant" and not turn.content.strip():
            found.append(f"{place} is empty: remove the row")
        try:
            turn.content.encode()
        except UnicodeEncodeError as error:  # JSON may escape half of a character; no tokenizer takes it
            half = turn.content[error.start]
            found.append(f"{place} has half of a character ({half!a}) at position {error.start + 1}: repair the text")
    return found


_PLACES = {"system": "the system prompt", "user": "the prompt", "assistant": "the answer"}


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:39] + "…"
