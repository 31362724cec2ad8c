"""A Method is what the user writes: a frozen configuration that knows how to build an Adapter for a shape.

    LoRA(rank=8, alpha=16).at("layers.0.q_proj", spec).build(spec) -> Adapter

Its class is the registry key: `get("lora")` gives it back, fields are the options of configuration files, and
`to_dict` / `from_dict` are what adapter files hold. A new method is one file that registers one class.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from deltaw.core import plugins
from deltaw.core.adapter import Adapter, Factors
from deltaw.core.errors import ConfigError, UseError, did_you_mean, faults
from deltaw.core.host import Host, HostSpec, WeightHost


class Site(NamedTuple):
    """Where an adapter sits: the path of a base module ("" is the model itself) and one slot of it."""

    path: str
    slot: str = "weight"

    def __str__(self) -> str:
        return f"{self.path or '(the model itself)'}" + ("" if self.slot == "weight" else f":{self.slot}")


Owned = Mapping[str, Mapping[str, tuple[int, ...]]]
"""Path of every module → name and shape of each parameter that it owns itself."""
Part = tuple["Method", Mapping[str, Tensor], float]
"""One term of a mix at one site: its method, its tensors and its weight."""


@dataclass(frozen=True, kw_only=True)
class Given:
    """What a start may look at beside the model, as given to `attach`; None where it was not."""

    batches: Iterable[Any] | None = None
    """Inputs of the model."""
    weights: Callable[[Site], Tensor] | None = None
    """Site → canonical weight before the base was quantised."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """Base of all methods. Subclasses add fields, each with a docstring, check them in `invalid` and build adapters."""

    name: ClassVar[str]
    suits: ClassVar[str] = ""
    """When to use it, in a few words: for the table of methods."""
    version: ClassVar[int] = 1
    """Raised when the meaning of the saved tensors changes; a file of a newer version is refused."""
    host: ClassVar[type[Host]] = WeightHost
    """The view this method needs of a module; modules without it cannot carry the method."""
    stacks: ClassVar[bool] = False
    """True where it sits on stacks of weights (experts): its adapter's tensors are then those of every weight, stacked
    along a first dimension, and so are its factors, which it must have. A subclass says so itself."""
    follows_ties: ClassVar[bool] = False
    """True for changes of a table itself (token rows): they act in every module that is tied to the same parameter."""
    common: ClassVar[tuple[str, ...]] = ()
    """Fields that `penalty` and `after_step` read for all adapters of the kind under one name: they must not differ."""

    @property
    def corrects(self) -> bool:
        """Does its change make up for what quantising the base rounded off? It is wrong on any other base then."""
        return False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.stacks = cls.__dict__.get("stacks", False)

    def __post_init__(self) -> None:
        found = list(self.invalid())
        if found:
            raise faults(ConfigError, f"{type(self).__name__}(…) cannot be built", found)

    def invalid(self) -> Sequence[str]:
        """Faults of the fields by themselves, each a sentence."""
        return ()

    def unfit(self, spec: HostSpec) -> str | None:
        """Why a layer of this shape cannot carry the method as configured, or None."""
        return None

    def unstacked(self, spec: HostSpec) -> str | None:
        """Why the method cannot sit on this stack, or None; also of a slot that is no stack."""
        if spec.stack is None or self.stacks:
            return None
        return f"{self.name} has no form for stacks of weights (experts), lora has"

    def unused(self, paths: Sequence[str]) -> Sequence[str]:
        """Faults of fields that name modules (patterns) and match none of the adapted `paths`."""
        return ()

    def over(self, specs: Mapping[Site, HostSpec]) -> Self:
        """The method as it applies to this set of layers: values that depend on all of them. Called before `at`."""
        return self

    def at(self, path: str, spec: HostSpec) -> Self:
        """The method as it applies to one module: defaults and per-module patterns resolved to plain values."""
        return self

    def companions(self, parameters: Owned, targets: Sequence[str]) -> "Mapping[Site, Method]":
        """Further sites trained with the targets (biases, whole modules), from what every module owns itself."""
        return {}

    def build(self, spec: HostSpec) -> Adapter:
        """A fresh adapter for a slot of this shape, fp32 on the CPU, whose change is zero."""
        raise NotImplementedError

    def prepare(
        self, model: nn.Module, sites: "Mapping[Site, tuple[Method, HostSpec]]", given: Given
    ) -> "Mapping[Site, tuple[Method, Mapping[str, Tensor]]]":
        """For starts that depend on data: other methods for some sites, and tensors that their adapters start with.

        Called by `attach` before it changes the model.
        """
        return {}

    def penalty(self, adapters: Sequence[Adapter]) -> Tensor | None:
        """A term that is added to the training loss, of all adapters of this kind under one name; None for no term."""
        return None

    def after_step(self, adapters: Sequence[Adapter], step: int, total: int) -> None:
        """Called in training after optimizer step `step` of `total` (from 1), the gradients still there.

        What it must remember are buffers of the adapters that are not persistent: checkpoints keep them, files do not.
        """

    def settled(self, step: int, total: int) -> bool:
        """Has the adapter after step `step` of `total` the form that it ends with? The best one is sought among those."""
        return True

    def rates(self) -> Mapping[str, float]:
        """Factors of the learning rate for some of its tensors, by name; those left out have 1."""
        return {}

    def factors(self, tensors: Mapping[str, Tensor]) -> Factors | None:
        """Saved tensors as low-rank factors (2-D, fp32) where the change is exactly that, else None."""
        return None

    def finished(self, tensors: Mapping[str, Tensor]) -> "tuple[Method, Mapping[str, Tensor]]":
        """The same change as files hold it, without what only further training needs."""
        return self, tensors

    def combine(self, parts: Sequence[Part]) -> "tuple[Method, dict[str, Tensor]]":
        """Σ weight · ΔW of several states at one site as one method and its tensors, exact to rounding."""
        names = " + ".join(sorted({type(method).__name__ for method, _, _ in parts}))
        ranked = all(method.host is WeightHost and not method.follows_ties for method, _, _ in parts)
        way = "; in a given rank it can (mixing.svd, deltaw mix --rank)" if ranked else ""
        raise UseError(f"{names} at one site cannot be mixed exactly: the change is not a weighted sum of factors{way}")

    def to_dict(self) -> dict[str, Any]:
        """Name, version and the fields that differ from their defaults, ready for JSON."""
        default = {
            f.name: f.default_factory() if callable(f.default_factory) else f.default for f in dataclasses.fields(self)
        }
        fields = {k: v for k, v in dataclasses.asdict(self).items() if v != default[k]}
        return {"method": self.name, "version": self.version, **fields}


class Shapes:
    """Names and shapes of the tensors that methods build: on the meta device, once for all equal sites of a model."""

    def __init__(self) -> None:
        self._known: dict[HostSpec, list[tuple[Method, tuple[Mapping[str, tuple[int, ...]], int]]]] = {}

    def of(self, method: Method, spec: HostSpec) -> tuple[Mapping[str, tuple[int, ...]], int]:
        """Of a resolved method: names and shapes of what its state holds, and the number of trained values."""
        known = self._known.setdefault(spec, [])
        found = next(
            (found for other, found in known if type(other) is type(method) and vars(other) == vars(method)), None
        )
        if found is None:
            with torch.device("meta"):  # nothing is drawn or allocated
                adapter = method.build(spec)
            shapes = {name: tuple(tensor.shape) for name, tensor in adapter.state_dict().items()}
            found = shapes, sum(p.numel() for p in adapter.parameters())
            known.append((method, found))
        return found


def from_dict(record: Mapping[str, Any]) -> Method:
    """The Method that `to_dict` wrote. Unknown methods, newer versions and unknown fields are errors."""
    fields = dict(record)
    method = get(str(fields.pop("method", "")))
    version = fields.pop("version", 1)
    if version > method.version:
        raise ConfigError(
            f"method {method.name!r} was saved in version {version}, this deltaw reads up to {method.version}: upgrade"
        )
    known = {f.name for f in dataclasses.fields(method)}
    unknown = [f"no field {name!r}{did_you_mean(name, known)}" for name in fields if name not in known]
    if unknown:
        raise faults(ConfigError, f"method {method.name!r}", unknown)
    return method(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})


_METHODS: dict[str, type[Method]] = {}


def register(name: str) -> Callable[[type[Method]], type[Method]]:
    """Class decorator: make the Method known as `name` to configurations, files and `get`."""

    def add(method: type[Method]) -> type[Method]:
        taken = _METHODS.get(name)
        if taken is not None and taken.__qualname__ != method.__qualname__:
            raise ConfigError(f"method name {name!r} is taken by {taken.__module__}.{taken.__qualname__}")
        method.name = name
        _METHODS[name] = method
        return method

    return add


def get(name: str) -> type[Method]:
    """The Method class called `name`, e.g. get("lora")."""
    plugins.load("deltaw.methods")
    if name not in _METHODS:
        raise ConfigError(f"no method {name!r}{did_you_mean(name, _METHODS)}; known: {', '.join(sorted(_METHODS))}")
    return _METHODS[name]


def names() -> list[str]:
    """All registered method names, sorted."""
    plugins.load("deltaw.methods")
    return sorted(_METHODS)
