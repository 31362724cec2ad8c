"""One task with `tiny`: LoRA, all weights, and the base. The rate is chosen on seed 0, then every seed runs at it.

LoRA is `deltaw train` itself on the base in bf16, with its sweep; full fine-tuning is a bare loop over the same rows, loss
and schedule, with fp32 weights and bf16 arithmetic. All are scored in fp32. Resumable cell by cell.
"""

import json
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import get_scheduler

from benchmarks._common import keep
from deltaw import load_base
from deltaw.config.schema import Source
from deltaw.data.collate import Collator
from deltaw.data.dataset import encode_rows
from deltaw.data.encode import Policy
from deltaw.data.kept import add_tokens, use_kept
from deltaw.data.rows import Rows, read_rows
from deltaw.infer.evaluate import evaluate
from deltaw.infer.loss import SFTLoss
from deltaw.models.adapters import load
from deltaw.models.base import Base
from deltaw.training.sweep import sweep


@dataclass(frozen=True)
class Task:
    name: str
    train: Source
    held_out: Rows
    metric: str
    rates: Mapping[str, Sequence[float]]
    steps: int
    batch: int = 16
    eval: Any = 0.01
    tokens: Sequence[str] = ()
    """New tokens, whose rows are trained on both sides."""
    adapter: Mapping[str, Any] = field(default_factory=lambda: {"rank": 16, "alpha": 32})


def table(task: Task, work: Path, seeds: int) -> None:
    """Run what is missing below `work` and keep the table as benchmarks/results/NAME.json."""
    best = _lora(task, work, task.rates["lora"], 1)[0].settings["train.learning_rate"]
    _lora(task, work, [best], seeds)
    folders = [work / "lora" / f"learning_rate-{best}_seed-{n}" / "adapter" for n in range(seeds)]
    first = {rate: _score(task, work, weights=_full(task, work, rate, 0)) for rate in task.rates["full"]}
    rate = min(first, key=lambda r: first[r]["loss"])
    found = {
        "base": [_score(task, work)],
        "lora": [_score(task, work, adapter=folder) for folder in folders],
        "full": [_score(task, work, weights=_full(task, work, rate, n)) for n in range(seeds)],
    }
    result: dict[str, Any] = {
        "steps": task.steps, "batch": task.batch, "held_out": len(task.held_out), "metric": task.metric,
        "tokens": list(task.tokens),
        "rates": {side: list(tried) for side, tried in task.rates.items()}, "chosen": {"lora": best, "full": rate},
    }  # fmt: skip
    for side, scores in found.items():
        for key in (task.metric, "loss"):
            values = [score[key] for score in scores]
            sd = statistics.stdev(values) if len(values) > 1 else None
            result.setdefault(side, {})[key] = {"mean": statistics.fmean(values), "sd": sd, "seeds": values}
    keep(task.name, result)


def _lora(task: Task, work: Path, rates: Sequence[float], seeds: int) -> list[Any]:
    source = {"path": task.train.path, "pattern": task.train.pattern}
    record = {
        "model": "tiny", "data": {"train": source, "eval": task.eval, "tokens": list(task.tokens)}, "adapter": dict(task.adapter),
        "train": {
            "max_steps": task.steps, "batch_size": task.batch, "dtype": "bf16", "eval_every": task.steps, "save_every": 250,
        },
        "output": str(work / "lora"),
    }  # fmt: skip
    return sweep(record, {"train.learning_rate": list(rates)}, seeds).ranking


def _full(task: Task, work: Path, rate: float, seed: int) -> Path:
    """All weights trained; the model's state as a file."""
    target = work / "full" / f"{rate}_{seed}.pt"
    if target.exists():
        return target
    base = _grown(task)
    encoded, _ = encode_rows(read_rows(task.train), base.tokenizer, Policy(base.max_length))
    torch.manual_seed(seed)
    model, loss = base.model.train().requires_grad_(True), SFTLoss(base.model)
    collate = Collator(base.tokenizer, packing=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    schedule = get_scheduler("cosine", optimizer, int(0.03 * task.steps), task.steps)
    order = random.Random(seed)
    for step in range(task.steps):
        with torch.autocast("cpu", torch.bfloat16):
            total, count = loss(collate(order.sample(encoded, task.batch)))
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


def _grown(task: Task) -> Base:
    """The base with rows for the new tokens in its own table, begun as the adapter's are."""
    base = load_base("tiny", dtype="fp32")
    tokens = add_tokens(base.tokenizer, task.tokens)
    if tokens.pieces:
        table = base.model.resize_token_embeddings(max(tokens.pieces) + 1, mean_resizing=False).weight.data
        for token, pieces in tokens.pieces.items():
            table[token] = table[list(pieces)].mean(0)
    return base


def _score(task: Task, work: Path, adapter: Path | None = None, weights: Path | None = None) -> dict[str, float]:
    """Loss and metric on the held-out rows, kept beside what was scored."""
    kept = work / "scores" / ("base.json" if not (of := adapter or weights) else f"{of.parent.name}_{of.stem}.json")
    if kept.exists():
        found: dict[str, float] = json.loads(kept.read_text())
        return found
    base = load_base("tiny", dtype="fp32") if weights is None else _grown(task)
    if adapter is not None:
        load(base.model, adapter)
        use_kept(base.tokenizer, adapter)
    if weights is not None:
        base.model.load_state_dict(torch.load(weights, weights_only=True))
    scored = evaluate(
        base.model, base.tokenizer, task.held_out, max_length=base.max_length, metric=(task.metric,), batch_size=64
    )
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps({"loss": scored.loss, **scored.scores}))
    return {"loss": scored.loss, **scored.scores}
