"""A host is one base module that carries adapters; a Host object is a view of one slot (parameter) of it.

The view hides how a layer stores its weight. Adapters see one canonical layout, [out, in, *kernel], whatever the
layer is, so that N methods and M kinds of layer need N + M pieces of code:

    layer                  stored            canonical weight W          y = op(x, W)
    nn.Linear              [out, in]         [out, in]                   x Wᵀ
    transformers Conv1D    [in, out]         [out, in]                   x Wᵀ
    nn.Embedding           [vocab, dim]      [dim, vocab], out = dim     column of W for each id
    nn.Conv1d/2d/3d        [out, in/g, k…]   the same                    convolution with the layer's own stride, …
    bitsandbytes           4 or 8 bit codes  decoded, [out, in]          x Wᵀ
    experts (MoE)          [E, …, …]         [E, out, in]                one matrix for the rows of each expert

`op` is linear in W and leaves the bias out: ΔW acts as y + op(x, ΔW).
"""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltaw.core import plugins
from deltaw.core.carried import carried, here
from deltaw.core.probe import departs
from deltaw.core.spec import HostSpec

Map = Callable[[Tensor], Tensor]


class Host:
    """View of one slot of a base module. Kinds subclass WeightHost (or this, for forward-only hosts)."""

    slots: ClassVar[tuple[str, ...]] = ()
    """Slots that `targets` adapts on this kind of layer."""

    def __init__(self, module: nn.Module, slot: str):
        self.module = module
        self.slot = slot

    @property
    def spec(self) -> HostSpec:
        raise NotImplementedError

    @classmethod
    def has(cls, module: nn.Module, slot: str) -> bool:
        """Is the slot there? A forward-only host, whose slots are no parameters, overrides this."""
        return module._parameters.get(slot) is not None

    @property
    def parameter(self) -> Tensor:
        """The base's own parameter behind the slot: the pristine one while a merge or a trained copy stands for it."""
        found = carried(self.module)
        pristine = found.pristine.get(self.slot) if found is not None else None
        return self.stored if pristine is None else pristine

    @property
    def stored(self) -> nn.Parameter:
        """What the module computes with now; merges write here."""
        parameter = self.module._parameters[self.slot]
        assert parameter is not None
        return parameter

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @property
    def registered(self) -> Any:
        """The class that this view was registered for: the module's own, or the nearest one above it."""
        return next(cls for cls in type(self.module).__mro__ if type(self) in _KINDS.get(_qualified(cls), ()))

    @property
    def quantized(self) -> str | None:
        """How the slot is quantised ("nf4", "int8", …), or None where it holds its values."""
        return None

    def rounded(self, weight: Tensor) -> Tensor:
        """A canonical weight as it will be read back after `write`, in fp32 or wider."""
        return wide(weight.to(self.parameter.dtype))

    def keep(self) -> Tensor:
        """A copy of what the slot holds now, from which `restore` brings back every bit."""
        return self.stored.detach().clone()

    def restore(self, kept: Tensor) -> None:
        """Put back what `keep` gave."""
        with torch.no_grad():
            self.stored.copy_(kept)

    def steady(self) -> tuple[str, Any] | None:
        """Keep the layer from rewriting its own weight while adapters are attached: the attribute set for it, as it was."""
        return None

    def fault(self) -> str | None:
        """Why this very module cannot carry adapters, or None."""
        return None

    @contextlib.contextmanager
    def replaced(self, change: Callable[[Any, Tensor], Any]) -> Iterator[None]:
        """Run the module with change(current, base) in place of the parameter; several replacements nest.

        The module itself is changed while it runs, so threads take turns.
        """
        parameters: dict[str, Any] = self.module._parameters
        pristine = here(self.module).pristine
        with contextlib.nullcontext() if torch.compiler.is_compiling() else TURNS:
            current, outermost = self.stored, self.slot not in pristine
            if outermost:
                pristine[self.slot] = current
            try:
                parameters[self.slot] = change(current, self.parameter)
                yield
            finally:
                parameters[self.slot] = current
                if outermost:
                    del pristine[self.slot]


