"""Rows → encoded rows and a report that accounts for every one of them; a split that stays when rows are added."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deltaw.core.errors import DataError
from deltaw.data.encode import Encoded, encode, stop_token_trained
from deltaw.data.rows import Example, Rows

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class DataReport:
    """What became of the rows. Tokens are those of kept rows; lengths are those of all rows, dropped ones too."""

    rows: int
    kept: int
    dropped: Mapping[str, int]
    total_tokens: int
    supervised_tokens: int
    longest: int
    percentiles: Mapping[int, int]

    def __str__(self) -> str:
        reasons = ", ".join(f"{reason}: {count:,}" for reason, count in self.dropped.items())
        share = self.supervised_tokens / max(1, self.total_tokens)
        lengths = ", ".join(f"{length:,} at {percent} %" for percent, length in self.percentiles.items())
        return (
            f"rows     {self.rows:,}, kept {self.kept:,}, dropped {self.rows - self.kept:,}{f' ({reasons})' if reasons else ''}\n"
            f"tokens   {self.total_tokens:,}, supervised {self.supervised_tokens:,} ({share:.0%})\n"
            f"lengths  {lengths}, longest {self.longest:,}"
        )


def encode_rows(
    rows: Rows, tokenizer: Any, max_length: int, *, train_on_prompt: bool = False
) -> tuple[list[Encoded], DataReport]:
    """Every row that can be learnt from, in order, and the report. DataError where none is left."""
    if tokenizer.chat_template:
        stop_token_trained(tokenizer)  # a template that never stops is one fault of the base, not one of each row
    encoded: list[Encoded] = []
    lengths: list[int] = []
    dropped: Counter[str] = Counter()
    for example in rows.rows:
        result = encode(example, tokenizer, max_length, train_on_prompt)
        if isinstance(result, Encoded):
            encoded.append(result)
            lengths.append(len(result.ids))
        else:
            dropped[result.reason] += 1
            lengths.append(result.length)
    report = DataReport(
        rows=len(rows),
        kept=len(encoded),
        dropped=dict(dropped),
        total_tokens=sum(len(row.ids) for row in encoded),
        supervised_tokens=sum(row.supervised for row in encoded),
        longest=max(lengths, default=0),
        percentiles=_percentiles(lengths),
    )
    if not encoded:
        reasons = ", ".join(f"{reason}: {count:,}" for reason, count in dropped.items()) or "there is none"
        raise DataError(
            f"{rows.source}: no row is left to learn from, of {len(rows):,} ({reasons}); the shortest has "
            f"{min(lengths, default=0):,} tokens, the longest {report.longest:,}: raise max_length or shorten the rows"
        )
    return encoded, report


def split(rows: Rows, share: float) -> tuple[Rows, Rows]:
    """(training rows, held-out rows), `share` of them held out by a hash of what they say.

    A row stays on its side when others are added or the order changes, and equal rows are never on both sides.
    """
    if not 0 < share < 1:
        raise DataError(f"the held-out share {share} must be between 0 and 1")
    places = [_place(example) for example in rows.rows]
    # A few rows may all hash to one side; each side gets at least the row that is nearest to it.
    lowest, highest = min(places, default=0.0), max(places, default=0.0)
    if lowest == highest:
        raise DataError(
            f"{rows.source} cannot be split, all its rows are equal: set data.eval to null or to another file"
        )
    border = min(max(share, lowest), highest)
    held_out = [place < border or place == lowest for place in places]
    sides = ([row for row, out in zip(rows.rows, held_out, strict=True) if out is side] for side in (False, True))
    train, evaluated = (Rows(rows.form, part, rows.source) for part in sides)
    return train, evaluated


def _place(example: Example) -> float:
    """A number in [0, 1) that depends on the content of a row only."""
    text = json.dumps([[message.role, message.content] for message in example.messages])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def _percentiles(lengths: list[int]) -> dict[int, int]:
    """Nearest-rank: the smallest length that this share of the rows does not exceed."""
    order = sorted(lengths)
    return {percent: order[-(-len(order) * percent // 100) - 1] for percent in PERCENTILES} if order else {}
