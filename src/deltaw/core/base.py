"""Which base is this? A fingerprint that survives dtype changes and quantisation, and tells equal shapes apart.

Values of some parameters are sampled (eight each, evenly spaced): the largest four, which quantisers leave alone (embeddings), 24
chosen by the hash of their names, and the largest below each of the first modules (`model.multi_modal_projector`), so that a part of
few tensors, which may be all that was trained, tells bases apart. Comparing two identities has three answers: match,
mismatch (with what differs), unknown (nothing in common to compare). Values saved in one dtype and loaded in another
are compared after rounding to the coarser one. Quantised parameters are left out: a base and its quantised copy are one
base, told by what both hold in full (embeddings, norms, heads); how it was quantised is kept beside, and not compared.

Sampled values, not a hash of them: a hash would call a bf16 copy of an fp32 checkpoint a stranger.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.core.adapter import Adapter
from deltaw.core.carried import base_class_of, carried
from deltaw.core.host import WeightHost, host_of

SAMPLED, VALUES = 24, 8


@dataclass(frozen=True)
class Sample:
    """Eight values of one parameter, with its shape and dtype ("float32", …)."""

    shape: tuple[int, ...]
    dtype: str
    values: tuple[float, ...]


@dataclass(frozen=True)
class BaseIdentity:
    name: str
    """Where it came from: hub id, folder name or class name. For messages, never compared."""
    layer: str
    """Class of the model, e.g. LlamaForCausalLM."""
    samples: Mapping[str, Sample]
    quantized: str | None = None
    """How its weights are quantised ("nf4", …), where they are."""

    def difference(self, other: "BaseIdentity") -> str | None:
        """What tells this base ("there") from the other ("here"), as a clause; None where all that can be compared agrees."""
        common = sorted(self.samples.keys() & other.samples.keys())
        if self.samples and other.samples and not common:
            return f"they share no parameter name ({self.layer} {self.name!r} and {other.layer} {other.name!r})"
        shapes = {path: (self.samples[path].shape, other.samples[path].shape) for path in common}
        apart = [f"{path} is {_x(a)} there and {_x(b)} here" for path, (a, b) in shapes.items() if a != b]
        if apart:
            return ", ".join(apart[:3])
        values = [path for path in common if not _same(self.samples[path], other.samples[path])]
        return f"the shapes agree and the values of {', '.join(values[:3])} do not" if values else None

    def comparable(self, other: "BaseIdentity") -> bool:
        """False where nothing can be compared: the answer is then 'unknown'."""
        return bool(self.samples) and bool(other.samples)

    def to_dict(self) -> dict[str, Any]:
        samples = {
            p: {"shape": list(s.shape), "dtype": s.dtype, "values": list(s.values)} for p, s in self.samples.items()
        }
        record = {"name": self.name, "layer": self.layer, "samples": samples}
        return record if self.quantized is None else {**record, "quantized": self.quantized}

    @staticmethod
    def from_dict(record: Mapping[str, Any]) -> "BaseIdentity":
        samples = {p: Sample(tuple(s["shape"]), s["dtype"], tuple(s["values"])) for p, s in record["samples"].items()}
        return BaseIdentity(record["name"], record["layer"], samples, record.get("quantized"))


def _same(mine: Sample, theirs: Sample) -> bool:
    """Equal, or one is the other rounded to bf16 or fp16, whatever dtype it is held in now."""
    a, b = (torch.tensor(s.values, dtype=torch.float64) for s in (mine, theirs))
    if torch.equal(a, b):
        return True
    for coarse in (torch.bfloat16, torch.float16):
        rounded = [x.to(coarse).double() for x in (a, b)]
        info = torch.finfo(coarse)
        near = info.eps * torch.maximum(a.abs(), b.abs()) + info.smallest_normal * info.eps  # fp16 is coarse near zero
        if any(torch.equal(x, r) for x, r in zip((a, b), rounded, strict=True)) and torch.all((a - b).abs() <= near):
            return True
    return False


def identify(model: nn.Module) -> BaseIdentity:
    """The identity of the base under `model`, adapters left out. Reads a few hundred values."""
    model = unwrapped(model)
    named = [(p, t) for p, t in base_parameters(model) if t.is_floating_point() and t.device.type != "meta" and t.ndim]
    return BaseIdentity(*called(model), sample(named), quantization(model))


def called(model: nn.Module) -> tuple[str, str]:
    """What the base calls itself, and its class: the first two facts of its identity."""
    name = str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")
    if os.path.isdir(name):
        name = os.path.basename(os.path.abspath(name))  # a folder of this machine means nothing elsewhere
    layer = base_class_of(model).__name__
    return name or layer, layer


def sample(named: Sequence[tuple[str, Tensor]]) -> dict[str, Sample]:
    """Sample named base tensors; the choice depends on names and sizes only."""
    tensors, result = dict(named), {}
    for path in chosen({path: tensor.numel() for path, tensor in named}):
        flat = tensors[path].detach().reshape(-1)
        values = flat[places(flat.numel()).to(flat.device)].double().tolist()
        kind = str(flat.dtype).removeprefix("torch.")
        result[path] = Sample(tuple(tensors[path].shape), kind, tuple(values))
    return result


def chosen(sizes: Mapping[str, int]) -> list[str]:
    """The names that are sampled, of all with their sizes."""
    by_size = sorted(sizes, key=lambda path: (-sizes[path], path))
    by_hash = sorted(sizes, key=lambda path: hashlib.sha256(path.encode()).hexdigest())
    parts: dict[tuple[str, ...], str] = {}
    for path in by_size:
        parts.setdefault(tuple(path.split(".")[:2]), path)
    return sorted({*[*by_size[:4], *by_hash][: SAMPLED + 4], *list(parts.values())[:SAMPLED]})


def places(size: int) -> Tensor:
    """Which values of a tensor of this size are sampled."""
    return torch.linspace(0, size - 1, min(VALUES, size), dtype=torch.float64).long()


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, where torch.compile stands around it: paths are those of the base."""
    inner = model._modules.get("_orig_mod")
    return inner if isinstance(inner, nn.Module) else model


