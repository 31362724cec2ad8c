"""Numbers of repeated blocks: those in a path, and those that a user writes."""

import re
from collections.abc import Iterable

from deltaw.core.errors import TargetError


def layer_index(path: str) -> int | None:
    """The first number in a path: that of the repeated block a module is in."""
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", path)
    return int(found.group(1)) if found else None


def parse_layers(layers: str | int | Iterable[int]) -> set[int]:
    """ "0-3,7" or integers → the set of layer indices."""
    if not isinstance(layers, str):
        listed = {layers} if isinstance(layers, int) else set(layers)
        if not listed or not all(type(layer) is int and layer >= 0 for layer in listed):
            raise TargetError(f"layers={layers!r} holds no layer numbers: write for example '0-3,7', or leave it out")
        return listed
    result: set[int] = set()
    for piece in layers.split(","):
        found = re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", piece)
        first, last = (int(found.group(1)), int(found.group(2) or found.group(1))) if found else (1, 0)
        if not first <= last < 10_000:
            raise TargetError(f"layers={layers!r} is not a range of layer numbers: write for example '0-3,7'")
        result.update(range(first, last + 1))
    return result
