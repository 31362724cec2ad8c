"""Rows → encoded rows and a report that accounts for every one of them; a split that stays when rows are added."""

import hashlib
from array import array
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from deltaw.core.errors import DataError
from deltaw.data.conversation import Example
from deltaw.data.encode import CONTROL, IMAGELESS, Encoded, Policy, encode, stop_token_trained
from deltaw.data.images import look
from deltaw.data.observed import Observed
from deltaw.data.processors import reader
from deltaw.data.rows import Part, Rows, place

PERCENTILES = (50, 90, 99)
JUDGED = "judged unwanted"
CURES = {
    "longer than": "raise data.max_length, set data.overflow to cut, or shorten the rows",
    "no token to learn": "raise data.max_length, or give the rows longer answers",
    CONTROL: "take the template's own tokens out of the texts",
    IMAGELESS: "name the image in `image`, or take its mark out of the text",
    JUDGED: "add rows whose label is true",
}
"""How the reason for leaving a row out begins → what to do about it."""
LEARN, EVALUATE = "learn from", "evaluate on"
"""What rows are for, in messages."""


def digest(encoded: Sequence[Encoded]) -> str:
    """sha256 over tokens, labels and images of all rows, in order: two runs with the same one learn from the same."""
    total = hashlib.sha256()
    for row in encoded:
        total.update(np.array([len(row.ids), *row.ids, *row.labels], dtype=np.int64).tobytes())
        for image in row.images:
            total.update(look(image).digest.encode())
    return f"sha256:{total.hexdigest()}"


@dataclass(frozen=True)
class DataReport:
    """What became of the rows. Tokens are those of kept rows; lengths are those of all rows, before any is dropped or cut."""

    parts: tuple[Part, ...]
    rows: int
    kept: int
    cut: int
    dropped: Mapping[str, int]
    total_tokens: int
    supervised_tokens: int
    longest: int
    percentiles: Mapping[int, int]
    histogram: Mapping[int, int]
    """Rows by length: {2^k: rows of more than 2^(k−1) and at most 2^k tokens}."""
    with_images: int = 0
    """Kept rows that hold images."""
    images: int = 0
    image_tokens: int = 0
    """Of all images: the tokens that stand for their parts."""

    def __str__(self) -> str:
        reasons = ", ".join(f"{reason}: {count:,}" for reason, count in self.dropped.items())
        lost = sum(self.dropped.values())
        share = self.supervised_tokens / max(1, self.total_tokens)
        lengths = ", ".join(f"{length:,} at {percent} %" for percent, length in self.percentiles.items())
        spread = "  ".join(f"≤{bound}: {count:,}" for bound, count in self.histogram.items())
        lines = [
            *(f"source   {part}" for part in self.parts),
            f"rows     {self.rows:,}, kept {self.rows - lost:,}, dropped {lost:,}{f' ({reasons})' if reasons else ''}"
            + (f", cut {self.cut:,}" if self.cut else ""),
            *([f"pieces   {self.kept:,} of the texts"] if self.kept > self.rows else []),
            *([f"images   {self.pictured}"] if self.images else []),
            f"tokens   {self.total_tokens:,}, supervised {self.supervised_tokens:,} ({share:.0%})",
            f"lengths  {lengths}, longest {self.longest:,}",
            f"         {spread}",
        ]
        return "\n".join(lines)

    @property
    def pictured(self) -> str:
        """What is said of the images."""
        each, rest = divmod(self.image_tokens, max(1, self.images))
        return (
            f"{self.images:,} in {self.with_images:,} of {self.kept:,} rows, {self.image_tokens:,} tokens "
            f"({'about ' if rest else ''}{each:,} an image)"
        )


def encode_rows(
    rows: Rows, tokenizer: Any, policy: Policy, *, objective: str = "sft", pairs: str | None = None,
    seen: Observed | None = None, purpose: str = LEARN, processor: Any = None,
) -> tuple[list[Encoded], DataReport]:  # fmt: skip
    """Every row that can be learnt from, in order, and the report. DataError where none is left.

    objective: sft learns answers, text learns raw texts; rows of the other kind are refused. pairs="chosen" learns the
    better answers of preference rows and the wanted ones of judged rows, which are refused without it. seen: is shown
    every row that is kept. purpose: of the rows, for messages. processor: that of a base which reads images.
    """
    fitting({part.form for part in rows.parts} or {rows.form}, rows.source, objective, pairs)
    encoder = Encoder(tokenizer, policy, objective, seen, processor)
    encoded = [piece for row in rows.rows for piece in encoder.add(row)]
    return encoded, encoder.report(rows.parts, rows.source, purpose)


