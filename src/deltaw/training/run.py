"""train(config): rows → label masks → base → adapter → steps → run directory. Faults in rows stop before the base loads.

run = deltaw.train({"model": "tiny", "data": {"train": "rows.jsonl"}, "output": "runs/first"})
run.adapter, run.losses["held_out"]
"""

import dataclasses
import hashlib
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import set_seed

import deltaw
from deltaw.config import parse
from deltaw.config.schema import Config
from deltaw.core.attach import attach, extract
from deltaw.core.errors import TrainError, UseError
from deltaw.core.plan import TargetPlan
from deltaw.data.collate import Collator
from deltaw.data.encode import Encoded
from deltaw.formats import directory
from deltaw.infer.packing import use_packing
from deltaw.models.base import Base, load_base
from deltaw.runs.directory import RunDirectory
from deltaw.training.callbacks import CleanStop, Events, GradientCheck, ProgressBar, peak_memory
from deltaw.training.prepare import Prepared, prepare
from deltaw.training.trainer import NAME, AdapterTrainer


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


def train(config: Config | Mapping[str, Any] | str | Path, *, quiet: bool = False) -> Run:
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
    return _train(config, run, prepare(config), quiet, resume=False)


def resume(path: str | Path, *, quiet: bool = False) -> Run:
    """Continue the run in `path` from its newest checkpoint: weights, optimizer, schedule, RNG and order of rows."""
    one_process()
    run = RunDirectory(path)
    config = parse.parse(run.config())
    run.last_checkpoint()  # the error comes before the base is loaded
    if run.adapter.exists():
        raise UseError(f"{path} is finished, its adapter is {run.adapter}: start another run to train further")
    return _train(config, run, prepare(config), quiet, resume=True)


def one_process() -> None:
    """Several processes would train apart from each other, without a word: refuse them until they train together."""
    world = int(os.environ.get("WORLD_SIZE") or 1)
    if world > 1:
        raise UseError(f"training runs in one process, torchrun started {world}: start `deltaw train` by itself")


def _train(config: Config, run: RunDirectory, data: Prepared, quiet: bool, resume: bool) -> Run:
    began = time.monotonic()
    report = data.report
    steps, every = _steps(config, len(data.encoded))
    base = dataclasses.replace(load_base(config.model, dtype=config.train.dtype), tokenizer=data.tokenizer)
    set_seed(config.train.seed)
    chosen = config.adapter
    plan = attach(
        base.model, chosen.method, targets=chosen.targets, exclude=chosen.exclude, layers=chosen.layers, name=NAME
    )
    if not resume:  # not before: what cannot be attached leaves no run behind
        run.create(config.to_dict(), deltaw.__version__)
    run.write_plan(
        {
            "base": base.name,
            "method": chosen.method.name,
            "adapters": len(plan),
            "trainable": plan.trainable,
            "base_parameters": plan.base_parameters,
            "rows": report.kept,
            "held_out": len(data.held_out),
            "dropped": dict(report.dropped),
            "supervised_tokens": report.supervised_tokens,
            "steps": steps,
        }
    )
    progress, stop = ProgressBar(quiet), CleanStop()
    progress.console.print(
        f"[bold]{base.name}[/]  {len(plan)} adapters, {plan.trainable:,} trainable of {plan.base_parameters:,}",
        highlight=False,
    )
    progress.console.print(f"{report}\nheld out {len(data.held_out):,} rows", highlight=False)
    progress.console.print(data.shown(), highlight=False, markup=False, soft_wrap=True)
    lengths = [len(row.ids) for row in data.encoded]
    packing = use_packing(config.data.packing, base.model, lengths, config.train.batch_size)
    base.model.train()
    trainer = AdapterTrainer(
        base.model, run, config.train, steps, every, data.encoded, data.held_out,
        Collator(base.tokenizer, packing=packing),
        [Events(run), GradientCheck(run, NAME), stop, progress],
    )  # fmt: skip
    run.log("resume" if resume else "start", steps=steps, trainable=plan.trainable)
    checkpoint = str(run.last_checkpoint()) if resume else None
    try:
        if data.held_out and not resume:
            trainer.evaluate()
        trainer.train(resume_from_checkpoint=checkpoint)
    except BaseException:
        run.withdraw()
        raise
    finally:
        stop.release()
        progress.release()
    first = [event["loss"] for event in run.events("eval") if event["step"] == 0]
    before = {"base": first[0]} if first else {}
    reached = trainer.state.global_step
    if stop.interrupted:
        run.log("interrupted", step=reached)
        raise TrainError(f"interrupted at step {reached} of {steps}; continue with: deltaw train --resume {run.path}")
    base.model.eval()
    losses = {**before, **_losses(trainer, data.held_out)}
    facts = {
        "losses": losses,
        "steps": reached,
        "seconds": round(time.monotonic() - began, 1),
        "peak_memory": peak_memory(),
    }
    directory.write(_described(config, base, extract(base.model, NAME), facts), run.adapter)
    run.log("end", **facts)
    return Run(run.path, run.adapter, plan, reached, facts["seconds"], losses)


def _steps(config: Config, rows: int) -> tuple[int, int]:
    """Optimizer steps in all, and between evaluations."""
    t = config.train
    batches = math.ceil(rows / t.batch_size)
    steps = t.max_steps or max(1, math.ceil(math.ceil(batches / t.gradient_accumulation) * t.epochs))
    every = max(1, math.ceil(steps / 5)) if t.eval_every == "auto" else t.eval_every
    return steps, every


def _losses(trainer: AdapterTrainer, evaluated: list[Encoded]) -> dict[str, float]:
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    result = {"train": logged[-1]} if logged else {}
    if evaluated:
        result["held_out"] = trainer.evaluate()["eval_loss"]
    return result


def _described(config: Config, base: Base, state: Any, facts: Mapping[str, Any]) -> Any:
    """The state with what a user of the files must know: task, base, template, mask policy, recipe, what was measured."""
    template = getattr(base.tokenizer, "chat_template", None) or ""
    identity = dataclasses.replace(state.base, name=base.name)
    meta = {
        "task_type": "CAUSAL_LM",
        "chat_template": hashlib.sha256(template.encode()).hexdigest() if template else None,
        "mask": "all tokens" if config.data.train_on_prompt else "answers only",
        "recipe": {key: value for key, value in config.to_dict().items() if key in ("data", "adapter", "train")},
        "metrics": dict(facts),
    }
    return dataclasses.replace(state, base=identity, meta=meta)
