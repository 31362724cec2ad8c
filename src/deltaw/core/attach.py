"""Attaching = class swap + child module + around-call adapters.

    model.q_proj                 type Linear          →  AdaptedLinear(Adapted, Linear)
    model.q_proj.weight          untouched, frozen
    model.q_proj.adapters        {name: {slot: Adapter}}, trainable fp32 tensors
    model.q_proj(x)              adapter_n(… adapter_1(Linear.forward) …)(x)

The host keeps its identity: keys, `isinstance` and base tensors stay what they were, and `detach` restores class,
keys, flags and outputs to the bit. Attach after quantising and before sharding.
"""

import functools
import types
from collections.abc import Iterable
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from deltaw.core import guards, route
from deltaw.core import targets as planning
from deltaw.core.adapter import Adapter
from deltaw.core.base import identify
from deltaw.core.errors import FileError, UseError, did_you_mean, faults
from deltaw.core.host import host_of
from deltaw.core.method import Method, Site
from deltaw.core.state import AdapterState, misfit
from deltaw.core.targets import TargetPlan, Targets


class Adapted:
    """Mixin in front of a host's class. All but the child module `adapters` are plain values in `__dict__`."""

    base_class: ClassVar[type[nn.Module]]
    adapters: nn.ModuleDict
    """Name → slot → Adapter: what holds the trained tensors."""
    entries: dict[str, tuple[route.Live, ...]]
    """Name → its adapters here, ready to be made live."""
    live: tuple[route.Live, ...]
    """What acts now."""
    merged: tuple[str, ...]
    """Names whose change is in the weights; never live."""
    pristine: dict[str, Tensor]
    """Slot → the base's own parameter, while a merged weight or a trained copy stands in its place."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        call = super().forward  # type: ignore[misc]
        for adapter, host, strength in self.live:  # the first is innermost; additive ones commute
            call = functools.partial(adapter, host, call, strength)
        return call(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # A class made at run time cannot be pickled by name: rebuild it from the base class.
        return (_blank, (self.base_class,), *super().__reduce_ex__(protocol)[2:])  # type: ignore[index]


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def adapted_class(base: type[nn.Module]) -> type[nn.Module]:
    """The subclass of `base` with Adapted in front, made once."""
    if base not in _CLASSES:
        facts = {"base_class": base, "__module__": base.__module__}
        _CLASSES[base] = type(f"Adapted{base.__name__}", (Adapted, base), facts)
    return _CLASSES[base]


def _blank(base: type[nn.Module]) -> nn.Module:
    cls = adapted_class(base)
    return cls.__new__(cls)


def attach(
    model: nn.Module,
    method: Method,
    *,
    targets: Targets,
    name: str = "default",
    exclude: Targets = (),
    layers: str | Iterable[int] | None = None,
) -> TargetPlan:
    """Attach fresh adapters of `method` to the modules that `targets` names, and make them the trainable ones.

    Afterwards exactly the tensors of adapter `name` require a gradient and `name` alone is live. The model's output is
    unchanged to the bit until training moves them. Attaching again under the same name adds to that adapter.

    targets: preset, name, pattern or several (see `deltaw.core.targets`); exclude: the same, taken away; layers: "0-3".
    Returns the plan that was carried out. Raises TargetError, with nothing touched, when a target cannot be adapted.
    """
    plan = planning.plan(model, method, targets, exclude=exclude, layers=layers)
    sites = {target.site: target.method for target in plan.targets}
    guards.admit(model, name, sites)
    for target in plan.targets:
        adapter = target.method.build(target.spec)
        host = host_of(model.get_submodule(target.site.path), target.site.slot, target.method.host)
        adapter.to(host.device)
        adapter.start_from(host)
        _place(model, name, target.site, adapter, target.method)
    _finish(model, name)
    return plan


def detach(model: nn.Module, name: str = "default") -> None:
    """Remove adapter `name`. With the last one go class swap, children and frozen flags: the base is itself again."""
    known(model, name)
    guards.unmerged(model, name)
    for module in route.adapted_modules(model):
        remove(module, name)
    route.changed()
    if not route.adapted_modules(model):
        guards.release(model)


def extract(model: nn.Module, name: str = "default") -> AdapterState:
    """Adapter `name` as a state: copies of its tensors on the CPU, its methods, and the identity of the base."""
    there = adapters(model, name)
    methods = {site: adapter.method for site, adapter in there.items()}
    tensors = {
        site: {n: p.detach().to("cpu", copy=True) for n, p in adapter.named_parameters()}
        for site, adapter in there.items()
    }
    specs = {site: host_of(model.get_submodule(site.path), site.slot, m.host).spec for site, m in methods.items()}
    return AdapterState(methods, tensors, specs, base=identify(model))


def adapters(model: nn.Module, name: str = "default") -> dict[Site, Adapter]:
    """The live modules of adapter `name`, by site."""
    known(model, name)
    found: dict[int, tuple[Site, Adapter]] = {}  # one that follows ties sits in several modules: the first counts
    for path, module in model.named_modules():
        for adapter, host, _ in module.__dict__.get("entries", {}).get(name, ()):
            found.setdefault(id(adapter), (Site(path, host.slot), adapter))
    return dict(found.values())


def insert(model: nn.Module, state: AdapterState, *, name: str = "default") -> None:
    """Put a state into the model as adapter `name`, frozen, and make it the one that is live.

    Every tensor must land: paths the model does not have, shapes that do not fit and non-finite values are one
    FileError, raised before the model is touched. Whether the base is the right one is `load`'s question.
    """
    found = fit(model, state)
    if found:
        raise faults(
            FileError, "the adapter does not fit this model", [f"{site}: {why}" for site, why in found.items()]
        )
    guards.admit(model, name, state.methods)
    for site, method in sorted(state.methods.items(), key=lambda item: item[1].follows_ties):
        host = host_of(model.get_submodule(site.path), site.slot, method.host)
        adapter = method.build(host.spec)
        adapter.load_state_dict(dict(state.tensors[site]))
        adapter.to(host.device).requires_grad_(False)
        _place(model, name, site, adapter, method)
    _finish(model, None)
    route.apply(route.adapted_modules(model), {name: 1.0})


def fit(model: nn.Module, state: AdapterState) -> dict[Site, str]:
    """Why which sites of a state cannot be put into `model`: paths, kinds of layer, names, shapes and values."""
    found: dict[Site, str] = {}
    modules = dict(model.named_modules())
    for site, method in state.methods.items():
        module = modules.get(site.path)
        host = None if module is None else host_of(module, site.slot, method.host)
        if module is None:
            found[site] = f"the model has no such module{did_you_mean(site.path, modules)}"
        elif host is None or not host.has(module, site.slot):
            found[site] = f"{_class(module).__name__} cannot carry {method.name} at {site.slot!r}"
        elif (
            reason := guards.bypassed(model, site.path)
            or host.fault()
            or misfit(method, state.tensors[site], host.spec)
        ):
            found[site] = reason
    return found


def trainable(model: nn.Module, name: str = "default") -> None:
    """Make exactly the tensors of adapter `name` require a gradient, e.g. to train a loaded adapter further."""
    known(model, name)
    guards.unmerged(model, name)
    _finish(model, name)


def _finish(model: nn.Module, name: str | None) -> None:
    route.changed()
    modules = route.adapted_modules(model)
    if name is not None:
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for module in modules:
            for adapter, _, _ in module.__dict__["entries"].get(name, ()):
                adapter.requires_grad_(True)
        route.apply(modules, {name: 1.0})


def known(model: nn.Module, name: str) -> None:
    """Refuse a name that is not attached."""
    there = route.names(model)
    if name not in there:
        listed = ", ".join(there) or "none"
        raise UseError(f"no adapter {name!r} is attached{did_you_mean(name, there)} (attached: {listed})")


def _class(module: nn.Module) -> type[nn.Module]:
    return getattr(type(module), "base_class", type(module))


def _place(model: nn.Module, name: str, site: Site, adapter: Adapter, method: Method) -> None:
    """Add an adapter to the module at `site`, and where it follows ties to every module with the same parameter."""
    first = model.get_submodule(site.path)
    table = first._parameters.get(site.slot) if method.follows_ties else None
    others = [] if table is None else [module for module in model.modules() if module is not first]
    tied = [module for module in others if module._parameters.get(site.slot) is table]
    free = [module for module in tied if not guards.carries(module, name, site.slot)]  # a trained copy there goes first
    for module in (first, *free):
        _add(module, name, site.slot, adapter, method, host_of(module, site.slot, method.host))


def _add(module: nn.Module, name: str, slot: str, adapter: Adapter, method: Method, host: Any) -> None:
    if "entries" not in module.__dict__:
        module.__class__ = adapted_class(type(module))
        module.__dict__.update(live=(), entries={}, pristine={}, merged=())
        module.add_module("adapters", nn.ModuleDict())
        if "_old_forward" in module.__dict__:  # accelerate's hooks call this: let it be ours
            module.__dict__["_old_forward"] = types.MethodType(type(module).forward, module)
    adapter.method, adapter.name = method, name
    adapter.train(module.training)
    here = cast(Adapted, module)
    if name not in here.adapters:
        here.adapters[name] = nn.ModuleDict()
    cast(nn.ModuleDict, here.adapters[name])[slot] = adapter
    here.entries[name] = (*here.entries.get(name, ()), (adapter, host, None))


def remove(module: nn.Module, name: str) -> None:
    """Take adapter `name` off one module; with the last one the module gets its own class back."""
    here = cast(Adapted, module)
    if name not in here.entries:
        return
    del here.entries[name], here.adapters[name]
    module.__dict__["live"] = tuple(entry for entry in here.live if entry[0].name != name)
    if not here.entries:
        del here.adapters
        for key in ("live", "entries", "pristine", "merged"):
            del module.__dict__[key]
        module.__class__ = here.base_class
        if "_old_forward" in module.__dict__:
            module.__dict__["_old_forward"] = types.MethodType(type(module).forward, module)
