"""Merging file by file beside reading, writing and syncing the same files, in one process, turn by turn.

    copy     every shard: read whole, write, fsync
    merge    deltaw merge, from the adapter's folder to the finished folder; the checks are timed apart

A random Llama of about 1 GB in bf16, shards of 250 MB, LoRA rank 16 on all linear layers. Memory is what the process
takes of its own (anonymous pages): mapped files are left out. What was written must equal the merge in memory to the bit.
"""

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers

import deltaw
from benchmarks._common import keep, parser
from deltaw.ship.merge import merge_to_folder
from deltaw.ship.private import Private

MOST_TIME, SHARES, MORE = 1.5, 2, 300e6
"""merge / copy at most; own memory at most this many times the largest shard, and so many bytes."""


def make(folder: Path, layers: int) -> None:
    """The base and an adapter; in a process of its own, whose memory goes with it."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=layers, vocab_size=8000, num_attention_heads=16,
        num_key_value_heads=16, dtype=torch.bfloat16,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder / "base", max_shard_size="250MB")
    deltaw.attach(model, deltaw.LoRA(rank=16, alpha=24), targets="all-linear")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.02)
    deltaw.save(model, folder / "adapter")


def copy(source: Path, target: Path) -> None:
    target.mkdir()
    for file in sorted(source.glob("*.safetensors")):
        data = file.read_bytes()
        with open(target / file.name, "wb") as new:
            new.write(data)
            new.flush()
            os.fsync(new.fileno())


def equal(base: Path, adapter: Path, merged: Path) -> bool:
    """Is what was written the merge in memory, to the bit?"""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    deltaw.load(model, adapter)
    deltaw.merge(model)
    written = transformers.AutoModelForCausalLM.from_pretrained(merged, dtype=torch.bfloat16).state_dict()
    return all(torch.equal(tensor, written[path]) for path, tensor in model.state_dict().items())


def main(arguments: list[str]) -> None:
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--layers", type=int, default=9)
    options.add_argument(
        "--folder", type=Path, default=None, help="where to write; default: the system's own for such files"
    )
    options.add_argument("--make", type=Path, help="only write base and adapter there")
    args = options.parse_args(arguments)
    if args.make is not None:
        return make(args.make, args.layers)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        words = ["-m", "benchmarks", "merge", "--make", str(folder), "--layers", str(args.layers)]
        subprocess.run([sys.executable, *words], check=True)
        base, adapter = folder / "base", folder / "adapter"
        shards = [file.stat().st_size for file in base.glob("*.safetensors")]
        times: dict[str, list[float]] = {"copy": [], "merge": [], "plan": [], "write": [], "check": []}
        rises = []
        for number in range(args.rounds + 1):
            for side in ("copy", "merge") if number % 2 else ("merge", "copy"):
                target = folder / side
                shutil.rmtree(target, ignore_errors=True)
                start = time.perf_counter()
                if side == "copy":
                    copy(base, target)
                    seconds = time.perf_counter() - start
                else:
                    with Private() as memory:
                        done = merge_to_folder(str(base), adapter, target, check=False)
                    seconds = time.perf_counter() - start - done.seconds["check"]
                    rises.append(memory.rise or 0)
                if number:  # the first round warms the page cache and imports
                    times[side].append(seconds)
                    for stage in ("plan", "write", "check") if side == "merge" else ():
                        times[stage].append(done.seconds[stage])
        same = equal(base, adapter, folder / "merge")
    assert same, "the folder is not the merge in memory"
    middle = {side: round(statistics.median(values), 3) for side, values in times.items()}
    ratio = statistics.median(m / c for m, c in zip(times["merge"], times["copy"], strict=True))
    bound = SHARES * max(shards) + MORE
    keep("merge", {
        "threads": torch.get_num_threads(), "rounds": args.rounds, "bytes": sum(shards), "shards": len(shards),
        "largest_shard": max(shards), "weights": done.weights, "seconds": middle, "merge / copy": round(ratio, 3),
        "ratios": [round(m / c, 3) for m, c in zip(times["merge"], times["copy"], strict=True)],
        "private_bytes": max(rises), "private / largest shard": round(max(rises) / max(shards), 3),
        "equal to the merge in memory": same,
        "reached": {"time": ratio <= MOST_TIME, "memory": max(rises) <= bound},
    })  # fmt: skip
