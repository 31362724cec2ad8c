"""Rows → encoded rows and a report that accounts for every one of them; a split that stays when rows are added."""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from deltaw.core.errors import DataError
from deltaw.data.conversation import Example
from deltaw.data.encode import Encoded, Policy, encode, stop_token_trained
from deltaw.data.rows import Part, Rows, place

PERCENTILES = (50, 90, 99)


def digest(encoded: Sequence[Encoded]) -> str:
    """sha256 over tokens and labels of all rows, in order: two runs with the same one learn from the same."""
    total = hashlib.sha256()
    for row in encoded:
        total.update(np.array([len(row.ids), *row.ids, *row.labels], dtype=np.int64).tobytes())
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
            f"tokens   {self.total_tokens:,}, supervised {self.supervised_tokens:,} ({share:.0%})",
            f"lengths  {lengths}, longest {self.longest:,}",
            f"         {spread}",
        ]
        return "\n".join(lines)


def encode_rows(
    rows: Rows, tokenizer: Any, policy: Policy, *, objective: str = "sft", pairs: str | None = None
) -> tuple[list[Encoded], DataReport]:
    """Every row that can be learnt from, in order, and the report. DataError where none is left.

    objective: sft learns answers, text learns raw texts; rows of the other kind are refused. pairs="chosen" learns the
    better answers of preference rows and the wanted ones of judged rows, which are refused without it.
    """
    _fitting(rows, objective, pairs)
    if tokenizer.chat_template and objective == "sft":
        stop_token_trained(tokenizer)  # a template that never stops is one fault of the base, not one of each row
    encoded: list[Encoded] = []
    lengths: list[int] = []
    dropped: Counter[str] = Counter()
    for row in rows.rows:
        if row.good is False:
            dropped["judged unwanted"] += 1
            continue
        result = encode(row, tokenizer, policy)
        if isinstance(result, list):
            encoded += result
            lengths += [len(piece.ids) + piece.cut for piece in result]
        else:
            dropped[result.reason] += 1
            lengths.append(result.length)
    report = DataReport(
        parts=rows.parts,
        rows=len(rows),
        kept=len(encoded),
        cut=sum(row.cut > 0 for row in encoded),
        dropped=dict(dropped),
        total_tokens=sum(len(row.ids) for row in encoded),
        supervised_tokens=sum(row.supervised for row in encoded),
        longest=max(lengths, default=0),
        percentiles=_percentiles(lengths),
        histogram=dict(sorted(Counter(1 << max(length - 1, 0).bit_length() for length in lengths).items())),
    )
    if not encoded:
        reasons = ", ".join(f"{reason}: {count:,}" for reason, count in dropped.items()) or "there is none"
        raise DataError(
            f"{rows.source}: no row is left to learn from, of {len(rows):,} ({reasons}); the shortest has "
            f"{min(lengths, default=0):,} tokens, the longest {report.longest:,}: raise data.max_length, set "
            "data.overflow to cut, or shorten the rows"
        )
    return encoded, report


def _fitting(rows: Rows, objective: str, pairs: str | None) -> None:
    forms = {part.form for part in rows.parts} or {rows.form}
    texts = forms & {"text"}
    if objective == "text" and forms != texts:
        raise DataError(
            f"{rows.source}: objective text learns raw texts, these rows are {', '.join(sorted(forms - texts))}: use sft"
        )
    if objective == "sft" and texts:
        raise DataError(
            f"{rows.source}: raw `text` has no answer to supervise: set train.objective to text to learn all of it, or "
            "data.pattern to take it apart into prompt and completion"
        )
    if forms & {"preference", "judged"} and pairs != "chosen":
        raise DataError(
            f"{rows.source}: preference and judged rows also hold answers that are not wanted: set data.pairs to chosen "
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


def _percentiles(lengths: list[int]) -> dict[int, int]:
    """Nearest-rank: the smallest length that this share of the rows does not exceed."""
    order = sorted(lengths)
    return {percent: order[-(-len(order) * percent // 100) - 1] for percent in PERCENTILES} if order else {}
