"""What went wrong in a run, read from its events: findings with their evidence in numbers and what to try next.

    diagnose(events, plan)  →  not_falling, zero_loss, vanishing_gradient, exploding_gradient, unstable, over_fitting,
                               under_trained, forgetting: each fine, warning, fault or unknown (not measured)

Every threshold is a constant with its reason. Training losses are means over `train.log_every` batches and noisy;
held-out and general losses are of the same rows each time, so that they are believed first.
"""

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from deltaw.runs.course import Course, course, doubt, ends, noise, up_to, values
from deltaw.runs.directory import RunDirectory

MIN_LINES = 5
"""Fewer lines of training loss than this show no course: one odd batch would decide."""
SMALL = 0.01
"""Nats per token: a difference of a hundredth changes a token's probability by 1 %, and no answer."""
FALLS = 0.02
"""A loss that ends less than 2 % below its start has not fallen: batches alone differ by more."""
EARLY = 0.1
"""A loss that is gone within the first tenth of the steps was never a task: learning one takes longer."""
VANISHED = 1e-8
"""Root mean square of the gradient at which Adam's ε, 1e-8, is as large: below it steps shrink to nothing."""
EXPLODED = 20.0
"""Times the first norm, and the median one: it grows by two or three while B leaves zero, and by this only when weights are thrown."""
CLIMBED = 0.5
"""A loss that stays half again above the untrained one: steps are too long for any descent."""
SPIKE = 0.5
"""A single line half above those before it, and 8 times further than lines differ as a rule: no batch is that odd."""
RISES = 0.05
"""A held-out loss 5 % above its best: by less, answers often still improve while the loss rises from certainty."""
STILL = 0.03
"""A loss that fell by 3 % in the last fifth of the steps was not done; schedules that end at rate 0 hide more."""
FORGETS = 0.1
"""Nats on general text, a tenth more perplexity: twice what LoRA of rank 32 loses in PEFT's MetaMathQA benchmark (0.050)."""

Verdict = Literal["fine", "warning", "fault", "unknown"]


@dataclass(frozen=True)
class Finding:
    """One question asked of a run. `next` is what to try, empty where nothing is wrong."""

    name: str
    verdict: Verdict
    evidence: str
    next: str = ""

    def __str__(self) -> str:
        return f"{self.name.replace('_', ' ')}: {self.evidence}" + (f"; {self.next}" if self.next else "")

    @property
    def wrong(self) -> bool:
        return self.verdict in ("warning", "fault")


def diagnose(events: Iterable[Mapping[str, Any]], plan: Mapping[str, Any]) -> list[Finding]:
    """All findings for a run in any state, the fine ones too."""
    seen = course(events, plan)
    return [check(seen) for check in CHECKS]


def recorded(run: RunDirectory) -> list[Finding]:
    """The findings of a run: those it ended with, else what its events say so far."""
    events = run.events()
    kept = next((event["findings"] for event in reversed(events) if event["event"] == "diagnosis"), None)
    ended = any(event["event"] == "end" for event in events)
    return [Finding(**one) for one in kept] if kept is not None and ended else diagnose(events, run.plan())


def not_falling(run: Course) -> Finding:
    name, rate = "not_falling", run.setting("learning_rate")
    now = "" if rate is None else f", now {rate:g},"
    said, fell, rose = [], False, False
    if len(run.evals) > 1:
        start, best, last = run.evals[0][1], min(values(run.evals[1:])), run.evals[-1][1]
        said.append(f"the held-out loss {_went(start, last)}")
        fell, rose = best < start * (1 - FALLS), last > start * (1 + FALLS)
    if len(run.lines) >= MIN_LINES:
        start, last = ends(run.lines)
        start = run.lines[0][1] if _climb(run) else start  # where it first shot up, the lowest start is the true one
        said.append(f"the training loss {_went(start, last)}")
        least = max(FALLS * start, doubt(run.lines))
        fell, rose = fell or start - last > least, rose or last - start > least
    evidence = f"{', '.join(said)}, in {run.last} steps"
    if not said:
        return Finding(name, "unknown", f"{len(run.lines)} lines of loss and no held-out rows: lower train.log_every")
    if fell or _gone(run):
        return Finding(name, "fine", evidence)
    if rose:
        return Finding(name, "fault", evidence, f"lower train.learning_rate{now} to a third or a tenth")
    if run.evals and min(values(run.evals)) < run.evals[0][1]:
        small = (
            "less than 2 % counts as none: train longer, or raise train.learning_rate, if the rows have more to teach"
        )
        return Finding(name, "warning", evidence, small)
    if not run.evals and run.lines[-1][1] < run.lines[0][1]:
        return Finding(name, "unknown", f"{evidence}, within the noise of its lines: set data.eval")
    labels = "see in `deltaw plan` that the answers are what is learnt and the template is the base's"
    return Finding(name, "fault", evidence, f"{labels}; then raise train.learning_rate{now} three to ten times")


