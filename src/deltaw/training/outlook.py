"""What a run will train and what its steps take, before any weight is loaded: on the base's modules and shapes (meta device).

configuration → outline of the base → TargetPlan → adapters on the outline → a step rehearsed → bytes by part, work
"""

import math
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from deltaw.config.schema import Config
from deltaw.core import targets
from deltaw.core.plan import TargetPlan
from deltaw.data.store import lengths
from deltaw.models.base import DEFAULT_LENGTH, DTYPES, outline
from deltaw.planner.memory import Memory, Weight, optimizer_bytes, weight_bytes
from deltaw.training.prepare import Prepared
from deltaw.training.rehearsal import Counted, dress, rehearse
from deltaw.training.watch import holes

OVERHEAD = {"cpu": 31_000_000, "cuda": 34_000_000}
"""Bytes that libraries take for themselves once a step has run: modules that are imported late, cuBLAS' workspace (docs/memory.md)."""


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

    def count(self, config: Config, batch: Batch, kind: str, dtype: str) -> tuple[Counted, Memory]:
        """A step of `batch` on a device of `kind` (cpu, cuda): what it computes, and its bytes by part.

        The outline keeps the dtype of the first call, and whether it is quantised: others need another outlook.
        """
        if not self._weights:
            self._weights += base_weights(self.model)
            layers = quantized_layers(self.model) if config.quantize != "none" else []
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
            weights=weight_bytes(self._weights, DTYPES[dtype].itemsize, config.quantize),
            adapters=adapters,
            optimizer=states,
            gradients=gradients,
            activations=activations,
            work=peak - gradients - activations,
            overhead=OVERHEAD[kind] + int(kept),
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


def widest(config: Config, data: Prepared | None) -> Batch:
    """The widest batch of a run's rows; without any, of rows as long as it takes.

    It is as wide as the longest row, because every row of a batch is padded to the longest of it.
    """
    size = config.train.batch_size
    if data is None:
        return Batch(size, config.data.max_length or DEFAULT_LENGTH)
    longest = config.data.max_length or DEFAULT_LENGTH
    found, report = [min(n, longest) for n in lengths(data.encoded)], data.report
    share = report.supervised_tokens / max(1, report.total_tokens)
    return Batch(min(size, len(found)), max(found), size > 1 and min(found) != max(found), share)


def steps(config: Config, rows: int) -> tuple[int, int]:
    """Optimizer steps in all, and between evaluations."""
    t = config.train
    batches = math.ceil(rows / t.batch_size)
    total = t.max_steps or max(1, math.ceil(math.ceil(batches / t.gradient_accumulation) * t.epochs))
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
