"""What a `peft_type` is to us: the names of its tensors, its options, the method of ours that it holds, both ways.

`peft_methods` has one Kind per peft_type; everything that all of them share (targets, saved modules, biases, unknown
keys) is in `peft_config`, `peft` and `peft_write`, and never asks which kind it is.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor

from deltaw.core.host import HostSpec
from deltaw.core.method import Method, Site, get
from deltaw.core.state import AdapterState
from deltaw.formats.layout import Layout
from deltaw.formats.peft_valid import ALPHAS, POSITIVE, RANKS, WHOLE, Check
from deltaw.methods.patterns import first_hit

Value = TypeVar("Value", int, float)
PLAIN: Mapping[str, Any] = {"bias": "none", "modules_to_save": (), "rank_pattern": {}, "alpha_pattern": {}}
"""Options of PEFT's that finished tensors answer, as they are of one module by itself: a method of ours without such a field can
still be read."""


@dataclass(frozen=True)
class Piece:
    """What a file holds of one module."""

    method: Method
    tensors: Mapping[str, Tensor]
    spec: HostSpec | None = None
    """Shape of the layer, where the tensors tell it: most methods' tensors do not."""
    notes: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Kind:
    type: str
    """PEFT's word, upper case."""
    label: str
    """The method's name in sentences."""
    names: tuple[str, ...]
    """Methods of ours that it holds, by their names in the registry."""
    keys: Mapping[str, str]
    """End of a tensor's key, after the module's path → our name of the tensor. The first of a name is written."""
    slot: str = "weight"
    """Of the modules it sits on."""
    shared: Collection[str] = ()
    """Whole keys of tensors that belong to no module."""
    unread: Mapping[str, str] = field(default_factory=dict)
    """Ends of keys that are not supported → what they are."""
    valid: Mapping[str, Check] = field(default_factory=dict)
    """Options with a meaning here, and the values they may have."""
    unsupported: Mapping[str, str] = field(default_factory=dict)
    """Options that change what an adapter computes; anything but an empty value is refused."""
    unused: Collection[str] = ()
    """Options that say nothing about what finished tensors compute, whatever their value."""
    for_training: Mapping[str, str] = field(default_factory=dict)
    """Options that a file's tensors answer, but a new adapter made from the config would not honour."""
    lacks: Collection[str] = ()
    """Options of other kinds that its config does not have."""
    bias: str | None = None
    """Its word for "the biases of the adapted modules"; None where it trains none."""
    token_rows: bool = False
    """Does it train single token rows beside the method?"""
    kernels: Collection[int] = (0,)
    """Layers that PEFT has it for, by the dimensions of their kernel."""
    lookup: bool = False
    transposed: bool = False
    stacks: bool = False
    """Also for embeddings; also for transformers' Conv1D; also for stacks of experts (`peft_experts`)."""
    same: tuple[str, ...] = ()
    """Attributes of our method that the config decides: adapter_config.json and deltaw.json must agree on them."""

    def holds(self, method: Method) -> bool:
        return method.name in self.names and type(method) is get(method.name)

    def called(self, config: Mapping[str, Any]) -> str:
        return self.label

    # Reading

    def targets(self, config: Mapping[str, Any]) -> Any:
        """Its target_modules: a regular expression or names."""
        return config.get("target_modules")

    def faults(self, config: Mapping[str, Any]) -> list[str]:
        """What else of a config is impossible or not supported, each a sentence."""
        return []

    def notes(self, config: Mapping[str, Any]) -> list[str]:
        """What a user should know of a config that is read all the same."""
        return []

    def untrainable(self, config: Mapping[str, Any]) -> list[str]:
        """What of a readable config a new adapter would not honour."""
        return []

    def method(self, config: Mapping[str, Any]) -> Method:
        """The method that the config describes, with its patterns."""
        raise NotImplementedError

    def forms(self, config: Mapping[str, Any]) -> Sequence[set[str]]:
        """Sets of tensors, by our names, that make one adapter."""
        return [set(self.keys.values())]

    def incomplete(self, config: Mapping[str, Any], group: Collection[str]) -> str | None:
        given = set(group)
        needed = min(self.forms(config), key=lambda form: len(form ^ given))
        if given == needed:
            return None
        said = [f"missing {', '.join(sorted(needed - given))}"] if needed - given else []
        said += [f"unexpected {', '.join(sorted(given - needed))}"] if given - needed else []
        return f"{'; '.join(said)}; the config says {self.called(config)}"

    def read(
        self, config: Mapping[str, Any], path: str, found: Mapping[str, Tensor], shared: Mapping[str, Tensor]
    ) -> Piece | str:
        """What `found` (end of the key → tensor, all of a form) makes of the module at `path`, or why it is no adapter."""
        raise NotImplementedError

    def read_stack(self, config: Mapping[str, Any], name: str, found: Mapping[str, Tensor]) -> Piece | str:
        """As `read`, of the stack of experts that PEFT calls `name`; asked only where `stacks` is set."""
        raise NotImplementedError

    # Writing

    def unheld(self, method: Method, spec: HostSpec | None, transposed: bool) -> str | None:
        """Why PEFT has no format for the method on this layer, or None."""
        if transposed and not self.transposed:
            return f"PEFT has no {self.label} on transformers' Conv1D"
        if spec is None:
            return None
        if spec.lookup and not self.lookup:
            return f"PEFT has no {self.label} on embeddings"
        kernel = len(spec.shape) - 2
        if kernel and kernel not in self.kernels:
            return f"PEFT has no {self.label} on convolutions of {kernel} dimension{'s' if kernel > 1 else ''}"
        return None

    def unplaced(self, state: AdapterState, adapted: Collection[Site], layout: Layout | None) -> list[str]:
        """Why PEFT has no format for these sites together, each a sentence."""
        return []

    def tensors(self, method: Method, group: Mapping[str, Tensor], spec: HostSpec | None) -> dict[str, Tensor]:
        """End of the key → tensor, as PEFT has it, of a layer or of a stack of them."""
        end: dict[str, str] = {}
        for key, name in self.keys.items():
            end.setdefault(name, key)
        return {end[name]: tensor for name, tensor in group.items()}

    def common(self, methods: Mapping[str, Method], specs: Mapping[str, HostSpec | None]) -> dict[str, Tensor]:
        """Tensors that belong to no module, by their whole keys."""
        return {}

    def options(self, methods: Mapping[str, Method], specs: Mapping[str, HostSpec | None]) -> dict[str, Any]:
        """Its part of the config, from the methods by path or name of a parameter. ConfigError where PEFT cannot say it."""
        raise NotImplementedError

    # Shared by those below

    def make(self, config: Mapping[str, Any], name: str, **fields: Any) -> Method:
        """The method called `name`; fields of PLAIN only where it has them."""
        cls = get(name)
        known = {f.name for f in dataclasses.fields(cls)}
        fields = {
            "bias": config.get("bias") or "none",
            "modules_to_save": tuple(dict.fromkeys(config.get("modules_to_save") or ())),
            "rank_pattern": dict(config.get("rank_pattern") or {}),
            "alpha_pattern": dict(config.get("alpha_pattern") or {}),
            **fields,
        }
        return cls(**{key: value for key, value in fields.items() if key in known or key not in PLAIN})

    def plain(self, method: Method) -> Method:
        """Without what concerns other modules."""
        known = {f.name for f in dataclasses.fields(method)}
        return dataclasses.replace(method, **{key: value for key, value in PLAIN.items() if key in known})


