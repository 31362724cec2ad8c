"""What a run knows of itself: before the first step (plan.json), on resume, and for those who use its adapter."""

import dataclasses
import hashlib
import platform
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import transformers
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

import deltaw
from deltaw.config import parse
from deltaw.config.schema import Config
from deltaw.core.errors import TrainError, UseError, did_you_mean, faults
from deltaw.core.parts import Parts
from deltaw.core.plan import TargetPlan
from deltaw.data.dataset import digest
from deltaw.models.base import Base
from deltaw.training.prepare import Prepared

RECIPE = ("quantize", "data", "adapter", "train")
"""Sections of the configuration that go into an adapter's files."""


def environment() -> dict[str, str]:
    """What a run ran on, for those who repeat it."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    versions = {package.__name__: package.__version__ for package in (deltaw, torch, transformers)}
    return {"python": platform.python_version(), **versions, "device": device, "threads": str(torch.get_num_threads())}


def facts(config: Config, base: Base, data: Prepared, plan: TargetPlan, steps: int) -> dict[str, Any]:
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


def unchanged(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to continue a run with other rows or another configuration than it began with."""
    if not before:
        raise TrainError("the run has no plan.json, so that nobody knows what it began with: start it anew")
    began = parse.parse(before["config"]).to_dict()  # options that are newer than the run have their defaults
    found = [f"{key} was {old!r}, is {new!r}" for key, old, new in _differences(began, now["config"], "")]
    for key, what in (("rows", "training rows"), ("held_out", "held-out rows")):
        if before["digest"][key] != now["digest"][key]:
            counts = f"{before[key]:,} then, {now[key]:,} now"
            if before[key] == now[key]:
                counts = f"{now[key]:,} as before, with other tokens, or with images whose files have changed"
            found.append(f"the {what} are others: {counts}")
    if found:
        raise faults(TrainError, "the run cannot continue as it began", found)


def _differences(old: Any, new: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in [*old, *(key for key in new if key not in old)]:
            yield from _differences(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
    elif old != new:
        yield path, old, new


def described(
    config: Config, base: Base, state: Any, measured: Mapping[str, Any], parents: list[str], parts: Parts | None = None
) -> Any:
    """The state with what a user of the files must know: task, base, template, mask policy, recipe, what was measured."""
    template = getattr(base.tokenizer, "chat_template", None) or ""
    identity = dataclasses.replace(state.base, name=base.name)
    d = config.data
    meta = {
        "task_type": "CAUSAL_LM",
        "chat_template": hashlib.sha256(template.encode()).hexdigest() if template else None,
        "mask": "all tokens" if d.train_on_prompt or config.train.objective == "text" else f"answers, {d.turns} turns",
        "recipe": {key: value for key, value in config.to_dict().items() if key in RECIPE},
        "metrics": dict(measured),
        "parents": parents,
    }
    meta |= {} if parts is None else {"parts": {part: list(roots) for part, roots in parts.roots.items()}}
    return dataclasses.replace(state, base=identity, meta=meta)


def reporters(wanted: Sequence[str]) -> None:
    """UseError for loggers that transformers does not know, or that are not installed."""
    unknown = [name for name in wanted if name not in INTEGRATION_TO_CALLBACK]
    if unknown:
        known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
        raise UseError(
            f"train.report_to: no logger {unknown[0]!r}{did_you_mean(unknown[0], INTEGRATION_TO_CALLBACK)} ({known})"
        )
    missing = [name for name in wanted if name not in get_available_reporting_integrations()]
    if missing:
        raise UseError(f"train.report_to: {missing[0]!r} is not installed: pip install its package, or leave it out")
