"""Numbers of sites laid out as layer × module: `model.layers.3.mlp.up_proj` is column 3 of row `model.layers.*.mlp.up_proj`.

In text one character for each layer, ▁ the least and █ the most of the whole map, · where nothing is known.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$|:)")
BARS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Grid:
    """values[row][column], None where there is no site; of several sites in one cell the mean."""

    modules: Sequence[str]
    layers: Sequence[int]
    values: Sequence[Sequence[float | None]]

    @property
    def known(self) -> list[float]:
        return [value for row in self.values for value in row if value is not None]

    def __str__(self) -> str:
        known = self.known
        if not known:
            return ""
        low, span = min(known), (max(known) - min(known)) or 1.0
        width = max(map(len, self.modules))
        rows = (
            f"{module.ljust(width)}  "
            + "".join("·" if v is None else BARS[min(7, int(8 * (v - low) / span))] for v in row)
            for module, row in zip(self.modules, self.values, strict=True)
        )
        return "\n".join(rows)


def folded(site: str) -> str:
    """The site with every number that is a part of its path as *."""
    return NUMBER.sub("*", site)


def layer(site: str) -> int | None:
    """The first number in the path, None where there is none."""
    found = NUMBER.search(site)
    return None if found is None else int(found[0])


def grid(records: Iterable[Mapping[str, Any]], measure: str) -> Grid:
    """`measure` of all records with a site in a numbered layer, which are known and finite."""
    cells: dict[tuple[str, int], list[float]] = {}
    for record in records:
        place, value = layer(record["site"]), record.get(measure)
        if place is not None and value is not None and math.isfinite(value):
            cells.setdefault((folded(record["site"]), place), []).append(float(value))
    modules = list(dict.fromkeys(module for module, _ in cells))
    layers = sorted({place for _, place in cells})
    values = [
        [sum(v) / len(v) if (v := cells.get((module, place))) else None for place in layers] for module in modules
    ]
    return Grid(short(modules), layers, values)


def short(modules: Sequence[str]) -> list[str]:
    """Names without what they all begin with."""
    if not modules:
        return []
    parts = [module.split(".") for module in modules]
    same = 0
    while all(len(p) > same + 1 and p[same] == parts[0][same] for p in parts):
        same += 1
    return [".".join(p[same:]) for p in parts]
