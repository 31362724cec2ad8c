"""Every method on a bundled task with `tiny`: parameters, file, step time beside LoRA's, held-out loss, exact match.

    python -m benchmarks methods [--steps 100] [--seeds 3] [--only lora,dora] [--work build/methods]

Each method with its own defaults. The learning rate is the best of four on seed 0; then every seed runs at it. Cells are
ordinary runs, resumable one by one. Steps are timed in turns with LoRA's on the same rows, medians of rounds.
"""

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks._common import keep, parser
from deltaw import load_base
from deltaw.core.attach import attach, detach
from deltaw.core.method import Method, get, names
from deltaw.data.collate import Collator
from deltaw.data.dataset import encode_rows
from deltaw.data.encode import Policy
from deltaw.data.rows import read_rows
from deltaw.infer.evaluate import evaluate
from deltaw.infer.loss import SFTLoss
from deltaw.lab.tasks import load_task
from deltaw.models.adapters import load
from deltaw.training.sweep import sweep

TASK, BATCH, ROUNDS, TIMED = "records", 16, 5, 4
ADDED = (1e-3, 3e-3, 1e-2, 3e-2)
RATES: dict[str, Sequence[float]] = {
    "full": (3e-4, 1e-3, 3e-3, 1e-2),
    "ia3": (1e-2, 3e-2, 1e-1, 3e-1),
    "vera": (1e-2, 3e-2, 1e-1, 3e-1),
    "llama_adapter": (3e-3, 1e-2, 3e-2, 1e-1),
}
LEFT_OUT = {"token_rows"}  # rows of new tokens: there are none in the task


def ours() -> list[str]:
    return [name for name in names() if get(name).__module__.startswith("deltaw.") and name not in LEFT_OUT]


def main(arguments: list[str]) -> None:
    options = parser(__doc__)
    options.add_argument("--steps", type=int, default=100)
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--only", default="")
    options.add_argument("--work", type=Path, default=Path("build/methods"))
    args = options.parse_args(arguments)
    chosen = args.only.split(",") if args.only else ours()
    rows = read_rows(str(load_task(TASK).held_out))
    base = load_base("tiny", dtype="fp32")
    before = evaluate(base.model, base.tokenizer, rows, max_length=base.max_length, batch_size=64)
    table = {name: one(name, args.work, args.steps, args.seeds, rows, before.loss) for name in chosen}
    times = ratios({name: get(name)() for name in chosen})
    for name, ratio in times.items():
        table[name]["step_time"] = ratio
    result = {
        "task": TASK, "steps": args.steps, "batch": BATCH, "seeds": args.seeds, "held_out": len(rows),
        "base": {"loss": before.loss, "exact_match": before.scores["exact_match"]}, "methods": table,
    }  # fmt: skip
    keep("methods", result)


def one(name: str, work: Path, steps: int, seeds: int, rows: Any, base_loss: float) -> dict[str, Any]:
    """The cells of one method."""
    record = {
        "model": "tiny", "data": {"train": str(load_task(TASK).train), "eval": str(load_task(TASK).held_out)},
        "adapter": {"method": name},
        "train": {
            "max_steps": steps, "batch_size": BATCH, "dtype": "fp32", "eval_every": steps, "save_every": steps, "keep": 1,
        },
        "output": str(work / name),
    }  # fmt: skip
    rates = list(RATES.get(name, ADDED))
    first = sweep(record, {"train.learning_rate": rates}, 1)
    rate = first.ranking[0].settings["train.learning_rate"]
    losses = sweep(record, {"train.learning_rate": [rate]}, seeds).ranking[0].values
    scores, size, parameters = [], 0, 0
    for seed in range(seeds):
        folder = work / name / f"learning_rate-{rate}_seed-{seed}" / "adapter"
        base = load_base("tiny", dtype="fp32")
        parameters = load(base.model, folder).parameters
        found = evaluate(base.model, base.tokenizer, rows, max_length=base.max_length, batch_size=64)
        assert found.loss < base_loss, f"{name} learnt nothing: {found.loss} after, {base_loss} before"
        scores.append(found.scores["exact_match"])
        size = (folder / "adapter_model.safetensors").stat().st_size
    return {
        "rates": rates, "rate": rate, "failed": dict(first.failed), "parameters": parameters, "bytes": size,
        "loss": spread(losses), "exact_match": spread(scores),
    }  # fmt: skip


def spread(values: Sequence[float]) -> dict[str, Any]:
    sd = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "sd": sd, "seeds": list(values)}


def ratios(methods: dict[str, Method]) -> dict[str, float]:
    """Time of forward and backward of each method over LoRA's on the same rows, in turns; medians of rounds."""
    base = load_base("tiny", dtype="fp32")
    encoded, _ = encode_rows(read_rows(str(load_task(TASK).train)), base.tokenizer, Policy(base.max_length))
    batch = Collator(base.tokenizer)(encoded[:BATCH])
    loss = SFTLoss(base.model)
    found: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(ROUNDS):
        reference = timed(base.model, get("lora")(), loss, batch)
        for name, method in methods.items():
            found[name].append(timed(base.model, method, loss, batch) / reference)
    return {name: round(statistics.median(values), 3) for name, values in found.items()}


def timed(model: Any, method: Method, loss: SFTLoss, batch: dict[str, torch.Tensor]) -> float:
    """Seconds of a step, the first left out; a step without a gradient is no step."""
    attach(model, method, targets="all-linear")
    model.train()
    times = []
    for _ in range(TIMED + 1):
        began = time.perf_counter()
        total, count = loss(batch)
        (total / count).backward()
        times.append(time.perf_counter() - began)
    assert any(p.grad is not None and bool(p.grad.abs().max() > 0) for p in model.parameters() if p.requires_grad)
    detach(model)
    model.eval()
    return statistics.median(times[1:])
