"""train(config): rows → label masks → base → adapter → steps → run directory. Faults in rows stop before the base loads.

run = deltaw.train({"model": "tiny", "data": {"train": "rows.jsonl"}, "output": "runs/first"})
run.adapter, run.losses["held_out"]
"""

import dataclasses
import itertools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import set_seed

import deltaw
from deltaw.config import parse
from deltaw.config.schema import Config
from deltaw.core import route
from deltaw.core.attach import detach, extract
from deltaw.core.errors import Interrupted, TrainError, UseError
from deltaw.core.files import write_text
from deltaw.core.plan import TargetPlan
from deltaw.data.collate import Collator
from deltaw.data.store import lengths
from deltaw.formats import directory
from deltaw.fusion.fused import fused
from deltaw.infer.evaluate import generate_samples, measured
from deltaw.infer.metrics import metrics
from deltaw.infer.packing import use_packing
from deltaw.models.base import Base, load_base, outline
from deltaw.runs.diagnosis import Finding, recorded
from deltaw.runs.directory import RunDirectory
from deltaw.runs.report import html_report
from deltaw.training import ending
from deltaw.training.attaching import put_on
from deltaw.training.callbacks import CleanStop, Events, GradientCheck, ProgressBar, Steps
from deltaw.training.facts import described, environment, facts, reporters, unchanged
from deltaw.training.forecast import foreseen
from deltaw.training.general import General
from deltaw.training.optimizer import build, groups
from deltaw.training.outlook import held_by, outlook, steps
from deltaw.training.parts import exactly, rates
from deltaw.training.prepare import Prepared, brought, prepare, read_by
from deltaw.training.readback import first_batch, read_back
from deltaw.training.stages import ahead, in_order, warnings
from deltaw.training.trainer import NAME, AdapterTrainer
from deltaw.training.watch import Watch, give_back, peak_memory


@dataclass(frozen=True)
class Run:
    """A finished run: where its adapter is and what was measured."""

    path: Path
    adapter: Path
    plan: TargetPlan
    steps: int
    seconds: float
    losses: Mapping[str, float] = field(default_factory=dict)
    """`train` (last logged), and with held-out rows `base` (before the first step) and `held_out` (after the last)."""
    findings: Sequence[Finding] = ()
    """What its course says, the fine ones too."""


class Shelf:
    """The base and the rows of the last run, for a next one that wants the same."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[Any, Any]] = {}

    def get(self, kind: str, key: Any, make: Callable[[], Any]) -> Any:
        if self._kept.get(kind, (None,))[0] != key:
            self._kept.pop(kind, None)  # before the next one is made: two bases need not fit
            self._kept[kind] = (key, make())
        return self._kept[kind][1]


Ask = Callable[[list[str]], bool]
"""Of warnings, before anything is paid for: shall the run start?"""


def train(
    config: Config | Mapping[str, Any] | str | Path,
    *,
    quiet: bool = False,
    shelf: Shelf | None = None,
    ask: Ask | None = None,
) -> Run:
    """Train an adapter as `config` says (a Config, the same as plain data, or a YAML file) in a new run directory.

    Only adapter tensors receive gradients, checked at the first step. Raises ConfigError, DataError, TargetError before
    anything is trained; TrainError when the run cannot go on, with what is saved so far still in the run directory.
    """
    one_process()
    if isinstance(config, str | Path):
        config = parse.read(config)
    elif not isinstance(config, Config):
        config = parse.parse(config)
    run = RunDirectory(config.output)
    run.must_be_free()
    shelf = shelf or Shelf()
    if not config.stages:
        return _train(config, run, quiet, resume=False, shelf=shelf, ask=ask)
    warned = warnings(ahead(config))  # a fault in the last stage is said before the first is paid for
    if ask is not None and warned and not ask(warned):
        raise TrainError("not started: it was not wanted with these warnings")
    return _staged(config, run, quiet, shelf)


def resume(path: str | Path, *, quiet: bool = False, shelf: Shelf | None = None) -> Run:
    """Continue the run in `path` from its newest checkpoint: weights, optimizer, schedule, RNG and order of rows."""
    one_process()
    run = RunDirectory(path)
    config = parse.parse(run.config())
    if run.adapter.exists():
        raise UseError(f"{path} is finished, its adapter is {run.adapter}: start another run to train further")
    if config.stages:
        return _staged(config, run, quiet, shelf or Shelf())
    run.last_checkpoint()  # the error comes before the base is loaded
    return _train(config, run, quiet, resume=True, shelf=shelf or Shelf())


def _staged(config: Config, run: RunDirectory, quiet: bool, shelf: Shelf) -> Run:
    """All stages; the Run is the last one's, with the path and the adapter of the whole."""

    def one(stage: Config) -> Run:
        return train(stage, quiet=quiet, shelf=shelf)

    def further(stage: RunDirectory) -> Run:
        return resume(stage.path, quiet=quiet, shelf=shelf)

    last = in_order(config, run, quiet, one, further) or _read(RunDirectory(parse.stages(config)[-1].output))
    return dataclasses.replace(last, path=run.path, adapter=run.adapter)


