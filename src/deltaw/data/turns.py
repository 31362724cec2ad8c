"""Lists of turns in the dialects people write → messages: OpenAI's role/content, ShareGPT's from/value, typed parts.

{"role": "assistant", "content": "…", "reasoning_content": "…", "tool_calls": […]}          OpenAI and its followers
{"from": "gpt", "value": "…"}   also human, function_call, observation                     ShareGPT
{"role": "assistant", "content": [{"type": "reasoning", "value": "…"}, {"type": "text", …}]}   typed parts
{"role": "user", "content": [{"type": "image", "path": "a.png"}, {"type": "text", …}]}            with images
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from deltaw.core.errors import did_you_mean, meant_to_be
from deltaw.data.conversation import IMAGE, ROLES, Call, Message

NAMES = {
    "system": "system", "developer": "system", "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool", "ipython": "tool",
    "function_call": "call", "tool_call": "call",
}  # fmt: skip
"""What a role is called in files → what it is here; `call` is an assistant's turn whose content is the call itself."""

MARK = "<image>"
"""What stands in texts where an image is meant that is named beside them."""
NEXT = Path(MARK)
"""In the place of a file: the next one of those that the row names beside its turns."""

LOCAL = re.compile(r"file://(localhost(?=/))?", re.IGNORECASE)
"""How the address of a file of this machine begins."""


class Unreadable(ValueError):
    """A turn that cannot be read; the message is the reason."""


def messages(turns: Any, field: str) -> tuple[list[Message], list[str]]:
    """The turns under `field` of a row, and what is wrong with them."""
    if not isinstance(turns, list) or not turns:
        return [], [f"`{field}` is {shown(turns)}: must be a list of turns with role and content"]
    result, found = [], []
    for number, turn in enumerate(turns, 1):
        try:
            result.append(message(turn))
        except Unreadable as error:
            found.append(f"message {number} {error}")
    return result, found


def message(turn: Any) -> Message:
    """One turn. Unreadable says why it is none."""
    if not isinstance(turn, Mapping):
        raise Unreadable(f"is {shown(turn)}: must be an object with role and content")
    keys = ("from", "value") if "from" in turn and "role" not in turn else ("role", "content")
    missing = [key for key in keys if key not in turn and not (key == "content" and turn.get("tool_calls"))]
    if missing:
        near = meant_to_be(missing[0], map(str, turn))
        raise Unreadable(f"has no `{missing[0]}`{near} (it has {', '.join(map(str, turn))})")
    name, content = turn[keys[0]], turn.get(keys[1])
    role = NAMES.get(name.lower()) if isinstance(name, str) else None
    if role is None:
        raise Unreadable(
            f"has the role {name!r}, expected one of {', '.join(ROLES)}{did_you_mean(str(name), [*NAMES, *ROLES])}"
        )
    if role == "call":
        return Message("assistant", "", calls=_calls(content), learn=_learn(turn))
    text, reasoning, calls, images = _parts(content)
    for key in ("reasoning_content", "reasoning", "thinking"):
        reasoning = reasoning or _text(turn.get(key) or "", key)
    calls += _calls(turn.get("tool_calls") or [])
    if (calls or reasoning) and role != "assistant":
        raise Unreadable(f"is the {role}'s and {'calls a tool' if calls else 'reasons'}: only the assistant does that")
    return Message(role, text, reasoning, calls, _learn(turn), images)


def tools(given: Any) -> tuple[tuple[str, ...], list[str]]:
    """The `tools` field of a row, a list or a list as JSON text; each as a JSON object in OpenAI's envelope."""
    try:
        listed = json.loads(given) if isinstance(given, str) and given.strip() else given or []
    except json.JSONDecodeError as error:
        return (), [f"`tools` is not JSON: {error.msg} at character {error.pos + 1}"]
    if not isinstance(listed, list) or not all(isinstance(tool, dict) for tool in listed):
        return (), [f"`tools` is {shown(given)}: must be a list of objects"]
    nameless = [tool for tool in listed if not isinstance(tool.get("function", tool).get("name"), str)]
    if nameless:
        return (), [f"`tools` holds {shown(nameless[0])}, which has no name"]
    whole = [tool if "function" in tool else {"type": "function", "function": tool} for tool in listed]
    return tuple(json.dumps(tool, ensure_ascii=False) for tool in whole), []


