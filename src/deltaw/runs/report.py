"""report.html: what a run did, in one file without network or scripts: curves, answers before and after, settings."""

import html
import json
from collections.abc import Mapping, Sequence

import yaml

from deltaw.core.html import document, facts, table
from deltaw.runs.diagnosis import Finding
from deltaw.runs.directory import RunDirectory
from deltaw.runs.summary import summarise

WIDTH, HEIGHT, MARGIN = 720, 280, 44
Points = Sequence[tuple[float, float]]


def html_report(run: RunDirectory) -> str:
    """The page for a run in any state."""
    s, plan = summarise(run), run.plan()
    steps = [(event["step"], event["loss"]) for event in run.events("step")]
    evals = [(event["step"], event["loss"]) for event in run.events("eval")]
    start = next(iter(run.events("start")), {})
    known = {
        "state": s.state, "steps": f"{s.step} of {s.steps}", "base": plan.get("base"), "method": plan.get("method"),
        "trainable": f"{s.trainable:,} of {plan.get('base_parameters', 0):,}", "rows": plan.get("rows"),
        "held-out rows": plan.get("held_out"), "seconds": round(s.seconds, 1), "peak memory": f"{s.peak_memory / 1e9:.2f} GB",
        **_beside("memory above the base", s.memory_increment, s.memory_predicted, 1e6, "MB"),
        **_beside("a step", s.step_seconds, s.step_seconds_predicted, 1.0, "s"),
        **{f"loss, {name}": f"{value:.4f}" for name, value in s.losses.items()}, **_general(s.general),
        **{name: f"{value:.4f}" for name, value in s.scores.items()},
    }  # fmt: skip
    parts = [facts(known), "<h2>Loss</h2>", curves(steps, evals)]
    parts += ["<h2>Diagnosis</h2>", _findings(s.findings)]
    samples = run.samples()
    if samples:
        parts += ["<h2>Answers to held-out prompts</h2>", _answers(samples)]
    warnings = [event["text"] for event in run.events("warning")]
    parts += (
        ["<h2>Warnings</h2><ul>", *(f"<li>{html.escape(text)}</li>" for text in warnings), "</ul>"] if warnings else []
    )
    settings = yaml.safe_dump(run.config(), sort_keys=False, allow_unicode=True)
    parts += ["<h2>Settings</h2>", f"<pre>{html.escape(settings)}</pre>"]
    parts += ["<h2>Environment</h2>", facts(start.get("environment", {}))]
    return document(str(run.path.name), parts)


def curves(steps: Points, evals: Points) -> str:
    """Training loss as a line, held-out loss as a line with dots, as one SVG."""
    if not steps and not evals:
        return "<p>No step was made.</p>"
    xs, ys = zip(*[*steps, *evals], strict=True)
    low, high, last = min(ys), max(ys), max(max(xs), 1)
    span = (high - low) or 1.0

    def place(point: tuple[float, float]) -> str:
        x = MARGIN + point[0] / last * (WIDTH - 2 * MARGIN)
        y = HEIGHT - MARGIN - (point[1] - low) / span * (HEIGHT - 2 * MARGIN)
        return f"{x:.1f},{y:.1f}"

    def line(points: Points, colour: str) -> str:
        return f'<polyline fill="none" stroke="{colour}" stroke-width="1.5" points="{" ".join(map(place, points))}"/>'

    def dot(point: tuple[float, float]) -> str:
        x, y = place(point).split(",")
        return f'<circle cx="{x}" cy="{y}" r="3" fill="#cf222e"><title>step {point[0]}: {point[1]:.4f}</title></circle>'

    axis = HEIGHT - MARGIN
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="loss over steps">'
        f'<path d="M{MARGIN},{MARGIN}V{axis}H{WIDTH - MARGIN}" fill="none" stroke="#d0d7de"/>'
        f'<text x="4" y="{MARGIN}">{high:.3g}</text><text x="4" y="{axis}">{low:.3g}</text>'
        f'<text x="{WIDTH - MARGIN - 20}" y="{HEIGHT - 20}">{last}</text>'
        f'<text x="{MARGIN}" y="{HEIGHT - 20}">training (blue), held out (red)</text>'
        + line(steps, "#0969da") + line(evals, "#cf222e") + "".join(map(dot, evals)) + "</svg>"
    )  # fmt: skip


def _general(losses: Mapping[str, float]) -> dict[str, str]:
    """Loss on general text, base → after, and at smaller strengths where they were tried."""
    if not {"0", "1"} <= losses.keys():
        return {}
    weaker = "".join(
        f", {loss:.4f} at strength {strength}" for strength, loss in losses.items() if strength not in "01"
    )
    return {"loss, general": f"{losses['0']:.4f} → {losses['1']:.4f}{weaker}"}


def _findings(findings: Sequence[Finding]) -> str:
    rows = [(one.name.replace("_", " "), one.verdict, one.evidence, one.next) for one in findings]
    return table([("question", "verdict", "evidence", "next"), *rows], head=True)


def _beside(name: str, measured: float | None, predicted: float | None, unit: float, said: str) -> dict[str, str]:
    """A measured number and the predicted one, where there are any."""
    if measured is None:
        return {}
    more = "" if predicted is None else f" (predicted {predicted / unit:,.3g} {said})"
    return {name: f"{measured / unit:,.3g} {said}{more}"}


def _answers(samples: dict[str, list[dict[str, object]]]) -> str:
    rows = [("prompt", "first", "last", "wanted")]
    for before, after in list(zip(samples["first"], samples["last"], strict=True))[:20]:
        wanted = (
            json.dumps(after["references"], ensure_ascii=False)
            if len(after["references"]) > 1  # type: ignore[arg-type]
            else after["references"][0]  # type: ignore[index]
        )
        rows.append(tuple(map(str, (after["prompt"], before["answer"], after["answer"], wanted))))  # type: ignore[arg-type]
    return table(rows, head=True)
