"""Restaurant descriptions (E2E) on a real 260 k-parameter Llama: deltaw and PEFT from the same factors, rows and seed.

    python -m benchmarks e2e [--shared ../shared] [--steps 200]

Both start from one adapter file and see the same batches, so that in fp32 the two loss curves agree to rounding: the
comparison asserts it, and that gradients are not zero. Timing is interleaved in blocks of ten steps, quoted as a ratio
of medians. BLEU is sacrebleu's, lower-cased, over all references of 100 test inputs.
"""

import argparse
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks._common import keep
from deltaw import LoRA, attach, save, use
from deltaw.data.collate import Collator
from deltaw.data.dataset import encode_rows
from deltaw.data.encode import Policy
from deltaw.data.rows import read_rows
from deltaw.infer.generate import generate
from deltaw.infer.loss import SFTLoss, mean_loss


def pairs(file: Path) -> list[tuple[str, str]]:
    lines = file.read_text(encoding="utf-8").splitlines()
    return [(mr.strip(), text.strip()) for mr, _, text in (line.partition("||") for line in lines if line.strip())]


def as_rows(given: list[tuple[str, str]], file: Path) -> Any:
    file.write_text("".join(json.dumps({"prompt": f"{mr} =>", "completion": f" {text}"}) + "\n" for mr, text in given))
    return read_rows(file)


class Side:
    """One of the two: a model with its adapter, its optimizer, and the times of its blocks."""

    def __init__(self, name: str, model: nn.Module, loss: Any, rate: float, steps: int):
        self.name, self.model, self.loss = name, model.train(), loss
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=rate, weight_decay=0.0)
        self.schedule = torch.optim.lr_scheduler.LinearLR(self.optimizer, 1.0, 0.0, total_iters=steps)
        self.losses: list[float] = []
        self.blocks: list[float] = []

    def run(self, batches: list[dict[str, torch.Tensor]]) -> None:
        began = time.perf_counter()
        for batch in batches:
            value = self.loss(batch)
            value.backward()
            norm = nn.utils.clip_grad_norm_(self.parameters, 1.0)
            assert float(norm) > 0
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()
            self.losses.append(float(value.detach()))
        self.blocks.append(time.perf_counter() - began)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path(__file__).parent.parent.parent / "shared")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--work", type=Path, default=Path("build/e2e"))
    args = parser.parse_args(arguments)
    from peft import PeftModel

    args.work.mkdir(parents=True, exist_ok=True)
    base, data = args.shared / "models/stories260K", args.shared / "data/e2e"
    train = as_rows(pairs(data / "valid.txt"), args.work / "train.jsonl")
    test = pairs(data / "test.txt")
    held_out = as_rows(test[::10], args.work / "held_out.jsonl")
    tokenizer = AutoTokenizer.from_pretrained(base)
    collate = Collator(tokenizer)
    rows, report = encode_rows(train, tokenizer, Policy(512))
    print(report)
    order, steps = random.Random(0), args.steps
    batches = [collate(order.sample(rows, 16)) for _ in range(steps)]
    evaluated = [
        collate(encode_rows(held_out, tokenizer, Policy(512))[0][i : i + 32]) for i in range(0, len(held_out.rows), 32)
    ]

    ours = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    before = mean_loss(SFTLoss(ours), evaluated)
    torch.manual_seed(0)
    plan = attach(ours, LoRA(rank=16, alpha=32), targets="all-linear")
    save(ours, args.work / "start")
    peft = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), args.work / "start", is_trainable=True
    )
    sft = SFTLoss(ours)

    def ours_loss(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        total, count = sft(batch)
        return total / count

    sides = [Side("deltaw", ours, ours_loss, 5e-3, steps), Side("PEFT", peft, lambda b: peft(**b).loss, 5e-3, steps)]
    for start in range(0, steps, 10):
        for side in sides if start % 20 else reversed(sides):
            side.run(batches[start : start + 10])
    apart = max(abs(a - b) for a, b in zip(*(side.losses for side in sides), strict=True))
    assert apart < 2e-2, f"the loss curves differ by {apart}"

    references: dict[str, list[str]] = {}
    for mr, text in test:
        references.setdefault(mr, []).append(text)
    inputs = list(references)[:100]
    result: dict[str, Any] = {
        "base": "stories260K", "rows": report.kept, "steps": steps, "batch": 16, "trainable": plan.trainable,
        "largest_loss_difference": apart, "held_out_base": before,
    }  # fmt: skip
    with use(ours, {}):
        result["bleu_base"] = bleu(ours, tokenizer, inputs, references)
    for side in sides:
        result[side.name] = {
            "first_loss": side.losses[0], "last_loss": side.losses[-1],
            "held_out": mean_loss(SFTLoss(side.model if side.name == "deltaw" else side.model.base_model.model), evaluated),
            "bleu": bleu(side.model, tokenizer, inputs, references),
            "seconds_per_step": statistics.median(side.blocks) / 10,
        }  # fmt: skip
    result["step_time_ratio"] = result["deltaw"]["seconds_per_step"] / result["PEFT"]["seconds_per_step"]
    keep("e2e", result)


def bleu(model: nn.Module, tokenizer: Any, inputs: list[str], references: dict[str, list[str]]) -> float | None:
    """BLEU over all references, or None where sacrebleu is not installed."""
    try:
        import sacrebleu
    except ImportError:
        return None
    answers = generate(model, tokenizer, [f"{mr} =>" for mr in inputs], max_new_tokens=160)
    width = max(len(references[mr]) for mr in inputs)
    columns = [[(references[mr] + [""] * width)[i] for mr in inputs] for i in range(width)]
    return round(sacrebleu.corpus_bleu(answers, columns, lowercase=True).score, 2)


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
