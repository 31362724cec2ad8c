"""How a module is adapted: class swap + child module + around-call adapters; and how it gets its own class back.

The first adapter gives the module the subclass `Adapted<Its class>` and a child `adapters`; the last one to go takes
both away. Several adapters are placed all or none.
"""

import functools
import types
from collections.abc import Sequence
from typing import Any, ClassVar, cast

import torch
from torch import nn

from deltaw.core import guards, route
from deltaw.core.adapter import Adapter
from deltaw.core.base import by_path
from deltaw.core.carried import Carried, base_class_of, carried, here, hold
from deltaw.core.host import ParameterHost, host_of
from deltaw.core.method import Method, Site
from deltaw.core.rows import PerRow, by_rows
from deltaw.core.together import now


class Adapted:
    """Mixin in front of a host's class: the child module `adapters`, and one private object (`core.carried`)."""

    base_class: ClassVar[type[nn.Module]]
    adapters: nn.ModuleDict
    """Name → slot → Adapter: what holds the trained tensors."""
    _deltaw: Carried

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        call = super().forward  # type: ignore[misc]
        there, together = self._deltaw, now()
        if together is not None and (y := together.output(self, args, kwargs)) is not None:  # type: ignore[arg-type]
            return y
        batch = there.batch
        if (
            batch is not None
            and batch.live is there.live
            and not (torch.is_grad_enabled() or torch.compiler.is_compiling())
        ):
            y = batch.bank(batch.plan, call, *args, **kwargs)
            if y is not None:
                return y
            there.routed.clear()  # the model may have moved: the next route is planned anew
        for adapter, host, strength in there.live:  # the first is innermost; additive ones commute
            around = functools.partial(by_rows, adapter) if isinstance(strength, PerRow) else adapter
            call = functools.partial(around, host, call, strength)
        return call(*args, **kwargs)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Moves to another device or dtype take the kept originals along."""
        result = super()._apply(fn, recurse)  # type: ignore[misc]
        with torch.no_grad():
            self._deltaw.pristine = {slot: fn(kept) for slot, kept in self._deltaw.pristine.items()}
        return result

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


def place(model: nn.Module, name: str, built: Sequence[tuple[Site, Adapter, Method]]) -> None:
    """Put finished adapters into the modules of their sites, all or none."""
    root, touched = hold(model), []
    guards.set_guards(model, [site.path for site, _, _ in built])
    there = by_path(model)
    paths = {id(module): path for path, module in reversed(there.items())}
    try:
        # those that follow ties come last: a trained copy of the same parameter goes first
        for site, adapter, method in sorted(built, key=lambda item: item[2].follows_ties):
            adapter.spec = host_of(there[site.path], site.slot, method.host).spec
            for module, slot in _modules(there, name, site, method):
                touched.append(module)
                _add(module, name, slot, adapter, method, host_of(module, slot, method.host))
                here(module).roots.setdefault(name, []).append((root, paths[id(module)]))
                root.placed.setdefault(name, set()).add(paths[id(module)])
    except BaseException:
        for module in dict.fromkeys(touched):
            remove(module, name, model)
        if not root.placed:
            guards.release(root, model)
        raise
    finally:
        route.changed()


def _modules(there: guards.Modules, name: str, site: Site, method: Method) -> list[tuple[nn.Module, str]]:
    """Where one adapter goes: its own module, and where it follows ties every other that reads the same parameter."""
    places = [(there[site.path], site.slot)]
    for other in guards.tied(there, site, method):
        module = there[other.path]
        mine = here(module).entries.get(name, ()) if carried(module) else ()
        taken = [adapter for adapter, host, _ in mine if host.slot == other.slot]
        if not any(adapter.method.host is ParameterHost for adapter in taken):
            places.append((module, other.slot))  # a trained copy there is a parameter of its own
    return places


def _add(module: nn.Module, name: str, slot: str, adapter: Adapter, method: Method, host: Any) -> None:
    if carried(module) is None:
        module.__dict__["_deltaw"] = Carried()
        module.__class__ = adapted_class(type(module))
        module.add_module("adapters", nn.ModuleDict())
        if "_old_forward" in module.__dict__:  # accelerate's hooks call this: let it be ours
            module.__dict__["_old_forward"] = types.MethodType(type(module).forward, module)
    there, adapter.method, adapter.name = here(module), method, name
    there.routed.clear()
    entries = (*there.entries.get(name, ()), (adapter, host, None))
    there.entries[name] = tuple(sorted(entries, key=route.outermost))
    adapter.train(module.training)
    holder = cast(nn.ModuleDict, module.adapters)
    if name not in holder:
        holder[name] = nn.ModuleDict()
    slots = cast(nn.ModuleDict, holder[name])
    key = slot if slot not in slots and not hasattr(slots, slot) else f"{slot}_{len(slots)}"
    slots[key] = adapter


def remove(module: nn.Module, name: str, model: nn.Module) -> None:
    """Take adapter `name` off one module of `model`; with the last one the module gets its own class back."""
    there = here(module)
    if name not in there.entries:
        return
    del there.entries[name]
    there.routed.clear()  # it would keep what goes
    holder = cast(nn.ModuleDict, module.adapters)
    if name in holder:
        del holder[name]
    there.live, there.bank, there.batch = tuple(entry for entry in there.live if entry[0].name != name), None, None
    for root, path in there.roots.pop(name, ()):
        root.placed.get(name, set()).discard(path)
        if not root.placed.get(name):
            root.placed.pop(name, None)
        if not root.placed:
            guards.release(root, model)
    if there.entries:
        return
    del module.adapters
    module.__class__ = base_class_of(module)
    del module.__dict__["_deltaw"]
    if "_old_forward" in module.__dict__:
        module.__dict__["_old_forward"] = types.MethodType(type(module).forward, module)
