"""The loss of a step beside the stock one and TRL's: time of forward and backward, and memory.

    python -m benchmarks loss [--vocabularies 32768,131072] [--rounds 7]

Llama of two layers (hidden 512, random, LoRA r 16; bf16, or fp32 where the CPU has no units for that), 4 rows of 256 tokens
of which the last quarter is supervised.
    ours       supervised positions only, chunks that make their own gradient
    stock      the model's own loss: logits of all positions
    trl        SFTTrainer.compute_loss (with its defaults but for bf16 autocast and gradient checkpointing)
    body       the step without any head or loss: what is left to pay for anyway
Sides take turns, medians of rounds. Losses are equal and gradients are not zero: asserted. Memory is the highest resident size of a
process of its own during two steps, above what it was with the model loaded.
"""

import gc
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import deltaw
from benchmarks._common import DTYPES, dtypes, highest, keep, measured, parser
from deltaw.infer.loss import SFTLoss

SIDES = ("ours", "stock", "trl", "body")
ROWS, LENGTH = 4, 256
Loss = Callable[[], Tensor]


def model_of(vocabulary: int, dtype: str) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=512, intermediate_size=1408, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=8, tie_word_embeddings=False, use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(DTYPES[dtype])
    deltaw.attach(model, deltaw.LoRA(rank=16), targets="all-linear")
    return model.train()


def losses(model: Any, sides: tuple[str, ...]) -> dict[str, Loss]:
    """Every side's mean loss of the batch, as a function."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (ROWS, LENGTH), generator=generator)
    labels = ids.masked_fill(torch.arange(LENGTH) < 3 * LENGTH // 4, -100)
    batch = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
    sft = SFTLoss(model)

    def ours() -> Tensor:
        total, count = sft(batch)
        return total / count

    found: dict[str, Loss] = {
        "ours": ours, "stock": lambda: model(**batch).loss,
        "body": lambda: model.model(input_ids=ids).last_hidden_state.float().square().mean(),
    }  # fmt: skip
    if "trl" in sides:
        trainer = of_trl(model)
        found["trl"] = lambda: trainer.compute_loss(model, dict(batch), num_items_in_batch=None)
    return {side: found[side] for side in sides}


def of_trl(model: Any) -> Any:
    """TRL's trainer around the model; one batch of it is all that is asked."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    arguments = SFTConfig(
        output_dir=tempfile.mkdtemp(),
        report_to=[],
        bf16=False,
        gradient_checkpointing=False,
        max_length=None,
        use_cpu=True,
    )
    rows = Dataset.from_dict({"input_ids": [[1, 2, 3]], "labels": [[1, 2, 3]]})
    return SFTTrainer(
        model=model, args=arguments, train_dataset=rows, processing_class=deltaw.load_base("tiny").tokenizer
    )


def step(model: Any, loss: Loss) -> tuple[float, float, float]:
    """Seconds, the loss, and the squared norm of the gradient."""
    gc.collect()
    began = time.perf_counter()
    value = loss()
    value.backward()
    seconds = time.perf_counter() - began
    norm = sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None)
    model.zero_grad()
    return seconds, float(value.detach()), norm


def peak(side: str, vocabulary: int, dtype: str) -> int:
    """Highest resident size during two steps above that of the loaded model, in this process."""
    model = model_of(vocabulary, dtype)
    loss = losses(model, (side,))[side]
    gc.collect()
    with highest() as size:
        for _ in range(2):
            step(model, loss)
    return size[0]


def compare(vocabulary: int, rounds: int, dtype: str) -> dict[str, Any]:
    model = model_of(vocabulary, dtype)
    acts = losses(model, SIDES)
    times: dict[str, list[float]] = {side: [] for side in SIDES}
    values = {}
    for number in range(rounds + 1):
        for side in SIDES if number % 2 else SIDES[::-1]:
            seconds, values[side], norm = step(model, acts[side])
            assert norm > 0, f"{side}: no gradient"
            times[side].append(seconds)
    for side in ("stock", "trl"):
        assert abs(values["ours"] - values[side]) < 1e-2, values
    middle = {side: statistics.median(seconds[1:]) for side, seconds in times.items()}
    peaks = {}
    for side in SIDES:
        call = f"from benchmarks.loss import peak; print(peak({side!r}, {vocabulary}, {dtype!r}))"
        done = subprocess.run([sys.executable, "-c", call], capture_output=True, text=True, check=True)
        peaks[side] = round(int(done.stdout.split()[-1]) / 1e6, 1)
    return {
        "loss": values, "seconds": {side: round(t, 4) for side, t in middle.items()}, "peak_megabytes": peaks,
        "ratios": {f"ours / {side}": round(middle["ours"] / middle[side], 3) for side in SIDES[1:]},
    }  # fmt: skip


def main(arguments: list[str]) -> None:
    options = parser(__doc__)
    options.add_argument("--vocabularies", default="32768,131072")
    options.add_argument("--rounds", type=int, default=7)
    args = options.parse_args(arguments)
    dtype = dtypes()[0]
    found = {v: compare(int(v), args.rounds, dtype) for v in args.vocabularies.split(",")}
    keep("loss", {dtype: {"measured": measured(args.rounds), "vocabularies": found}}, beside=())
