"""What a run trains, put on its base: fresh adapters, those of a checkpoint, or those of the adapter that it goes on from."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltaw.config.schema import Config
from deltaw.core import route
from deltaw.core.attach import attach, plan_of, trainable
from deltaw.core.host import host_of
from deltaw.core.method import Site
from deltaw.core.parts import Parts
from deltaw.core.plan import TargetPlan
from deltaw.data.collate import Collator
from deltaw.methods.token_rows import TokenRows
from deltaw.models.adapters import load
from deltaw.models.base import Base, load_base
from deltaw.runs.directory import RunDirectory
from deltaw.training.parts import PartRow, by_part, only, table
from deltaw.training.prepare import Prepared
from deltaw.training.rows import attach_rows, readable
from deltaw.training.trainer import NAME

FIRST_BATCHES = 64
"""Most batches that a method may look at before training."""


@dataclass(frozen=True)
class Attached:
    """What is on the base and what of it is trained."""

    plan: TargetPlan
    """What is trained."""
    parents: list[str]
    """Digests of the adapters that it goes on from."""
    remarks: list[str]
    parts: Parts | None = None
    """Of a run that goes part by part."""
    table: tuple[PartRow, ...] = ()


def put_on(config: Config, base: Base, run: RunDirectory, checkpoint: Path | None, data: Prepared) -> Attached:
    """Attach what the run trains, and make exactly that trainable."""
    chosen = config.adapter
    parents, remarks = _loaded(config, base, run, checkpoint)
    if chosen.parts is not None:
        return _by_part(config, base, data, parents, remarks)
    if chosen.start is None and checkpoint is None:
        plan = attach(
            base.model, chosen.method, targets=chosen.targets, exclude=chosen.exclude, layers=chosen.layers, name=NAME,
            batches=_inputs(base, data, config.train.batch_size), weights=_originals(config),
        )  # fmt: skip
        return Attached(attach_rows(base.model, data.tokens) or plan, [], [])
    trainable(base.model, NAME)
    return Attached(plan_of(base.model, NAME), parents, remarks)


def _loaded(config: Config, base: Base, run: RunDirectory, checkpoint: Path | None) -> tuple[list[str], list[str]]:
    """Load the adapter of the checkpoint or of the parent, where there is one: digests of parents, and remarks."""
    start = config.adapter.start
    if checkpoint is not None:  # also where it had a parent, which may be gone; the trainer asks for the base
        load(base.model, checkpoint / "adapter", name=NAME, allow_base_mismatch=True)
        return run.plan().get("parents", []), []
    if start is None:
        return [], []
    report = load(base.model, start, name=NAME)
    return [report.digest], [f"{start}: {remark}" for remark in report.remarks]


def _by_part(config: Config, base: Base, data: Prepared, parents: list[str], remarks: list[str]) -> Attached:
    """Fresh adapters beside those that are there; what is frozen is decided last, when everything is attached."""
    chosen, model = config.adapter, base.model
    carried = plan_of(model, NAME).targets if NAME in route.names(model) else ()
    rows = bool(config.data.tokens)
    found = by_part(model, chosen, carried, rows)
    for part, plan in found.fresh.items():
        wanted = (chosen.parts or {})[part]
        assert wanted is not None and plan
        attach(
            model, wanted.method, targets={part: wanted.targets}, exclude=wanted.exclude, layers=wanted.layers, name=NAME,
            batches=_inputs(base, data, config.train.batch_size), weights=_originals(config), given=chosen.modules,
        )  # fmt: skip
    if rows and not any(isinstance(target.method, TokenRows) for target in carried):
        attach_rows(model, data.tokens)
    kept = {target.site for target in found.kept}
    whole = plan_of(model, NAME)
    trained = [target for target in whole.targets if target.site not in kept]
    only(model, NAME, [target.site for target in trained])
    plan = TargetPlan(tuple(trained), whole.base_parameters, found.plan(model).notes)
    lines = table(model, chosen, found, config.train.learning_rate, trained)
    return Attached(plan, parents, [*remarks, *found.remarks], found.parts, tuple(lines))


def _inputs(base: Base, data: Prepared, size: int) -> Iterator[dict[str, Any]]:
    """The first training rows as inputs of the model, for methods that start from data."""
    collate, device = Collator(base.tokenizer, processor=base.processor), next(base.model.parameters()).device
    for first in range(0, min(len(data.encoded), FIRST_BATCHES * size), size):
        batch = collate(data.encoded[first : first + size])
        there = {key: value.to(device) for key, value in batch.items() if key != "labels"}
        yield readable(base.model, there, data.tokens)


def _originals(config: Config) -> Callable[[Site], Tensor] | None:
    """The weights of a base that is quantised here, read when the first is asked for."""
    if config.quantize == "none":
        return None

    @functools.cache
    def whole() -> Any:
        return load_base(config.model, dtype=config.train.dtype, device=torch.device("cpu")).model

    return lambda site: host_of(whole().get_submodule(site.path), site.slot).weight
