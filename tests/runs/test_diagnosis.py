"""Findings on made-up events: each is found where it is, with its numbers and its remedy, and nowhere else."""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

from deltaw.runs.diagnosis import CHECKS, FORGETS, Finding, diagnose, recorded
from deltaw.runs.directory import RunDirectory
from deltaw.runs.report import html_report
from deltaw.runs.summary import summarise

PLAN = {"trainable": 10_000, "steps": 100, "config": {"train": {"learning_rate": 1e-3, "clip": 1.0, "best": False}}}
FALLING = [0.2 + 3.8 * math.exp(-step / 15) for step in range(0, 101, 5)]
HELD_OUT = [4.0, 1.3, 0.6, 0.4, 0.305, 0.3]


def events(
    losses: Sequence[float], evals: Iterable[float] = (), norms: Any = 1.0, apart: int = 5
) -> list[dict[str, Any]]:
    """Lines of loss `apart` steps from each other, evaluations of which the first is before step 1."""
    each = norms if isinstance(norms, list) else [norms] * len(losses)
    found = [
        {"event": "step", "step": max(1, apart * place), "loss": loss, "grad_norm": norm}
        for place, (loss, norm) in enumerate(zip(losses, each, strict=True))
    ]
    held_out = list(evals)
    last = apart * (len(losses) - 1)
    every = last // max(1, len(held_out) - 1)
    return [*found, *({"event": "eval", "step": every * place, "loss": loss} for place, loss in enumerate(held_out))]


def asked(name: str, given: list[dict[str, Any]], plan: dict[str, Any] = PLAN) -> Finding:
    (found,) = (finding for finding in diagnose(given, plan) if finding.name == name)
    return found


def wrong(given: list[dict[str, Any]], plan: dict[str, Any] = PLAN) -> list[str]:
    return [finding.name for finding in diagnose(given, plan) if finding.wrong]


def test_a_good_run_has_nothing_wrong() -> None:
    found = diagnose(events(FALLING, HELD_OUT), PLAN)
    assert [one.name for one in found] == [check.__name__ for check in CHECKS]
    assert {one.name: one.verdict for one in found if one.verdict != "fine"} == {"forgetting": "unknown"}
    assert all(one.evidence and not one.next for one in found if one.name != "forgetting")


def test_no_events_are_no_reason_to_worry() -> None:
    assert {one.verdict for one in diagnose([], {})} == {"unknown"}


@pytest.mark.parametrize("noisy", [0.0, 0.3])
def test_not_falling(noisy: float) -> None:
    flat = [2.0 + noisy * math.sin(7 * place) for place in range(21)]
    found = asked("not_falling", events(flat))
    assert found.verdict == "fault" and "training loss went from" in found.evidence and "in 100 steps" in found.evidence
    assert "deltaw plan" in found.next and "raise train.learning_rate, now 0.001," in found.next
    little = asked("not_falling", events(flat, [5.6453, 5.5771]))
    assert little.verdict == "warning" and little.next.startswith("less than 2 % counts as none: train longer")
    rising = asked("not_falling", events([2.0 + place / 10 for place in range(21)], [2.0, 3.0, 4.0]))
    assert rising.verdict == "fault" and "the held-out loss went from 2.0000 to 4.0000" in rising.evidence
    assert rising.next.startswith("lower train.learning_rate")
    assert (
        asked("not_falling", events(flat, [2.0, 1.8, 1.7])).verdict == "fine"
    )  # the same rows each time: believed first
    assert asked("not_falling", events([2.0, 1.0, 0.5])).verdict == "unknown"


def test_zero_loss() -> None:
    found = asked("zero_loss", events([0.0] * 21))
    assert found.verdict == "fault" and "0.0000 at step 1" in found.evidence and "⟦ and ⟧" in found.next
    assert wrong(events([0.0] * 21, norms=0.0)) == ["zero_loss"]  # neither a gradient that vanished nor one that fails
    at_once = asked("zero_loss", events([3.0, 0.004, *[0.001] * 19]))
    assert at_once.verdict == "warning" and "by step 5 of 100" in at_once.evidence
    assert asked("zero_loss", events([*FALLING[:-1], 0.001])).verdict == "fine"


def test_vanishing_gradient() -> None:
    found = asked("vanishing_gradient", events([2.0] * 21, norms=5e-7))
    assert found.verdict == "fault" and "gradient norm 5e-07" in found.evidence and "5e-09" in found.evidence
    assert asked("vanishing_gradient", events(FALLING, norms=5e-5)).verdict == "fine"
    gone = events([*[2.0] * 10, *[1e-4] * 11], norms=[*[1.0] * 10, *[0.0] * 11])  # with the loss goes the gradient
    assert asked("vanishing_gradient", gone).verdict == "fine"


def test_exploding_gradient() -> None:
    norms = [1.0, 1.0, 45.0, *[2.0] * 18]
    found = asked("exploding_gradient", events(FALLING, norms=norms))
    assert found.verdict == "warning" and "45 at step 10" in found.evidence and "warmup" in found.next
    free = {**PLAN, "config": {"train": {"clip": 0}}}
    assert "set train.clip to 1" in asked("exploding_gradient", events(FALLING, norms=norms), free).next
    assert asked("exploding_gradient", events(FALLING, norms=[0.5, *[3.0] * 20])).verdict == "fine"  # B has left zero


