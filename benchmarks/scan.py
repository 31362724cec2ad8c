"""SCAN, simple split, with `tiny`: commands → actions, exact match on 500 held-out commands; LoRA, and all weights beside it.

    python -m benchmarks scan [--steps 1500] [--seeds 3] [--work build/scan]

The learning rate is chosen on seed 0 from three values per side, then both sides run on all seeds. LoRA is `deltaw train`
itself on the base in bf16, with its sweep; full fine-tuning is a bare loop over the same rows, loss and schedule, with
fp32 weights and bf16 arithmetic. Both are scored in fp32. Resumable cell by cell.
"""

import json
import random
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import get_scheduler

from benchmarks._common import keep, parser
from deltaw import load_base
from deltaw.config.schema import Source
from deltaw.data.collate import Collator
from deltaw.data.dataset import encode_rows
from deltaw.data.encode import Policy
from deltaw.data.rows import Rows, read_rows
from deltaw.infer.evaluate import evaluate
from deltaw.infer.loss import SFTLoss
from deltaw.models.adapters import load
from deltaw.training.sweep import sweep

PATTERN = "IN: (?P<prompt>.*) OUT: (?P<completion>.*)"
RATES = {"lora": [3e-3, 6e-3, 1e-3], "full": [3e-4, 1e-3, 2e-3]}
BATCH = 16


def held_out(shared: Path) -> Rows:
    """500 commands of the test file, always the same."""
    rows = read_rows(Source(path=str(shared / "data/scan/simple_split/tasks_test_simple.txt"), pattern=PATTERN))
    return Rows(rows.form, random.Random(0).sample(rows.rows, 500), rows.source, rows.parts)


def lora(shared: Path, work: Path, steps: int, rates: list[float], seeds: int) -> list[Any]:
    source = {"path": str(shared / "data/scan/simple_split/tasks_train_simple.txt"), "pattern": PATTERN}
    record = {
        "model": "tiny", "data": {"train": source, "eval": 0.01}, "adapter": {"rank": 16, "alpha": 32},
        "train": {"max_steps": steps, "batch_size": BATCH, "dtype": "bf16", "eval_every": steps, "save_every": 250},
        "output": str(work / "lora"),
    }  # fmt: skip
    return sweep(record, {"train.learning_rate": rates}, seeds).ranking


def full(shared: Path, work: Path, steps: int, rate: float, seed: int) -> Path:
    """All weights trained; the model's state as a file."""
    target = work / "full" / f"{rate}_{seed}.pt"
    if target.exists():
        return target
    base = load_base("tiny", dtype="fp32")
    rows = read_rows(Source(path=str(shared / "data/scan/simple_split/tasks_train_simple.txt"), pattern=PATTERN))
    encoded, _ = encode_rows(rows, base.tokenizer, Policy(base.max_length))
    torch.manual_seed(seed)
    model, loss = base.model.train().requires_grad_(True), SFTLoss(base.model)
    collate = Collator(base.tokenizer, packing=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    schedule = get_scheduler("cosine", optimizer, int(0.03 * steps), steps)
    order = random.Random(seed)
    for step in range(steps):
        with torch.autocast("cpu", torch.bfloat16):
            total, count = loss(collate(order.sample(encoded, BATCH)))
        (total / count).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(f"full {rate} seed {seed} step {step} loss {float((total / count).detach()):.3f}", flush=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), target)
    return target


def score(rows: Rows, adapter: Path | None = None, weights: Path | None = None) -> dict[str, float]:
    base = load_base("tiny", dtype="fp32")
    if adapter is not None:
        load(base.model, adapter)
    if weights is not None:
        base.model.load_state_dict(torch.load(weights, weights_only=True))
    found = evaluate(base.model, base.tokenizer, rows, max_length=base.max_length, batch_size=64)
    return {"loss": found.loss, **found.scores}


def main(arguments: list[str]) -> None:
    options = parser(__doc__)
    options.add_argument("--steps", type=int, default=1500)
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--work", type=Path, default=Path("build/scan"))
    args = options.parse_args(arguments)
    rows = held_out(args.shared)
    best = lora(args.shared, args.work, args.steps, RATES["lora"], 1)[0].settings["train.learning_rate"]
    lora(args.shared, args.work, args.steps, [best], args.seeds)
    folders = [args.work / "lora" / f"learning_rate-{best}_seed-{n}" / "adapter" for n in range(args.seeds)]
    first = {rate: score(rows, weights=full(args.shared, args.work, args.steps, rate, 0)) for rate in RATES["full"]}
    rate = min(first, key=lambda r: first[r]["loss"])
    weights = [full(args.shared, args.work, args.steps, rate, n) for n in range(args.seeds)]
    found = {
        "base": [score(rows)],
        "lora": [score(rows, f) for f in folders],
        "full": [score(rows, weights=w) for w in weights],
    }
    result: dict[str, Any] = {"steps": args.steps, "batch": BATCH, "rates": {"lora": best, "full": rate}}
    for side, scores in found.items():
        values = [s["exact_match"] for s in scores]
        result[side] = {
            "exact_match": statistics.fmean(values), "sd": statistics.stdev(values) if len(values) > 1 else 0.0,
            "loss": statistics.fmean(s["loss"] for s in scores), "seeds": values,
        }  # fmt: skip
    keep("scan", result)
    print(json.dumps(result["rates"]))
