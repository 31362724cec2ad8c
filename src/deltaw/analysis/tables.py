"""Records of sites as a table, equal modules of repeated layers folded into one line with the range of each number."""

from collections.abc import Sequence
from typing import Any

from deltaw.analysis.layers import folded
from deltaw.core.text import columns

FIXED = ("rank", "alpha", "scale")
RANGES = {
    "norm": "norm of change",
    "effective_rank": "effective rank",
    "stable_rank": "stable rank",
    "rank_90": "rank for 90 %",
    "of_base": "of the base",
    "amplified": "amplification",
    "intruding": "intruders",
}
"""Measure of a record → title of its column; columns where nothing is known are left out."""


def table(records: Sequence[dict[str, Any]]) -> str:
    """The records of `describe` as text."""
    return columns(rows(records))


def rows(records: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """The same as cells, the head first."""
    flat = [with_factors(record) for record in records]
    shown = [key for key in RANGES if key == "norm" or any(record[key] is not None for record in flat)]
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for record in flat:
        numbers = (number(record[key]) for key in FIXED)
        groups.setdefault((folded(record["site"]), record["method"], *numbers), []).append(record)
    lines: list[tuple[str, ...]] = [
        ("module", "method", *FIXED, "count", "parameters", *(RANGES[key] for key in shown))
    ]
    for key, group in groups.items():
        size = f"{sum(record['parameters'] for record in group):,}"
        unknown = next((record["unknown"] for record in group if record["unknown"]), "–")
        spans = (span([r[name] for r in group], unknown if name == "norm" else "–") for name in shown)
        lines.append((*key, str(len(group)), size, *spans))
    return lines


def with_factors(record: dict[str, Any]) -> dict[str, Any]:
    """The record with the factor of its amplification and the number of its intruders as plain numbers."""
    amplified, found = record["amplification"], record["intruders"]
    return {
        **record,
        "amplified": None if amplified is None else amplified["factor"],
        "intruding": None if found is None else len(found["places"]),
    }


def span(values: Sequence[float | None], unknown: str = "–") -> str:
    """least … most of what is known."""
    known = [value for value in values if value is not None]
    if not known:
        return unknown
    low, high = number(min(known)), number(max(known))
    return low if low == high else f"{low} … {high}"


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}" if value % 1 or abs(value) >= 1e6 else f"{value:g}"
