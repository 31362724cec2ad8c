"""Layers of one module that are called with the same x (q, k and v of an attention), computed by `kernels.siblings`.

Which they are is asked of the module's own forward: a copy of it, with recorders in the place of its layers, is called with
things that stand for the tensors of the real call, until something does not go through (`calls`). No name is looked at. That
is done once for every form of call: which arguments are there, and which of them are the same. And only for modules that have
nothing a trial could change: no buffers or parameters of their own, no lists, tables or objects (`inert`).

Computed together are layers that carry one LoRA or DoRA each, frozen base, no dropout now, where gradients are wanted; all
others by themselves, as ever. A layer that gets another x than the trial said computes again: only time is lost.
"""

import copy
import random
import types
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltaw.core.autocast import autocasts
from deltaw.core.carried import base_class_of, carried
from deltaw.core.host import WeightHost
from deltaw.core.together import Group, Together
from deltaw.kernels.siblings import Layer, siblings

KEY = "_deltaw_siblings"
_OF_A_MODULE = {*nn.Module().__dict__}
_CONFIGURATIONS = {
    "transformers.configuration_utils.PreTrainedConfig",
    "transformers.configuration_utils.PretrainedConfig",
}
MOST = 10_000
"""Stand-ins that one trial may make."""
FORMS = 16
"""Most forms of call of one module that are tried; beyond, its layers compute by themselves."""


class FusedSiblings:
    """Mixin in front of a module's class."""

    unfused: ClassVar[type[nn.Module]]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        own = super().forward  # type: ignore[misc]
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return own(*args, **kwargs)
        known: dict[Any, list[Group]] = self.__dict__[KEY]
        form = _form((*args, *kwargs.values()), tuple(kwargs))
        if form not in known:
            known[form] = called_together(self, self.unfused, args, kwargs) if len(known) < FORMS else []  # type: ignore[arg-type]
        with Together(known[form], together):
            return own(*args, **kwargs)


def together(group: Group, x: Tensor) -> Sequence[Tensor] | None:
    """What `core.together` computes a group with."""
    if not torch.is_grad_enabled() or not x.is_floating_point() or x.ndim < 2 or autocasts(x):
        return None
    layers = []
    for layer in group:
        live = there.live if (there := carried(layer)) is not None else ()
        host = live[0][1] if len(live) == 1 else None
        simple = host.simple() if isinstance(host, WeightHost) else None
        if simple is None or simple[2] is None or simple[2].dropout:
            return None
        weight, bias, (a, b, scale, gain, _) = simple
        layers.append(Layer(weight, bias, a, b, scale, gain))
    return siblings(x, layers)


def candidates(module: nn.Module) -> list[str]:
    """Names of a module's adapted linear layers that may read the same x: two at least have their number of inputs."""
    if carried(module) or "forward" in module.__dict__ or not inert(module):
        return []
    widths = {
        name: child.in_features
        for name, child in module.named_children()
        if carried(child) and issubclass(base_class_of(child), nn.Linear)
    }
    return [name for name, width in widths.items() if list(widths.values()).count(width) > 1]


def inert(module: nn.Module) -> bool:
    """Has the module itself, its children apart, nothing that its forward could write to?"""
    own = {name for name in module.__dict__ if not name.startswith("_deltaw")} - _OF_A_MODULE
    state = [tensor for tensor in (*module._parameters.values(), *module._buffers.values()) if tensor is not None]
    return not state and all(_fixed(module.__dict__[name]) for name in own)


def _fixed(value: Any) -> bool:
    """Can it not be changed, or is it a configuration, which a forward reads, or an object without attributes?"""
    if type(value) in (tuple, frozenset):
        return all(map(_fixed, value))
    if isinstance(value, _PLAIN) or any(
        f"{c.__module__}.{c.__qualname__}" in _CONFIGURATIONS for c in type(value).__mro__
    ):
        return True
    return not isinstance(value, Collection | Tensor | nn.Module) and getattr(value, "__dict__", None) == {}


