"""What the trainer costs over a bare loop: the same model, rows, loss and optimizer, in turns.

    python -m benchmarks overhead [--rounds 5] [--steps 20]

tiny, LoRA r 16 all-linear, 16 rows of 128 tokens, fp32. Each round runs both sides, the order changing; the ratio is that
of the medians over rounds, steps alone: start-up, evaluation and checkpoints are left out. Equal losses are asserted.
"""

import contextlib
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from benchmarks._common import keep, parser
from deltaw import LoRA, attach, load_base
from deltaw.config.schema import TrainConfig
from deltaw.core.attach import detach
from deltaw.data.collate import Collator
from deltaw.data.encode import Encoded
from deltaw.infer.loss import SFTLoss
from deltaw.runs.directory import RunDirectory
from deltaw.training.callbacks import Events, GradientCheck
from deltaw.training.optimizer import build, groups
from deltaw.training.trainer import NAME, AdapterTrainer


class Clock(TrainerCallback):
    """Time of the steps alone, the first three left out."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.times.append(time.perf_counter())

    def per_step(self) -> float:
        kept = self.times[2:]
        return (kept[-1] - kept[0]) / (len(kept) - 1)


@contextlib.contextmanager
def adapted(model: nn.Module) -> Iterator[nn.Module]:
    torch.manual_seed(0)
    attach(model, LoRA(rank=16, alpha=32), targets="all-linear", name=NAME)
    model.train()
    yield model
    detach(model, NAME)


def bare(model: nn.Module, batches: list[dict[str, torch.Tensor]], config: TrainConfig) -> tuple[float, list[float]]:
    clock, losses, sft = Clock(), [], SFTLoss(model)
    optimizer = build(groups(model, NAME, config), config)
    parameters = [p for p in model.parameters() if p.requires_grad]
    for batch in batches:
        total, count = sft(batch)
        loss = total / count
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, config.clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        clock.on_step_end()
    return clock.per_step(), losses


def trainer(model: nn.Module, rows: list[Encoded], collate: Collator, config: TrainConfig) -> tuple[float, list[float]]:
    with tempfile.TemporaryDirectory() as folder:
        run, clock = RunDirectory(Path(folder) / "run"), Clock()
        run.path.mkdir()
        sides = [Events(run), GradientCheck(run, NAME), clock]
        steps = len(rows) // config.batch_size
        optimizer = build(groups(model, NAME, config), config)
        made = AdapterTrainer(model, run, config, steps, steps, rows, [], collate, optimizer, sides)
        made._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(rows)  # type: ignore[method-assign]
        made.train()
        return clock.per_step(), [event["loss"] for event in run.events("step")]


def main(arguments: list[str]) -> None:
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--steps", type=int, default=20)
    args = options.parse_args(arguments)
    base = load_base("tiny", dtype="fp32")
    config = TrainConfig(
        batch_size=16, learning_rate=1e-3, schedule="constant", warmup=0.0, save_every=10**6, log_every=1
    )
    ids = torch.randint(5, 4096, (16 * args.steps, 128), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [Encoded(row, [-100] * 64 + row[64:]) for row in ids]
    collate = Collator(base.tokenizer)
    batches = [collate(rows[i : i + 16]) for i in range(0, len(rows), 16)]
    times: dict[str, list[float]] = {"bare": [], "trainer": []}
    for number in range(args.rounds):
        losses = {}
        for side in ("bare", "trainer") if number % 2 else ("trainer", "bare"):
            with adapted(base.model) as model:
                if side == "bare":
                    seconds, losses[side] = bare(model, batches, config)
                else:
                    seconds, losses[side] = trainer(model, rows, collate, config)
            times[side].append(seconds)
        apart = max(abs(a - b) for a, b in zip(losses["bare"], losses["trainer"], strict=True))
        assert apart < 1e-3, f"the losses differ by {apart}"
    middle = {side: statistics.median(values) for side, values in times.items()}
    keep("overhead", {
        "model": "tiny, LoRA r 16 all-linear", "batch": "16 × 128", "seconds_per_step": middle,
        "ratio": middle["trainer"] / middle["bare"], "largest_loss_difference": apart, "rounds": times,
        "threads": torch.get_num_threads(),
    })  # fmt: skip
