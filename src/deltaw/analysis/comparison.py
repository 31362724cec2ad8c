"""Two adapters beside each other, site by site: do their changes point the same way, and how much of that is chance?

cosine, ratio of norms      of ΔW, from the factors
left, right                 φ of the spaces of outputs and of inputs (`analysis.similarity`): of the first directions and
                            of all, each with what two random spaces of these dimensions have
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from deltaw.analysis.describe import Weights, Work, is_matrix, is_quick
from deltaw.analysis.layers import folded
from deltaw.analysis.similarity import by_chance, inner, phi, phis
from deltaw.analysis.spectrum import directions, mean, of_values
from deltaw.analysis.tables import number, span
from deltaw.core.change import Singular, independent
from deltaw.core.errors import UseError, faults
from deltaw.core.method import Site
from deltaw.core.state import AdapterState, delta
from deltaw.core.text import columns, counted

GRID = 16
"""φ(i, j) is kept for so many directions of each."""


@dataclass(frozen=True)
class Comparison:
    """`sites`: one record for each that both adapt; `left_out`: those that cannot be compared, and why."""

    sites: list[dict[str, Any]]
    only_a: list[str]
    only_b: list[str]
    left_out: Mapping[str, str] = field(default_factory=dict)
    top: int = 4

    @property
    def cosine(self) -> float | None:
        """Of the two changes as wholes, over all sites that are compared."""
        a, b = (math.hypot(*(one[key] for one in self.sites)) for key in ("norm_a", "norm_b"))
        return sum(one["inner"] for one in self.sites) / (a * b) if a and b else None

    @property
    def ratio(self) -> float | None:
        """‖ΔW_B‖ / ‖ΔW_A‖ over all sites that are compared."""
        a, b = (math.hypot(*(one[key] for one in self.sites)) for key in ("norm_a", "norm_b"))
        return b / a if a else None

    @property
    def zero(self) -> list[str]:
        """Which of A and B change nothing at the sites that are compared."""
        sides = (("A", "norm_a"), ("B", "norm_b"))
        return [name for name, key in sides if self.sites and not any(one[key] for one in self.sites)]

    def share(self, side: str, which: str) -> tuple[float, float] | None:
        """φ and its chance level in the mean over sites. side: left or right; which: top or all."""
        known = [one[side][which] for one in self.sites if one[side] is not None]
        return (mean([one["phi"] for one in known]), mean([one["chance"] for one in known])) if known else None

    def __str__(self) -> str:
        return f"{columns(rows(self))}\n{summary(self)}" if self.sites else summary(self)


def compare(
    a: AdapterState, b: AdapterState, weights: tuple[Weights, Weights] | None = None, *,
    work: tuple[Work | None, Work | None] = (None, None), top: int = 4,
) -> Comparison:  # fmt: skip
    """Compare two states. weights: of their base as each sees it, for changes that depend on it; work: `costly` of each,
    where those that take long are to be decomposed. top: how many first directions are compared beside all of them.

    Raises UseError where nothing is adapted by both, or a site is of two shapes.
    """
    both = [site for site in a.methods if site in b.methods]
    if not both:
        raise UseError(
            f"no module is adapted by both: {next(iter(map(str, a.methods)), 'none')}, … by the one, "
            f"{next(iter(map(str, b.methods)), 'none')}, … by the other"
        )
    shapes = {site: [shape for state in (a, b) if (shape := _shape(state, site))] for site in both}
    apart = [
        f"{site}: {' and '.join('×'.join(map(str, s)) for s in two)}"
        for site, two in shapes.items()
        if len(set(two)) > 1
    ]
    if apart:
        raise faults(UseError, "these adapters are for bases of different shapes", apart)
    sites, left_out = list[dict[str, Any]](), dict[str, str]()
    own = weights or (None, None)
    for site in both:
        one, other = (_each(s, site, w, plan) for s, w, plan in zip((a, b), own, work, strict=True))
        if isinstance(one, str) or isinstance(other, str):
            left_out[str(site)] = one if isinstance(one, str) else str(other)
        else:
            sites.append({"site": str(site), **_record(one, other, top)})
    only_a, only_b = ([str(site) for site in x.methods if site not in y.methods] for x, y in ((a, b), (b, a)))
    return Comparison(sites, only_a, only_b, left_out, top)


def _shape(state: AdapterState, site: Site) -> tuple[int, ...] | None:
    """Of ΔW, as far as the file tells: of its layer, else of its factors."""
    spec = state.specs.get(site)
    if spec is not None:
        return (*(() if spec.stack is None else (spec.stack,)), spec.out_features, spec.fan_in)
    factors = state.factors(site)
    return None if factors is None else (*factors.a.shape[:-2], factors.b.shape[-2], factors.a.shape[-1])


def _each(state: AdapterState, site: Site, weights: Weights | None, work: Work | None) -> list[Singular] | str:
    """ΔW of the site as its decompositions, one for each weight of a stack; or why there is none."""
    factors, name = state.factors(site), state.methods[site].name
    svd = directions(state, site) if factors is not None and is_quick(factors, site, work) else None
    if svd is not None:
        return [svd] if svd.s.ndim == 1 else [Singular(*parts) for parts in zip(*svd, strict=True)]
    if factors is not None:
        return f"{name}: takes long, and was not asked for"
    if not is_matrix(state, site):
        return f"{name}: no matrix"
    if work is None:
        return f"{name}: takes long, and was not asked for"
    if site not in work.sites:
        return f"{name}: has no ΔW of its shape" if weights is not None else f"{name}: depends on the base"
    weight = None if weights is None else weights(site)
    change = independent(state, site) if weight is None else delta(state, site, weight)
    if change is None:
        return f"{name}: depends on the base"
    return [Singular(*torch.linalg.svd(change.flatten(1).double(), full_matrices=False))]


def _record(one: list[Singular], other: list[Singular], top: int) -> dict[str, Any]:
    norms = [math.hypot(*(float(svd.s.double().norm()) for svd in each)) for each in (one, other)]
    product = sum(inner(x, y) for x, y in zip(one, other, strict=True))
    spaces = [(_used(x), _used(y)) for x, y in zip(one, other, strict=True)]
    there = [(x, y) for x, y in spaces if len(x.s) and len(y.s)]
    return {
        "norm_a": norms[0], "norm_b": norms[1], "inner": product,
        "cosine": product / (norms[0] * norms[1]) if all(norms) else None,
        "norm_ratio": norms[1] / norms[0] if norms[0] else None,
        "left": _spaces([(x.u, y.u) for x, y in there], top),
        "right": _spaces([(x.vt.mT, y.vt.mT) for x, y in there], top),
    }  # fmt: skip


def _used(svd: Singular) -> Singular:
    """Without directions of no size. Of a dense change, whose tail is all directions, those for 90 % of the energy."""
    (spectrum,) = of_values(svd.s)
    k = spectrum.full_rank if len(svd.s) < min(svd.u.shape[0], svd.vt.shape[1]) else spectrum.rank(0.9)
    return Singular(svd.u[:, :k], svd.s[:k], svd.vt[:k])


def _spaces(pairs: list[tuple[Tensor, Tensor]], top: int) -> dict[str, Any] | None:
    """φ of pairs of bases [d, i] and [d, j], in the mean over the pairs."""
    if not pairs:
        return None
    cut = [(u[:, :top], v[:, :top]) for u, v in pairs]
    size = [min(GRID, *(basis[place].shape[1] for basis in pairs)) for place in (0, 1)]
    tables = torch.stack([phis(u[:, : size[0]], v[:, : size[1]]) for u, v in pairs])
    return {"top": _against_chance(cut), "all": _against_chance(pairs), "grid": tables.mean(0).tolist()}


def _against_chance(pairs: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
    chances = [by_chance(u.shape[1], v.shape[1], u.shape[0]) for u, v in pairs]
    return {"phi": mean([phi(u, v) for u, v in pairs]), "chance": mean(chances)}


def rows(found: Comparison) -> list[tuple[str, ...]]:
    """The comparison as cells, the head first; equal modules of repeated layers in one line."""
    lines: list[tuple[str, ...]] = [
        ("module", "count", "cosine", "norm B / A", f"left φ, first {found.top}", "left φ, all", "right φ, first "
         f"{found.top}", "right φ, all")
    ]  # fmt: skip
    groups: dict[str, list[dict[str, Any]]] = {}
    for record in found.sites:
        groups.setdefault(folded(record["site"]), []).append(record)
    for module, group in groups.items():
        cells = [module, str(len(group)), span([r["cosine"] for r in group]), span([r["norm_ratio"] for r in group])]
        lines.append((*cells, *_shares(group)))
    return lines


def _shares(group: list[dict[str, Any]]) -> Iterator[str]:
    for side in ("left", "right"):
        for which in ("top", "all"):
            known = [record[side][which] for record in group if record[side] is not None]
            chance = f" (chance {number(mean([one['chance'] for one in known]))})" if known else ""
            yield span([one["phi"] for one in known]) + chance


def summary(found: Comparison) -> str:
    """In words: what is shared, and what is only in one of them."""
    lines = []
    if found.zero:
        sides = " and ".join(found.zero)
        lines.append(f"the change of {sides} is zero at all of these modules, which has no direction: was it trained?")
    elif found.sites:
        lines.append(f"all together: cosine {number(found.cosine)}, norm B / A {number(found.ratio)}")
    for side, what in (("left", "outputs"), ("right", "inputs")):
        share = found.share(side, "top")
        if share is not None:
            times = f", {number(share[0] / share[1])} × chance" if share[1] else ""
            lines.append(f"directions of {what}: φ of the first {found.top} is {number(share[0])} in the mean{times}")
    for name, only in (("A", found.only_a), ("B", found.only_b)):
        if only:
            lines.append(
                f"only in {name}: {', '.join(sorted(set(map(folded, only))))} ({counted(len(only), 'module')})"
            )
    reasons = dict.fromkeys(found.left_out.values())
    lines += [
        f"not compared, {reason}: {counted(sum(one == reason for one in found.left_out.values()), 'module')}"
        for reason in reasons
    ]
    return "\n".join(lines)