class WeightHost(Host):
    """A layer whose slot holds a weight with a canonical dense form."""

    slots: ClassVar[tuple[str, ...]] = ("weight",)

    @property
    def weight(self) -> Tensor:
        """The base's canonical dense weight in its own dtype; a view of the parameter where possible. Do not write."""
        return self.parameter

    @property
    def bias(self) -> "ParameterHost | None":
        """The view of the layer's bias, [out]."""
        return ParameterHost(self.module, "bias") if ParameterHost.has(self.module, "bias") else None

    def write(self, weight: Tensor) -> None:
        """Store a canonical weight (any float dtype) in the parameter, in the parameter's dtype and layout."""
        with torch.no_grad():
            self.stored.copy_(weight)

    def adapted(
        self, adapter: Any, call: Callable[..., Any], strength: Tensor | None, *args: Any, **kwargs: Any
    ) -> Any:
        """The call with a WeightAdapter's change added to its output. Override where that is too late, or slow."""
        y, x = call(*args, **kwargs), args[0] if args else kwargs["input"]
        return y + (adapter.branch(self, x) if strength is None else adapter.weighted(self, x, strength))

    def simple(self) -> tuple[Tensor, Tensor | None, Any] | None:
        """(W, bias, `Change` or None) where the layer now is W and at most that beside it, W and bias frozen; else None."""
        return None

    def op(self, x: Tensor, weight: Tensor) -> Tensor:
        """The layer's operator with another canonical weight, without bias. Linear in `weight`."""
        raise NotImplementedError

    def low_rank(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """op(x, b @ a) without forming b @ a. a: [r, in, *kernel], b: [out, r, *ones]."""
        raise NotImplementedError

    grouped: ClassVar[Callable[..., Tensor] | None] = None
    """`kernels.grouped` of layers whose rows go through a [r, in] and bt [r, out] as vectors do. A subclass says so itself."""
    fresh: bool = False
    """Is the layer's output a new tensor at every call, so that it may be added to in place?"""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.grouped = cls.__dict__.get("grouped")

    def act(
        self, x: Tensor, dense: Callable[[], Tensor], vectors: Map | None = None, columns: Map | None = None
    ) -> Tensor:
        """op(x, ΔW) by the cheapest form of ΔW that this kind of layer can use, of those that the method offers.

        dense() is ΔW itself; vectors(x) is x ΔWᵀ for vectors [.., in]; columns(ids) is the column of ΔW for each id.
        """
        return self.op(x, dense())

    @property
    def out_dim(self) -> int:
        """The dimension of the layer's output that counts `out` (−1, or −1 − spatial for convolutions)."""
        return -1

    def probe(self) -> Tensor:
        """A small input of the layer (on the CPU, fp32 or ids), for checking `op` against the layer's own forward."""
        return torch.randn(2, self.spec.shape[1])

    def fault(self) -> str | None:
        """Where a subclass brings a forward of its own, compare `op` with it on a random input instead of trusting."""
        layer = type(self.module)
        own = layer.forward is not self.registered.forward
        return departs(self) if own and not hasattr(layer, "base_class") else None


class ParameterHost(Host):
    """Any module that owns parameters, seen as stored: the host of fully trained copies (weights, biases, norms)."""

    @property
    def spec(self) -> HostSpec:
        return HostSpec(tuple(self.parameter.shape), linear=False)

    @property
    def weight(self) -> Tensor:
        return self.parameter

    def write(self, weight: Tensor) -> None:
        with torch.no_grad():
            self.stored.copy_(weight)

    def fault(self) -> str | None:
        kind = type(self.module).__name__
        if isinstance(self.module, nn.ParameterList | nn.ParameterDict):
            return f"a {kind} is never called, a trained copy there would be ignored"
        if not self.parameter.is_floating_point():
            return f"its {self.slot} is quantised ({self.parameter.dtype}), a trained copy needs the values: load the base unquantised"
        computes = [type(hook) for hook in self.module._forward_pre_hooks.values() if hasattr(hook, "compute_weight")]
        if computes:
            return f"{computes[0].__name__} computes the weight of this {kind} before every call: remove it first"
        return None


def wide(weight: Tensor) -> Tensor:
    """In fp32, or in fp64 where it is that."""
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


TURNS = threading.RLock()  # held while a module is changed for the time of one call
_KINDS: dict[str, list[type[Host]]] = {}  # qualified name of a layer class → views of it
_FAMILIES: list[tuple[Callable[[type], bool], type[Host]]] = []  # what tells a class by itself → the view of it


def register(*layers: type[nn.Module] | str | Callable[[type], bool]) -> Callable[[type[Host]], type[Host]]:
    """Class decorator: this Host is the view of `layers`: classes, qualified names (which need no import of the library
    that owns the class), or functions that say of a class by itself whether it is one of a family."""

    def add(kind: type[Host]) -> type[Host]:
        for layer in layers:
            if isinstance(layer, str | type):
                _KINDS.setdefault(layer if isinstance(layer, str) else _qualified(layer), []).append(kind)
            else:
                _FAMILIES.append((layer, kind))
        _kind.cache_clear()
        return kind

    return add


def _qualified(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def kind_of(layer: type[nn.Module], protocol: type[Host] = WeightHost) -> type[Host] | None:
    """The view of class `layer` that satisfies `protocol`: the nearest registered base class wins."""
    plugins.load("deltaw.hosts")
    return ParameterHost if protocol is ParameterHost else _kind(layer, protocol)  # type: ignore[no-any-return]


def _find(layer: type[nn.Module], protocol: type[Host]) -> type[Host] | None:
    def views(cls: type) -> list[type[Host]]:
        return [*_KINDS.get(_qualified(cls), ()), *(kind for tells, kind in _FAMILIES if tells(cls))]

    return next((kind for cls in layer.__mro__ for kind in views(cls) if issubclass(kind, protocol)), None)


_kind: Any = functools.cache(_find)


def host_of(module: nn.Module, slot: str | None = None, protocol: type[Host] = WeightHost) -> Any:
    """The view of `module`'s slot (its first by default), or None where no registered kind fits."""
    kind = kind_of(type(module), protocol)
    return None if kind is None else kind(module, slot or (*kind.slots, "weight")[0])
