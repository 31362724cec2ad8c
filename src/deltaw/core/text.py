"""Rows of cells as text, one width per column: how every table of ours is printed; and numbers of things in words."""

from collections.abc import Sequence


def columns(rows: Sequence[Sequence[str]]) -> str:
    """The rows, the first of them the head, as lines without trailing blanks."""
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def counted(number: int, thing: str) -> str:
    """1 adapter, 2 adapters, 1,000 adapters."""
    return f"{number:,} {thing}{'s' * (number != 1)}"
