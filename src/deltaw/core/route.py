"""What is live: which adapters of a model act, and how strongly.

    with use(model, {"sql": 1.0, "tone": 0.5}): ...      W' = W + 1.0·ΔW_sql + 0.5·ΔW_tone
    use(model, "sql")                                    switches for good
    use(model, {})                                       the base
    use(model, [{"sql": 1.0}, "tone", {}])               a route for every row of the batch (`core.rows`)

A switch replaces one tuple per adapted module: no walk over parameters, no `requires_grad`, no copies.
"""

import math
import weakref
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
from torch import nn

from deltaw.core.adapter import Adapter, WeightAdapter
from deltaw.core.bank import Plan, settle
from deltaw.core.base import unwrapped
from deltaw.core.carried import carried, here
from deltaw.core.errors import UseError, did_you_mean, faults
from deltaw.core.rows import PerRow, whole

Route = Mapping[str, float]
"""Adapter name → strength. Names left out, and strength 0, are off."""


class _Stamp:
    """Replaced by every attach, detach and merge; an index with another stamp is stale."""


class _Facts(NamedTuple):
    """Of one name: what of it is merged, what cannot act in single rows, what has no strengths."""

    merged: bool
    whole: str
    rigid: str


class _Rows:
    """Stands for the routes of the rows of one batch."""


KEPT = 16
"""Batches whose routes are remembered."""


class _Index:
    """What is known of a model until adapters come or go. It must not keep the model alive: weak references."""

    def __init__(self, model: nn.Module):
        self.stamp = _stamp
        self.modules = [weakref.ref(module) for module in model.modules() if carried(module) is not None]
        self.facts: dict[str, _Facts] | None = None
        self.rows: dict[Any, _Rows] = {}
        """Routes of rows that were found right: what stands for them in `Carried.routed`."""


_stamp = _Stamp()
_known: "weakref.WeakKeyDictionary[nn.Module, _Index]" = weakref.WeakKeyDictionary()


def changed() -> None:
    """Forget all cached lists of adapted modules. Called whenever adapters come or go."""
    global _stamp
    _stamp = _Stamp()


def adapted_modules(model: nn.Module) -> list[nn.Module]:
    """The modules of `model` that carry adapters, in model order. Cached until adapters come or go."""
    found = (module() for module in _index(model).modules)
    return [module for module in found if module is not None and carried(module) is not None]


def _index(model: nn.Module) -> _Index:
    found = _known.get(model)
    if found is None or found.stamp is not _stamp:
        found = _known[model] = _Index(model)
    return found


def names(model: nn.Module) -> list[str]:
    """Names of the adapters attached to `model`, in order of first appearance."""
    return list(dict.fromkeys(name for module in adapted_modules(model) for name in here(module).entries))


def live(model: nn.Module) -> dict[str, float]:
    """The current route: live adapters and their strengths."""
    route: dict[str, float] = {}
    for module in adapted_modules(model):
        for adapter, _, strength in here(module).live:
            if isinstance(strength, PerRow):
                raise UseError("the rows of a batch have routes of their own: leave that `use` first")
            if adapter.name not in route:
                route[adapter.name] = 1.0 if strength is None else float(strength)
    return route


class use:
    """Make exactly these adapters live, at once; as a context manager, go back to what was live before on exit.

    `route`: {name: strength}, a name, or {} for the base; or a list of these, one for every row of the batch. Strengths are
    any finite numbers and scale ΔW; an adapter whose change is not a ΔW takes 0 or 1 only, and no single rows. Raises
    UseError for names that are not attached, merged adapters and strengths that cannot be.
    """

    def __init__(self, model: nn.Module, route: Route | str | Sequence[Route | str]):
        self.model = model = unwrapped(model)
        rows = isinstance(route, Sequence) and not isinstance(route, str)
        routes = [_route(one) for one in route] if rows else [_route(route)]
        if not routes:
            raise UseError("no route: give one for every row of the batch, {} for a row of the base")
        self.modules = adapted_modules(model)
        known = _index(model).rows
        key = tuple(tuple(one.items()) for one in routes) if rows and _plain(routes) else None
        stands = None if key is None else known.get(key)
        if stands is None:
            _check(model, self.modules, routes, rows)
            if key is not None:
                stands = _Rows()
                _remember(known, key, stands)
        self.before = [(there, there.live, there.batch) for there in map(here, self.modules)]
        self.stamp = _stamp
        apply_rows(self.modules, routes, stands) if rows else apply(self.modules, routes[0])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.stamp is _stamp:
            for there, live, batch in self.before:
                there.live, there.batch = live, batch
            return
        before = {there: live for there, live, _ in self.before}
        for module in adapted_modules(self.model):  # adapters came, went or were merged in the block
            state = here(module)
            free = [entry for name, group in state.entries.items() if name not in state.merged for entry in group]
            still = {id(adapter) for adapter, _, _ in free}
            state.live = tuple(entry for entry in before.get(state, ()) if id(entry[0]) in still)


