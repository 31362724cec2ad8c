"""What an adapted module carries, in one private object, and the root it was adapted from.

All that deltaw keeps on a base's modules lies under one key of their `__dict__`, so that no attribute of theirs is ever
taken: `entries`, `live` or `merged` may be names of the base's own.
"""

import weakref
from typing import Any

from torch import Tensor, nn

Live = tuple[Any, Any, Any]
"""One adapter of a module: the adapter, the view of its host, its strength (None = 1, a 0-dim tensor, or a `PerRow`)."""

_CARRIED, _HELD, _ROOT = "_deltaw", "_deltaw_held", "_deltaw_root"


class Carried:
    """Of one adapted module: its adapters, which act, and what stands in the place of its own parameters."""

    def __init__(self) -> None:
        self.entries: dict[str, tuple[Live, ...]] = {}
        """Name → its adapters here, ready to be made live."""
        self.live: tuple[Live, ...] = ()
        """What acts now, innermost first."""
        self.bank: Any = None
        """The factors of its adapters in one place (`core.bank.Bank`), where that can be."""
        self.batch: Any = None
        """What the bank does with the rows of a batch (`core.bank.Batch`), as long as its `live` is live."""
        self.routed: dict[Any, tuple[tuple[Live, ...], Any]] = {}
        """Routes of rows that were live before → what `live` and `batch` were then."""
        self.merged: tuple[str, ...] = ()
        """Names whose change is in the weights; never live."""
        self.roots: dict[str, list[tuple[Root, str]]] = {}
        """Name → the roots it was attached through, with the path of this module as each of them sees it."""
        self.pristine: dict[str, Tensor] = {}
        """Slot → the base's own parameter, while a merged weight or a trained copy stands in its place."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "routed": {}}  # a copy makes its own


def carried(module: nn.Module) -> Carried | None:
    """What `module` carries, or None for one that is not adapted."""
    return module.__dict__.get(_CARRIED)


def here(module: nn.Module) -> Carried:
    """What an adapted module carries."""
    found: Carried = module.__dict__[_CARRIED]
    return found


class Root:
    """The model that adapters were attached through: what it froze is given back when the last of them goes.

    Copies of the model get a root of their own; a model that comes out of a pickle finds its root when it is used.
    """

    def __init__(self, model: nn.Module):
        self.model: weakref.ref[nn.Module] | None = weakref.ref(model)
        self.placed: dict[str, set[str]] = {}
        """Name of an adapter → paths, seen from the model, of the modules that carry it."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "Root":
        copy = Root.__new__(Root)
        memo[id(self)] = copy
        mine = self.model() if self.model is not None else None
        twin = memo.get(id(mine))
        copy.model = None if twin is None else weakref.ref(twin)
        copy.placed = {name: set(paths) for name, paths in self.placed.items()}
        return copy

    def __getstate__(self) -> dict[str, Any]:
        return {"model": None, "placed": self.placed}


class Held:
    """Of one module that a root froze: the flags its parameters had, and every root that wants them frozen."""

    def __init__(self, module: nn.Module):
        self.required = {name for name, p in module._parameters.items() if p is not None and p.requires_grad}
        self.roots: list[Root] = []
        self.switched_off: tuple[str, Any] | None = None
        """Name and value of the flag of something that would ignore adapters or rewrite weights."""


def hold(model: nn.Module) -> Root:
    """The root of `model`, made at its first adapter: it holds the flags of every parameter as they are now."""
    root: Root | None = model.__dict__.get(_ROOT)
    if root is None:
        root = model.__dict__[_ROOT] = Root(model)
        for module in model.modules():
            held(module).roots.append(root)
    root.model = weakref.ref(model)  # a model out of a pickle
    return root


def vanished(model: nn.Module, name: str) -> list[str]:
    """Paths where adapter `name` was attached through `model` and is no longer: someone replaced those modules."""
    root: Root | None = model.__dict__.get(_ROOT)
    there = dict(model.named_modules())
    paths = root.placed.get(name, set()) if root is not None else set()

    def carries(path: str) -> bool:
        found = carried(there[path]) if path in there else None
        return found is not None and name in found.entries

    return sorted(path for path in paths if not carries(path))


def held(module: nn.Module) -> Held:
    """The record of one module's flags, made where there is none."""
    return module.__dict__.setdefault(_HELD, Held(module))  # type: ignore[no-any-return]


def forget(root: Root, fallback: nn.Module) -> list[nn.Module]:
    """Undo `hold`: flags come back where no other root wants them frozen. Returns the modules that are free now.

    `fallback` stands for the root's model where that is gone (a copy or a pickle of a part of it).
    """
    model = (root.model() if root.model is not None else None) or fallback
    model.__dict__.pop(_ROOT, None)
    free = []
    for module in model.modules():
        record: Held | None = module.__dict__.get(_HELD)
        if record is None or root not in record.roots:
            continue
        record.roots.remove(root)
        if record.roots:
            continue
        del module.__dict__[_HELD]
        if record.switched_off is not None:
            setattr(module, *record.switched_off)
        for name, parameter in module._parameters.items():
            if parameter is not None:
                parameter.requires_grad_(name in record.required)
        free.append(module)
    return free


def base_class_of(module: nn.Module) -> type[nn.Module]:
    """The class a module had before it was adapted."""
    return getattr(type(module), "base_class", type(module))
