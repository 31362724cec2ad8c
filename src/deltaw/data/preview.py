"""A row as the model will see it, with what it learns marked: the mask, shown before anything is paid for.

preview    text, with every supervised span between ⟦ and ⟧
coloured   text for a terminal, with every supervised span on a colour
pieces     the tokens one by one, for a page

The tokens that stand for an image are one mark, ⟨image×576⟩.
"""

from collections.abc import Iterator
from itertools import groupby
from typing import Any, NamedTuple

from rich.console import Console
from rich.text import Text

from deltaw.data.encode import IGNORE, Encoded
from deltaw.data.processors import reader

OPEN, CLOSE = "⟦", "⟧"
LEARNT = "black on green"
MOST_IDS = 8
"""Tokens of one character at most: bytes that never make one are shown by then."""
CONTROLS = {number: 0x2400 + number for number in range(32) if chr(number) not in "\t\n"}
"""A row must not steer the terminal."""


def preview(encoded: Encoded, tokenizer: Any, processor: Any = None) -> str:
    """The text of a row, special tokens too, with every supervised span between ⟦ and ⟧."""
    return "".join(f"{OPEN}{text}{CLOSE}" if learnt else text for learnt, text in _spans(encoded, tokenizer, processor))


def coloured(encoded: Encoded, tokenizer: Any, processor: Any = None) -> Text:
    """The same text with every supervised span on a colour instead."""
    spans = _spans(encoded, tokenizer, processor)
    return Text.assemble(*((text.translate(CONTROLS), LEARNT if learnt else "") for learnt, text in spans))


def shows_colours(console: Console) -> bool:
    """Does it end in a terminal with colours, of a user who does not refuse them (NO_COLOR)?"""
    return console.file.isatty() and console.color_system is not None and not console.no_color


def _spans(encoded: Encoded, tokenizer: Any, processor: Any) -> Iterator[tuple[bool, str]]:
    image = _image(encoded, tokenizer, processor)
    for learnt, run in groupby(zip(encoded.ids, encoded.labels, strict=True), key=lambda pair: pair[1] != IGNORE):
        parts = groupby((number for number, _ in run), key=lambda number: number == image)
        yield learnt, "".join(_shown(list(part), is_image, tokenizer) for is_image, part in parts)


def _image(encoded: Encoded, tokenizer: Any, processor: Any) -> int | None:
    """The token that stands for a part of an image, in a row that has some."""
    there = encoded.images and processor is not None
    return reader(processor).placeholder(encoded.images[0], tokenizer) if there else None


def _shown(ids: list[int], image: bool, tokenizer: Any) -> str:
    return f"⟨image×{len(ids)}⟩" if image else _text(ids, tokenizer)


class Piece(NamedTuple):
    """Tokens that make a piece of text: one, or the several that spell one character."""

    ids: list[int]
    text: str
    learnt: bool


def pieces(encoded: Encoded, tokenizer: Any, processor: Any = None) -> Iterator[Piece]:
    """The tokens of a row in order. Each is read after the one before it: some tokenizers leave out a first space."""
    ids, learnt = encoded.ids, [label != IGNORE for label in encoded.labels]
    image = _image(encoded, tokenizer, processor)
    before = start = 0
    for end in range(1, len(ids) + 1):
        if ids[start] == image:
            if end == len(ids) or ids[end] != image:
                yield Piece(ids[start:end], _shown(ids[start:end], True, tokenizer), learnt[start])
                before = start = end
            continue
        text = _text(ids[before:end], tokenizer).removeprefix(_text(ids[before:start], tokenizer))
        whole = not text.endswith("\ufffd") or end - start == MOST_IDS
        if whole or end == len(ids) or learnt[end] != learnt[start]:
            yield Piece(ids[start:end], text, learnt[start])
            before, start = start, end


def _text(ids: list[int], tokenizer: Any) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) if ids else ""
