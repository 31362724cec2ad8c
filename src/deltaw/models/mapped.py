"""A base whose weights stay on disk: every module is there, every parameter is the mapped file, nothing is in memory.

    disk ─ safetensors, mapped ─→ model.layers.0.mlp.down_proj.weight    the same numbers under the name in memory
         ─ stacked when loaded ─→ model.layers.0.mlp.experts.down_proj   its shape only: zeros that take no room

Adapters are put on it as on any model, with all checks of `load`; what they change is then written file by file
(`deltaw.ship.disk`). It can run nothing that reads the parameters that have only their shape.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.core.base import BaseIdentity, Sample, by_path, called, chosen, identify, places
from deltaw.core.errors import UseError
from deltaw.models.base import load_model, read_config, require_transformers
from deltaw.models.checkpoint import Checkpoint, folder_of, open_checkpoint
from deltaw.models.classes import class_for
from deltaw.models.names import Names, placed
from deltaw.models.quantize import method_of


@dataclass(frozen=True)
class Mapped:
    model: nn.Module
    names: Names
    """With one name for parameters that are tied, that of `one`."""
    one: dict[int, str]
    """id of a parameter → the first of its names."""
    identity: BaseIdentity

    def has(self, parameter: Tensor) -> bool:
        """Are its values there, and not its shape alone?"""
        keys = self.names.keys(self.one[id(parameter)])
        return bool(keys) and self.names.pieces[keys[0]].weight is None


def mapped(name: str, checkpoint: Checkpoint, layer: str | None = None) -> Mapped:
    """The base `name` over its files; layer: as `class_of` has it."""
    model = hollow(name, layer)
    shapes = {key: entry.shape for key, entry in checkpoint.entries.items()}
    memory = {path: tuple(tensor.shape) for path, tensor in _everything(model)}
    names = placed(shapes, memory, model)
    whole = {piece.parameter: key for key, piece in names.pieces.items() if piece.weight is None}
    kinds = {piece.parameter: checkpoint.entries[key].dtype for key, piece in names.pieces.items()}
    one, first = dict[int, str](), dict[str, str]()
    for paths in _tied(model, whole, checkpoint):
        source = next((path for path in paths if path in whole), None)
        if source is not None:
            parameter = nn.Parameter(checkpoint.tensor(whole[source]), requires_grad=False)
        else:
            dtype = kinds.get(paths[0]) or torch.float32
            parameter = nn.Parameter(torch.zeros((), dtype=dtype).expand(memory[paths[0]]), requires_grad=False)
        for path in paths:
            module, _, slot = path.rpartition(".")
            model.get_submodule(module)._parameters[slot] = parameter
            first[path] = paths[0]
        one[id(parameter)] = paths[0]
    pieces = {
        key: piece if piece.parameter not in first else type(piece)(first[piece.parameter], piece.weight, piece.rows)
        for key, piece in names.pieces.items()
    }
    there = {piece.parameter for piece in pieces.values()}
    lost = {path: why for path, why in names.lost.items() if path in one.values() and path not in there}
    names = Names(pieces, lost)
    return Mapped(model, names, one, _identity(model, names, checkpoint))


@dataclass(frozen=True)
class Opened:
    """A base of which some modules are read and nothing is run."""

    model: nn.Module
    identity: BaseIdentity
    remark: str | None = None
    """Why it is in memory as a whole, where it is."""


def open_base(name: str, paths: Iterable[str], layer: str | None = None) -> Opened:
    """A base whose modules at `paths` hold their weights: over its files where these hold them as they are, else loaded.

    FileError where it cannot be read, UseError for a base whose files are quantised.
    """
    own = method_of(read_config(name))
    if own is not None:
        raise UseError(f"the files of the base {name!r} are quantised ({own}): give the unquantised base")
    checkpoint, reason = open_checkpoint(folder_of(name)), "it has no safetensors file"
    if checkpoint is not None:
        base = mapped(name, checkpoint, layer)
        there = by_path(base.model)
        wanted = [p for path in paths if path in there for p in there[path]._parameters.values() if p is not None]
        missing = next((base.one[id(p)] for p in wanted if not base.has(p)), None)
        if missing is None:
            return Opened(base.model, base.identity)
        reason = f"{missing}: {base.names.lost.get(missing, 'it lies on disk in pieces')}"
    model = load_model(name, dtype="fp32", device=torch.device("cpu"))
    return Opened(model, identify(model), f"the base was loaded whole ({reason})")


def hollow(name: str, layer: str | None = None) -> nn.Module:
    """The model of a base, with buffers and ties but without weights."""
    from accelerate import init_empty_weights

    config, cls = read_config(name), class_of(name, layer)
    with init_empty_weights(include_buffers=False):
        model = cls.from_config(config) if hasattr(cls, "from_config") else cls(config)
    model.tie_weights()
    if name == "tiny":
        model.config._name_or_path = name
    return model.eval().requires_grad_(False)  # type: ignore[no-any-return]


def class_of(name: str, layer: str | None = None) -> Any:
    """The class of transformers whose `from_pretrained` loads this base (`deltaw.models.classes.class_for`)."""
    config = read_config(name)
    found = class_for(config, require_transformers(), layer)
    if found is None:
        called = (getattr(config, "architectures", None) or ["none"])[0]
        raise UseError(
            f"transformers has no class for the base {name!r}: its config.json names {called} (architectures)"
        )
    return found


def _everything(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _tied(model: nn.Module, whole: dict[str, str], checkpoint: Checkpoint) -> list[list[str]]:
    """The names of every parameter. Names of one that are on disk twice with other values are not tied: transformers
    does not tie them either."""
    groups = defaultdict[int, list[str]](list)
    for path, parameter in model.named_parameters(remove_duplicate=False):
        groups[id(parameter)].append(path)
    result = []
    for paths in groups.values():
        there = [checkpoint.tensor(whole[path]) for path in paths if path in whole]
        apart = any(not torch.equal(there[0], other) for other in there[1:])
        result += [[path] for path in paths] if apart else [paths]
    return result


def _identity(model: nn.Module, names: Names, checkpoint: Checkpoint) -> BaseIdentity:
    """As `identify` of the loaded base, from a few hundred values of its files."""
    sizes = {
        path: parameter.numel()
        for path, parameter in model.named_parameters()
        if parameter.is_floating_point() and parameter.ndim
    }
    samples = {}
    for path in chosen(sizes):
        parameter = model.get_parameter(path)
        keys = names.keys(path)
        if not keys:
            continue
        if len(keys) == 1 or names.pieces[keys[0]].weight is None:
            values = parameter.reshape(-1)[places(sizes[path])].double().tolist()
        else:
            values = [_value(names, keys, checkpoint, *at) for at in _unravel(places(sizes[path]), parameter.shape)]
        kind = str(parameter.dtype).removeprefix("torch.")
        samples[path] = Sample(tuple(parameter.shape), kind, tuple(values))
    return BaseIdentity(*called(model), samples)


def _unravel(flat: Tensor, shape: Iterable[int]) -> list[tuple[int, ...]]:
    return list(zip(*(axis.tolist() for axis in torch.unravel_index(flat, tuple(shape))), strict=True))


def _value(names: Names, keys: list[str], checkpoint: Checkpoint, weight: int, row: int, column: int) -> float:
    """One number of a stack."""
    for key in keys:
        piece = names.pieces[key]
        first, after = piece.rows or (0, checkpoint.entries[key].shape[0])
        if piece.weight == weight and first <= row < after:
            return float(checkpoint.slice(key)[row - first, column])
    raise AssertionError("the pieces of a stack cover it")
