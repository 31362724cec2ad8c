"""What a run will train and what its steps take, before any weight is loaded: on the base's modules and shapes (meta device).

configuration → outline of the base → TargetPlan → adapters on the outline → a step rehearsed → bytes by part, work
"""

import math
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from deltaw.config.schema import Config
from deltaw.core import targets
from deltaw.core.errors import UseError
from deltaw.core.plan import TargetPlan
from deltaw.data.store import lengths
from deltaw.models.base import DTYPES, limit_of, outline
from deltaw.models.quantize import method_of
from deltaw.planner.arithmetic import optimizer_steps
from deltaw.planner.memory import Memory, Weight, optimizer_bytes, weight_bytes
from deltaw.training.prepare import Prepared, longest
from deltaw.training.rehearsal import Counted, dress, rehearse
from deltaw.training.watch import holes

OVERHEAD = {("cpu", "fp32"): 24_000_000, ("cpu", "bf16"): 9_000_000}
CARD = 34_000_000
"""Bytes that libraries take for themselves once a step has run: modules that are imported late, MKL's buffers for products in fp32,
on a card cuBLAS' workspace (docs/memory.md)."""


@dataclass(frozen=True)
class Batch:
    """The widest batch: rows, tokens in each, whether a mask is needed, share of the positions that are learnt."""

    rows: int
    length: int
    padded: bool = True
    supervised: float = 1.0


@dataclass
class Outlook:
    """A base's outline and what will be attached to it."""

    model: Any
    plan: TargetPlan
    _weights: list[Weight] = field(default_factory=list)
    """Those of the base, known once the adapters are on the outline."""
    _counted: dict[Any, Counted] = field(default_factory=dict)

    @property
    def quantized(self) -> str | None:
        """How the base's own files are quantised, in our words; None where they are not. UseError for what we do not know."""
        own = getattr(self.model.config, "quantization_config", None)
        if own is None:
            return None
        record = own if isinstance(own, dict) else own.to_dict()
        if record.get("load_in_8bit"):
            return "int8"
        if record.get("load_in_4bit"):
            return "nf4-double" if record.get("bnb_4bit_use_double_quant") else "nf4"
        raise UseError(f"what a base quantised by {method_of(self.model.config)} takes is not known")

    @property
    def limit(self) -> int | None:
        """The longest row that the base reads, where it says one."""
        return limit_of(self.model.config)

    def count(self, config: Config, batch: Batch, kind: str, dtype: str) -> tuple[Counted, Memory]:
        """A step of `batch` on a device of `kind` (cpu, cuda): what it computes, and its bytes by part.

        The outline keeps the dtype of the first call, and whether it is quantised: others need another outlook.
        """
        kind_of_weights = self.quantized or config.quantize
        if not self._weights:
            self._weights += base_weights(self.model)
            layers = quantized_layers(self.model) if kind_of_weights != "none" else []
            dress(self.model.to(dtype=DTYPES[dtype]), self.plan, layers)
        t = config.train
        options: dict[str, Any] = {
            "device": kind, "padded": batch.padded, "supervised": batch.supervised, "checkpointing": t.checkpointing,
            "accumulated": t.gradient_accumulation > 1,
        }  # fmt: skip
        key = batch, *options.values()
        if key not in self._counted:
            self._counted[key] = rehearse(self.model, batch.rows, batch.length, **options)
        counted = self._counted[key]
        sizes = [p.numel() for p in self.model.parameters() if p.requires_grad]
        adapters, states, peak = 4 * sum(sizes), optimizer_bytes(sizes, t.optimizer), int(counted.peak)
        gradients = min(int(counted.gradients), peak)
        activations = min(int(counted.saved), peak - gradients)
        kept = holes(t.checkpointing) * (adapters + states + peak) if kind == "cpu" else 0
        return counted, Memory(
            weights=weight_bytes(self._weights, DTYPES[dtype].itemsize, kind_of_weights),
            adapters=adapters,
            optimizer=states,
            gradients=gradients,
            activations=activations,
            work=peak - gradients - activations,
            overhead=OVERHEAD.get((kind, dtype), CARD) + int(kept),
            evaluation=int(counted.evaluation),
        )


def outlook(config: Config) -> Outlook | None:
    """The plan that attaching will carry out, on the base's outline; None where the run goes on from an adapter.

    Raises TargetError for targets that cannot be adapted, FileError for a base whose configuration cannot be read.
    """
    chosen = config.adapter
    if chosen.start is not None:
        return None
    model = outline(config.model).requires_grad_(False)
    plan = targets.plan(model, chosen.method, chosen.targets, exclude=chosen.exclude, layers=chosen.layers)
    return Outlook(model, plan)


def widest(config: Config, data: Prepared | None, limit: int | None) -> Batch:
    """The widest batch of a run's rows; without any, of rows as long as it takes.

    It is as wide as the longest row, because every row of a batch is padded to the longest of it. What is learnt of it is
    counted on the longest rows, which may be unlike the others.
    """
    size, most = config.train.batch_size, longest(config, limit)
    if data is None:
        return Batch(size, most)
    found = [min(n, most) for n in lengths(data.encoded)]
    order = sorted(range(len(found)), key=lambda n: -found[n])[:size]
    learnt = sum(min(data.encoded[n].supervised, found[n]) for n in order)
    share = min(1.0, learnt / max(1, len(order) * (found[order[0]] - 1)))
    return Batch(len(order), found[order[0]], size > 1 and min(found) != max(found), share)


def steps(config: Config, rows: int) -> tuple[int, int]:
    """Optimizer steps in all, and between evaluations."""
    t = config.train
    total = t.max_steps or optimizer_steps(rows, t.batch_size * t.gradient_accumulation, t.epochs)
    every = max(1, math.ceil(total / 5)) if t.eval_every == "auto" else t.eval_every
    return total, every


def quantized_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that bitsandbytes quantises: linear ones but for the head."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return [module for module in model.modules() if type(module) is nn.Linear and module is not head]


def base_weights(model: nn.Module) -> list[Weight]:
    """The tensors of a base, and which of them would be quantised."""
    linear = {id(module.weight) for module in quantized_layers(model)}
    tensors = (*model.parameters(), *model.buffers())
    return [Weight(t.numel(), len(t) if t.ndim else 1, id(t) in linear) for t in tensors]
