"""The course of a run as numbers: what its events say of losses and gradients, each step once.

events.jsonl  →  lines (training loss), norms (of the gradient), evals (held out), general (never trained on)
"""

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Points = Sequence[tuple[int, float]]
"""(step, value), ascending."""


@dataclass(frozen=True)
class Course:
    """Finite values alone; `broken` is the first step where one was not."""

    lines: Points = ()
    norms: Points = ()
    evals: Points = ()
    """Step 0 is the measurement before the first step."""
    general: Mapping[float, Mapping[str, Any]] = field(default_factory=dict)
    """The last measurement on the general text, by the adapter's strength; 0 is the base."""
    broken: int | None = None
    plan: Mapping[str, Any] = field(default_factory=dict)

    @property
    def last(self) -> int:
        return max((points[-1][0] for points in (self.lines, self.evals) if points), default=0)

    def setting(self, name: str) -> Any:
        """A field of the section `train` of the run's configuration; None where it is not known."""
        return self.plan.get("config", {}).get("train", {}).get(name)


def course(events: Iterable[Mapping[str, Any]], plan: Mapping[str, Any]) -> Course:
    """Steps that a resumed run made again count once, as they came out last."""
    lines: dict[int, float] = {}
    norms: dict[int, float] = {}
    evals: dict[int, float] = {}
    general: dict[float, Mapping[str, Any]] = {}
    for event in events:
        kind, step = event.get("event"), int(event.get("step", 0))
        if kind == "step":
            lines[step] = float(event["loss"])
            norms |= {step: float(event["grad_norm"])} if event.get("grad_norm") is not None else {}
        elif kind == "eval":
            evals[step] = float(event["loss"])
        elif kind == "general":
            general[float(event["strength"])] = event
    broken = [step for points in (lines, norms, evals) for step, value in points.items() if not math.isfinite(value)]
    return Course(_finite(lines), _finite(norms), _finite(evals), general, min(broken, default=None), plan)


def _finite(points: Mapping[int, float]) -> Points:
    return [(step, value) for step, value in sorted(points.items()) if math.isfinite(value)]


def values(points: Points) -> list[float]:
    return [value for _, value in points]


def ends(points: Points, share: int = 5) -> tuple[float, float]:
    """Means over the first and the last `1/share` of the points, at least one of them."""
    numbers = values(points)
    count = max(1, len(numbers) // share)
    return statistics.fmean(numbers[:count]), statistics.fmean(numbers[-count:])


def noise(numbers: Sequence[float]) -> float:
    """How far a value is from the one before it, as a rule: the median, so that a few jumps do not count."""
    steps = [abs(b - a) for a, b in itertools.pairwise(numbers)]
    return statistics.median(steps) if steps else 0.0


def doubt(points: Points, share: int = 5) -> float:
    """A difference between two such means that noise alone may make: two standard deviations of it."""
    numbers = values(points)
    return 3 * noise(numbers) / math.sqrt(max(1, len(numbers) // share))


def up_to(points: Points, step: int) -> float | None:
    """The last value that is known at `step`."""
    return next((value for at, value in reversed(points) if at <= step), None)
