"""The quickstart: an adapter's whole life on the bundled base, offline, in about two minutes on two cores.

    train two adapters → base against tuned on held-out rows → switch → mix → merge and check → what is refused

Everything is done through the same functions a user calls; every figure is measured in this run.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deltaw.core.attach import detach, extract, insert
from deltaw.core.errors import DeltawError
from deltaw.core.route import use
from deltaw.data.rows import Rows, read_rows
from deltaw.infer.evaluate import Evaluation, evaluate
from deltaw.lab.tasks import TASKS, Task, load_task, nearest_row_baseline
from deltaw.mixing.exact import exact
from deltaw.models.adapters import load
from deltaw.models.base import Base, load_base, resolve
from deltaw.ship.check import logits, probe
from deltaw.ship.merge import merge_to_folder
from deltaw.training.callbacks import peak_memory
from deltaw.training.run import train

STEPS, BATCH, RATE = 120, 16, 3e-3
MIXES = ((1.0, 0.3), (0.7, 0.7), (0.3, 1.0))

Say = Callable[[str], None]


@dataclass(frozen=True)
class Trained:
    """One task with its adapter and the held-out rows."""

    task: Task
    rows: Rows
    adapter: Path


def quickstart(
    output: str | Path, say: Say = print, *, steps: int = STEPS, held_out: int | None = None
) -> dict[str, Any]:
    """Run all of it under `output` (a new folder) and return the figures. `held_out` limits the rows scored per task."""
    began = time.monotonic()
    folder = Path(output)
    base = load_base("tiny", dtype="fp32")
    parameters = sum(p.numel() for p in base.model.parameters())
    say(f"The base `tiny`: {parameters:,} parameters, frozen. Two adapters will be trained beside it.\n")

    done = [_train(name, folder, steps, held_out, say) for name in TASKS]
    names = [each.task.name for each in done]
    for each in done:
        load(base.model, each.adapter, name=each.task.name)
    use(base.model, {})

    scores = {each.task.name: _compare(base, each, say) for each in done}
    switch_ms = _switch(base.model, names)
    say(f"\nSwitching between the two on the loaded base takes {switch_ms:.3f} ms (median of 100 switches).")
    mixed = _mix(base, done, say)
    merged = _merge(done[0], folder, say)
    refused = _refusals(base, done[0], say)

    size = max(_bytes(each.adapter) for each in done)
    seconds = time.monotonic() - began
    result = {
        "base": {"exact_match": max(s["base"]["exact_match"] for s in scores.values())},
        "tuned": {"exact_match": min(s["tuned"]["exact_match"] for s in scores.values())},
        "tasks": scores,
        "switch_ms": switch_ms,
        "mix": mixed,
        "merge": merged,
        "refused": refused,
        "adapter_bytes": size,
        "base_parameters": parameters,
        "seconds": seconds,
        "peak_memory_bytes": peak_memory(),
        "output": str(folder),
    }
    say(
        f"\nAn adapter folder is {size / 1e6:.2f} MB. All of this took {seconds:.0f} s and {peak_memory() / 1e9:.2f} GB."
    )
    say(f"The adapters are in {folder}; try: deltaw chat --adapter {done[0].adapter}")
    return result


def _train(name: str, folder: Path, steps: int, held_out: int | None, say: Say) -> Trained:
    task = load_task(name)
    say(f"Training `{name}`: {task.description}")
    run = train(
        {
            "model": "tiny",
            "data": {"train": str(task.train), "eval": None},
            "adapter": {"method": "lora", "rank": 16, "alpha": 32, "targets": "all-linear"},
            "train": {
                "max_steps": steps, "batch_size": BATCH, "learning_rate": RATE, "dtype": "fp32",
                "save_every": steps, "keep": 1,
            },
            "output": str(folder / name),
        }
    )  # fmt: skip
    say(f"  {run.steps} steps, {run.seconds:.0f} s, {run.plan.trainable:,} trainable parameters\n")
    rows = read_rows(str(task.held_out))
    return Trained(task, Rows(rows.form, rows.rows[:held_out], rows.source), run.adapter)


def _compare(base: Base, each: Trained, say: Say) -> dict[str, Any]:
    """Base against tuned on the held-out rows, beside the answer of the most similar training row."""

    def run(route: dict[str, float]) -> Evaluation:
        with use(base.model, route):
            return evaluate(
                base.model, base.tokenizer, each.rows, max_length=base.max_length, batch_size=64,
                scores={"slot_accuracy": each.task.slot_accuracy},
            )  # fmt: skip

    before, after = run({}), run({each.task.name: 1.0})
    nearest = nearest_row_baseline(each.task, each.rows)
    say(f"`{each.task.name}` on {len(each.rows.rows)} held-out rows, none of them seen in training:")
    say(f"  {'':24}{'base':>8}{'tuned':>8}{'nearest training row':>24}")
    for key in ("exact_match", "slot_accuracy"):
        say(f"  {key:24}{before.scores[key]:8.1%}{after.scores[key]:8.1%}{nearest[key]:24.1%}")
    say(f"  {'loss':24}{before.loss:8.3f}{after.loss:8.3f}")
    for example, was, now in list(zip(each.rows.rows, before.answers, after.answers, strict=True))[:3]:
        say(f"    prompt  {_line(example.messages[-2].content)}")
        say(f"    base    {_line(was)}")
        say(f"    tuned   {_line(now)}")
    return {"base": before.to_dict(), "tuned": after.to_dict(), "nearest_row": nearest}


def _switch(model: nn.Module, names: list[str]) -> float:
    """Milliseconds of one switch, median of 100."""
    times = []
    for number in range(100):
        began = time.perf_counter()
        use(model, names[number % len(names)])
        times.append(1000 * (time.perf_counter() - began))
    use(model, {})
    return statistics.median(times)


def _mix(base: Base, done: list[Trained], say: Say) -> dict[str, Any]:
    """Both adapters live at once, at several weights: how well each task survives; and the last mix as one adapter."""
    say("\nBoth live at once, W' = W + w₁·ΔW₁ + w₂·ΔW₂; exact match and loss on 40 rows of each task:")
    table = []
    for weights in MIXES:
        route = {each.task.name: weight for each, weight in zip(done, weights, strict=True)}
        kept = {}
        with use(base.model, route):
            for each in done:
                some = Rows(each.rows.form, each.rows.rows[:40], each.rows.source)
                found = evaluate(base.model, base.tokenizer, some, max_length=base.max_length, batch_size=64)
                kept[each.task.name] = {"exact_match": found.scores["exact_match"], "loss": found.loss}
        table.append({"weights": route, **kept})
        mixed = " + ".join(f"{weight:g}·{name}" for name, weight in route.items())
        scores = "   ".join(f"{name} {k['exact_match']:4.0%} (loss {k['loss']:.2f})" for name, k in kept.items())
        say(f"  {mixed:32}{scores}")
    ids = probe(base.model)
    with use(base.model, route):
        live = logits(base.model, ids)
    insert(base.model, exact([extract(base.model, name) for name in route], list(route.values())), name="both")
    difference = float((logits(base.model, ids) - live).abs().max())
    detach(base.model, "both")
    use(base.model, {})
    say(f"The last mix as one adapter of twice the rank: largest logit difference {difference:.1e}.")
    say("The sum is exact; whether two tasks survive it is a property of the tasks, which is why it is measured.")
    return {"mixes": table, "max_logit_difference": difference}


def _merge(each: Trained, folder: Path, say: Say) -> dict[str, Any]:
    shipped = merge_to_folder("tiny", each.adapter, folder / f"{each.task.name}-merged", dtype="fp32")
    say(
        f"\n`{each.task.name}` merged into a plain Transformers folder, read back from disk and compared with the adapter:"
    )
    say(
        f"  largest logit difference {shipped.max_logit_difference:.1e} (the adapter's own effect: {shipped.effect:.2f})"
    )
    return {"max_logit_difference": shipped.max_logit_difference, "effect": shipped.effect, "path": str(shipped.path)}


def _refusals(base: Base, each: Trained, say: Say) -> dict[str, str]:
    """What happens when an adapter is opened without its base, or put on a stranger of the same shape."""

    def without_base() -> None:
        resolve(str(each.adapter))

    def on_a_stranger() -> None:
        torch.manual_seed(1)
        load(type(base.model)(base.model.config), each.adapter)

    say("\nAn adapter is not a model:")
    result = {}
    for title, action in (
        ("opened without its base", without_base),
        ("put on another base of the same shape", on_a_stranger),
    ):
        try:
            action()
        except DeltawError as error:
            result[title] = str(error)
            say(f"  {title}: {_line(str(error), 400)}")
    return result


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def _line(text: str, width: int = 110) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= width else flat[: width - 1] + "…"


def new_folder(output: str | Path) -> Path:
    """`output`, or `output-2`, … where that exists."""
    folder, number = Path(output), 1
    while folder.exists():
        number += 1
        folder = Path(f"{output}-{number}")
    return folder