def apply(modules: list[nn.Module], route: Route) -> None:
    """Write the live tuple of every adapted module. The route must have been checked."""
    with torch.inference_mode(False):  # a strength made in inference could not be saved for a backward pass later
        wanted = [(name, None if w == 1.0 else torch.tensor(float(w))) for name, w in route.items() if w != 0.0]
    if not wanted:
        for there in map(here, modules):
            there.live = ()
        return
    if len(wanted) == 1 and wanted[0][1] is None:
        name = wanted[0][0]
        for there in map(here, modules):
            there.live = there.entries.get(name, ())
        return
    for there in map(here, modules):
        found = [(a, host, strength) for name, strength in wanted for a, host, _ in there.entries.get(name, ())]
        there.live = tuple(sorted(found, key=outermost))


def apply_rows(modules: list[nn.Module], routes: Sequence[Route], key: _Rows | None) -> None:
    """As `apply`, with a route for every row of the batch; where it was live before, as it was then."""
    if key is not None and all(key in there.routed for there in map(here, modules)):
        for there in map(here, modules):
            there.live, there.batch = there.routed[key]
        return
    wanted, plans = {}, dict[Any, Plan | None]()
    with torch.inference_mode(False):  # parameters that a bank takes in must be able to train later
        for name in dict.fromkeys(name for route in routes for name in route):
            acts = [(number, route[name]) for number, route in enumerate(routes) if route.get(name, 0.0) != 0.0]
            if acts:
                rows, strengths = zip(*acts, strict=True)
                wanted[name] = PerRow(torch.tensor(strengths, dtype=torch.float32), torch.tensor(rows), len(routes))
        for module in modules:
            there = here(module)
            found = [(a, host, at) for name, at in wanted.items() for a, host, _ in there.entries.get(name, ())]
            there.live = tuple(found)
            there.batch = settle(there, there.live, plans)
            if key is not None:
                _remember(there.routed, key, (there.live, there.batch))


def _remember(known: dict[Any, Any], key: Any, value: Any) -> None:
    if len(known) >= KEPT:
        known.clear()
    known[key] = value


def _plain(routes: Sequence[Route]) -> bool:
    """Can these be a key? What is no number is said by `_check`."""
    return all(type(name) is str and type(w) in (float, int) for route in routes for name, w in route.items())


def _route(given: object) -> Route:
    if not isinstance(given, str | Mapping):
        raise UseError(f"{given!r} is no route: give {{name: strength}}, a name, or {{}} for the base")
    return {given: 1.0} if isinstance(given, str) else dict(given)


def outermost(entry: tuple[Adapter, Any, Any]) -> bool:
    """Is it called around all others? What follows ties may change the ids, and the size of the output."""
    return bool(entry[0].method.follows_ties)


def _facts(model: nn.Module, modules: list[nn.Module]) -> dict[str, _Facts]:
    """Of every attached name; made once until adapters come or go, or are merged."""
    index = _index(model)
    if index.facts is None:
        entries: dict[str, list[tuple[Adapter, Any, bool]]] = {}
        for there in map(here, modules):
            for name, group in there.entries.items():
                entries.setdefault(name, []).extend((a, host, name in there.merged) for a, host, _ in group)
        index.facts = {
            name: _Facts(
                any(merged for _, _, merged in group),
                "; ".join(sorted({why for a, host, _ in group if (why := whole(a, host))})),
                ", ".join(sorted({type(a).__name__ for a, _, _ in group if not isinstance(a, WeightAdapter)})),
            )
            for name, group in entries.items()
        }
    return index.facts


def _check(model: nn.Module, modules: list[nn.Module], routes: Sequence[Route], rows: bool) -> None:
    found: list[str] = []
    known = _facts(model, modules)
    for name, w in {(str(name), repr(w)): (name, w) for route in routes for name, w in route.items()}.values():
        facts = known.get(name)
        if facts is None:
            there = f"attached: {', '.join(known)}" if known else "no adapter is attached to this model"
            found.append(f"no adapter {name!r}{did_you_mean(str(name), known)} ({there})")
        elif isinstance(w, bool) or not isinstance(w, (int, float)) or not math.isfinite(w):
            found.append(f"strength {w!r} of {name!r} is not a finite number")
        elif facts.merged and w != 0:
            found.append(f"{name!r} is merged into the weights: unmerge the model before routing it")
        elif rows and w != 0 and facts.whole:
            found.append(f"{name!r} cannot act in single rows of a batch: {facts.whole}")
        elif w not in (0, 1) and facts.rigid:
            found.append(f"{name!r} has parts without a ΔW ({facts.rigid}): its strength is 0 or 1, not {w}")
    if found:
        raise faults(UseError, "cannot use these adapters", list(dict.fromkeys(found)))
