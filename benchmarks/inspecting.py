"""How long `deltaw inspect` and `deltaw compare` take on an adapter of the size of a 7 B model's.

    python -m benchmarks inspecting [--layers 32] [--rank 16] [--threads 1]

Llama-7B shapes (hidden 4096, feed-forward 11008), LoRA on the 7 linear layers of each of 32 blocks, random factors in fp32,
no base. `inspect` is the whole command in a process of its own: imports, reading and checking the file, 224 spectra;
`in_python` is `describe` alone. On a machine that does other work as well the processor's seconds tell more than the clock's.
Singular values are held against a dense decomposition of ΔW, 4096 × 4096, in the same run.
"""

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks._common import keep, parser
from deltaw.analysis import compare, costly, describe, spectra
from deltaw.core.host import HostSpec
from deltaw.core.method import Site
from deltaw.core.state import AdapterState, delta
from deltaw.formats import directory
from deltaw.methods.lora import LoRA

HIDDEN, INNER = 4096, 11008
SHAPES = {
    **{f"self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qkvo"},
    "mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN), "mlp.down_proj": (HIDDEN, INNER),
}  # fmt: skip


def adapter(layers: int, rank: int, seed: int) -> AdapterState:
    generator = torch.Generator().manual_seed(seed)
    specs = {Site(f"model.layers.{n}.{name}"): HostSpec(shape) for n in range(layers) for name, shape in SHAPES.items()}
    tensors = {
        site: {
            "lora_A": torch.randn(rank, spec.shape[1], generator=generator) / spec.shape[1] ** 0.5,
            "lora_B": 0.01 * torch.randn(spec.shape[0], rank, generator=generator),
        }
        for site, spec in specs.items()
    }
    return AdapterState(dict.fromkeys(specs, LoRA(rank=rank, alpha=2.0 * rank)), tensors, specs)


def seconds(act: Callable[[], Any], rounds: int) -> dict[str, float]:
    """Medians of what a clock and the processor's own count say, of this process and its children."""
    times: list[tuple[float, float]] = []
    for _ in range(rounds):
        began, used = time.perf_counter(), processor()
        act()
        times.append((time.perf_counter() - began, processor() - used))
    clock, cpu = (statistics.median(column) for column in zip(*times, strict=True))
    return {"seconds": round(clock, 2), "processor_seconds": round(cpu, 2)}


def processor() -> float:
    spent = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in spent)


def against_dense(state: AdapterState, count: int) -> tuple[float, float]:
    """The largest relative difference of a singular value to that of ΔW itself, and the seconds of one dense decomposition."""
    ours, apart, took = spectra(state), 0.0, 0.0
    sites = [site for site, spec in state.specs.items() if spec.shape == (HIDDEN, HIDDEN)][:count]
    for site in sites:
        dense = delta(state, site, torch.zeros(state.specs[site].shape))
        began = time.perf_counter()
        values = torch.linalg.svdvals(dense).double()
        took += time.perf_counter() - began
        mine = torch.tensor(ours[site][0].values)  # type: ignore[index]
        apart = max(apart, float(((values[: len(mine)] - mine.double()) / mine.double()).abs().max()))
    return apart, took / len(sites)


def main(arguments: list[str]) -> None:
    options = parser(__doc__)
    options.add_argument("--layers", type=int, default=32)
    options.add_argument("--rank", type=int, default=16)
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--dense", type=int, default=1, help="modules held against a dense decomposition")
    options.add_argument("--dry", action="store_true", help="print, and keep no result")
    args = options.parse_args(arguments)
    torch.set_num_threads(args.threads)
    one, other = (adapter(args.layers, args.rank, seed) for seed in (0, 1))
    assert not costly(one, with_base=False).sites
    with tempfile.TemporaryDirectory() as folder:
        for name, state in (("one", one), ("other", other)):
            directory.write(state, Path(folder) / name)
        size = sum(file.stat().st_size for file in (Path(folder) / "one").iterdir())
        environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}

        def verb(*words: str) -> Callable[[], Any]:
            given = [sys.executable, "-m", "deltaw", *words]
            return lambda: subprocess.run(given, cwd=folder, env=environment, check=True, capture_output=True)

        found = {
            "modules": len(one.methods), "parameters": one.parameters, "megabytes": round(size / 1e6), "rank": args.rank,
            "threads": args.threads, "load_average": round(os.getloadavg()[0], 1), "cores": os.cpu_count(),
            "inspect": seconds(verb("inspect", "one"), args.rounds),
            "inspect_html": seconds(verb("inspect", "one", "--html", "page.html"), args.rounds),
            "compare": seconds(verb("compare", "one", "other"), args.rounds),
            "in_python": seconds(lambda: describe(one), args.rounds),
            "compare_in_python": seconds(lambda: compare(one, other), args.rounds),
        }  # fmt: skip
    apart, took = against_dense(one, args.dense)
    assert apart < 1e-4, apart
    found |= {"largest_relative_difference": apart, "dense_seconds_a_module": round(took, 2)}
    if not args.dry:
        keep("inspecting", found)
    else:
        print(found)
