"""train(config): rows → label masks → base → adapter → steps → run directory. Faults in rows stop before the base loads.

run = deltaw.train({"model": "tiny", "data": {"train": "rows.jsonl"}, "output": "runs/first"})
run.adapter, run.losses["held_out"]
"""

import dataclasses
import hashlib
import math
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import set_seed
from transformers.integrations import get_available_reporting_integrations

import deltaw
from deltaw.config import parse
from deltaw.config.schema import Config
from deltaw.core.attach import attach, extract, plan_of, trainable
from deltaw.core.errors import TrainError, UseError, did_you_mean, faults
from deltaw.core.files import write_text
from deltaw.core.plan import TargetPlan
from deltaw.data.collate import Collator
from deltaw.data.dataset import digest
from deltaw.data.encode import Encoded
from deltaw.data.template import keep_template
from deltaw.formats import directory
from deltaw.infer.evaluate import generate_samples
from deltaw.infer.metrics import metrics
from deltaw.infer.packing import use_packing
from deltaw.models.adapters import load
from deltaw.models.base import Base, load_base
from deltaw.runs.directory import RunDirectory
from deltaw.runs.report import html_report
from deltaw.training.callbacks import CleanStop, Events, GradientCheck, ProgressBar, peak_memory
from deltaw.training.optimizer import groups
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
    _reporters(config.train.report_to)
    steps, every = _steps(config, len(data.encoded))
    base = dataclasses.replace(load_base(config.model, dtype=config.train.dtype), tokenizer=data.tokenizer)
    set_seed(config.train.seed)
    plan, parents = _attach(config, base)
    facts = _facts(config, base, data, plan, steps)
    lengths = [len(row.ids) for row in data.encoded]
    packing = use_packing(config.data.packing, base.model, lengths, config.train.batch_size)
    if resume:
        _unchanged(run.plan(), facts)
    else:  # not before: what cannot be attached leaves no run behind
        groups(base.model, NAME, config.train)
        run.create(config.to_dict(), deltaw.__version__)
    run.write_plan(facts)
    progress, stop = ProgressBar(quiet), CleanStop()
    _announce(progress, base, data, plan)
    base.model.train()
    trainer = AdapterTrainer(
        base.model, run, config.train, steps, every, data.encoded, data.held_out,
        Collator(base.tokenizer, packing=packing),
        [Events(run), GradientCheck(run, NAME), stop, progress], _scorer(config, base, data, run),
    )  # fmt: skip
    run.log("resume" if resume else "start", steps=steps, trainable=plan.trainable, environment=environment())
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
    reached = trainer.state.global_step
    if stop.interrupted:
        run.log("interrupted", step=reached)
        raise TrainError(f"interrupted at step {reached} of {steps}; continue with: deltaw train --resume {run.path}")
    trainer.take_best()
    base.model.eval()
    losses = _losses(run, trainer, data.held_out)
    measured = {
        "losses": losses,
        "steps": reached,
        "seconds": round(time.monotonic() - began, 1),
        "peak_memory": peak_memory(),
    }
    directory.write(_described(config, base, extract(base.model, NAME), measured, parents), run.adapter)
    keep_template(base.tokenizer, config.data.template, run.adapter)
    run.log("end", **measured)
    write_text(run.path / "report.html", html_report(run))
    return Run(run.path, run.adapter, plan, reached, measured["seconds"], losses)


def _attach(config: Config, base: Base) -> tuple[TargetPlan, list[str]]:
    """Fresh adapters, or those of the adapter that the run goes on from; and the digests of its parents."""
    chosen = config.adapter
    if chosen.start is None:
        plan = attach(
            base.model, chosen.method, targets=chosen.targets, exclude=chosen.exclude, layers=chosen.layers, name=NAME
        )
        return plan, []
    load(base.model, chosen.start, name=NAME)
    trainable(base.model, NAME)
    return plan_of(base.model, NAME), [directory.open_directory(chosen.start).digest]