def zero_loss(run: Course) -> Finding:
    name = "zero_loss"
    if not run.lines:
        return Finding(name, "unknown", "no line of loss")
    (step, first), gone = run.lines[0], next((step for step, loss in run.lines if loss < SMALL), None)
    answers = (
        "see in `deltaw plan` what is learnt between ⟦ and ⟧: it stands in the prompt already, or is always the same"
    )
    if first < SMALL:
        other = ", or these rows were trained on before"
        return Finding(
            name, "fault", f"the loss is {first:.4f} at step {step}, nothing is left to learn", answers + other
        )
    steps = max(run.last, run.plan.get("steps", 0))
    if gone is not None and gone <= EARLY * steps:
        evidence = f"the loss fell from {first:.4f} below {SMALL} by step {gone} of {steps}"
        return Finding(name, "warning", evidence, answers)
    return Finding(name, "fine", f"the loss began at {first:.4f}, the lowest line is {min(values(run.lines)):.4f}")


def vanishing_gradient(run: Course) -> Finding:
    name = "vanishing_gradient"
    losses, size = dict(run.lines), max(1, run.plan.get("trainable", 1))
    norms = [norm for step, norm in run.norms if losses.get(step, math.inf) >= SMALL]  # with the loss goes the gradient
    if not norms:
        return Finding(name, "unknown", "no gradient norm beside a loss above zero")
    middle = statistics.median(norms)
    each = middle / math.sqrt(size)
    evidence = f"gradient norm {middle:.3g} (median), {each:.1g} per trained number of {size:,}"
    if each >= VANISHED:
        return Finding(name, "fine", evidence)
    fix = "see in `deltaw plan` that the targets are modules the base runs, and try another adapter.init or adapter.targets"
    return Finding(name, "fault", f"{evidence}, below Adam's ε", fix)


def exploding_gradient(run: Course) -> Finding:
    name = "exploding_gradient"
    if not run.norms:
        return Finding(name, "unknown", "no gradient norm in the events")
    first, middle = run.norms[0][1], statistics.median(values(run.norms))
    step, largest = max(run.norms, key=lambda point: point[1])
    evidence = (
        f"largest gradient norm {largest:.3g} at step {step}, {first:.3g} at the first, {middle:.3g} in the middle"
    )
    if largest <= EXPLODED * max(first, middle):
        return Finding(name, "fine", evidence)
    clip = "set train.clip to 1" if run.setting("clip") == 0 else "lengthen train.warmup"
    return Finding(name, "warning", evidence, f"lower train.learning_rate to a third, or {clip}")


def unstable(run: Course) -> Finding:
    name, calm = "unstable", "lower train.learning_rate to a third, lengthen train.warmup, or raise train.batch_size"
    if run.broken is not None:
        return Finding(
            name, "fault", f"loss or gradient is not finite at step {run.broken}", f"{calm}; or train in fp32"
        )
    numbers = values(run.lines)
    found = [said for said in (_climb(run), _spike(run)) if said]
    if found:
        return Finding(name, "warning", "; ".join(found), calm)
    if len(numbers) < MIN_LINES and len(run.evals) < 2:
        return Finding(name, "unknown", f"{len(numbers)} lines of loss and no held-out rows: lower train.log_every")
    return Finding(name, "fine", f"lines of training loss differ by {noise(numbers):.3g} from one to the next")


def over_fitting(run: Course) -> Finding:
    name = "over_fitting"
    if len(run.evals) < 2:
        return Finding(name, "unknown", "no held-out rows were measured: set data.eval")
    (step, best), (last_step, last) = min(run.evals, key=lambda point: point[1]), run.evals[-1]
    at_end = "" if step == last_step else f", and {last:.4f} at the end (step {last_step})"
    evidence = f"the held-out loss is best at step {step} ({best:.4f}){at_end}"
    if last - best <= max(RISES * best, SMALL):
        return Finding(name, "fine", evidence)
    then, now = _trained_at(run, step), _trained_at(run, last_step)
    if then is None or now is None or now >= then:
        return Finding(name, "fine", f"{evidence}, and the training loss did not fall either")
    evidence = f"{evidence}, while the training loss fell from {then:.4f} to {now:.4f}"
    if run.setting("best") and step:
        return Finding(name, "fine", f"{evidence}; train.best took the adapter of step {step}")
    stop = f"stop at step {step} (train.best: true, train.early_stopping: 3)" if step else "lower train.learning_rate"
    return Finding(
        name, "warning", evidence, f"{stop}, take more rows, or a smaller adapter.rank with adapter.dropout 0.05"
    )