def _parts(content: Any) -> tuple[str, str, tuple[Call, ...], tuple[Path, ...]]:
    """Content, plain or in typed parts → text, reasoning, calls, images."""
    if isinstance(content, str) or content is None:
        return content or "", "", (), ()
    if not isinstance(content, list) or not all(isinstance(part, Mapping) for part in content):
        raise Unreadable(f"has the content {shown(content)}: must be text, or a list of typed parts")
    texts, thoughts, calls, images = [], [], (), []
    for part in content:
        kind = part.get("type")
        value = part.get("value", part.get("text", part.get(str(kind))))
        if kind == "text":
            texts.append(_text(value, "text"))
        elif kind in ("reasoning", "thinking"):
            thoughts.append(_text(value, kind))
        elif kind in ("tool_call", "function_call"):
            calls += _calls(value)
        elif kind in ("image", "image_url"):
            images.append(_image(part))
            texts.append(IMAGE)
        else:
            raise Unreadable(
                f"has a part of type {kind!r}, which cannot be read yet: text, image, reasoning and tool_call can"
            )
    return "".join(texts), "".join(thoughts), calls, tuple(images)


def _image(part: Mapping[str, Any]) -> Path:
    """The file of a part that is an image; NEXT where it names none."""
    given = next((part[key] for key in ("image", "path", "url", "image_url", "base64", "value") if part.get(key)), None)
    given = given.get("url") if isinstance(given, Mapping) and "url" in given else given
    try:
        return NEXT if given is None else Path(image_name(given))
    except Unreadable as error:
        raise Unreadable(f"has an image that {error}") from None


def image_name(given: Any) -> str:
    """The name of a file, as rows give it, also as file:///…. Unreadable for what is none."""
    if isinstance(given, Mapping) and not given.get("bytes"):
        given = given.get("path")
    if not isinstance(given, str) or not given:
        raise Unreadable(f"is {shown(given)}: must be the name of a file, images inside a table are not read")
    if given.startswith("data:"):
        raise Unreadable("is written out in the row (data:…): save it as a file and give its name")
    if LOCAL.match(given):
        return unquote(LOCAL.sub("", given))
    if re.match(r"[a-zA-Z][a-zA-Z0-9+.\-]*://", given):
        raise Unreadable(f"is an address ({given[:60]}): images are not fetched, save it as a file and give its name")
    return given


def _calls(given: Any) -> tuple[Call, ...]:
    """One call or several, as objects or as JSON text, with or without OpenAI's envelope."""
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except json.JSONDecodeError as error:
            raise Unreadable(
                f"calls a tool with text that is not JSON: {error.msg} at character {error.pos + 1}"
            ) from None
    result = []
    for item in given if isinstance(given, list) else [given]:
        inner = item.get("function", item) if isinstance(item, Mapping) else {}
        name, arguments = (inner.get("name"), inner.get("arguments", {})) if isinstance(inner, Mapping) else (None, {})
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments or "{}")
            except json.JSONDecodeError:
                raise Unreadable(f"calls {name!r} with arguments that are not JSON: {shown(arguments)}") from None
        if not isinstance(name, str) or not isinstance(arguments, Mapping):
            raise Unreadable(f"calls a tool as {shown(item)}: must be an object with name and arguments")
        result.append(Call(name, json.dumps(arguments, ensure_ascii=False)))
    return tuple(result)


def _learn(turn: Mapping[str, Any]) -> bool:
    """`train: false` or `weight: 0` on a turn make it context."""
    for key in ("train", "weight"):
        if turn.get(key) is not None:  # tables fill what is missing with null
            if turn[key] not in (0, 1):  # True and False are 1 and 0
                raise Unreadable(f"has {key}={turn[key]!r}: must be 0 or 1, true or false")
            return bool(turn[key])
    return True


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise Unreadable(f"has {name} {shown(value)}: must be text")
    return value


def shown(value: Any) -> str:
    """A value of a file in a message, cut to 40 characters."""
    text = repr(value)
    return text if len(text) <= 40 else text[:39] + "…"
