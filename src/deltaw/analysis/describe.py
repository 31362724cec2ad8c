"""What is in an adapter, as plain data: one record per site, from its factors and, where they are given, the base's weights.

    without the base   methods, ranks, ‖ΔW‖, effective and stable rank, ranks for 90 and 99 % of the energy, spectrum
    with the base      ‖ΔW‖ / ‖W‖, amplification; changes that depend on W (DoRA, trained copies); intruders where asked

One weight of the base is held at a time. What takes long (decompositions of changes without factors or with wide ones,
intruders) is found first by `costly` and `intruder_seconds`, which say how long.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deltaw.analysis.amplification import Amplification, amplification
from deltaw.analysis.intruders import intruders, seconds
from deltaw.analysis.norms import norm
from deltaw.analysis.spectrum import Spectrum, directions, mean, of_dense, of_factors, of_values
from deltaw.core.adapter import Factors, WeightAdapter
from deltaw.core.change import Singular, independent
from deltaw.core.errors import UseError
from deltaw.core.method import Site
from deltaw.core.state import AdapterState, delta

Weights = Callable[[Site], Tensor | None]
"""Site → canonical weight of the base, [out, in, *kernel] (of experts [E, out, in]); None where the base has none there."""
WIDE = 64
"""Factors of so many ranks are decomposed whatever the number of sites: some milliseconds each."""
SHOWN = 64
"""Singular values kept of a site."""
MEASURES = ("effective_rank", "stable_rank", "rank_90", "rank_99")


@dataclass(frozen=True)
class Work:
    """Sites whose decomposition takes long, and about how many seconds they take together."""

    sites: frozenset[Site] = frozenset()
    seconds: float = 0.0


def costly(state: AdapterState, with_base: bool) -> Work:
    """Sites with factors of more than `WIDE` ranks, and those without: with the base all, else what does not depend on it."""
    found: dict[Site, list[tuple[int, ...]]] = {}
    alone: dict[type, bool] = {}  # what depends on the base at one site does at all
    for site, method in state.methods.items():
        factors = state.factors(site)
        if factors is not None:
            *stack, r, fan_in = factors.a.shape
            if r > WIDE:
                found[site] = [(factors.b.shape[-2] + fan_in, r)] * math.prod(stack)
            continue
        if not is_matrix(state, site) or not _has_change(state, site):
            continue
        if not with_base and type(method) not in alone:
            alone[type(method)] = independent(state, site) is not None
        if with_base or alone[type(method)]:
            found[site] = [state.specs[site].shape]
    return Work(frozenset(found), seconds(shape for shapes in found.values() for shape in shapes) if found else 0.0)


def is_quick(factors: Factors, site: Site, work: Work | None) -> bool:
    """Are there few factors, or does `work` hold the site?"""
    return factors.a.shape[-2] <= WIDE or (work is not None and site in work.sites)


def intruder_seconds(state: AdapterState, count: int) -> float:
    """About how long `describe` takes to count the intruders of `count` sites at most: two decompositions each."""
    shapes = [state.specs[site].shape for site in state.methods if is_matrix(state, site)]
    return 2 * seconds(sorted(shapes, key=lambda shape: -math.prod(shape))[:count]) if count else 0.0


def describe(
    state: AdapterState, weights: Weights | None = None, *, work: Work | None = None, count_intruders: int = 0,
    watch: Callable[[Sequence[Site]], Iterable[Site]] = iter,
) -> list[dict[str, Any]]:  # fmt: skip
    """One record per site: site, method, rank, alpha, scale, parameters, norm, and the measures above; None: not known.

    weights: of the base; `state.specs` are then its shapes. work: long decompositions to do, of `costly`; None: none.
    count_intruders: of so many sites, those with the largest ‖ΔW‖/‖W‖; needs `weights`. Raises UseError without them.
    watch: gives the sites back one by one, and may show how far it is.
    """
    if count_intruders and weights is None:
        raise UseError("intruder dimensions are those of W + ΔW: give the base")
    records = {site: _record(state, site, weights, work) for site in watch(list(state.methods))}
    if weights is not None:
        known = [site for site, record in records.items() if record["of_base"] and is_matrix(state, site)]
        for site in watch(sorted(known, key=lambda s: -records[s]["of_base"])[:count_intruders]):
            weight = weights(site)
            assert weight is not None  # it was beside its change before
            found = intruders(weight, delta(state, site, weight))
            records[site]["intruders"] = {**dataclasses.asdict(found), "places": found.places, "share": found.share}
    return list(records.values())


def _record(state: AdapterState, site: Site, weights: Weights | None, work: Work | None) -> dict[str, Any]:
    method = state.methods[site]
    record: dict[str, Any] = {
        "site": str(site), "method": method.name,
        **{key: getattr(method, key, None) for key in ("rank", "alpha", "scale")},
        "parameters": sum(tensor.numel() for tensor in state.tensors[site].values()),
        **dict.fromkeys(("norm", *MEASURES, "spectrum", "energy", "of_base", "amplification", "intruders", "unknown")),
    }  # fmt: skip
    factors = state.factors(site)
    if factors is not None:
        quick = is_quick(factors, site, work)
        record |= _measures(of_factors(factors)) if quick else {"norm": norm(factors)}
        if weights is None or (weight := weights(site)) is None:
            return record
        return record | _beside(record["norm"], weight, directions(state, site) if quick else None)
    if not _has_change(state, site):
        return record | {"unknown": "no ΔW of its shape" if site in state.specs else "its shape is not known"}
    wanted = work is not None and site in work.sites
    weight = None if weights is None else weights(site)
    change = delta(state, site, weight) if weight is not None else independent(state, site) if wanted else None
    if change is None:
        return record | {"unknown": "no factors" if work is None else "depends on the base"}
    record["norm"] = float(torch.linalg.vector_norm(change, dtype=torch.float64))
    if weight is None or not wanted:
        record |= _measures(of_dense(change)) if wanted else {}
        return record if weight is None else record | _beside(record["norm"], weight, None)
    svd = Singular(*torch.linalg.svd(change.flatten(1), full_matrices=False))
    (spectrum,) = of_values(svd.s)
    k = spectrum.rank(0.9)  # its tail has all directions of W
    main = Singular(svd.u[:, :k], svd.s[:k], svd.vt[:k])
    return record | _measures([spectrum]) | _beside(record["norm"], weight, main)


def _measures(each: Sequence[Spectrum]) -> dict[str, Any]:
    """Of a site's spectrum. Of a stack: the means over its weights, the norm of all, and each by itself beside."""
    rows = [
        {
            "norm": one.norm, "effective_rank": one.effective_rank, "stable_rank": one.stable_rank,
            "rank_90": one.rank(0.9), "rank_99": one.rank(0.99),
        }
        for one in each
    ]  # fmt: skip
    spectrum = tuple(math.hypot(*column) for column in zip(*(one.values for one in each), strict=True))
    found: dict[str, Any] = {"spectrum": spectrum[:SHOWN], "energy": Spectrum(spectrum).energy[:SHOWN]}
    if len(rows) == 1:
        return found | rows[0]
    return found | {
        "norm": math.hypot(*(one.norm for one in each)),
        **{key: mean([row[key] for row in rows]) for key in MEASURES},
        "each": rows,
    }


