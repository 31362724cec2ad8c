"""AdapterState: an adapter outside any model. What files, mixing and analysis speak.

    state.methods   {(path, slot): Method}                     resolved: no patterns left
    state.tensors   {(path, slot): {name: Tensor}}             on the CPU
    w * state, state + state                                   exact weighted sums of ΔW; ranks and alphas are free

extract(model, name) and insert(model, state, name) go between a model and a state.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from deltaw.core.adapter import Factors, WeightAdapter
from deltaw.core.base import BaseIdentity
from deltaw.core.errors import UseError, did_you_mean, faults
from deltaw.core.host import HostSpec, WeightHost, wide
from deltaw.core.method import Method, Part, Shapes, Site


@dataclass(frozen=True)
class AdapterState:
    methods: Mapping[Site, Method]
    tensors: Mapping[Site, Mapping[str, Tensor]]
    specs: Mapping[Site, HostSpec]
    """Shape of the slot at each site, and what kind of layer it is: what `build` needs. A stranger's file may not tell."""
    base: BaseIdentity | None = None
    """The base it was trained on; None for a stranger's file that does not say."""
    meta: Mapping[str, Any] = field(default_factory=dict)
    """Free facts that travel with the files: task type, recipe, metrics, parents."""

    @property
    def parameters(self) -> int:
        return sum(tensor.numel() for group in self.tensors.values() for tensor in group.values())

    def factors(self, site: Site) -> Factors | None:
        """The change at `site` as low-rank factors, where it is exactly that."""
        method, stack = self.methods[site], _stack(self, site)
        if stack is None:
            own = method.factors(self.tensors[site])
            return own if own is not None or site not in self.specs else _factors(self, site)
        each = [method.factors(tensors) for tensors in _each(self.tensors[site], stack)]
        found = [factors for factors in each if factors is not None]
        if len(found) < stack:
            return None
        return Factors(torch.stack([f.a for f in found]), torch.stack([f.b for f in found]), found[0].scale)

    def finished(self) -> "AdapterState":
        """The same change as files hold it (`Method.finished`); itself where nothing is to be done."""
        ends = {site: method.finished(self.tensors[site]) for site, method in self.methods.items()}
        if all(ends[site][0] is method for site, method in self.methods.items()):
            return self
        methods = {site: method for site, (method, _) in ends.items()}
        return dataclasses.replace(
            self, methods=methods, tensors={site: tensors for site, (_, tensors) in ends.items()}
        )

    def __mul__(self, weight: float) -> "AdapterState":
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            return NotImplemented
        return combine([self], [weight])

    __rmul__ = __mul__

    def __radd__(self, other: object) -> "AdapterState":
        return self if other == 0 else NotImplemented  # sum([a, b]) starts from 0

    def __add__(self, other: "AdapterState") -> "AdapterState":
        if not isinstance(other, AdapterState):
            return NotImplemented
        return combine([self, other], [1.0, 1.0])


def combine(states: Sequence[AdapterState], weights: Sequence[float]) -> AdapterState:
    """Σ wᵢ·ΔWᵢ as one state, exact to rounding. Sites that only some states adapt keep just those terms."""
    if len(states) != len(weights) or not states:
        raise UseError(
            f"{len(states)} states and {len(weights)} weights: give one weight per state, and at least one state"
        )
    wrong = [w for w in weights if isinstance(w, bool) or not isinstance(w, int | float) or not math.isfinite(w)]
    if wrong:
        raise UseError(f"weights must be finite numbers, not {', '.join(map(repr, wrong))}")
    methods: dict[Site, Method] = {}
    tensors: dict[Site, Mapping[str, Tensor]] = {}
    found: list[str] = []
    for site in dict.fromkeys(site for state in states for site in state.methods):
        parts = [
            (s.methods[site], s.tensors[site], float(w))
            for s, w in zip(states, weights, strict=True)
            if site in s.methods
        ]
        shapes = {s.specs[site].whole for s in states if site in s.specs}
        if len(shapes) > 1 and all(method.host is WeightHost for method, _, _ in parts):
            found.append(f"{site}: the layers have different shapes, {' and '.join(map(str, sorted(shapes)))}")
            continue
        try:
            methods[site], tensors[site] = _mixed(
                parts, next((_stack(s, site) for s in states if site in s.specs), None)
            )
        except UseError as error:
            found.append(f"{site}: {error}")
            continue
        if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors[site].values()):
            found.append(f"{site}: the mix is too large for fp32: give smaller weights")
    if found:
        raise faults(UseError, "these adapters cannot be mixed exactly", found)
    specs = {site: spec for state in reversed(states) for site, spec in state.specs.items()}
    return AdapterState(methods, tensors, specs, base=same_base(states), meta={})


