"""Any weight method → plain LoRA, for readers that know nothing else.

exact    where ΔW has factors: LoRA itself, PiSSA and OLoRA (rank 2r), AdaLoRA (without the λ that are zero), …
svd      else ΔW = UΣVᵀ cut at `rank`: B = U√Σ, A = √ΣVᵀ, scale 1; relative error √(Σ_{i>r} σᵢ²) / ‖ΔW‖, the least possible
kept     changes of a parameter itself (trained copies, token rows, a scaled bias), which PEFT holds beside LoRA
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from deltaw.core.adapter import Factors, WeightAdapter
from deltaw.core.change import decomposed, independent
from deltaw.core.errors import UseError, faults
from deltaw.core.host import HostSpec, ParameterHost, host_of
from deltaw.core.method import Method, Site
from deltaw.core.state import AdapterState, built, delta
from deltaw.core.text import columns
from deltaw.methods.full import Full
from deltaw.methods.lora import LoRA, plain

Weights = nn.Module | Callable[[str], Tensor] | Mapping[str, Tensor]


@dataclass(frozen=True)
class Converted:
    """One site: how it became a LoRA, of which rank, and ‖ΔW − ΔW_lora‖ / ‖ΔW‖."""

    how: Literal["exact", "svd", "kept"]
    rank: int
    error: float


@dataclass(frozen=True)
class Conversion:
    """What a conversion did, by site. `print(report)` shows it as a table."""

    sites: Mapping[Site, Converted]

    @property
    def error(self) -> float:
        """The largest relative error of a site."""
        return max((one.error for one in self.sites.values()), default=0.0)

    def __str__(self) -> str:
        rows = [(str(s), one.how, str(one.rank or "–"), f"{one.error:.3g}") for s, one in self.sites.items()]
        return columns([("module", "conversion", "rank", "relative error"), *rows])


def to_lora(
    state: AdapterState, weights: Weights | None = None, rank: int | None = None
) -> tuple[AdapterState, Conversion]:
    """`state` as plain LoRA, and what that cost. Exact where the algebra allows, within `rank` where one is given.

    weights: the base, as the model, or as path → canonical weight [out, in, *kernel]; needed where ΔW depends on it
    (DoRA, OFT, …). rank: needed where ΔW has no factors; a lower one than the exact one cuts that too.
    """
    if rank is not None and (type(rank) is not int or rank < 1):
        raise UseError(f"rank={rank!r} is not a whole number of at least 1")
    methods: dict[Site, Method] = {}
    tensors: dict[Site, Mapping[str, Tensor]] = {}
    specs, done = dict(state.specs), dict[Site, Converted]()
    found: list[str] = []
    state = replace(state, specs=specs)  # which grows below: files may leave shapes out, and biases come to it
    for site in state.methods:
        try:
            if site not in specs and not _is_kept(state.methods[site]):
                specs[site] = _spec(state.methods[site], site, weights)
            methods[site], tensors[site], done[site] = _site(state, site, weights, rank)
            for other, copy in _beside(state, site, weights).items():
                methods[other], tensors[other], done[other] = Full(), {"copy": copy}, Converted("kept", 0, 0.0)
                specs[other] = HostSpec(tuple(copy.shape), linear=False)
        except UseError as error:
            said = str(error)
            found.append(said if said.startswith(f"{site}:") else f"{site}: {said}")
    if found:
        raise faults(UseError, "this adapter cannot be made a LoRA", found)
    return replace(state, methods=methods, tensors=tensors, specs=specs), Conversion(done)


def _site(
    state: AdapterState, site: Site, weights: Weights | None, rank: int | None
) -> tuple[Method, Mapping[str, Tensor], Converted]:
    method, group = state.methods[site], state.tensors[site]
    if _is_kept(method):
        return method, group, Converted("kept", 0, 0.0)
    spec = state.specs[site]
    now, kept = method.finished(group)
    factors = state.factors(site)
    if factors is not None and (rank is None or _rank(factors) <= rank):
        if type(now) is LoRA and (rank is None or (now.rank or 0) <= rank):
            return now, kept, Converted("exact", now.rank or 0, 0.0)
        a, b, scale = _without_zeros(factors)
        lora = plain(len(a), scale * len(a) if scale > 0 else None, method.corrects)
        return lora, _shaped(a, b if scale > 0 else scale * b, spec), Converted("exact", len(a), 0.0)
    if rank is None:
        raise UseError(f"the change of {method.name} has no low-rank factors: give the rank to cut it at")
    if factors is not None:
        u, s, vt = decomposed(factors)
    else:
        u, s, vt = torch.linalg.svd(_change(state, site, weights).flatten(1), full_matrices=False)
    size = min(rank, s.shape[-1])
    root = s[..., :size].sqrt()  # [r], or [E, r] of a stack
    whole = float(s.double().square().sum())
    lost = float(s[..., size:].double().square().sum())
    error = (lost / whole) ** 0.5 if whole else 0.0
    a, b = root.unsqueeze(-1) * vt[..., :size, :], u[..., :size] * root.unsqueeze(-2)
    return plain(size, corrects=method.corrects), _shaped(a, b, spec), Converted("svd", size, error)


def _is_kept(method: Method) -> bool:
    return method.follows_ties or method.host is ParameterHost


def _spec(method: Method, site: Site, weights: Weights | None) -> HostSpec:
    """The shape of a layer that the adapter's files do not tell."""
    if weights is None:
        raise UseError(f"the files of this {method.name} do not tell the layer's shape: give the model as weights")
    if isinstance(weights, nn.Module):
        _weight(weights, site)  # says what is wrong with the place
        found: HostSpec = host_of(weights.get_submodule(site.path), site.slot).spec
        return found
    return HostSpec(tuple(_weight(weights, site).shape))


