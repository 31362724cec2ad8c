"""Attaching = class swap + child module + around-call adapters.

    model.q_proj                 type Linear          →  AdaptedLinear(Adapted, Linear)
    model.q_proj.weight          untouched, frozen
    model.q_proj.adapters        {name: {slot: Adapter}}, trainable fp32 tensors
    model.q_proj(x)              adapter_n(… adapter_1(Linear.forward) …)(x)

The host keeps its identity: keys, `isinstance` and base tensors stay what they were, and `detach` restores class,
keys, flags and outputs to the bit. Attach after quantising and before sharding.
"""

import functools
import re
import sys
import types
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from torch import nn

from deltaw.core import route
from deltaw.core import targets as planning
from deltaw.core.adapter import Adapter
from deltaw.core.base import base_parameters, identify
from deltaw.core.errors import TargetError, UseError, did_you_mean, faults
from deltaw.core.host import host_of
from deltaw.core.method import Method, Site
from deltaw.core.state import AdapterState, check
from deltaw.core.targets import TargetPlan, Targets


class Adapted:
    """Mixin in front of a host's class. In `__dict__`: `live`, `entries` (per name), `pristine` and `merged`."""

    base_class: ClassVar[type[nn.Module]]
    adapters: nn.ModuleDict
    live: tuple[route.Live, ...]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        call = super().forward  # type: ignore[misc]
        for adapter, host, strength in self.live:  # the first is innermost; additive ones commute
            call = functools.partial(adapter, host, call, strength)
        return call(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # A class made at run time cannot be pickled by name: rebuild it from the base class.
        return (_blank, (self.base_class,), *super().__reduce_ex__(protocol)[2:])  # type: ignore[index]


@functools.cache
def adapted_class(base: type[nn.Module]) -> type[nn.Module]:
    """The cached subclass of `base` with Adapted in front."""
    return type(f"Adapted{base.__name__}", (Adapted, base), {"base_class": base, "__module__": base.__module__})


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

    targets: preset, name, pattern or several (see `deltaw.core.targets`); exclude: the same, taken away; layers: "0-3,7".
    Returns the plan that was carried out. Raises TargetError, with nothing touched, when a target cannot be adapted.
    """
    plan = planning.plan(model, method, targets, exclude=exclude, layers=layers)
    sites = {target.site: target.method for target in plan.targets}
    _admit(model, name, sites)
    for target in plan.targets:
        module = model.get_submodule(target.site.path)
        host = _host(module, target.site.slot, target.method)
        adapter = target.method.build(target.spec)
        adapter.to(host.parameter.device)
        adapter.start_from(host)
        _add(module, name, target.site.slot, adapter, target.method, host)
    _finish(model, name)
    return plan


def detach(model: nn.Module, name: str = "default") -> None:
    """Remove adapter `name`. With the last one go class swap, child modules and frozen flags: the base is itself again."""
    _known(model, name)
    if any(name in module.__dict__.get("merged", ()) for module in route.adapted_modules(model)):
        raise UseError(f"{name!r} is merged into the weights: unmerge the model first, then detach")
    for module in route.adapted_modules(model):
        _remove(module, name)
    route.changed()
    if not route.adapted_modules(model):
        _release(model)


def extract(model: nn.Module, name: str = "default") -> AdapterState:
    """Adapter `name` as a state: copies of its tensors on the CPU, its methods, and the identity of the base."""
    _known(model, name)
    methods: dict[Site, Method] = {}
    tensors: dict[Site, Mapping[str, Any]] = {}
    for path, module in model.named_modules():
        for adapter, host, _ in module.__dict__.get("entries", {}).get(name, ()):
            site = Site(path, host.slot)
            methods[site] = adapter.method
            tensors[site] = {n: p.detach().to("cpu", copy=True) for n, p in adapter.named_parameters()}
    return AdapterState(methods, tensors, base=identify(model))


def insert(model: nn.Module, state: AdapterState, *, name: str = "default") -> None:
    """Put a state into the model as adapter `name`, frozen, and make it the one that is live.

    Every tensor must land: paths the model does not have, shapes that do not fit and non-finite values are one
    FileError, raised before the model is touched. Whether the base is the right one is `load`'s question.
    """
    found, specs = [], {}
    modules = dict(model.named_modules())
    for site, method in state.methods.items():
        module = modules.get(site.path)
        host = None if module is None else _host(module, site.slot, method)
        if module is None:
            found.append(f"{site}: the model has no such module{did_you_mean(site.path, modules)}")
        elif host is None or module._parameters.get(site.slot) is None:
            found.append(f"{site}: {_class(module).__name__} cannot carry {method.name} at {site.slot!r}")
        elif host.fault():
            found.append(f"{site}: {host.fault()}")
        else:
            specs[site] = host.spec
    if found:
        raise faults(TargetError, "the adapter does not fit this model", found)
    check(state.methods, state.tensors, specs)
    _admit(model, name, state.methods)
    for site, method in state.methods.items():
        host = _host(modules[site.path], site.slot, method)
        adapter = method.build(specs[site])
        adapter.load_state_dict(dict(state.tensors[site]))
        adapter.to(host.parameter.device).requires_grad_(False)
        _add(modules[site.path], name, site.slot, adapter, method, host)
    _finish(model, None)
    route.apply(route.adapted_modules(model), {name: 1.0})


def trainable(model: nn.Module, name: str = "default") -> None:
    """Make exactly the tensors of adapter `name` require a gradient, e.g. to train a loaded adapter further."""
    _known(model, name)
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


def _known(model: nn.Module, name: str) -> None:
    there = route.names(model)
    if name not in there:
        listed = ", ".join(there) or "none"
        raise UseError(f"no adapter {name!r} is attached{did_you_mean(name, there)} (attached: {listed})")


def _class(module: nn.Module) -> type[nn.Module]:
    return getattr(type(module), "base_class", type(module))


def _host(module: nn.Module, slot: str, method: Method) -> Any:
    """The view of a slot; adapters on the same slot share one, so that it can keep track of them."""
    for entries in module.__dict__.get("entries", {}).values():
        for _, host, _ in entries:
            if host.slot == slot and isinstance(host, method.host):
                return host
    return host_of(module, slot, method.host)


def _admit(model: nn.Module, name: str, sites: Mapping[Site, Method]) -> None:
    """Refuse what would be ignored, overwritten or wrong; nothing has been touched yet."""
    found: list[str] = []
    if not re.fullmatch(r"[\w\-]+", name) or hasattr(nn.ModuleDict(), name):
        raise UseError(
            f"an adapter cannot be called {name!r}: use letters, digits, '_' and '-', and no name of an nn.Module attribute"
        )
    fsdp = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    if fsdp is not None and any(isinstance(module, fsdp) for module in model.modules()):
        raise UseError("the model is already sharded (fully_shard): attach after quantising and before sharding")
    for site in sites:
        module = model.get_submodule(site.path)
        if any(host.slot == site.slot for _, host, _ in module.__dict__.get("entries", {}).get(name, ())):
            found.append(f"{site} already carries adapter {name!r}: choose another name, or detach it first")
        if "entries" in module.__dict__:
            continue
        if "forward" in module.__dict__ and "_old_forward" not in module.__dict__:
            found.append(
                f"{site}: its forward was replaced on the instance, an adapter would be ignored: attach before patching"
            )
        if hasattr(module, "adapters") or hasattr(module, "parametrizations"):
            found.append(
                f"{site}: the module has an attribute 'adapters' or parametrizations of its own: remove them first"
            )
    if found:
        raise faults(UseError, f"cannot attach {name!r}", found)
    if "_required_grad" not in model.__dict__ and not route.adapted_modules(model):
        model.__dict__["_required_grad"] = {path for path, p in base_parameters(model) if p.requires_grad}
        if hasattr(type(model), "save_pretrained"):
            model.__dict__["save_pretrained"] = _SavingRefused()
    _no_fast_path(model, [site.path for site in sites])


class _SavingRefused:
    """Stands for `save_pretrained` while adapters are attached: it would write adapter keys into the base's file."""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        raise UseError(
            "save_pretrained on a model with adapters attached would mix their tensors into the base's file: "
            "deltaw.save(model, path) writes the adapter, deltaw.merge(model) first gives a plain model to save"
        )