class Encoder:
    """Encodes rows one by one and keeps the account of them."""

    def __init__(
        self,
        tokenizer: Any,
        policy: Policy,
        objective: str = "sft",
        seen: Observed | None = None,
        processor: Any = None,
    ):
        self.tokenizer, self.policy, self.seen, self.processor = tokenizer, policy, seen, processor
        if tokenizer.chat_template and objective == "sft":
            stop_token_trained(
                tokenizer, processor
            )  # a template that never stops is one fault of the base, not one of each row
        self._lengths, self._learnt = array("q"), array("q")
        self._dropped: Counter[str] = Counter()
        self._rows = self._kept = self._cut = self._tokens = self._supervised = 0
        self._with_images = self._images = self._image_tokens = 0

    def add(self, row: Example) -> list[Encoded]:
        """The tokens of a row: nothing where it is left out, several pieces of a text."""
        self._rows += 1
        if row.good is False:
            self._dropped[JUDGED] += 1
            return []
        result = encode(row, self.tokenizer, self.policy, self.processor)
        if not isinstance(result, list):
            self._dropped[result.reason] += 1
            self._lengths.append(result.length)
            return []
        for piece in result:
            self._lengths.append(len(piece.ids) + piece.cut)
            self._learnt.append(len(piece.ids))
            self._cut += piece.cut > 0
            self._tokens += len(piece.ids)
            self._supervised += piece.supervised
            if piece.images:
                read = reader(self.processor)
                self._with_images += 1
                self._images += len(piece.images)
                self._image_tokens += piece.ids.count(read.placeholder(piece.images[0], self.tokenizer))
        self._kept += len(result)
        if self.seen is not None:
            self.seen.add(row, result)
        return result

    def report(self, parts: tuple[Part, ...], source: str, purpose: str = LEARN) -> DataReport:
        """The account of all rows. DataError where none is left."""
        lengths = self._lengths
        if not self._rows:
            raise DataError(
                f"{source}: no row is left to {purpose}: give more rows, or a file of their own in data.eval"
            )
        if not self._kept:
            reasons = ", ".join(f"{reason}: {count:,}" for reason, count in self._dropped.items())
            sizes = f"; the shortest has {min(lengths):,} tokens, the longest {max(lengths):,}" if lengths else ""
            raise DataError(
                f"{source}: no row is left to {purpose}, of {self._rows:,} ({reasons}){sizes}: {cure(self._dropped)}"
            )
        return DataReport(
            parts=parts,
            rows=self._rows,
            kept=self._kept,
            cut=self._cut,
            dropped=dict(self._dropped),
            total_tokens=self._tokens,
            supervised_tokens=self._supervised,
            longest=max(lengths),
            percentiles=_percentiles(self._learnt),
            histogram=dict(sorted(Counter(1 << max(length - 1, 0).bit_length() for length in lengths).items())),
            with_images=self._with_images,
            images=self._images,
            image_tokens=self._image_tokens,
        )


def cure(dropped: Collection[str]) -> str:
    """What to do where rows are left out for these reasons."""
    return "; ".join(text for start, text in CURES.items() if any(reason.startswith(start) for reason in dropped))


def fitting(forms: Collection[str], source: str, objective: str, pairs: str | None) -> None:
    """DataError where rows of these forms cannot be learnt from in this way."""
    texts = set(forms) & {"text"}
    if objective == "text" and set(forms) != texts:
        raise DataError(
            f"{source}: objective text learns raw texts, these rows are {', '.join(sorted(set(forms) - texts))}: use sft"
        )
    if objective == "sft" and texts:
        raise DataError(
            f"{source}: raw `text` has no answer to supervise: set train.objective to text to learn all of it, or "
            "data.pattern to take it apart into prompt and completion"
        )
    if set(forms) & {"preference", "judged"} and pairs != "chosen":
        raise DataError(
            f"{source}: preference and judged rows also hold answers that are not wanted: set data.pairs to chosen "
            "to learn the better ones only"
        )


def split(rows: Rows, share: float) -> tuple[Rows, Rows]:
    """(training rows, held-out rows), `share` of them held out by a hash of what they say.

    A row stays on its side when others are added or the order changes, and equal rows are never on both sides. Of a
    single text the end is held out.
    """
    if not 0 < share < 1:
        raise DataError(f"the held-out share {share} must be between 0 and 1")
    if len(rows) == 1 and rows.rows[0].text is not None:
        return _split_text(rows, share)
    places = [place(row) for row in rows.rows]
    # A few rows may all hash to one side; each side gets at least the row that is nearest to it.
    lowest, highest = min(places, default=0.0), max(places, default=0.0)
    if lowest == highest:
        raise DataError(
            f"{rows.source} cannot be split, all its rows are equal: set data.eval to null or to another file"
        )
    border = min(max(share, lowest), highest)
    held_out = [number < border or number == lowest for number in places]
    sides = ([row for row, out in zip(rows.rows, held_out, strict=True) if out is side] for side in (False, True))
    train, evaluated = (Rows(rows.form, part, rows.source, rows.parts) for part in sides)
    return train, evaluated


def _split_text(rows: Rows, share: float) -> tuple[Rows, Rows]:
    text = rows.rows[0].text or ""
    wanted = int(len(text) * (1 - share))
    line = text.rfind("\n", 0, wanted) + 1
    border = line if wanted - line < 0.2 * share * len(text) else wanted  # at a line's end, where one is near
    halves = text[:border], text[border:]
    if not all(half.strip() for half in halves):
        raise DataError(
            f"{rows.source} is too short to hold {share:.0%} of it out: set data.eval to null or to another file"
        )
    train, evaluated = (
        Rows("text", [Example((), row.line, row.where, text=half)], rows.source, rows.parts)
        for row, half in zip(rows.rows * 2, halves, strict=True)
    )
    return train, evaluated


def _percentiles(lengths: Sequence[int]) -> dict[int, int]:
    """Nearest-rank: the smallest length that this share of the rows does not exceed."""
    order = sorted(lengths)
    return {percent: order[-(-len(order) * percent // 100) - 1] for percent in PERCENTILES} if order else {}