def _mixed(parts: Sequence[Part], stack: int | None) -> tuple[Method, Mapping[str, Tensor]]:
    """One site of a mix; the weights of a stack are mixed each by itself."""
    if stack is None:
        return parts[0][0].combine(parts)
    split = [(method, _each(tensors, stack), weight) for method, tensors, weight in parts]
    each = [parts[0][0].combine([(method, one[e], weight) for method, one, weight in split]) for e in range(stack)]
    return each[0][0], {name: torch.stack([tensors[name] for _, tensors in each]) for name in each[0][1]}


def _stack(state: AdapterState, site: Site) -> int | None:
    return state.specs[site].stack if site in state.specs else None


def _each(tensors: Mapping[str, Tensor], stack: int) -> list[dict[str, Tensor]]:
    """The tensors of every weight of a stack."""
    return [{name: tensor[e] for name, tensor in tensors.items()} for e in range(stack)]


def same_base(states: Sequence[AdapterState]) -> BaseIdentity | None:
    """The base of all states: where one of them makes up for rounding (`Method.corrects`), as that one holds it."""
    bases = [state.base for state in states if state.base is not None]
    for other in bases[1:]:
        difference = bases[0].difference(other)
        if difference:
            raise UseError(f"adapters of two different bases cannot be mixed: {difference}")
    bound = [s.base for s in states if s.base is not None and any(method.corrects for method in s.methods.values())]
    if len({base.quantized for base in bound}) > 1:
        kinds = " and ".join(sorted(str(base.quantized) for base in bound))
        raise UseError(f"adapters that make up for rounding to {kinds} cannot be mixed: each belongs to its own base")
    return next(iter([*bound, *bases]), None)


def misfit(method: Method, tensors: Mapping[str, Tensor], spec: HostSpec, shapes: Shapes | None = None) -> str | None:
    """Why `tensors` cannot be those of `method` on a slot of this shape, or None. They must also be finite."""
    reason = method.unstacked(spec) or method.unfit(spec)
    if reason:
        return reason
    expected, _ = (shapes or Shapes()).of(method, spec)
    given = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    found = []
    for name in sorted(expected.keys() | given.keys()):
        if expected.get(name) != given.get(name):
            have, want = given.get(name, "missing"), expected.get(name, f"no such tensor in {method.name}")
            found.append(f"{name} is {have}, expected {want} for this {'×'.join(map(str, spec.whole))} layer")
        elif not torch.isfinite(tensors[name]).all():
            found.append(f"{name} holds NaN or infinite values")
    return "; ".join(found) or None


def delta(state: AdapterState, path: Site | str, weight: Tensor) -> Tensor:
    """ΔW at `path` (a Site, or the path of a module) for the canonical dense base weight; reads no model.

    In fp32, or in fp64 where the weight is that.
    weight: [out, in, *kernel]; of an embedding its transpose, [dim, vocab]; of experts [E, out, in].
    """
    site = path if isinstance(path, Site) else Site(path)
    if site not in state.methods:
        raise UseError(f"the state adapts no {str(site)!r}{did_you_mean(str(site), map(str, state.methods))}")
    spec = state.specs.get(site) or HostSpec(tuple(weight.shape))
    if tuple(weight.shape) != spec.whole:
        raise UseError(f"{site}: the weight is {tuple(weight.shape)}, the adapter was made for {spec.whole}")
    reason = None if site in state.specs else misfit(state.methods[site], state.tensors[site], spec)
    if reason:
        raise UseError(f"{site}: {reason}")
    adapter = built(state, site, spec)
    full = wide(weight)
    with torch.no_grad():
        merged = adapter.merged(full)
    if merged.shape != full.shape:
        raise UseError(f"{site}: it brings rows that the weight does not have, there is no ΔW of its shape")
    return merged - full


def _factors(state: AdapterState, site: Site) -> Factors | None:
    """Of a method whose factors the tensors alone do not tell (VeRA)."""
    method = state.methods[site]
    return built(state, site).factors() if method.host is WeightHost and not method.follows_ties else None


def built(state: AdapterState, site: Site, spec: HostSpec | None = None) -> WeightAdapter:
    """The adapter of a site by itself."""
    with torch.random.fork_rng(devices=[]):  # the random numbers that it would start from are nobody's
        adapter = state.methods[site].build(spec or state.specs[site])
    if not isinstance(adapter, WeightAdapter):
        raise UseError(f"{site}: {state.methods[site].name} has no ΔW, its change cannot be written into a weight")
    adapter.load_state_dict(dict(state.tensors[site]))
    return adapter.requires_grad_(False)
