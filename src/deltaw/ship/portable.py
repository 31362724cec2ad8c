"""An adapter as the plain LoRA that every engine reads with the right scale: a pure transform of AdapterState.

    B' = s·B in fp32, then cast        α = r: no engine's rule for the scale can be another one (rsLoRA, patterns, mixes)
    A' [R, in], B' [out, R]            one R for all, the largest rank rounded up to a size engines have; zeros beyond r
    A = 0, B = 0                       where a module of {q, k, v} or {gate, up} is missing, or a layer of its kind
    paths                              those of the base's own class

ΔW is the same at every site. What is no LoRA on a linear layer is refused, each with its reason.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from deltaw.core.errors import UseError, faults
from deltaw.core.host import HostSpec
from deltaw.core.method import Method, Site
from deltaw.core.state import AdapterState
from deltaw.methods.full import Full
from deltaw.methods.lora import LoRA
from deltaw.methods.token_rows import TokenRows
from deltaw.ship.rules import folded, leaf
from deltaw.ship.rules_scale import GROUPS

SIZES = (8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that engines pad to anyway (vLLM's --max-lora-rank); 8 and multiples of 16 are what SGMV kernels work with."""
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MERGE = "write it into the weights instead, with deltaw merge"


def unportable(state: AdapterState) -> list[str]:
    """What of a state has no portable form, each a sentence; asked before anything is converted."""
    found = []
    for site, method in state.methods.items():
        spec = state.specs.get(site)
        if isinstance(method, TokenRows):
            found.append(f"{site}: rows of a table of tokens, which engines refuse or leave out")
        elif isinstance(method, Full):
            what = "a trained bias" if site.slot == "bias" else "a trained copy of a parameter"
            found.append(f"{site}: {what}, which engines refuse or leave out")
        elif spec is not None and spec.stack is not None:
            found.append(f"{site}: a stack of experts, for which every engine has keys of its own")
        elif spec is not None and spec.lookup:
            found.append(f"{site}: an embedding, which not every engine adapts")
        elif spec is not None and len(spec.shape) != 2:
            found.append(f"{site}: not a linear layer")
        elif method.corrects:
            found.append(f"{site}: it makes up for what quantising this one base rounds off (init: loftq)")
    return found


def refuse(found: list[str]) -> None:
    """One UseError for all of them."""
    if found:
        raise faults(UseError, f"this adapter has no portable form: {MERGE}", found)


def rank_for(ranks: Iterable[int], rank: int | None, most: int | None) -> int:
    """R: as asked, else the largest rank rounded up to one of SIZES, and at most `most`."""
    if rank is not None:
        return rank
    largest = max(ranks)
    size = next((size for size in SIZES if size >= largest), None)
    if size is None and most is None:
        raise UseError(f"rank {largest} is above what any engine takes, {SIZES[-1]}: cut it, --max-rank {SIZES[-2]}")
    return min(size or largest, most or SIZES[-1])


def uniform(state: AdapterState, rank: int, dtype: torch.dtype) -> AdapterState:
    """Plain LoRA, all of this rank and of scale 1, in `dtype`. The sites must be LoRA of at most this rank, on linear layers."""
    tensors: dict[Site, Mapping[str, Tensor]] = {}
    overflowing = []
    for site in state.methods:
        factors = state.factors(site)
        assert factors is not None and factors.a.ndim == 2, f"{site} is no LoRA of a linear layer"
        a, b = factors.a.float(), factors.scale * factors.b.float()
        pair = _padded(a, 0, rank).to(dtype), _padded(b, 1, rank).to(dtype)
        overflowing += (
            [] if all(bool(torch.isfinite(t).all()) for t in pair) else [f"{site}: it overflows {_name(dtype)}"]
        )
        tensors[site] = dict(zip(("lora_A", "lora_B"), pair, strict=True))
    if overflowing:
        raise faults(UseError, "the adapter is too large for this dtype: give bf16 or fp32", overflowing)
    return dataclasses.replace(state, methods=dict.fromkeys(tensors, _plain(rank)), tensors=tensors)


