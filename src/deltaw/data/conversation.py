"""One row as a conversation: what every form of row becomes, and what may follow what in it.

[system]  user  assistant  [tool …  assistant]  user  assistant …
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

ROLES = ("system", "user", "assistant", "tool")
IMAGE = "\ufffc"
"""Where an image stands in the content of a message that has some (Unicode's object replacement character)."""


class Call(NamedTuple):
    """A tool called by the assistant; `arguments` is a JSON object as text."""

    name: str
    arguments: str


@dataclass(frozen=True)
class Message:
    role: str
    content: str
    reasoning: str = ""
    """What the assistant thought before it answered, kept apart from the answer."""
    calls: tuple[Call, ...] = ()
    learn: bool = True
    """False for an assistant's turn that is only context."""
    images: tuple[Path, ...] = ()
    """Files of the images that IMAGE stands for in the content, in that order."""


@dataclass(frozen=True)
class Example:
    """One row: a conversation that ends with the assistant's turn, or a text."""

    messages: tuple[Message, ...]
    line: int
    """Where it stands: line of a .jsonl file, number of the row in another file, from 1."""
    where: str = ""
    """The same with the name of the file, for messages to people."""
    completion: bool = False
    """A prompt and its completion, which may be written one after the other where there is no chat template."""
    tools: tuple[str, ...] = ()
    """Descriptions of the tools that the assistant may call, each a JSON object as text."""
    text: str | None = None
    """A raw text, learnt from its first word on; then there are no messages."""
    rejected: tuple[Message, ...] = ()
    """Of a preference pair: the worse last turns; `messages` ends with the better ones."""
    good: bool | None = None
    """Of a judged answer: was it wanted?"""

    @property
    def images(self) -> tuple[Path, ...]:
        """Files of all images, in the order in which they stand."""
        return tuple(image for message in self.messages for image in message.images)


def order(turns: Sequence[Message]) -> list[str]:
    """What is wrong with the order of the turns and with their content, each with the number of its turn."""
    if not any(turn.role == "assistant" for turn in turns):
        return ["no message is the assistant's: there is no answer to learn"]
    found = []
    first = int(turns[0].role == "system")
    for number, turn in enumerate(turns[first:], first):
        before = turns[number - 1] if number > first else None
        allowed = _after(before)
        if turn.role not in allowed:
            expected = " or ".join(f"the {role}'s" for role in allowed)
            found.append(f"message {number + 1} is the {turn.role}'s, expected {expected}: turns must alternate")
            break
    else:
        if turns[-1].role != "assistant":
            found.append(f"the last message is the {turns[-1].role}'s and has no answer: remove it")
    if not any(turn.role == "assistant" and turn.learn for turn in turns):
        found.append("every answer is marked as context only: there is nothing to learn")
    for number, turn in enumerate(turns, 1):
        if turn.role == "assistant" and not turn.content.strip() and not turn.calls:
            found.append(f"message {number}, the assistant's, is empty: remove the row")
        for text in (turn.content, turn.reasoning, *(call.arguments for call in turn.calls)):
            if half := half_character(text):
                found.append(f"message {number}, the {turn.role}'s, {half}")
    return found


def _after(turn: Message | None) -> tuple[str, ...]:
    """Roles that may follow a turn."""
    if turn is None:
        return ("user",)
    if turn.role == "assistant":
        return ("tool",) if turn.calls else ("user",)
    return ("tool", "assistant") if turn.role == "tool" else ("assistant",)


def half_character(text: str) -> str:
    """A sentence where the text holds half of a character (JSON may escape one; no tokenizer takes it), else ""."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"has half of a character ({text[error.start]!a}) at position {error.start + 1}: repair the text"
    return ""