def by_path(model: nn.Module) -> dict[str, nn.Module]:
    """Every module of `model` under every path that it has."""
    return dict(model.named_modules(remove_duplicate=False))


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Named modules of the base: without the adapters and what holds them."""
    holders = [module.get_submodule("adapters") for module in model.modules() if carried(module) is not None]
    owned = {id(module) for holder in holders for module in holder.modules()}
    return ((path, module) for path, module in model.named_modules() if id(module) not in owned)


def base_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Named parameters of the base, all that does not live under an Adapter; pristine copies stand for merged ones."""
    owned = {id(p) for module in model.modules() if isinstance(module, Adapter) for p in module.parameters()}
    pristine = {
        id(module._parameters[slot]): kept
        for module in model.modules()
        if (there := carried(module)) is not None
        for slot, kept in there.pristine.items()
    }
    for path, parameter in model.named_parameters():
        if id(parameter) not in owned:
            yield path, pristine.get(id(parameter), parameter)


def quantization(model: nn.Module) -> str | None:
    """How the base's weights are quantised, or None; several ways are joined with a plus."""
    return "+".join(sorted({str(host.quantized) for host in _quantized(model)})) or None


def parameters(model: nn.Module) -> int:
    """Number of the base's parameters; quantised ones count as the values they stand for."""
    sizes = {id(host.parameter): host.spec.numel for host in _quantized(model)}
    return sum(sizes.get(id(parameter), parameter.numel()) for _, parameter in base_parameters(model))


def _quantized(model: nn.Module) -> list[WeightHost]:
    hosts = [host_of(module) for _, module in base_modules(model)]
    return [host for host in hosts if host is not None and host.has(host.module, host.slot) and host.quantized]


def _x(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))
