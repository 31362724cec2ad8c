"""What a mix costs beside the dense SVD of the same matrix, and what its error is beside the least possible.

    python -m benchmarks mix [--size 2048] [--parts 4] [--rank 16] [--rounds 5]

Random LoRAs of the rank on one layer, size × size. "svd" is `mixing.svd` from the states, "dense" forms the sum and takes
torch's SVD of it; both end in factors of the rank, in turns, medians of rounds. TIES (density 0.2) has no factors: its
matrix is cut once by a sketch, as `mixing` does, and once by that dense SVD, and the two errors are held against each other.
The errors of svd and dense must agree, the sketch must be within a percent: asserted.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks._common import keep, parser
from deltaw.core.host import HostSpec
from deltaw.core.method import Site
from deltaw.core.state import AdapterState
from deltaw.methods.lora import LoRA
from deltaw.mixing import svd, ties

HERE = Site("layer")


def part(size: int, rank: int) -> AdapterState:
    tensors = {"lora_A": torch.randn(rank, size) / size**0.5, "lora_B": 0.02 * torch.randn(size, rank)}
    return AdapterState({HERE: LoRA(rank=rank, alpha=2.0 * rank)}, {HERE: tensors}, {HERE: HostSpec((size, size))})


def matrix(state: AdapterState) -> Tensor:
    factors = state.factors(HERE)
    assert factors is not None
    return factors.scale * (factors.b @ factors.a)


def dense(whole: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors of the rank by torch's SVD of the matrix."""
    u, s, vt = torch.linalg.svd(whole, full_matrices=False)
    root = s[:rank].sqrt()
    return root[:, None] * vt[:rank], u[:, :rank] * root


def error(whole: Tensor, a: Tensor, b: Tensor) -> float:
    return float((whole - b @ a).norm() / whole.norm())


def main(arguments: list[str]) -> None:
    options = parser(__doc__)
    for name, default in (("size", 2048), ("parts", 4), ("rank", 16), ("rounds", 5)):
        options.add_argument(f"--{name}", type=int, default=default)
    args = options.parse_args(arguments)
    torch.manual_seed(0)
    states, weights = [part(args.size, args.rank) for _ in range(args.parts)], [0.7, -0.3, 0.5, 0.4][: args.parts]
    full, _ = ties(states, weights, 0.2)
    sparse = matrix(full)
    made: dict[str, Any] = {}

    def summed() -> Tensor:
        return sum(w * matrix(state) for w, state in zip(weights, states, strict=True))  # type: ignore[return-value]

    sides: dict[str, Callable[[], Any]] = {
        "svd": lambda: svd(states, weights, args.rank), "dense": lambda: dense(summed(), args.rank),
        "ties, sketch": lambda: ties(states, weights, 0.2, rank=args.rank), "ties, dense": lambda: dense(sparse, args.rank),
    }  # fmt: skip
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(args.rounds + 1):
        for name in sides if number % 2 else [*sides][::-1]:
            began = time.perf_counter()
            made[name] = sides[name]()
            times[name].append(time.perf_counter() - began)
    seconds = {name: statistics.median(values[1:]) for name, values in times.items()}
    errors = {"svd": made["svd"][1].error, "dense": error(summed(), *made["dense"])}
    errors |= {"ties, sketch": made["ties, sketch"][1].error, "ties, dense": error(sparse, *made["ties, dense"])}
    assert abs(errors["svd"] / errors["dense"] - 1) < 1e-4, errors
    assert errors["ties, sketch"] < 1.01 * errors["ties, dense"], errors
    keep("mix", {
        "threads": torch.get_num_threads(), "size": args.size, "parts": args.parts, "rank": args.rank, "rounds": args.rounds,
        "milliseconds": {name: round(1e3 * t, 2) for name, t in seconds.items()},
        "svd / dense": round(seconds["svd"] / seconds["dense"], 5),
        "ties, sketch and all / the dense SVD": round(seconds["ties, sketch"] / seconds["ties, dense"], 4),
        "errors": {name: round(value, 6) for name, value in errors.items()},
    })  # fmt: skip
