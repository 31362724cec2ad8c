"""Names on disk → places in memory, by the same table that transformers' loader goes by.

    renamed   ….block_sparse_moe.gate.weight            →  ….mlp.gate.weight, all of it
    stacked   ….experts.3.w2.weight [H, I]              →  ….experts.down_proj[3]
    joined    ….experts.3.w1.weight, ….w3.weight [I, H] →  ….experts.gate_up_proj[3], rows 0:I and I:2I

Stacking (`MergeModulelist`) and joining the rows of what was stacked (`Concatenate`) only lay numbers side by side, so
that a change of the parameter in memory is a change of each tensor on disk. A parameter that is made in another way
(split, permuted, interleaved) has no place here, and says so: it is merged in memory.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Piece:
    """The part of a parameter that one tensor on disk holds: all of it, or one weight of a stack, or rows of that."""

    parameter: str
    weight: int | None = None
    rows: tuple[int, int] | None = None

    @property
    def index(self) -> tuple[Any, ...]:
        """What picks it from the parameter."""
        if self.weight is None:
            return ()
        return (self.weight,) if self.rows is None else (self.weight, slice(*self.rows))


@dataclass(frozen=True)
class Names:
    pieces: Mapping[str, Piece]
    """Name on disk → place; names that the model has no place for are left out."""
    lost: Mapping[str, str]
    """Parameter → why nothing on disk can be written for it."""

    def keys(self, parameter: str) -> list[str]:
        """The tensors on disk that hold it."""
        return self._keys.get(parameter, [])

    @functools.cached_property
    def _keys(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for key, piece in self.pieces.items():
            found.setdefault(piece.parameter, []).append(key)
        return found


def placed(disk: Mapping[str, Shape], memory: Mapping[str, Shape], model: Any) -> Names:
    """Where every tensor on disk stands in `model`, given the shapes on both sides; reads no values.

    memory: all names of parameters and buffers. The order of renaming is that of transformers' loader (5.23,
    core_model_loading.convert_and_load_state_dict_in_model): all renamings, one converter, then the prefix of the body.
    """
    from transformers.core_model_loading import dot_natural_key

    renamed, converters = _renamer(model, memory, model.base_model_prefix)
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    whole: dict[str, list[str]] = {}
    made: dict[str, dict[str, list[str]]] = {}  # parameter → pattern → names on disk, in the loader's order
    for key in sorted(disk, key=dot_natural_key):
        name, pattern = renamed(key)
        if name in memory and pattern is None:
            whole.setdefault(name, []).append(key)
        elif name in memory:
            made.setdefault(name, {}).setdefault(pattern, []).append(key)
    pieces, lost = dict[str, Piece](), dict[str, str]()
    for name, keys in whole.items():
        if len(keys) > 1 or name in made:
            lost[name] = f"{len(keys)} tensors on disk are called so"
        elif disk[keys[0]] != memory[name]:
            lost[name] = f"it is {_x(disk[keys[0]])} on disk and {_x(memory[name])} in the model"
        else:
            pieces[keys[0]] = Piece(name)
    for name, groups in made.items():
        converter = by_pattern[next(iter(groups))]
        found = _stacked(name, groups, converter, disk, memory[name])
        if name in lost or found is None:
            steps = ", ".join(type(step).__name__ for step in converter.operations)
            lost.setdefault(name, f"transformers makes it from others ({steps}) as it loads")
        else:
            pieces |= found
    there = {piece.parameter for piece in pieces.values()}
    return Names(
        pieces, lost | {name: "it is not on disk" for name in memory if name not in there and name not in lost}
    )


def translator(model: Any, memory: Mapping[str, Any]) -> Callable[[str], str | None]:
    """What files of other versions of transformers call a parameter → its name in `model`, where it is one parameter.

    memory: all names of parameters and buffers. A body's own names, without the prefix that they have in the whole model, are
    of another model and not looked for.
    """
    renamed, _ = _renamer(model, memory, None)

    def translated(key: str) -> str | None:
        name, pattern = renamed(key)
        return name if name in memory and pattern is None else None

    return translated


def _renamer(
    model: Any, memory: Mapping[str, Any], prefix: str | None
) -> tuple[Callable[[str], tuple[str, str | None]], list[Any]]:
    """Name on disk → name in memory and the pattern of what makes it from others; and what makes them."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    table = get_model_conversion_mapping(model)
    renamings = [entry for entry in table if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in table if isinstance(entry, WeightConverter)]

    def renamed(key: str) -> tuple[str, str | None]:
        name, pattern = rename_source_key(key, renamings, converters, prefix, memory)
        if name not in memory and key in memory:
            name, pattern = rename_source_key(key, [], [], prefix, memory)
        return name, pattern

    return renamed, converters


def _stacked(
    name: str, groups: Mapping[str, Sequence[str]], converter: Any, disk: Mapping[str, Shape], shape: Shape
) -> dict[str, Piece] | None:
    """The pieces of a parameter that is stacked, and joined along its rows; None where it is made otherwise."""
    steps = [(type(step).__name__, getattr(step, "dim", None)) for step in converter.operations]
    joined = steps == [("MergeModulelist", 0), ("Concatenate", 1)]
    if not (joined or steps == [("MergeModulelist", 0)]) or len(converter.target_patterns) > 1:
        return None
    order = [groups[pattern] for pattern in converter.source_patterns if pattern in groups]
    if len(order) != len(converter.source_patterns) or len(shape) != 3:
        return None
    pieces, first = dict[str, Piece](), 0
    for keys in order:
        if len(keys) != shape[0] or len({disk[key] for key in keys}) > 1 or disk[keys[0]][1:] != shape[2:]:
            return None
        after = first + disk[keys[0]][0]
        pieces |= {key: Piece(name, e, (first, after) if joined else None) for e, key in enumerate(keys)}
        first = after
    return pieces if first == shape[1] else None


def _x(shape: Shape) -> str:
    return "×".join(map(str, shape)) or "a number"
