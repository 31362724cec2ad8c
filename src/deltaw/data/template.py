"""Chat templates: that of the tokenizer, of a file, or one of ours by name; and what must be true of any of them.

    <open role>content<close>   for every turn; the assistant's with its reasoning and calls:
    <think>…</think>            before its answer
    <tool_call>{…}</tool_call>  after it, one per call; results come back as <tool_response>…</tool_response>

Tools stand in the system turn, one JSON object a line.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from deltaw.core.errors import ConfigError, did_you_mean
from deltaw.data.conversation import IMAGE, Message


class Unfit(Exception):
    """What the template writes cannot be used; the message is the reason."""


def build(opening: str, closing: str) -> str:
    """A template in which `opening` with the role in the place of ROLE and `closing` stand around every turn."""

    def begin(role: str) -> str:
        return opening.replace("ROLE", role)

    return (
        "{%- if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set rest = messages[1:] %}"
        "{%- else %}{% set system = '' %}{% set rest = messages %}{% endif %}"
        "{%- if system or tools %}" + begin("system") + "{{ system }}"
        "{%- if tools %}{% if system %}{{ '\\n\\n' }}{% endif %}{{ '# Tools' }}"
        "{%- for tool in tools %}{{ '\\n' + (tool | tojson) }}{% endfor %}{% endif %}" + closing + "{% endif %}"
        "{%- for m in rest %}"
        "{%- if m.role == 'tool' %}" + begin("user") + "{{ '<tool_response>\\n' + m.content + '\\n</tool_response>' }}"
        "{%- else %}" + begin("{{ m.role }}") + "{%- if m.reasoning_content %}"
        "{{ '<think>\\n' + m.reasoning_content + '\\n</think>\\n\\n' }}{% endif %}{{ m.content }}"
        "{%- for call in m.tool_calls or [] %}{{ '\\n' if m.content or not loop.first else '' }}"
        "{{ '<tool_call>\\n' + (call.function | tojson) + '\\n</tool_call>' }}{% endfor %}{% endif %}" + closing
        + "{% endfor %}{%- if add_generation_prompt %}" + begin("assistant") + "{% endif %}"
    )  # fmt: skip


def _text(text: str) -> str:
    """Text in a template that keeps its line breaks."""
    return "{{ " + json.dumps(text) + " }}"


TEMPLATES = {
    "chatml": build(_text("<|im_start|>") + "ROLE" + _text("\n"), _text("<|im_end|>\n")),
    "plain": build(_text("### ") + "ROLE" + _text(":\n"), "{{ eos_token }}" + _text("\n")),
    "tiny": build(_text("<|") + "ROLE" + _text("|>\n"), _text("<|end|>\n")),
}
"""chatml: for tokenizers that have <|im_end|>. plain: for any base with an end-of-text token. tiny: the bundled base's."""


def template(given: str) -> str:
    """The text of a template by name, or from a file. ConfigError where there is none."""
    if given in TEMPLATES:
        return TEMPLATES[given]
    try:
        return Path(given).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise ConfigError(
            f"data.template={given!r} is no file that can be read and none of {', '.join(TEMPLATES)}"
            f"{did_you_mean(given, TEMPLATES)}"
        ) from None


def as_chat(messages: Sequence[Message], content: Callable[[Message], Any] | None = None) -> list[dict[str, Any]]:
    """Messages as chat templates and `generate` take them. content: a message → its content; the text by default."""
    result = []
    for m in messages:
        turn: dict[str, Any] = {"role": m.role, "content": m.content if content is None else content(m)}
        if m.reasoning:
            turn["reasoning_content"] = m.reasoning
        if m.calls:
            turn["tool_calls"] = [
                {"type": "function", "function": {"name": c.name, "arguments": json.loads(c.arguments)}}
                for c in m.calls
            ]
        result.append(turn)
    return result


def render(
    messages: Sequence[Message], tokenizer: Any, tools: Sequence[str] = (), answer: bool = False,
    content: Callable[[Message], Any] | None = None,
) -> str:  # fmt: skip
    """The text of a conversation through the tokenizer's template; with `answer` up to where the answer begins.

    content: as `as_chat` takes it.
    """
    return tokenizer.apply_chat_template(
        as_chat(messages, content),
        tools=[json.loads(tool) for tool in tools] or None,
        tokenize=False,
        add_generation_prompt=answer,
    )


def unwritten(messages: Sequence[Message], tools: Sequence[str], text: str) -> str | None:
    """What of a conversation its rendered text leaves out, or None: a template that drops calls drops them silently."""
    for number, m in enumerate(messages, 1):
        said = m.content.split(IMAGE) if m.images else [m.content]
        if any(part.strip() not in text for part in said):
            return f"the content of message {number}, the {m.role}'s"
        if any(call.name not in text for call in m.calls):
            return f"the tool call of message {number}"
        if m.reasoning.strip() not in text and m.learn and number == len(messages):
            return f"the reasoning of message {number}"
    if any(json.loads(tool)["function"]["name"] not in text for tool in tools):
        return "the tools"
    return None