def environment() -> dict[str, str]:
    """What a run ran on, for those who repeat it."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    versions = {package.__name__: package.__version__ for package in (deltaw, torch, transformers)}
    return {"python": platform.python_version(), **versions, "device": device, "threads": str(torch.get_num_threads())}


def _scorer(config: Config, base: Base, data: Prepared, run: RunDirectory) -> Callable[[], Mapping[str, float]] | None:
    """Answers to some held-out rows and their metrics, with the answers kept; None where none are wanted."""
    rows, t = data.held_out_rows, config.train
    if not t.generate or rows is None:
        return None
    chosen = metrics(t.metrics)

    def score() -> dict[str, float]:
        samples = generate_samples(
            base.model, base.tokenizer, rows.rows[: t.generate], data.policy, batch_size=t.batch_size
        )
        run.write_samples([dataclasses.asdict(sample) for sample in samples])
        answers, references = [s.answer for s in samples], [s.references for s in samples]
        return {name: measure(answers, references) for name, measure in chosen.items()} if samples else {}

    return score


def _facts(config: Config, base: Base, data: Prepared, plan: TargetPlan, steps: int) -> dict[str, Any]:
    """What is known before the first step: plan.json."""
    return {
        "base": base.name,
        "method": ", ".join(sorted({target.method.name for target in plan.targets})),
        "adapters": len(plan),
        "trainable": plan.trainable,
        "base_parameters": plan.base_parameters,
        "rows": data.report.kept,
        "held_out": len(data.held_out),
        "dropped": dict(data.report.dropped),
        "supervised_tokens": data.report.supervised_tokens,
        "steps": steps,
        "digest": {"rows": digest(data.encoded), "held_out": digest(data.held_out)},
        "config": config.to_dict(),
    }


def _unchanged(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to continue a run with other rows or another configuration than it began with."""
    if not before:
        raise TrainError("the run has no plan.json, so that nobody knows what it began with: start it anew")
    found = [f"{key} was {old!r}, is {new!r}" for key, old, new in _differences(before["config"], now["config"], "")]
    for key, what in (("rows", "training rows"), ("held_out", "held-out rows")):
        if before["digest"][key] != now["digest"][key]:
            found.append(
                f"the {what} are others: {before[key]:,} then, {now[key]:,} now, or the same number with other tokens"
            )
    if found:
        raise faults(TrainError, "the run cannot continue as it began", found)


def _differences(old: Any, new: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in [*old, *(key for key in new if key not in old)]:
            yield from _differences(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
    elif old != new:
        yield path, old, new


def _reporters(wanted: Sequence[str]) -> None:
    there = get_available_reporting_integrations()
    missing = [name for name in wanted if name not in there]
    if missing:
        raise UseError(
            f"train.report_to: {missing[0]!r} is not installed or unknown{did_you_mean(missing[0], there)}: pip install it"
        )


def _announce(progress: ProgressBar, base: Base, data: Prepared, plan: TargetPlan) -> None:
    size = f"{len(plan)} adapters, {plan.trainable:,} trainable of {plan.base_parameters:,}"
    progress.console.print(f"[bold]{base.name}[/]  {size}", highlight=False)
    progress.console.print(f"{data.report}\nheld out {len(data.held_out):,} rows", highlight=False)
    progress.console.print(data.shown(), highlight=False, markup=False, soft_wrap=True)


def _steps(config: Config, rows: int) -> tuple[int, int]:
    """Optimizer steps in all, and between evaluations."""
    t = config.train
    batches = math.ceil(rows / t.batch_size)
    steps = t.max_steps or max(1, math.ceil(math.ceil(batches / t.gradient_accumulation) * t.epochs))
    every = max(1, math.ceil(steps / 5)) if t.eval_every == "auto" else t.eval_every
    return steps, every


def _losses(run: RunDirectory, trainer: AdapterTrainer, evaluated: list[Encoded]) -> dict[str, float]:
    first = [event["loss"] for event in run.events("eval") if event["step"] == 0]
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    result = ({"base": first[0]} if first else {}) | ({"train": logged[-1]} if logged else {})
    if evaluated:
        result["held_out"] = trainer.evaluate()["eval_loss"]
    return result


def _described(config: Config, base: Base, state: Any, measured: Mapping[str, Any], parents: list[str]) -> Any:
    """The state with what a user of the files must know: task, base, template, mask policy, recipe, what was measured."""
    template = getattr(base.tokenizer, "chat_template", None) or ""
    identity = dataclasses.replace(state.base, name=base.name)
    d = config.data
    meta = {
        "task_type": "CAUSAL_LM",
        "chat_template": hashlib.sha256(template.encode()).hexdigest() if template else None,
        "mask": "all tokens" if d.train_on_prompt or config.train.objective == "text" else f"answers, {d.turns} turns",
        "recipe": {key: value for key, value in config.to_dict().items() if key in ("data", "adapter", "train")},
        "metrics": dict(measured),
        "parents": parents,
    }
    return dataclasses.replace(state, base=identity, meta=meta)
