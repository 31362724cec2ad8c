"""Weights by block: other weights for some modules, for attention or MLP, for a range of layers.

    attention           modules inside attention modules                        attention@0-11    those of layers 0 … 11
    mlp                 what else is adapted in repeated blocks                 @12-23            all of layers 12 … 23
    q_proj              modules of that name; or a regular expression at the end of the path, as in rank_pattern
    experts.down_proj   one weight of a stack of experts

An adapter with several weights is several adapters with one weight each, on modules of their own: so that block weights go
with every way of mixing. The first block that names a module has it; a block that gets none is an error.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from deltaw.core.errors import UseError, did_you_mean, faults
from deltaw.core.host import HostSpec
from deltaw.core.layers import layer_index, parse_layers
from deltaw.core.method import Site
from deltaw.core.state import AdapterState
from deltaw.methods import patterns

PARTS = ("attention", "mlp")


def blocks(
    states: Sequence[AdapterState], weights: Sequence[float], by_block: Mapping[str, Sequence[float]]
) -> tuple[list[AdapterState], list[float]]:
    """States and weights that give the mix in which the modules of a block have its weights, and all others `weights`.

    by_block: {block: one weight for each state}. For `exact`, `svd`, `ties` and `dare`: exact(*blocks(states, …)).
    Raises one UseError for all faults: blocks that name no module, or only those of earlier ones, and wrong weights.
    """
    specs = {site: state.specs.get(site) for state in reversed(states) for site in state.methods}
    if len(states) != len(weights):
        raise UseError(f"{len(states)} states and {len(weights)} weights: give one weight per state")
    taken: dict[Site, Sequence[float]] = {}
    found: list[str] = []
    for block, own in by_block.items():
        wrong = _wrong(own, len(states))
        named = [] if wrong else _named(block, specs, found)
        free = [site for site in named if site not in taken]
        if wrong:
            found.append(f"{block!r} {wrong}")
        elif named and not free:
            found.append(f"{block!r} names only modules that earlier blocks have already: put it before them")
        taken |= dict.fromkeys(free, own)
    if found:
        raise faults(UseError, "weights by block", found)
    split = [
        (_only(state, sites), weight)
        for number, state in enumerate(states)
        for weight, sites in _groups(state, number, weights, taken).items()
        if weight
    ]
    if not split:
        raise UseError("the mix would change nothing at all: every weight is zero")
    return [state for state, _ in split], [weight for _, weight in split]


def _wrong(own: Sequence[float], count: int) -> str | None:
    if isinstance(own, int | float) or len(own) != count:
        given = 1 if isinstance(own, int | float) else len(own)
        return f"has {given} weight{'' if given == 1 else 's'} for {count} adapters: give one for each, in their order"
    bad = [w for w in own if isinstance(w, bool) or not isinstance(w, int | float) or not math.isfinite(w)]
    return f"has the weight {bad[0]!r}, which is not a finite number" if bad else None


def _named(block: str, specs: Mapping[Site, HostSpec | None], found: list[str]) -> list[Site]:
    """The sites that a block names; where there are none, the fault is added to `found`."""
    pattern, at, layers = block.rpartition("@") if re.search(r"@[\d\s,\-]*$", block) else (block, "", "")
    wrong = patterns.invalid(pattern)
    if wrong or not (pattern or at):
        found.append(wrong or "'' names no module: write attention, mlp, a name, or @0-11 for layers")
        return []
    try:
        numbers = parse_layers(layers) if at else None
    except UseError as error:
        found.append(f"{block!r}: {error}")
        return []
    hits = [site for site, spec in specs.items() if not pattern or _hit(pattern, site, spec)]
    there = {layer_index(site.path) for site in hits}
    if not hits:
        names = [name for site in specs for name in (*site.path.split("."), *PARTS)]
        found.append(f"{block!r} names no module of these adapters{did_you_mean(pattern, names)}")
    elif numbers is not None and not numbers <= there:
        known = sorted(index for index in there if index is not None)
        said = f"they are in layers {known[0]} to {known[-1]}" if known else "they are in no repeated layer"
        found.append(f"{block!r}: layers {sorted(numbers - there)[:8]} hold no such module, {said}")
        return []
    return [site for site in hits if numbers is None or layer_index(site.path) in numbers]


def _hit(pattern: str, site: Site, spec: HostSpec | None) -> bool:
    if pattern in PARTS:
        above = site.path.lower().split(".")[:-1]
        inside = any("attention" in name or "attn" in name for name in above)
        repeated = layer_index(site.path) is not None and (spec is None or spec.linear)
        return inside if pattern == "attention" else repeated and not inside
    return patterns.hits(pattern, site.path) or patterns.hits(pattern, f"{site.path}.{site.slot}")


def _groups(
    state: AdapterState, number: int, weights: Sequence[float], taken: Mapping[Site, Sequence[float]]
) -> dict[float, list[Site]]:
    """The weights of one state, each with the sites that have it."""
    groups: dict[float, list[Site]] = {}
    for site in state.methods:
        groups.setdefault(float(taken.get(site, weights)[number]), []).append(site)
    return groups


def _only(state: AdapterState, sites: Sequence[Site]) -> AdapterState:
    return replace(
        state, methods={site: state.methods[site] for site in sites}, tensors={site: state.tensors[site] for site in sites},
        specs={site: state.specs[site] for site in sites if site in state.specs},
    )  # fmt: skip