def _beside(size_of_change: float, weight: Tensor, svd: Singular | None) -> dict[str, Any]:
    """The change beside its weight; of a stack the amplification is the mean over its weights that change."""
    size = float(torch.linalg.vector_norm(weight, dtype=torch.float64))
    found: dict[str, Any] = {"of_base": size_of_change / size if size else None}
    if svd is None or not size_of_change:
        return found
    pairs = [(svd, weight)]
    if svd.s.ndim > 1:
        pairs = [(Singular(*parts), one) for *parts, one in zip(*svd, weight, strict=True)]
    each = [amplification(one, w) for one, w in pairs if bool(one.s.any())]
    fields = [field.name for field in dataclasses.fields(Amplification)]
    means = {name: mean([getattr(one, name) for one in each]) for name in (*fields, "factor")}
    return found | {"amplification": means}


def _has_change(state: AdapterState, site: Site) -> bool:
    """Is there a ΔW of the weight's own shape? Not of methods beside the weight, nor of rows that it does not have."""
    spec = state.specs.get(site)
    if spec is None:
        return False
    with torch.device("meta"):  # nothing is drawn or allocated
        adapter = state.methods[site].build(spec)
    return isinstance(adapter, WeightAdapter) and not adapter.added


def is_matrix(state: AdapterState, site: Site) -> bool:
    """Is the slot one matrix or convolution, not a stack of them and not a vector?"""
    spec = state.specs.get(site)
    return spec is not None and spec.stack is None and (len(spec.shape) == 2 or (spec.linear and len(spec.shape) > 2))
