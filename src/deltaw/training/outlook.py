"""What a run will train and cost, before any weight is loaded: targets and shapes of the base (meta device) → memory and time.

    configuration → outline of the base → TargetPlan → a step rehearsed → Memory, seconds, and whether it fits

Sizes of batches are those of the rows where they are known: the longest decides, because the batch it is in is as wide.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from deltaw.config.schema import Config
from deltaw.core import targets
from deltaw.core.errors import UseError
from deltaw.core.plan import TargetPlan
from deltaw.data.store import lengths
from deltaw.models.base import DEFAULT_LENGTH, DTYPES, outline
from deltaw.planner.devices import Device, fits, seconds
from deltaw.planner.memory import Memory, Weight, optimizer_bytes, weight_bytes
from deltaw.training.prepare import Prepared
from deltaw.training.rehearsal import Counted, dress, rehearse

OVERHEAD = {"cpu": (60e6, 0.03), "cuda": (0.0, 0.0)}
"""Bytes, and share of what tensors take in a step, that libraries and allocators take beside them (docs/memory.md)."""


@dataclass(frozen=True)
class Batch:
    """Of the widest batch: rows, tokens in each, whether a mask is needed, share of the positions that are learnt."""

    rows: int
    length: int
    padded: bool = True
    supervised: float = 1.0


@dataclass
class Outlook:
    """A base's outline, what will be attached to it, and the two rehearsed."""

    model: Any
    plan: TargetPlan
    dressed: bool = False

    def count(self, config: Config, batch: Batch, kind: str, dtype: str) -> Counted:
        if not self.dressed:
            dress(self.model, self.plan)
            self.dressed = True
        self.model.to(dtype=DTYPES[dtype])
        for parameter in self.model.parameters():
            if parameter.requires_grad:  # trained tensors are fp32 whatever the base is
                parameter.data = parameter.data.float()
        t = config.train
        return rehearse(
            self.model, batch.rows, batch.length, device=kind, padded=batch.padded, supervised=batch.supervised,
            checkpointing=t.checkpointing, accumulated=t.gradient_accumulation > 1,
        )  # fmt: skip

    def memory(self, config: Config, counted: Counted, kind: str, dtype: str) -> Memory:
        sizes = [p.numel() for p in self.model.parameters() if p.requires_grad]
        increment = 4 * sum(sizes) + optimizer_bytes(sizes, config.train.optimizer) + counted.peak
        fixed, share = OVERHEAD[kind]
        saved, gradients = int(counted.saved), int(counted.gradients)
        gradients = min(gradients, int(counted.peak))
        saved = min(saved, int(counted.peak) - gradients)
        return Memory(
            weights=weight_bytes(_weights(self.model), DTYPES[dtype].itemsize, config.quantize),
            adapters=4 * sum(sizes),
            optimizer=optimizer_bytes(sizes, config.train.optimizer),
            gradients=gradients,
            activations=saved,
            work=int(counted.peak) - gradients - saved,
            overhead=int(fixed + share * increment),
            evaluation=int(counted.evaluation),
        )


def outlook(config: Config) -> Outlook | None:
    """The plan that attaching will carry out; None where the run goes on from an adapter, which brings its own.

    Raises TargetError for targets that cannot be adapted, FileError for a base whose configuration cannot be read.
    """
    chosen = config.adapter
    if chosen.start is not None:
        return None
    model = outline(config.model).requires_grad_(False)
    return Outlook(
        model, targets.plan(model, chosen.method, chosen.targets, exclude=chosen.exclude, layers=chosen.layers)
    )


def widest(config: Config, data: Prepared | None) -> Batch:
    """The widest batch of a run: of its rows, or, without any, of as long rows as it takes."""
    size = config.train.batch_size
    if data is None:
        return Batch(size, config.data.max_length or DEFAULT_LENGTH)
    found = lengths(data.encoded)
    report = data.report
    unlike = size > 1 and min(found) != max(found)
    return Batch(min(size, len(found)), max(found), unlike, report.supervised_tokens / max(1, report.total_tokens))


def _weights(model: nn.Module) -> list[Weight]:
    """The tensors of the base below the adapters; those of linear layers but the head are what is quantised."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear) and m is not head}
    return [
        Weight(p.numel(), len(p) if p.ndim else 1, id(p) in linear)
        for p in (*model.parameters(), *model.buffers())
        if not p.requires_grad
    ]
