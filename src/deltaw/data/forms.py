"""One row of a file → an Example: which form it has, and whether it can be read.

prompt-completion   {"prompt": "…", "completion": "…"}
messages            {"messages": [{"role": "user", "content": "…"}, …], "tools": […]}
sharegpt            {"conversations": [{"from": "human", "value": "…"}, …], "tools": "…", "system": "…"}
alpaca              {"instruction": "…", "input": "…", "output": "…", "system": "…", "history": […]}
text                {"text": "…"}
preference          prompt, messages or conversations, with chosen and rejected beside them
judged              prompt-completion, messages or conversations, with "label": true or false
caption             {"text": "…"} beside an image: what is said of it

All but text may have images: in the turns, or beside them (`deltaw.data.images`).
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from deltaw.core.errors import meant_to_be
from deltaw.data import images
from deltaw.data.conversation import Example, Message, half_character, order
from deltaw.data.turns import Unreadable, message, messages, shown, tools

Form = Literal["prompt-completion", "messages", "sharegpt", "alpaca", "text", "preference", "judged", "caption"]

NEEDED: dict[Form, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "prompt-completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
}
"""The fields that make a row one of a form; preference and judged rows are these with more beside them."""
BESIDE: dict[Form, tuple[str, ...]] = {
    "messages": ("system", "tools"),
    "sharegpt": ("system", "tools"),
    "prompt-completion": ("tools",),
    "alpaca": ("input", "system", "history", "tools"),
    "text": (),
}
"""The fields that are read of such rows too."""
READ = {form: {*keys, *BESIDE[form]} for form, keys in NEEDED.items()}
TALKS = READ["messages"] | READ["sharegpt"] | READ["prompt-completion"]
READ |= {"judged": TALKS | {"label"}, "preference": TALKS | READ["alpaca"] | {"chosen", "rejected"}}
READ = {form: names if form == "text" else {*names, *images.FIELDS} for form, names in READ.items()}
READ["caption"] = {"text", *images.FIELDS}
EXPECTED = "prompt + completion, messages, conversations, instruction + output, or text"
MEDIA = ("videos", "audios")


def detect(row: Mapping[str, Any]) -> tuple[Form | None, str]:
    """The form of a row; or None and what is wrong with it."""
    media = next((key for key in MEDIA if row.get(key)), None)
    if media:
        return None, f"`{media}` cannot be read yet: keep the rows of text"
    if "chosen" in row or "rejected" in row:
        missing = next((key for key in ("chosen", "rejected") if key not in row), None)
        return (None, f"the field `{missing}` of a preference pair is missing") if missing else ("preference", "")
    whole = [form for form, keys in NEEDED.items() if all(key in row for key in keys)]
    whole = [form for form in whole if form != "text"] or whole  # a text beside a whole row is a note on it
    if len(whole) > 1:
        return None, f"it is {' and '.join(whole)} at once: keep the fields of one form, or map them with data.columns"
    if whole == ["text"] and images.held(row):
        return "caption", ""
    if whole:
        judged = isinstance(row.get("label"), bool) and whole[0] not in ("alpaca", "text")
        return ("judged" if judged else whole[0]), ""
    for form, keys in NEEDED.items():
        missing_keys = [key for key in keys if key not in row]
        if len(missing_keys) < len(keys):
            given = ", ".join(map(str, row))
            near = meant_to_be(missing_keys[0], [key for key in map(str, row) if key not in keys])
            return None, f"the field `{missing_keys[0]}` is missing (a row of {form}; it has {given}){near}"
    known = sorted(set().union(*NEEDED.values()))
    near = next((d for key in known if (d := meant_to_be(key, map(str, row)))), "")
    has = ", ".join(map(str, row)) or "no field"
    return None, f"no known form: it has {has}, expected {EXPECTED}{near}; data.columns maps other names"


def unread(form: Form, row: Mapping[str, Any]) -> set[str]:
    """Fields of a row that hold something and are not read."""
    return {str(key) for key in row.keys() - READ[form] if row[key] not in (None, "", [], {})}


def example(form: Form, row: Mapping[str, Any], line: int, where: str) -> tuple[Example, list[str]]:
    """The row as an Example, and what is wrong with it; images beside it have no place yet."""
    if form == "caption":
        turns, found = _texts({**row, "prompt": ""}, [("user", "prompt"), ("assistant", "text")])
        return Example(tuple(turns), line, where, completion=True), found or order(turns)
    if form == "text":
        text, found = row["text"], []
        if not isinstance(text, str) or not text.strip():
            found.append(f"`text` is {shown(text)}: must be text, and not empty")
        elif half := half_character(text):
            found.append(f"`text` {half}")
        return Example((), line, where, text=text), found
    described, found = tools(row.get("tools"))
    before, wrong = _before(row) if form == "preference" else _conversation(row)
    found += wrong
    if form != "preference":
        found = found or order(before)
        pair = "completion" in row and "messages" not in row and "conversations" not in row
        good = row["label"] if form == "judged" else None
        return Example(tuple(before), line, where, completion=pair, tools=described, good=good), found
    ends: dict[str, list[Message]] = {}
    for key in ("chosen", "rejected"):
        ends[key], wrong = _ending(row[key], key, before)
        found += wrong or ([] if found else [f"with `{key}`: {fault}" for fault in order([*before, *ends[key]])])
    if not found and ends["chosen"] == ends["rejected"]:
        found.append("`chosen` and `rejected` are the same: there is nothing to prefer")
    whole = (*before, *ends["chosen"])
    pair = isinstance(row.get("prompt"), str)
    return Example(whole, line, where, completion=pair, tools=described, rejected=tuple(ends["rejected"])), found


def _conversation(row: Mapping[str, Any]) -> tuple[list[Message], list[str]]:
    """All turns of a row that is no preference pair."""
    if "messages" in row or "conversations" in row:
        return _talk(row)
    if "completion" in row:
        return _texts(row, [("user", "prompt"), ("assistant", "completion")])
    return _alpaca(row)


def _before(row: Mapping[str, Any]) -> tuple[list[Message], list[str]]:
    """The turns before the two answers of a preference pair."""
    if "messages" in row or "conversations" in row:
        return _talk(row)
    if isinstance(row.get("prompt"), list):
        return messages(row["prompt"], "prompt")
    if "prompt" in row:
        return _texts(row, [("system", "system"), ("user", "prompt")])
    if "instruction" in row:
        turns, found = _alpaca({**row, "output": "-"})
        return turns[:-1], found
    return [], []  # both answers are whole conversations


def _ending(given: Any, key: str, before: Sequence[Message]) -> tuple[list[Message], list[str]]:
    """`chosen` or `rejected`: a text, one turn, or turns; a whole conversation where nothing stands before."""
    if isinstance(given, str):
        return [Message("assistant", given)], []
    if isinstance(given, list):
        turns, found = messages(given, key)
        shared = len(before)
        return (turns[shared:] if before and turns[:shared] == list(before) else turns), found
    try:
        return [message(given)], []
    except Unreadable as error:
        return [], [f"`{key}` {error}"]


def _talk(row: Mapping[str, Any]) -> tuple[list[Message], list[str]]:
    field = "messages" if "messages" in row else "conversations"
    turns, found = messages(row[field], field)
    system = row.get("system")
    if system and isinstance(system, str) and not (turns and turns[0].role == "system"):
        turns = [Message("system", system), *turns]
    return turns, found


def _texts(row: Mapping[str, Any], fields: list[tuple[str, str]]) -> tuple[list[Message], list[str]]:
    given = [(role, key) for role, key in fields if role != "system" or row.get(key)]
    found = [f"`{key}` is {shown(row.get(key))}: must be text" for _, key in given if not isinstance(row.get(key), str)]
    return ([] if found else [Message(role, row[key]) for role, key in given]), found


def _alpaca(row: Mapping[str, Any]) -> tuple[list[Message], list[str]]:
    row = {**row, "input": row.get("input") or ""}
    texts, found = _texts(
        row, [("system", "system"), ("user", "instruction"), ("user", "input"), ("assistant", "output")]
    )
    history = row.get("history") or []
    pairs = history if isinstance(history, list) else [history]
    if not all(isinstance(p, list | tuple) and len(p) == 2 and all(isinstance(t, str) for t in p) for p in pairs):
        found.append("`history` must be a list of [instruction, answer] pairs of text")
    if found:
        return [], found
    *system, instruction, extra, answer = texts
    past = [Message(role, text) for p in pairs for role, text in zip(("user", "assistant"), p, strict=True)]
    asked = instruction.content + (f"\n{extra.content}" if extra.content else "")
    return [*system, *past, Message("user", asked), answer], []