def under_trained(run: Course) -> Finding:
    name = "under_trained"
    if run.broken is not None or _climb(run):
        return Finding(name, "unknown", "the run was unstable: what it fell by at its end says nothing of more steps")
    before = [(step, loss) for step, loss in run.evals if 0 < step <= 0.8 * run.last]
    if before:
        kind, (start, was), (end, now) = "held-out", before[-1], run.evals[-1]
        sure = 0.0
    elif len(run.lines) >= 2 * MIN_LINES:
        kind, count = "training", len(run.lines) // 5
        late, early = run.lines[-count:], run.lines[-2 * count : -count]
        start, end, was, now = early[-1][0], late[-1][0], *map(statistics.fmean, (values(early), values(late)))
        sure = doubt(run.lines)
    else:
        return Finding(name, "unknown", f"{len(run.lines)} lines of loss and no held-out rows: set data.eval")
    slope = 100 * (was - now) / max(1, end - start)
    evidence = (
        f"the {kind} loss went from {was:.4f} at step {start} to {now:.4f} at step {end}, {-slope:+.3g} per 100 steps"
    )
    if was - now <= max(STILL * was, SMALL, sure):
        return Finding(name, "fine", evidence)
    longer = f"train longer (train.max_steps: {2 * run.last}), or go on from the adapter with adapter.from"
    return Finding(name, "warning", f"{evidence}, and was still falling", longer)


def forgetting(run: Course) -> Finding:
    name = "forgetting"
    if not {0.0, 1.0} <= run.general.keys():
        return Finding(name, "unknown", "not measured: name a general text as data.general")
    base, after = (float(run.general[strength]["loss"]) for strength in (0.0, 1.0))
    rise = after - base
    ratio = math.exp(min(rise, 50.0))
    evidence = f"the general loss went from {base:.4f} (base) to {after:.4f}, {rise:+.4f}, perplexity × {ratio:.3g}"
    if rise <= FORGETS:
        return Finding(name, "fine", evidence)
    weaker = [_weaker(strength, said, base) for strength, said in run.general.items() if 0 < strength < 1]
    fix = "lower train.learning_rate or adapter.alpha, train less, or mix general rows into data.train"
    return Finding(name, "warning", evidence, "; ".join([*weaker, fix]))


CHECKS = (
    not_falling, zero_loss, vanishing_gradient, exploding_gradient, unstable, over_fitting, under_trained, forgetting,
)  # fmt: skip


def _went(start: float, last: float) -> str:
    return f"went from {start:.4f} to {last:.4f}"


def _gone(run: Course) -> bool:
    """Was there next to nothing to fall from? Then `zero_loss` says so."""
    return bool(run.lines) and run.lines[0][1] < SMALL


def _trained_at(run: Course, step: int) -> float | None:
    """Training loss around an evaluation: of the lines since the one before, or the first line."""
    before = max((at for at, _ in run.evals if at < step), default=0)
    inside = [loss for at, loss in run.lines if before < at <= step]
    return statistics.fmean(inside) if inside else up_to(run.lines, step) or next(iter(values(run.lines)), None)


def _climb(run: Course) -> str:
    """Did the loss stay far above where it began?"""
    if len(run.evals) > 1:
        start, (step, worst) = run.evals[0][1], max(run.evals[1:], key=lambda point: point[1])
        if run.evals[0][0] == 0 and worst > (1 + CLIMBED) * start + SMALL:
            return f"the held-out loss rose from {start:.4f} to {worst:.4f} by step {step}"
    numbers, first = values(run.lines), max(1, len(run.lines) // 20)
    if len(numbers) < MIN_LINES:
        return ""
    width, start = max(3, len(numbers) // 5), statistics.fmean(numbers[:first])
    windows = [numbers[place : place + width] for place in range(first, len(numbers) - width + 1)]
    highest = max(windows, key=statistics.fmean, default=[start])
    mean, spread = statistics.fmean(highest), statistics.pstdev(highest)
    if mean - start <= max(CLIMBED * start, 2 * spread / math.sqrt(first), SMALL):
        return ""
    return f"the training loss rose from {start:.4f} to {mean:.4f} (mean of {width} lines)"


def _spike(run: Course) -> str:
    """Lines that jump out of those before them, the highest of them named."""
    numbers, found = values(run.lines), []
    usual = noise([math.log(max(number, SMALL)) for number in numbers])  # noise is a share of the loss, which falls
    for place in range(MIN_LINES, len(numbers)):
        level = statistics.median(numbers[place - MIN_LINES : place])
        jump = numbers[place] - level
        if jump > max(SPIKE * level, level * (math.exp(min(8 * usual, 50.0)) - 1), SMALL):
            found.append((jump, run.lines[place][0], level, numbers[place]))
    if not found:
        return ""
    _, step, level, top = max(found)
    return f"{len(found)} lines of training loss jump, the highest at step {step} from {level:.4f} to {top:.4f}"


def _weaker(strength: float, said: Mapping[str, Any], base: float) -> str:
    """What the adapter would be at less than full strength."""
    loss = float(said["loss"])
    held_out = f", the held-out loss {said['held_out']:.4f}" if said.get("held_out") is not None else ""
    return f"at strength {strength:g} (--adapter FOLDER={strength:g}) it is {loss:.4f}, {loss - base:+.4f}{held_out}"
