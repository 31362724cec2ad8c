"""A run in one line, and runs side by side: read from their directories, whatever state they are in."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deltaw.core.errors import DeltawError
from deltaw.core.text import columns
from deltaw.runs.diagnosis import Finding, recorded
from deltaw.runs.directory import CONFIG, RunDirectory


@dataclass(frozen=True)
class Summary:
    """What a run was and came to. `settings` is its configuration, flat: {section.key: value}."""

    path: str
    state: str
    """finished, interrupted, or unfinished (still running, or cut off; of stages, how many are done)."""
    step: int
    steps: int
    losses: Mapping[str, float] = field(default_factory=dict)
    scores: Mapping[str, float] = field(default_factory=dict)
    trainable: int = 0
    seconds: float = 0.0
    peak_memory: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)
    general: Mapping[str, float] = field(default_factory=dict)
    """Loss on general text by the adapter's strength: "0" is the base, "1" the adapter."""
    findings: Sequence[Finding] = ()
    memory_increment: int | None = None
    """Bytes above the loaded base at most, measured; None where nobody knows."""
    memory_predicted: int | None = None
    step_seconds: float | None = None
    """Of an optimizer step, the median of those made; predicted for the widest batch."""
    step_seconds_predicted: float | None = None


def find(folders: Iterable[str | Path]) -> list[RunDirectory]:
    """The runs in and below some folders, in the order of their names."""
    found = {path.parent for folder in map(Path, folders) for path in sorted(folder.glob(f"**/{CONFIG}"))}
    return [RunDirectory(path) for path in sorted(found)]


def summarise(run: RunDirectory) -> Summary:
    events, plan = run.events(), run.plan()
    try:
        settings = flat(run.config())
    except DeltawError as error:
        return Summary(str(run.path), f"unreadable: {error}", 0, 0)
    if settings.get("stages"):
        return _staged(run, settings)
    last, predicted = events[-1] if events else {}, plan.get("predicted", {})
    end = next((event for event in reversed(events) if event["event"] == "end"), {})
    evals = [event for event in events if event["event"] == "eval"]
    named = {("held_out" if event["step"] else "base"): event["loss"] for event in evals}
    losses = end.get("losses") or {name: named[name] for name in ("base", "held_out") if name in named}
    memory = max((event.get("peak_memory", 0) for event in events), default=0)
    kept = {"event", "time", "step"}
    scores = next((e for e in reversed(events) if e["event"] == "scores"), {})
    return Summary(
        path=str(run.path),
        state={"end": "finished", "interrupted": "interrupted"}.get(str(last.get("event")), "unfinished"),
        step=max((event.get("step", 0) for event in events), default=0),
        steps=plan.get("steps", 0),
        losses=losses,
        scores={key: value for key, value in scores.items() if key not in kept},
        trainable=plan.get("trainable", 0),
        seconds=end.get("seconds", (last.get("time", 0.0) - events[0]["time"]) if events else 0.0),
        peak_memory=end.get("peak_memory", memory),
        settings=settings,
        general={f"{event['strength']:g}": event["loss"] for event in events if event["event"] == "general"},
        findings=recorded(run),
        memory_increment=end.get("memory_increment"),
        memory_predicted=predicted.get("memory", {}).get("increment_bytes"),
        step_seconds=end.get("step_seconds"),
        step_seconds_predicted=predicted.get("time", {}).get("step_seconds"),
    )


def _staged(run: RunDirectory, settings: Mapping[str, Any]) -> Summary:
    """A run in stages as a whole: what its stages, which are runs below it, took together, and what the last one came to."""
    below = [summarise(RunDirectory(path.parent)) for path in sorted(run.path.glob(f"*/{CONFIG}"))]
    done, total = sum(stage.state == "finished" for stage in below), len(settings["stages"])
    return Summary(
        path=str(run.path),
        state="finished" if run.adapter.is_dir() and done == total else f"unfinished, {done} of {total} stages",
        step=sum(stage.step for stage in below),
        steps=sum(stage.steps for stage in below),
        losses={name: loss for name, loss in below[-1].losses.items() if name != "base"} if below else {},
        seconds=sum(stage.seconds for stage in below),
        peak_memory=max((stage.peak_memory for stage in below), default=0),
        settings={key: value for key, value in settings.items() if key != "stages"},
    )


def flat(record: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} → {"a.b": 1}"""
    if not isinstance(record, Mapping):
        return {prefix: record}
    return {
        k: v for key, value in record.items() for k, v in flat(value, f"{prefix}.{key}" if prefix else str(key)).items()
    }


def table(summaries: Sequence[Summary]) -> str:
    """Runs as text: what came out, and in what their settings differ."""
    keys = dict.fromkeys(key for summary in summaries for key in summary.settings if key != "output")
    # a setting that only some runs have (another method's) tells nothing where those agree
    apart = [key for key in keys if len({str(s.settings[key]) for s in summaries if key in s.settings}) > 1]
    scores = list(dict.fromkeys(name for summary in summaries for name in summary.scores))
    rows = [
        ["run", "state", "step", "base", "held out", *scores, "trainable", "seconds", "memory", "of predicted", *apart]
    ]
    for s in summaries:
        cells = [
            s.path,
            s.state,
            f"{s.step}/{s.steps}",
            _number(s.losses.get("base")),
            _number(s.losses.get("held_out")),
        ]
        cells += [_number(s.scores.get(name)) for name in scores] + [f"{s.trainable:,}", f"{s.seconds:.0f}"]
        taken, foreseen = s.memory_increment, s.memory_predicted
        cells.append("–" if taken is None else f"{taken / 1e6:,.0f} MB")
        cells.append("–" if not taken or not foreseen else f"{taken / foreseen:.0%}")
        rows.append(cells + [str(s.settings.get(key, "–")) for key in apart])
    return columns(rows)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