@dataclass(frozen=True, kw_only=True)
class Ranked(Kind):
    """Kinds with a rank and a scale α/r per module, by patterns."""

    alpha: str = "alpha"
    """Its word for α."""
    same: tuple[str, ...] = ("scale",)

    def ranked(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return {"rank": config.get("r") or 8, "alpha": float(config.get(self.alpha) or 8)}

    def rank_of(self, config: Mapping[str, Any], path: str) -> int:
        """The rank that the config claims for one module; tensors decide."""
        return int(first_hit(config.get("rank_pattern") or {}, path) or config.get("r") or 8)

    def alpha_of(self, config: Mapping[str, Any], path: str) -> float:
        """α of one module, by PEFT's rule."""
        return float(first_hit(config.get("alpha_pattern") or {}, path) or config.get(self.alpha) or 8)

    def told(self, config: Mapping[str, Any], path: str, rank: int) -> list[str]:
        claimed = self.rank_of(config, path)
        if rank == claimed:
            return []
        return [f"{path}: of rank {rank} by its tensors and {claimed} by the config; the tensors count"]

    def patterned(self, ranks: Mapping[str, int], alphas: Mapping[str, float]) -> dict[str, Any]:
        rank, alpha = common(ranks, 8), common(alphas, 8.0)
        return {
            "r": rank,
            self.alpha: short(alpha),
            "rank_pattern": pattern(ranks, rank),
            "alpha_pattern": {key: short(value) for key, value in pattern(alphas, alpha).items()},
        }


def ranked_rules(alpha: str) -> dict[str, Check]:
    return {"r": WHOLE, alpha: POSITIVE, "rank_pattern": RANKS, "alpha_pattern": ALPHAS}


def common(values: Mapping[str, Value], default: Value) -> Value:
    return Counter(values.values()).most_common(1)[0][0] if values else default


def pattern(values: Mapping[str, Value], usual: Value) -> dict[str, Value]:
    """Exceptions from the usual value: by last name where all modules of that name agree, else by anchored path."""
    by_leaf: dict[str, set[Value]] = {}
    for path, value in values.items():
        by_leaf.setdefault(path.rpartition(".")[2], set()).add(value)
    result: dict[str, Value] = {}
    for path, value in values.items():
        leaf = path.rpartition(".")[2]
        if value != usual:
            result[re.escape(leaf) if len(by_leaf[leaf]) == 1 else f"^{re.escape(path)}"] = value
    assert all((first_hit(result, path) or usual) == value for path, value in values.items())
    return result


def short(value: float) -> float | int:
    """Whole numbers without a point: some readers take no other."""
    return int(value) if float(value).is_integer() else value