def _read(run: RunDirectory) -> Run:
    """A finished run, from its directory."""
    plan, (end, *_) = run.plan(), run.events("end")[::-1]
    held = TargetPlan(held_by(str(run.adapter), outline(plan["base"])), plan["base_parameters"])
    return Run(run.path, run.adapter, held, end["steps"], end["seconds"], end["losses"], recorded(run))


def one_process() -> None:
    """Several processes would train apart from each other, without a word: refuse them until they train together."""
    world = int(os.environ.get("WORLD_SIZE") or 1)
    if world > 1:
        raise UseError(f"training runs in one process, torchrun started {world}: start `deltaw train` by itself")


def _train(config: Config, run: RunDirectory, quiet: bool, resume: bool, shelf: Shelf, ask: Ask | None = None) -> Run:
    began = time.monotonic()
    checkpoint = run.last_checkpoint() if resume else None
    given = brought(config, checkpoint)
    data: Prepared = shelf.get("data", (*read_by(config), given), lambda: prepare(config, given))
    reporters(config.train.report_to)
    same = (config.model, config.adapter, config.quantize, config.train.dtype)
    # targets that cannot be adapted stop here
    look = None if checkpoint is not None else shelf.get("outlook", same, lambda: outlook(config))
    predicted, warned = ({}, []) if look is None else foreseen(config, look, data)
    if ask is not None and (warned or data.remarks) and not ask([*warned, *data.remarks]):
        raise TrainError("not started: it was not wanted with these warnings")
    dtype, quantize = config.train.dtype, config.quantize
    wanted = (config.model, dtype, quantize)
    base: Base = shelf.get("base", wanted, lambda: load_base(config.model, dtype=dtype, quantize=quantize))
    base = dataclasses.replace(base, tokenizer=data.tokenizer, processor=data.processor)
    try:
        return _on(base, config, run, data, quiet, checkpoint, began, predicted, warned)
    finally:
        _bare(base, config.train.checkpointing)


def _bare(base: Base, checkpointing: bool) -> None:
    """The base as it was, for the next run on it."""
    if NAME in route.names(base.model):
        detach(base.model, NAME)
    base.model.eval().requires_grad_(False)
    if checkpointing:
        base.model.activation_checkpointing_disable()


