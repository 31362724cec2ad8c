"""attach, detach, extract, insert: adapters on a model, and off it again.

    model.q_proj                 type Linear          →  AdaptedLinear(Adapted, Linear)
    model.q_proj.weight          untouched, frozen
    model.q_proj.adapters        {name: {slot: Adapter}}, trainable fp32 tensors
    model.q_proj(x)              adapter_n(… adapter_1(Linear.forward) …)(x)

The host keeps its identity: keys, `isinstance` and base tensors stay what they were, and `detach` restores class,
keys, flags and outputs to the bit. Attach after quantising and before sharding. How a module is changed is in
`core.place`, what is refused in `core.guards`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.core import guards, route
from deltaw.core import targets as planning
from deltaw.core.adapter import Adapter
from deltaw.core.base import by_path, identify, parameters, unwrapped
from deltaw.core.carried import base_class_of, carried, here, vanished
from deltaw.core.errors import FileError, UseError, did_you_mean, faults
from deltaw.core.groups import ByPart
from deltaw.core.host import host_of
from deltaw.core.matching import Targets
from deltaw.core.method import Given, Method, Shapes, Site
from deltaw.core.place import place, remove
from deltaw.core.plan import Target, TargetPlan
from deltaw.core.state import AdapterState, misfit


def attach(
    model: nn.Module,
    method: Method,
    *,
    targets: Targets | ByPart,
    name: str = "default",
    exclude: Targets = (),
    layers: str | int | Iterable[int] | None = None,
    batches: Iterable[Any] | None = None,
    weights: Callable[[Site], Tensor] | None = None,
    given: Mapping[str, Sequence[str]] | None = None,
) -> TargetPlan:
    """Attach fresh adapters of `method` to the modules that `targets` names, and make them the trainable ones.

    Afterwards exactly the tensors of adapter `name` require a gradient and `name` alone is live. The model's output is
    unchanged to the bit until training moves them (init: loftq apart). Attaching again under the same name adds to it.

    targets: preset, name, pattern or several, or {part: those} (see `deltaw.core.targets`); exclude: taken away from them;
    layers: "0-3"; given: parts that the model does not tell itself, {part: paths} (`deltaw.core.parts.find`);
    batches: inputs of the model (each its keyword arguments, or one argument), for methods that start from data;
    weights: site → the weight before it was quantised, for those that start from what was rounded off.
    Returns the plan that was carried out. Raises TargetError, with nothing touched, when a target cannot be adapted.
    """
    model = unwrapped(_module(model))
    if not isinstance(method, Method):
        raise UseError(f"{method!r} is not a method: give one with its options, for example deltaw.LoRA(rank=16)")
    plan = planning.plan(model, method, targets, exclude=exclude, layers=layers, given=given)
    guards.admit(model, name, {target.site: target.method for target in plan.targets})
    _agree(model, name, method)
    sites = {target.site: (target.method, target.spec) for target in plan.targets}
    with route.use(model, name if name in route.names(model) else {}):  # what will be live with the new ones
        first = method.prepare(model, sites, Given(batches=batches, weights=weights))
    plan = planning.replaced(plan, {site: prepared for site, (prepared, _) in first.items()})
    built, there = [], by_path(model)
    for target in plan.targets:  # all of them before the first is placed
        host = host_of(there[target.site.path], target.site.slot, target.method.host)
        adapter = target.method.build(target.spec).to(host.device)
        if host.device.type == "meta" and type(adapter).start_from is not Adapter.start_from:
            raise UseError(
                f"{target.site}: {target.method.name} starts from the base's weights, which are not there (meta)"
            )
        adapter.start_from(host)
        if target.site in first:
            adapter.load_state_dict(dict(first[target.site][1]), strict=False)
        built.append((target.site, adapter, target.method))
    place(model, name, built)
    _train(model, name)
    return plan


def detach(model: nn.Module, name: str = "default") -> None:
    """Remove adapter `name`. With the last one go class swap, children and frozen flags: the base is itself again."""
    model = unwrapped(model)
    known(model, name)
    guards.unmerged(model, name)
    modules = route.adapted_modules(model)
    guards.intact(modules, name)
    for module in modules:
        remove(module, name, model)
    route.changed()


def extract(model: nn.Module, name: str = "default") -> AdapterState:
    """Adapter `name` as a state: copies of its tensors on the CPU, its methods, and the identity of the base."""
    model = unwrapped(model)
    there = adapters(model, name)
    methods = {site: adapter.method for site, adapter in there.items()}
    tensors = {
        site: {n: t.detach().to("cpu", copy=True) for n, t in adapter.state_dict().items()}
        for site, adapter in there.items()
    }
    paths = by_path(model)
    specs = {site: host_of(paths[site.path], site.slot, m.host).spec for site, m in methods.items()}
    return AdapterState(methods, tensors, specs, base=identify(model))


def adapters(model: nn.Module, name: str = "default") -> dict[Site, Adapter]:
    """The live modules of adapter `name`, by site."""
    model = unwrapped(model)
    known(model, name)
    gone = vanished(model, name)
    if gone:
        raise UseError(
            f"{name!r} was attached to {', '.join(gone[:4])}, where it is no longer: those modules were replaced. "
            "Attach after changing the model, or detach first"
        )
    found: dict[int, tuple[Site, Adapter, bool]] = {}
    for path, module in model.named_modules():
        there = carried(module)
        for adapter, host, _ in there.entries.get(name, ()) if there is not None else ():
            # one that follows ties sits in several modules: the first of the kind it was made for counts
            own = host.spec == adapter.spec
            if id(adapter) not in found or (own and not found[id(adapter)][2]):
                found[id(adapter)] = (Site(path, host.slot), adapter, own)
    return {site: adapter for site, adapter, _ in found.values()}


def kinds(model: nn.Module, name: str = "default", *, trained: bool = False) -> list[tuple[Method, list[Adapter]]]:
    """The adapters of `name` by kind of method, each with the method whose hooks speak for all of them; only those that are
    trained where that is asked."""
    found: dict[type[Method], tuple[Method, list[Adapter]]] = {}
    for adapter in adapters(model, name).values():
        if trained and not any(parameter.requires_grad for parameter in adapter.parameters()):
            continue
        found.setdefault(type(adapter.method), (adapter.method, []))[1].append(adapter)
    return list(found.values())


def plan_of(model: nn.Module, name: str) -> TargetPlan:
    """What is attached to `model` under `name`, as the plan that would have made it."""
    targets = []
    for site, adapter in adapters(model, name).items():
        layer = base_class_of(model.get_submodule(site.path))
        size = sum(parameter.numel() for parameter in adapter.parameters())
        targets.append(Target(site, layer.__name__, adapter.spec, adapter.method, size))
    return TargetPlan(tuple(targets), parameters(model))


def insert(model: nn.Module, state: AdapterState, *, name: str = "default") -> None:
    """Put a state into the model as adapter `name`, frozen, and make it the one that is live.

    Every tensor must land: paths the model does not have, shapes that do not fit and non-finite values are one
    FileError, raised before the model is touched. Whether the base is the right one is `load`'s question.
    """
    model = unwrapped(model)
    if not isinstance(state, AdapterState):
        raise UseError(f"{type(state).__name__} is not an AdapterState: make one with deltaw.extract, or load a folder")
    guards.unmerged(model, name)
    if name in route.names(model):
        raise UseError(f"an adapter {name!r} is attached already: choose another name, or detach it first")
    found = fit(model, state)
    if found:
        raise faults(
            FileError, "the adapter does not fit this model", [f"{site}: {why}" for site, why in found.items()]
        )
    guards.admit(model, name, state.methods)
    built, there = [], by_path(model)
    with torch.random.fork_rng(devices=[]):  # the random numbers that they would start from are nobody's
        for site, method in state.methods.items():
            host = host_of(there[site.path], site.slot, method.host)
            adapter = method.build(host.spec)
            adapter.load_state_dict(dict(state.tensors[site]))
            built.append((site, adapter.to(host.device).requires_grad_(False), method))
    place(model, name, built)
    route.apply(route.adapted_modules(model), {name: 1.0})


def fit(model: nn.Module, state: AdapterState) -> dict[Site, str]:
    """Why which sites of a state cannot be put into `model`: paths, kinds of layer, names, shapes and values."""
    found: dict[Site, str] = {}
    modules, shapes, taken = by_path(model), Shapes(), dict[tuple[int, str], Site]()
    for site, method in state.methods.items():
        module = modules.get(site.path)
        host = None if module is None else host_of(module, site.slot, method.host)
        first = taken.setdefault((id(module), site.slot), site)
        if module is None:
            found[site] = f"the model has no such module{did_you_mean(site.path, modules)}"
        elif first != site:
            found[site] = f"it is the same module as {first}: the model has one place for the two"
        elif any(p.device.type == "meta" for p in module._parameters.values() if p is not None):
            found[site] = "the base's weights are not there (meta device): load or materialise the base first"
        elif host is None or not host.has(module, site.slot):
            found[site] = f"{base_class_of(module).__name__} cannot carry {method.name} at {site.slot!r}"
        elif (
            reason := guards.bypassed(modules, site.path)
            or host.fault()
            or guards.untrue(modules, site, method)
            or misfit(method, state.tensors[site], host.spec, shapes)
        ):
            found[site] = reason
    return found


def trainable(model: nn.Module, name: str = "default") -> None:
    """Make exactly the tensors of adapter `name` require a gradient, e.g. to train a loaded adapter further."""
    model = unwrapped(model)
    known(model, name)
    guards.unmerged(model, name)
    _train(model, name)


def _agree(model: nn.Module, name: str, method: Method) -> None:
    """Refuse to add to an adapter with other values of what counts for all of it: those of the first would hold."""
    there = (a.method for module in route.adapted_modules(model) for a, _, _ in here(module).entries.get(name, ()))
    first = next((other for other in there if type(other) is type(method)), method)
    values = {field: (getattr(first, field), getattr(method, field)) for field in method.common}
    found = [f"{field} is {has!r} there and {given!r} here" for field, (has, given) in values.items() if has != given]
    if found:
        raise faults(
            UseError,
            f"cannot add to {name!r}, whose adapters share these options of {method.name} (give the same, or another name)",
            found,
        )


def _train(model: nn.Module, name: str) -> None:
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    modules = route.adapted_modules(model)
    for module in modules:
        for adapter, _, _ in here(module).entries.get(name, ()):
            adapter.requires_grad_(True)
    route.apply(modules, {name: 1.0})


def _module(model: object) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise UseError(f"{model!r} is not a model: give a torch.nn.Module")
    return model


def known(model: nn.Module, name: str) -> None:
    """Refuse a name that is not attached."""
    there = route.names(model)
    if name not in there:
        listed = ", ".join(there) or "none"
        raise UseError(f"no adapter {name!r} is attached{did_you_mean(name, there)} (attached: {listed})")
