"""How a run ends: its losses, and what its course says, kept with the run and told to whoever waits for it."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from deltaw.runs.diagnosis import Finding, diagnose
from deltaw.runs.directory import RunDirectory
from deltaw.training.trainer import AdapterTrainer


def losses(run: RunDirectory, trainer: AdapterTrainer) -> dict[str, float]:
    """The first held-out loss, the last training loss that was logged, and the held-out loss of the finished adapter."""
    first = [event["loss"] for event in run.events("eval") if event["step"] == 0]
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    result = ({"base": first[0]} if first else {}) | ({"train": logged[-1]} if logged else {})
    held_out = trainer.finish()
    return result if held_out is None else {**result, "held_out": held_out}


def diagnosed(run: RunDirectory, plan: Mapping[str, Any], say: Callable[[str], None]) -> list[Finding]:
    """All findings, logged; what is wrong is said."""
    findings = diagnose(run.events(), plan)
    run.log("diagnosis", findings=[dataclasses.asdict(finding) for finding in findings])
    for finding in findings:
        if finding.wrong:
            say(f"note: {finding}")
    return findings


def over(run: RunDirectory, checkpoint: Path, steps: int) -> bool:
    """Had the run made its last step, or stopped early, when it was cut off?"""
    step = int(checkpoint.name.removeprefix("step-"))
    return step >= steps or any(event["step"] == step for event in run.events("stopped"))
