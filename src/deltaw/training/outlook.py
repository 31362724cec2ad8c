"""What a run will train and what its steps take, before any weight is loaded: on the base's modules and shapes (meta device).

configuration → outline of the base → TargetPlan → adapters on the outline → a step rehearsed → bytes by part, work
"""

import math
from dataclasses import dataclass
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

OVERHEAD = {"cpu": (31e6, 0.0), "cuda": (34e6, 0.0)}
"""Bytes, and share of what the tensors of a step take, beside them: libraries' own memory, rounding (docs/memory.md)."""


@dataclass(frozen=True)
class Batch:
    """The widest batch: rows, tokens in each, whether a mask is needed, share of the positions that are learnt."""

    rows: int
    length: int
    padded: bool = True
    supervised: float = 1.0


@dataclass(frozen=True)
class Outlook:
    """A base's outline and what will be attached to it."""

    model: Any
    plan: TargetPlan

    def count(self, config: Config, batch: Batch, kind: str, dtype: str) -> tuple[Counted, Memory]:
        """A step of `batch` on a device of `kind` (cpu, cuda): what it computes, and its bytes by part. Uses the outline up."""
        layers = _quantized(self.model) if config.quantize != "none" else []
        weights = weight_bytes(_weights(self.model), DTYPES[dtype].itemsize, config.quantize)
        dress(self.model.to(dtype=DTYPES[dtype]), self.plan, layers)
        t = config.train
        counted = rehearse(
            self.model, batch.rows, batch.length, device=kind, padded=batch.padded, supervised=batch.supervised,
            checkpointing=t.checkpointing, accumulated=t.gradient_accumulation > 1,
        )  # fmt: skip
        sizes = [p.numel() for p in self.model.parameters() if p.requires_grad]
        adapters, states, peak = 4 * sum(sizes), optimizer_bytes(sizes, t.optimizer), int(counted.peak)
        gradients = min(int(counted.gradients), peak)
        activations = min(int(counted.saved), peak - gradients)
        fixed, share = OVERHEAD[kind]
        return counted, Memory(
            weights=weights,
            adapters=adapters,
            optimizer=states,
            gradients=gradients,
            activations=activations,
            work=peak - gradients - activations,
            overhead=int(fixed + share * (adapters + states + peak)),
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


def _quantized(model: nn.Module) -> list[nn.Module]:
    """The layers that bitsandbytes quantises: linear ones but for the head."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return [module for module in model.modules() if type(module) is nn.Linear and module is not head]


def _weights(model: nn.Module) -> list[Weight]:
    linear = {id(module.weight) for module in _quantized(model)}
    tensors = (*model.parameters(), *model.buffers())
    return [Weight(t.numel(), len(t) if t.ndim else 1, id(t) in linear) for t in tensors]
