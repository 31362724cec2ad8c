"""Site by site: the changes of all parts → one change → plain LoRA. What `svd`, `ties`, `dare` and `to_lora` share.

    a sum of factors     Σ wᵢsᵢBᵢAᵢ = [w₁s₁B₁ …]·[A₁; …], exact; cut by their QR where a rank is asked
    all else             every ΔWᵢ as a matrix, weighted and merged to one, cut at the rank; one site in memory at a time
    trained copies       Σ wᵢcᵢ where the weights sum to 1, else W + Σ wᵢ(cᵢ − W) with the base's own W; never cut
    token rows           as they are; several cannot be mixed

Parts of weight 0 at a site are left out, and so is a site where nothing else is; where an energy is asked for, also one
where factors cancel to what rounding leaves of them.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from deltaw.core.adapter import Factors
from deltaw.core.errors import UseError, faults
from deltaw.core.host import HostSpec
from deltaw.core.method import Method, Site
from deltaw.core.state import AdapterState, same_base
from deltaw.core.text import columns
from deltaw.methods.full import Full, of_one_shape
from deltaw.methods.inits import within
from deltaw.methods.lora import LoRA, plain
from deltaw.methods.ranked import times
from deltaw.mixing import cut
from deltaw.mixing.base import Weights, beside, kept, matrix, parameter, spec_of

Rank = int | Literal["full"] | None
Merge = Callable[[Site, Sequence[Tensor]], Tensor]
"""The weighted changes of the parts at a site, each [.., out, fan_in] → one."""
Track = Callable[[Sequence[Site]], Iterable[Site]]
Part = tuple[AdapterState, float]
Terms = list[tuple[Tensor, float]]
"""Trained copies of one parameter with their weights."""


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

    def worst(self, count: int) -> "Conversion":
        """The sites that lost most, of those that lost anything."""
        lossy = sorted(((s, one) for s, one in self.sites.items() if one.error), key=lambda item: -item[1].error)
        return Conversion(dict(lossy[:count]))

    def __str__(self) -> str:
        rows = [(str(s), one.how, str(one.rank or "–"), f"{one.error:.3g}") for s, one in self.sites.items()]
        return columns([("module", "conversion", "rank", "relative error"), *rows])


Made = tuple[Method, Mapping[str, Tensor], Converted]


@torch.no_grad()
def through(
    states: Sequence[AdapterState],
    weights: Sequence[float],
    *,
    rank: Rank = None,
    energy: float | None = None,
    base: Weights | None = None,
    merge: Merge | None = None,
    head: str = "these adapters cannot be mixed",
    track: Track = iter,
) -> tuple[AdapterState, Conversion]:
    """Σ wᵢΔWᵢ as plain LoRA, or with `merge` what that makes of the wᵢΔWᵢ. All faults come as one UseError.

    rank: exact where None, as far as factors go; a number cuts; "full" keeps matrices whole. energy: see `mixing.cut`.
    base: where a change depends on the weight, or copies need it. track: wraps the sites, for a progress bar.
    """
    cut.check(rank, energy)
    wrong = [w for w in weights if isinstance(w, bool) or not isinstance(w, int | float) or not math.isfinite(w)]
    if len(states) != len(weights) or not states or wrong:
        said = f", not {', '.join(map(repr, wrong))}" if wrong else f": {len(states)} states and {len(weights)} weights"
        raise UseError(f"give at least one state and a finite number as its weight{said}")
    made: dict[Site, Made] = {}
    copies: dict[Site, Terms] = {}
    found: list[str] = []
    specs: dict[Site, HostSpec] = {}
    for state in states:
        specs = {**state.specs, **specs}
    for site in track(list(dict.fromkeys(site for state in states for site in state.methods))):
        parts = [(s, w) for s, w in zip(states, weights, strict=True) if site in s.methods and w]
        try:
            one = _site(site, parts, specs, rank, energy, base, merge, copies) if parts else None
            if one is not None:
                made[site] = one
        except UseError as error:
            found.append(_at(site, error))
    for site, terms in copies.items():
        try:
            made[site] = Full(), {"copy": _copy(site, terms, base)}, Converted("kept", 0, 0.0)
            specs.setdefault(site, HostSpec(tuple(terms[0][0].shape), linear=False))
        except UseError as error:
            found.append(_at(site, error))
    huge = [site for site, (_, group, _) in made.items() if not all(bool(t.isfinite().all()) for t in group.values())]
    found += [f"{site}: the mix is too large for fp32: give smaller weights" for site in huge]
    if found:
        raise faults(UseError, head, found)
    mixed = AdapterState(
        {site: method for site, (method, _, _) in made.items()}, {site: group for site, (_, group, _) in made.items()},
        {site: spec for site, spec in specs.items() if site in made}, base=same_base(states),
    )  # fmt: skip
    return mixed, Conversion({site: done for site, (_, _, done) in made.items()})


def _at(site: Site, error: UseError) -> str:
    return str(error) if str(error).startswith(f"{site}:") else f"{site}: {error}"


def _site(
    site: Site, parts: Sequence[Part], specs: dict[Site, HostSpec], rank: Rank, energy: float | None,
    base: Weights | None, merge: Merge | None, copies: dict[Site, Terms],
) -> Made | None:  # fmt: skip
    """What the parts make at one site; trained copies go into `copies`, and their sites come later."""
    methods = [state.methods[site] for state, _ in parts]
    if any(kept(method) for method in methods):
        return _kept(site, parts, copies)
    shapes = {state.specs[site].whole for state, _ in parts if site in state.specs}
    if len(shapes) > 1:
        raise UseError(f"the layers have different shapes, {' and '.join(map(str, sorted(shapes)))}")
    if site not in specs:
        specs[site] = spec_of(methods[0], site, base)
    parts = [(s if site in s.specs else replace(s, specs={**s.specs, site: specs[site]}), w) for s, w in parts]
    for state, weight in parts:
        for other, copy in beside(state, site, base).items():
            copies.setdefault(other, []).append((copy, weight))
    terms = [state.factors(site) for state, _ in parts]
    exact = [term for term in terms if term is not None]
    corrects = any(method.corrects for method in methods)
    if merge is None and len(exact) == len(parts):
        (state, weight), (now, group) = parts[0], methods[0].finished(parts[0][0].tensors[site])
        alone = len(parts) == 1 and weight == 1 and energy is None
        if alone and type(now) is LoRA and (not isinstance(rank, int) or (now.rank or 0) <= rank):
            return now, group, Converted("exact", now.rank or 0, 0.0)
        summed, most = _summed(exact, [w for _, w in parts]), 0.0
        if energy is not None:
            most = sum(abs(w) * cut.energy_of(term) ** 0.5 for term, (_, w) in zip(exact, parts, strict=True)) ** 2
            if cut.energy_of(summed) <= cut.ROUNDING * most:
                return None
        return _of_factors(summed, specs[site], rank, energy, corrects, most)
    if rank is None and energy is None and merge is None:
        missing = next(state.methods[site].name for (state, _), term in zip(parts, terms, strict=True) if term is None)
        raise UseError(f"the change of {missing} has no low-rank factors: give the rank to cut it at")
    changes = [times(w, matrix(state, site, base)) for state, w in parts]
    whole = sum(changes[1:], start=changes[0]) if merge is None else merge(site, changes)
    del changes  # before the cut needs as much again
    uncut = rank is None and energy is None
    made = cut.whole(whole) if rank == "full" or uncut else cut.of_matrix(whole, rank, energy)
    done = Converted("svd" if made.error else "exact", made.rank, made.error)
    return plain(made.rank, corrects=corrects), _shaped(made.a, made.b, specs[site]), done


def _of_factors(
    factors: Factors, spec: HostSpec, rank: Rank, energy: float | None, corrects: bool, parts: float
) -> Made:
    """A LoRA of these factors: exactly, unless a rank or energy leaves some out. parts: the energy of what was summed."""
    a, b, scale = factors = _without_zeros(factors)
    size = a.shape[-2]
    if energy is not None or (isinstance(rank, int) and size > rank):
        made = cut.of_factors(factors, rank if isinstance(rank, int) else None, energy, parts)
        if made.rank < size:
            done = Converted("svd", made.rank, made.error)
            return plain(made.rank, corrects=corrects), _shaped(made.a, made.b, spec), done
    lora = plain(size, scale * size if scale > 0 else None, corrects)
    return lora, _shaped(a, b if scale > 0 else scale * b, spec), Converted("exact", size, 0.0)


def _summed(terms: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """Σ wᵢsᵢBᵢAᵢ as one pair, in no more rank than the matrix has."""
    if len(terms) == 1 and weights[0] == 1:
        return terms[0]
    a = torch.cat([term.a for term in terms], dim=-2)
    b = torch.cat([times(w * term.scale, term.b) for term, w in zip(terms, weights, strict=True)], dim=-1)
    return Factors(*(within(a, b) if a.ndim == 2 else (a, b)), 1.0)


def _without_zeros(factors: Factors) -> Factors:
    """Only the components that contribute, at least one."""
    a, b, scale = factors
    if a.ndim > 2:
        return factors
    there = (a != 0).any(1) & (b != 0).any(0)
    there[0] |= not bool(there.any())
    return Factors(a[there], b[:, there], scale)


def _shaped(a: Tensor, b: Tensor, spec: HostSpec) -> dict[str, Tensor]:
    """[r, fan_in] and [out, r] in the layout of a LoRA on this layer; those of a stack are so already."""
    if spec.stack is not None:
        return {"lora_A": a.contiguous(), "lora_B": b.contiguous()}
    kernel = spec.shape[2:]
    return {
        "lora_A": a.reshape(len(a), spec.shape[1], *kernel).contiguous(),
        "lora_B": b.reshape(*b.shape, *[1] * len(kernel)).contiguous(),
    }


def _kept(site: Site, parts: Sequence[Part], copies: dict[Site, Terms]) -> Made | None:
    """A parameter that parts train themselves."""
    (state, weight), methods = parts[0], [state.methods[site] for state, _ in parts]
    if all(isinstance(method, Full) for method in methods):
        copies.setdefault(site, []).extend((s.tensors[site]["copy"].float(), w) for s, w in parts)
        return None
    if not all(kept(method) for method in methods):
        raise UseError(
            "one adapter trains this module itself and another adapts it: take it from one of them, with weights by block"
        )
    if len(parts) == 1 and weight == 1:
        return methods[0], state.tensors[site], Converted("kept", 0, 0.0)
    return *methods[0].combine([(s.methods[site], s.tensors[site], w) for s, w in parts]), Converted("kept", 0, 0.0)


def _copy(site: Site, terms: Terms, base: Weights | None) -> Tensor:
    """Σ wᵢcᵢ, and where the weights do not sum to 1 the rest of the base's own parameter."""
    of_one_shape([copy for copy, _ in terms])
    whole = torch.stack([w * copy for copy, w in terms]).sum(0) if len(terms) > 1 or terms[0][1] != 1 else terms[0][0]
    rest = 1.0 - sum(w for _, w in terms)
    if abs(rest) <= 1e-6:
        return whole
    try:
        return whole + rest * parameter(base, site, tuple(whole.shape))
    except UseError as error:
        raise UseError(f"weights of trained copies sum to {1.0 - rest:g}, not to 1: {error}") from None