def _beside(state: AdapterState, site: Site, weights: Weights | None) -> dict[Site, Tensor]:
    """Other parameters of the module that the method changes too (a scaled bias), as trained copies."""
    method, found = state.methods[site], dict[Site, Tensor]()
    if _is_kept(method):
        return found
    adapter = built(state, site)
    if type(adapter).beside is WeightAdapter.beside:
        return {}
    if not isinstance(weights, nn.Module):
        raise UseError(f"{method.name} also changes the bias of a layer that has one: give the model as weights")
    adapter.name, adapter.method = method.name, method
    with torch.no_grad():
        for changed, host in adapter.beside(host_of(weights.get_submodule(site.path), site.slot)):
            found[Site(site.path, host.slot)] = changed.merged(host.weight.detach().float().cpu())
    return found


def _without_zeros(factors: Factors) -> Factors:
    """Only the components that contribute, at least one."""
    a, b, scale = factors
    if a.ndim > 2:
        return factors
    there = (a != 0).any(1) & (b != 0).any(0)
    there[0] |= not bool(there.any())
    return Factors(a[there], b[:, there], scale)


def _rank(factors: Factors) -> int:
    return _without_zeros(factors).a.shape[-2]


def _shaped(a: Tensor, b: Tensor, spec: HostSpec) -> dict[str, Tensor]:
    """[r, fan_in] and [out, r] in the layout of a LoRA on this layer; those of a stack are so already."""
    if spec.stack is not None:
        return {"lora_A": a.contiguous(), "lora_B": b.contiguous()}
    kernel = spec.shape[2:]
    return {
        "lora_A": a.reshape(len(a), spec.shape[1], *kernel).contiguous(),
        "lora_B": b.reshape(*b.shape, *[1] * len(kernel)).contiguous(),
    }


def _change(state: AdapterState, site: Site, weights: Weights | None) -> Tensor:
    """ΔW, with the base's weight where it depends on that."""
    alone = independent(state, site)
    if alone is not None:
        return alone  # without the rounding of W
    if weights is None:
        raise UseError(
            f"the change of {state.methods[site].name} depends on the base's weight: give the model as weights"
        )
    return delta(state, site, _weight(weights, site))


def _weight(weights: Weights, site: Site) -> Tensor:
    if isinstance(weights, nn.Module):
        host: Any = host_of(weights.get_submodule(site.path), site.slot)
        if host is None:
            raise UseError(f"{site}: the model has no weight there that could carry it")
        found: Tensor = host.weight.detach().float().cpu()
        return found
    given = weights.get(site.path) if isinstance(weights, Mapping) else weights(site.path)
    if not isinstance(given, Tensor):
        raise UseError(f"{site}: `weights` gives {given!r}, not its weight")
    return given.detach().float().cpu()