def _no_fast_path(model: nn.Module, paths: Iterable[str]) -> None:
    """nn.TransformerEncoderLayer's inference fast path reads the weights of its linears itself: switch it off."""
    flags = {nn.TransformerEncoderLayer: "activation_relu_or_gelu", nn.TransformerEncoder: "use_nested_tensor"}
    for above in {".".join(path.split(".")[:i]) for path in paths for i in range(path.count(".") + 1)}:
        module = model.get_submodule(above)
        for kind, flag in flags.items():
            if isinstance(module, kind) and "_fast_path" not in module.__dict__:
                module.__dict__["_fast_path"] = (flag, getattr(module, flag))
                setattr(module, flag, 0)


def _release(model: nn.Module) -> None:
    """After the last adapter: flags, guards and caches back to what they were."""
    required = model.__dict__.pop("_required_grad", None)
    model.__dict__.pop("save_pretrained", None)
    model.__dict__.pop("_adapted", None)
    if required is not None:
        for path, parameter in model.named_parameters():
            parameter.requires_grad_(path in required)
    for module in model.modules():
        if "_fast_path" in module.__dict__:
            setattr(module, *module.__dict__.pop("_fast_path"))


def _add(module: nn.Module, name: str, slot: str, adapter: Adapter, method: Method, host: Any) -> None:
    if "entries" not in module.__dict__:
        module.__class__ = adapted_class(type(module))
        module.__dict__.update(live=(), entries={}, pristine={}, merged=())
        module.adapters = nn.ModuleDict()
        if "_old_forward" in module.__dict__:  # accelerate's hooks call this: let it be ours
            module.__dict__["_old_forward"] = types.MethodType(type(module).forward, module)
    adapter.method, adapter.name = method, name  # type: ignore[assignment]
    adapter.train(module.training)
    if name not in module.adapters:
        module.adapters[name] = nn.ModuleDict()
    module.adapters[name][slot] = adapter
    entries = module.__dict__["entries"]
    entries[name] = (*entries.get(name, ()), (adapter, host, None))


def _remove(module: nn.Module, name: str) -> None:
    entries = module.__dict__["entries"]
    if name not in entries:
        return
    del entries[name], module.adapters[name]
    module.__dict__["live"] = tuple(entry for entry in module.__dict__["live"] if entry[0].name != name)
    if not entries:
        del module.adapters
        for key in ("live", "entries", "pristine", "merged"):
            del module.__dict__[key]
        module.__class__ = module.base_class
        if "_old_forward" in module.__dict__:
            module.__dict__["_old_forward"] = types.MethodType(type(module).forward, module)