def _on(
    base: Base, config: Config, run: RunDirectory, data: Prepared, quiet: bool, checkpoint: Path | None, began: float,
    predicted: Mapping[str, Any], warned: list[str],
) -> Run:  # fmt: skip
    resume, watch = checkpoint is not None, Watch(base.model)
    if config.train.checkpointing and not watch.cuda:
        give_back()
    total, every = steps(config, len(data.encoded))
    set_seed(config.train.seed)
    attached = put_on(config, base, run, checkpoint, data)
    plan, parents = attached.plan, attached.parents
    remarks = [*attached.remarks, *warned, *data.remarks]
    known = {**facts(config, base, data, plan, total), "parents": parents, "predicted": predicted}
    known |= {"parts": [dataclasses.asdict(row) for row in attached.table]} if attached.table else {}
    pictured = data.report.with_images > 0
    collate = Collator(base.tokenizer, processor=base.processor)
    some = list(itertools.islice((row for row in data.encoded if row.images), 2)) if pictured else []
    collate.packing = use_packing(
        config.data.packing, base.model, lengths(data.encoded), config.train.batch_size, some, collate
    )
    score = _scorer(config, base, data, run)
    if resume:
        unchanged(run.plan(), known)
        known["predicted"] = run.plan().get("predicted", {})
    peaks = rates(config.adapter, attached.parts, config.train.learning_rate)
    optimizer = build(groups(base.model, NAME, config.train, peaks), config.train)
    if not resume:  # not before: what cannot be attached or optimised leaves no run behind
        run.create(config.to_dict(), deltaw.__version__)
    run.write_plan(known)
    progress, stop, events = ProgressBar(quiet), CleanStop(), Events(run)
    _announce(progress, base, data, plan, remarks)
    base.model.train()
    check = GradientCheck(run, NAME, attached.parts, pictured, lambda: trainer.features)
    trainer = AdapterTrainer(
        base.model, run, config.train, total, every, data.encoded, data.held_out,
        collate, optimizer,
        [events, check, Steps(base.model, NAME), stop, progress], score, data.kept.files,
    )  # fmt: skip
    exactly(base.model, NAME, [target.site for target in plan.targets], optimizer)  # when all that touches it is there
    general = General(base, NAME, run, data.general, data.held_out, config.train.batch_size)
    run.log("resume" if resume else "start", steps=total, trainable=plan.trainable, environment=environment())
    for remark in remarks:
        run.log("warning", text=remark)
    try:
        general.before()
        if data.held_out and not resume:
            trainer.evaluate()
        if checkpoint is not None and ending.over(run, checkpoint, total):
            trainer.take(checkpoint)
        else:
            with fused(base.model):
                trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except BaseException:
        run.withdraw()
        raise
    finally:
        stop.release()
        progress.release()
    reached = trainer.state.global_step
    if stop.interrupted and reached < total:
        run.log("interrupted", step=reached)
        raise Interrupted(f"interrupted at step {reached} of {total}; continue with: deltaw train --resume {run.path}")
    base.model.eval()
    losses = ending.losses(run, trainer)
    outcome = {
        "losses": losses,
        "steps": reached,
        "seconds": round(time.monotonic() - began, 1),
        "peak_memory": peak_memory(),
        "memory_increment": watch.rise,
        "step_seconds": events.step_seconds,
    }
    state = described(config, base, extract(base.model, NAME), outcome, parents, attached.parts)
    directory.write(state, run.adapter, beside=data.kept.files)
    general.after(reached)
    if attached.parts is not None:
        read_back(base, NAME, run.adapter, first_batch(data.encoded, config.train.batch_size))
    findings = ending.diagnosed(run, known, progress.say)
    run.log("end", **outcome)
    write_text(run.path / "report.html", html_report(run))
    return Run(run.path, run.adapter, plan, reached, outcome["seconds"], losses, findings)


def _scorer(config: Config, base: Base, data: Prepared, run: RunDirectory) -> Callable[[], Mapping[str, float]] | None:
    """Answers to some held-out rows and their metrics, with the answers kept; None where none are wanted."""
    rows, t = data.held_out_rows, config.train
    chosen = metrics(t.metrics)
    if not t.generate or rows is None:
        return None

    def score() -> dict[str, float]:
        samples = generate_samples(
            base.model, base.tokenizer, rows.rows[: t.generate], data.policy, batch_size=t.batch_size,
            processor=base.processor,
        )  # fmt: skip
        run.write_samples([dataclasses.asdict(sample) for sample in samples])
        return measured(samples, chosen)

    return score


def _announce(progress: ProgressBar, base: Base, data: Prepared, plan: TargetPlan, remarks: Sequence[str]) -> None:
    size = f"{len(plan)} adapters, {plan.trainable:,} trainable of {plan.base_parameters:,}"
    progress.console.print(f"[bold]{base.name}[/]  {size}", highlight=False)
    progress.say("\n".join([f"{data.report}", data.held_out_said, *data.general_said]))
    for remark in remarks:
        progress.say(f"note: {remark}")
    progress.console.print(data.on(progress.console), highlight=False, markup=False, soft_wrap=True)