def _plain(rank: int) -> Method:
    return LoRA(rank=rank, alpha=float(rank))


def _name(dtype: torch.dtype) -> str:
    return next(name for name, one in DTYPES.items() if one is dtype)


def _padded(tensor: Tensor, dim: int, rank: int) -> Tensor:
    """Zeros behind it, up to this rank: rows of A, columns of B."""
    more = list(tensor.shape)
    more[dim] = rank - more[dim]
    return torch.cat([tensor, tensor.new_zeros(more)], dim).contiguous()


def holes(paths: Iterable[str], linear: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Linear layers of the base that the adapter lacks: of a kind it has elsewhere, or that engines compute with one."""
    have = set(paths)
    wanted = {folded(path) for path in have}
    for kind in list(wanted):
        group = next((group for group in GROUPS if leaf(kind) in group), ())
        wanted |= {f"{kind.rpartition('.')[0]}.{name}" for name in group}
    return [path for path in linear if folded(path) in wanted and path not in have]


def filled(
    state: AdapterState, rank: int, dtype: torch.dtype, linear: Mapping[str, tuple[int, ...]]
) -> tuple[AdapterState, list[str]]:
    """The state with zero factors at its holes, and which these are: in the order of the base's layers."""
    missing = holes([site.path for site in state.methods], linear)
    methods, tensors, specs = dict(state.methods), dict(state.tensors), dict(state.specs)
    for path in missing:
        out, fan_in = linear[path]
        site = Site(path)
        methods[site], specs[site] = _plain(rank), HostSpec((out, fan_in))
        tensors[site] = {
            "lora_A": torch.zeros(rank, fan_in, dtype=dtype),
            "lora_B": torch.zeros(out, rank, dtype=dtype),
        }
    return dataclasses.replace(state, methods=methods, tensors=tensors, specs=specs), missing


def beginning(paths: Iterable[str], modules: Iterable[str]) -> tuple[str, str]:
    """(old, new): the beginning of all paths that makes them modules of the base when `new` stands in its place.

    An adapter of the inner model (layers.0.…) belongs at model.layers.0.…; engines that look at the last names only would
    load it and do nothing. UseError where the base has not all of the modules, or where there are several ways.
    """
    given, known = list(paths), set(modules)
    if known.issuperset(given):
        return "", ""
    ways = [
        (old, new)
        for old, new in _beginnings(given[0], known)
        if all(path.startswith(old) and new + path.removeprefix(old) in known for path in given)
    ]
    if len(ways) == 1:
        return ways[0]
    lost = [f"{path}: the base has no linear layer there" for path in given if path not in known]
    raise faults(
        UseError, "the adapter does not fit this base: give the one that it was trained on, with --model", lost
    )


def _beginnings(path: str, known: set[str]) -> list[tuple[str, str]]:
    """The beginnings that make `path` one of `known`, and keep the most of it."""
    for cut in [0, *(dot.end() for dot in re.finditer(r"\.", path))]:
        tail = path[cut:]
        found = {other[: len(other) - len(tail)] for other in known if other == tail or other.endswith(f".{tail}")}
        if found:
            return [(path[:cut], new) for new in sorted(found)]
    return []


def at_other_paths(state: AdapterState, old: str, new: str, layer: str) -> AdapterState:
    """The state with another beginning of its paths, and of the names that identify its base; layer: the base's class."""

    def to(path: str) -> str:
        return new + path.removeprefix(old) if path.startswith(old) else path

    base = state.base
    if base is not None:
        samples = {to(path): sample for path, sample in base.samples.items()}
        base = dataclasses.replace(base, samples=samples, layer=layer)
    sites = {site: Site(to(site.path), site.slot) for site in state.methods}
    return dataclasses.replace(
        state,
        methods={sites[site]: method for site, method in state.methods.items()},
        tensors={sites[site]: tensors for site, tensors in state.tensors.items()},
        specs={sites[site]: spec for site, spec in state.specs.items() if site in sites},
        base=base,
    )
