"""Predicted memory and time of training steps beside what they take on a CUDA device.

    python -m benchmarks memory_cuda [--only "NAME;…"]

Random Llamas of 0.2 to 2.2 B parameters in one process: forward, loss, backward and AdamW as `deltaw train` runs them, six steps.
Memory is the highest number of allocated bytes above the loaded base, without the constant of the overhead; seconds the
median of the last four steps, beside what is predicted from the device's speed as measured here (`deltaw plan`).
"""

import gc
import json
import statistics
import tempfile
import time
from typing import Any, NamedTuple

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import deltaw
from benchmarks._common import keep, parser
from deltaw.config import parse
from deltaw.core import targets
from deltaw.infer.loss import SFTLoss
from deltaw.models.base import DTYPES, TINY, load_base
from deltaw.planner import devices
from deltaw.planner.devices import Device
from deltaw.training.optimizer import build, groups
from deltaw.training.outlook import Batch, Outlook

STEPS = 6


class Case(NamedTuple):
    name: str
    hidden: int
    vocabulary: int
    rows: int
    length: int
    method: str = "lora"
    rank: int = 16
    dropout: float = 0.0
    padded: bool = False
    checkpointing: bool = False
    accumulation: int = 1
    dtype: str = "bf16"
    quantize: str = "none"


CASES = (
    Case("lora 2x2048", 4096, 32000, 2, 2048),
    Case("lora 2x2048, padded", 4096, 32000, 2, 2048, padded=True),
    Case("lora r 64 2x2048", 4096, 32000, 2, 2048, rank=64),
    Case("lora 8x2048, checkpointing", 4096, 32000, 8, 2048, checkpointing=True),
    Case("lora dropout 2x2048", 4096, 32000, 2, 2048, dropout=0.05),
    Case("dora 2x1024", 4096, 32000, 2, 1024, "dora"),
    Case("lora 4x1024, vocabulary 128 k", 2048, 128256, 4, 1024),
    Case("lora 4x512, accumulated, vocabulary 128 k", 2048, 128256, 4, 512, accumulation=2),
    Case("lora 2x1024, padded, vocabulary 128 k", 2048, 128256, 2, 1024, padded=True),
    Case("lora 1x256, vocabulary 128 k", 2048, 128256, 1, 256),
    Case("full 2x1024, vocabulary 128 k", 2048, 128256, 2, 1024, "full"),
    Case("lora fp32 2x1024, vocabulary 128 k", 2048, 128256, 2, 1024, dtype="fp32"),
    Case("lora nf4 2x1024, vocabulary 128 k", 2048, 128256, 2, 1024, quantize="nf4"),
)  # fmt: skip


def llama(case: Case) -> LlamaConfig:
    """Of 8 layers; of 16 heads with 8 keys where it is 2048 wide."""
    heads = case.hidden // 128
    return LlamaConfig(
        vocab_size=case.vocabulary, hidden_size=case.hidden, intermediate_size=int(3.5 * case.hidden), num_hidden_layers=8,
        num_attention_heads=heads, num_key_value_heads=8 if case.hidden == 2048 else heads, tie_word_embeddings=False,
        use_cache=False,
    )  # fmt: skip


def configuration(case: Case) -> Any:
    options = {} if case.method == "full" else {"rank": case.rank, "dropout": case.dropout}
    return parse.parse({
        "model": "random", "quantize": case.quantize, "data": {"train": "rows"},
        "adapter": {"method": case.method, **options},
        "train": {"batch_size": case.rows, "checkpointing": case.checkpointing, "dtype": case.dtype,
                  "gradient_accumulation": case.accumulation},
    })  # fmt: skip


def predicted(case: Case, device: Device) -> dict[str, float]:
    config = configuration(case)
    with torch.device("meta"):
        outline = LlamaForCausalLM(llama(case)).requires_grad_(False)
    plan = targets.plan(outline, config.adapter.method, config.adapter.targets)
    batch = Batch(case.rows, case.length, case.padded)
    counted, memory = Outlook(outline, plan).count(config, batch, "cuda", case.dtype)
    taken = case.accumulation * devices.seconds(counted.work, device, case.dtype)
    return {"bytes": memory.increment - memory.overhead, "seconds": round(taken, 4), "weights": memory.weights}


def loaded(case: Case) -> Any:
    if case.quantize == "none":
        with torch.device("cuda"):
            return LlamaForCausalLM(llama(case)).to(DTYPES[case.dtype])
    with tempfile.TemporaryDirectory() as folder:
        AutoTokenizer.from_pretrained(TINY).save_pretrained(folder)
        LlamaForCausalLM(llama(case)).to(DTYPES[case.dtype]).save_pretrained(folder)
        return load_base(folder, dtype=case.dtype, quantize=case.quantize).model


def measured(case: Case) -> dict[str, float]:
    config, model = configuration(case), loaded(case)
    model.requires_grad_(False)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before, times = torch.cuda.memory_allocated(), []
    deltaw.attach(model, config.adapter.method, targets=config.adapter.targets)
    if case.checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    loss, optimizer = SFTLoss(model), build(groups(model, "default", config.train), config.train)
    ids = torch.randint(0, case.vocabulary, (case.rows, case.length), device="cuda")
    mask = torch.ones_like(ids)
    mask[0, case.length - 7 * case.padded :] = 0
    losses = []
    with deltaw.fused(model):
        for _ in range(STEPS):
            torch.cuda.synchronize()
            began = time.perf_counter()
            for _ in range(case.accumulation):
                total, count = loss({"input_ids": ids, "labels": ids, "attention_mask": mask})
                (total / count).backward()
            optimizer.step()
            optimizer.zero_grad()
            torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
            losses.append(float(total.detach() / count))
    assert losses[-1] < losses[0], losses
    peak = torch.cuda.max_memory_allocated() - before
    return {"bytes": peak, "seconds": round(statistics.median(times[2:]), 4)}


def main(arguments: list[str]) -> None:
    options = parser(__doc__)
    options.add_argument("--only", default="")
    args = options.parse_args(arguments)
    device = devices.measured(torch.device("cuda"), "", 0)
    measured(Case("the first step of a process", 1024, 32000, 1, 128))
    wanted, found = args.only.split(";") if args.only else [case.name for case in CASES], {}
    for case in (case for case in CASES if case.name in wanted):
        found[case.name] = {"predicted": predicted(case, device), "measured": measured(case)}
        print(case.name, json.dumps(found[case.name]), flush=True)
    keep("memory_cuda", {"device": device.name, "flops": device.flops, "bandwidth": device.bandwidth, "cases": found})