def called_together(
    module: nn.Module, own: type[nn.Module], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[Group]:
    """Layers of `module` that its forward, `own`'s, calls with one and the same thing, if called with these arguments."""
    groups: dict[int, list[str]] = {}
    for name, x in calls(module, own, args, kwargs, candidates(module)):
        groups.setdefault(id(x), []).append(name)
    return [
        [module.get_submodule(name) for name in group]
        for group in groups.values()
        if len(group) > 1 and len(set(group)) == len(group)
    ]


def calls(
    module: nn.Module, own: type[nn.Module], args: Sequence[Any], kwargs: Mapping[str, Any], layers: Sequence[str]
) -> list[tuple[str, Any]]:
    """(layer, what it is called with) of a trial of the forward, as far as that goes, in order."""
    found: list[tuple[str, Any]] = []
    trial, stands, _Made.left = copy.copy(module), dict[int, Any](), MOST
    trial.__dict__["_modules"] = {
        name: None if child is None else _Recorder(name, found) if name in layers else _Made()
        for name, child in module._modules.items()
    }
    given, named = [_stand(a, stands) for a in args], {name: _stand(a, stands) for name, a in kwargs.items()}
    cards = {a.device for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and a.is_cuda}
    numbers = random.getstate()
    try:
        # what a forward sets comes back: whether there are gradients, and the random numbers of the training
        with torch.enable_grad(), torch.random.fork_rng(devices=cards):
            own.forward(trial, *given, **named)
    except Exception:
        # Whatever it is: the forward asked for something that only tensors have. What was called until then counts.
        return found
    finally:
        random.setstate(numbers)
    return found


class _Made:
    """Stands for what a forward makes or is given: whatever is done with it makes another one. It has no truth, no length
    and no numbers, and is never changed in place."""

    left: ClassVar[int] = 0
    """How many more may be made in this trial: a loop that waits for a number never sees one."""

    def __init__(self, facts: Mapping[str, Any] | None = None):
        _Made.left -= 1
        if _Made.left < 0:
            raise RuntimeError("more than a trial should take")
        self.__dict__.update(facts or {})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or (name.endswith("_") and not name.startswith("_")):
            raise AttributeError(name)  # a protocol that it does not have, or a change in place
        return _Made()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _Made()

    def __bool__(self) -> bool:
        raise TypeError("not known in a trial")

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__name__", "_").endswith("_"):
            raise TypeError("changed in place in a trial")
        return cls()


_OPERATORS = "add radd sub rsub mul rmul truediv rtruediv pow rpow matmul rmatmul neg invert and or xor getitem eq ne lt le gt ge"
for _name in _OPERATORS.split():
    setattr(_Made, f"__{_name}__", _Made.__call__)
_Made.__hash__ = object.__hash__  # type: ignore[assignment]
_Made.__iter__ = lambda self: iter((_Made(), _Made()))  # type: ignore[attr-defined]  # cos and sin


class _Recorder(_Made):
    def __init__(self, name: str, found: list[tuple[str, Any]]):
        super().__init__({"name": name, "found": found})

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs:
            self.found.append((self.name, args[0]))
        return _Made()


_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device, torch.Size, type, types.FunctionType)


def _stand(given: Any, stands: dict[int, Any]) -> Any:
    """What stands for an argument: the same for the same one; what is no tensor and has no state is itself."""
    if isinstance(given, _PLAIN):
        return given
    if type(given) in (tuple, list):
        return type(given)(_stand(one, stands) for one in given)
    if id(given) not in stands:
        facts = {}
        if isinstance(given, Tensor):
            facts = {"shape": given.shape, "ndim": given.ndim, "dtype": given.dtype, "device": given.device}
            facts |= {"size": _size(given.shape), "dim": _number(given.ndim), "requires_grad": given.requires_grad}
        stands[id(given)] = _Made(facts)
    return stands[id(given)]


def _size(shape: torch.Size) -> Any:
    return lambda dim=None: shape if dim is None else shape[dim]


def _number(value: int) -> Any:
    return lambda: value


def _form(values: Iterable[Any], names: tuple[str, ...]) -> Any:
    """What a trial depends on: which arguments are there, of what kind, and which are one and the same tensor."""
    first: dict[int, int] = {}
    kinds = tuple(
        (value.ndim, first.setdefault(id(value), place)) if isinstance(value, Tensor)
        else value if value is None or isinstance(value, bool) else type(value)
        for place, value in enumerate(values)
    )  # fmt: skip
    return kinds, names