def test_unstable() -> None:
    spiked = [*FALLING[:12], 3.5, *FALLING[13:]]
    found = asked("unstable", events(spiked))
    assert found.verdict == "warning" and "1 lines of training loss jump, the highest at step 60" in found.evidence
    assert "learning_rate" in found.next
    climbed = [4.0, 6.0, 9.0, 11.0, 9.0, *[5.0] * 16]
    assert "the training loss rose from 4.0000" in asked("unstable", events(climbed)).evidence
    assert (
        "held-out loss rose from 4.0000 to 9.0000 by step 50" in asked("unstable", events(climbed, [4, 9, 5])).evidence
    )
    assert asked("under_trained", events(climbed)).verdict == "unknown"  # more steps are not what it wants
    odd = [2.0 * math.exp(0.8 * math.sin(9 * place * place)) for place in range(60)]  # batches of one row
    assert asked("unstable", events(odd)).verdict == "fine"
    broken = [*events(FALLING[:4]), {"event": "step", "step": 20, "loss": math.nan, "grad_norm": math.nan}]
    found = asked("unstable", broken)
    assert found.verdict == "fault" and "not finite at step 20" in found.evidence


def test_over_fitting() -> None:
    held_out = [4.0, 1.5, 1.0, 1.1, 1.2, 1.4]
    found = asked("over_fitting", events(FALLING, held_out))
    assert found.verdict == "warning" and "best at step 40 (1.0000), and 1.4000 at the end (step 100)" in found.evidence
    assert (
        "training loss fell from" in found.evidence and "stop at step 40" in found.next and "train.best" in found.next
    )
    assert asked("over_fitting", events(FALLING, [4.0, 1.5, 1.0, 1.01, 1.02, 1.03])).verdict == "fine"
    kept = {**PLAN, "config": {"train": {"best": True}}}
    found = asked("over_fitting", events(FALLING, held_out), kept)
    assert found.verdict == "fine" and "took the adapter of step 40" in found.evidence
    base = asked("over_fitting", events(FALLING, [1.0, 1.5, 1.5]), kept)  # nothing after the base was better
    assert base.verdict == "warning" and "best at step 0" in base.evidence and "learning_rate" in base.next
    assert asked("over_fitting", events(FALLING)).verdict == "unknown"


def test_under_trained() -> None:
    found = asked("under_trained", events(FALLING, [4.0, 3.5, 3.0, 2.5, 2.0, 1.5]))
    assert found.verdict == "warning" and "from 2.0000 at step 80 to 1.5000 at step 100" in found.evidence
    assert "-2.5 per 100 steps" in found.evidence and "train.max_steps: 200" in found.next
    alone = asked("under_trained", events([4.0 - 0.1 * place for place in range(21)]))
    assert alone.verdict == "warning" and "the training loss went from" in alone.evidence
    assert "-2 per 100 steps" in alone.evidence
    noisy = [1.0 + 0.3 * math.sin(9 * place * place) - 0.002 * place for place in range(40)]
    assert asked("under_trained", events(noisy)).verdict == "fine"
    assert (
        asked("under_trained", events(FALLING, [4.0, 0.05, 0.03, 0.02, 0.018, 0.016])).verdict == "fine"
    )  # nothing left


def general(after: float, half: float | None = None) -> list[dict[str, Any]]:
    found = [{"event": "general", "step": 0, "strength": 0.0, "loss": 3.0}]
    found += [{"event": "general", "step": 100, "strength": 1.0, "loss": after}]
    weaker = {"event": "general", "step": 100, "strength": 0.5, "loss": half, "held_out": 0.5}
    return found if half is None else [*found, weaker]


def test_forgetting() -> None:
    found = asked("forgetting", [*events(FALLING, HELD_OUT), *general(3.7, 3.05)])
    assert found.verdict == "warning" and "from 3.0000 (base) to 3.7000, +0.7000, perplexity × 2.01" in found.evidence
    assert "at strength 0.5 (--adapter FOLDER=0.5) it is 3.0500, +0.0500, the held-out loss 0.5000" in found.next
    assert all(word in found.next for word in ("learning_rate", "alpha", "general rows"))
    assert asked("forgetting", general(3.0 + FORGETS - 0.01)).verdict == "fine"
    assert asked("forgetting", general(2.5)).verdict == "fine"


def test_steps_made_again_after_a_resume_count_once() -> None:
    before = events([*FALLING[:12], 50.0, 50.0])  # thrown away with what came after the checkpoint
    again = [{**one, "step": one["step"] + 60} for one in events(FALLING[12:])]
    again[0]["step"] = 60
    assert wrong([*before, *again]) == []


def test_findings_of_a_run_are_those_it_ended_with(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.create({"model": "tiny"}, "1")
    run.write_plan(PLAN)
    for event in [*events([2.0] * 21), *general(3.7, 3.05)]:
        run.log(event.pop("event"), **event)
    assert [one.name for one in recorded(run) if one.wrong] == ["not_falling", "forgetting"]  # of a run that goes on
    run.log("diagnosis", findings=[{"name": "unstable", "verdict": "warning", "evidence": "a <b>", "next": "rest"}])
    run.log("end", losses={}, steps=100)
    (kept,) = recorded(run)
    assert str(kept) == "unstable: a <b>; rest" and summarise(run).findings == [kept]
    page = html_report(run)
    assert "a &lt;b&gt;" in page and "3.0000 → 3.7000, 3.0500 at strength 0.5" in page
    json.dumps(summarise(run).general)
