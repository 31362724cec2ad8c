"""The products of a low-rank change on a CUDA device, in Triton and in torch's operators, beside the layer's own product.

    python -m benchmarks thin [--shapes 4096x4096,4096x14336] [--ranks 16,64] [--tune]

down, add and outer as in `deltaw.kernels.thin`, bf16, with and without dropout 0.05; microseconds, medians of Triton's do_bench.
GB/s counts the large tensor once (twice for add, which writes it too). --tune tries other tiles and prints the fastest.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks._common import keep, parser
from deltaw.kernels import dropout, thin, twins

TRIED = {
    "down": list(itertools.product((16, 32, 64), (64, 128, 256), (4, 8), (3, 5))),
    "add": list(itertools.product((32, 64, 128), (64, 128, 256), (4, 8), (2,))),
    "outer": list(itertools.product((32, 64, 128), (64, 128, 256), (4, 8), (3, 5))),
}


def micro(act: Callable[[], Any]) -> float:
    from triton.testing import do_bench

    return 1000 * float(do_bench(act, warmup=5, rep=25, return_mode="median"))


def sides(rows: int, n: int, ranks: int, p: float) -> dict[str, tuple[Callable[[], Any], Callable[[], Any], int]]:
    """{product: (in Triton, in torch, times the large tensor passes)}"""
    x, y = (torch.randn(rows, n, dtype=torch.bfloat16) for _ in range(2))
    w, h = torch.randn(ranks, n) / math.sqrt(n), torch.randn(rows, ranks, dtype=torch.bfloat16)
    seed, twin = torch.tensor(1 << 40, device="cpu"), twins.ON
    by = dropout.drawn(seed if p else None, p)

    def plain(act: Callable[[torch.Tensor | None], Any]) -> Callable[[], Any]:
        def run() -> Any:
            twins.ON = lambda x: False  # torch's generator makes the mask
            try:
                return act(dropout.mask(x, seed, p) if p else None)
            finally:
                twins.ON = twin

        return run

    def down(ones: Any) -> Any:
        return F.linear(x if ones is None else x * ones, (1.5 * w).to(x.dtype))

    def add(ones: Any) -> Any:
        up = (1.5 * w).to(x.dtype)
        return y.addmm_(h, up) if ones is None else y.addcmul_(h @ up, ones)

    def outer(ones: Any) -> Any:
        return (h.T @ (x if ones is None else x * ones)).to(w.dtype)

    return {
        "down": (lambda: thin.down(x, w, 1.5, by), plain(down), 1),
        "add": (lambda: thin.add(y, h, w, 1.5, by), plain(add), 2),
        "outer": (lambda: thin.outer(h, x, 1.0, by), plain(outer), 1),
    }


def tuned(name: str, rows: int, n: int, ranks: int, p: float) -> list[tuple[float, tuple[int, ...]]]:
    before, found = thin.TILES[name], []
    for tile in TRIED[name]:
        thin.TILES[name] = tile
        try:
            found.append((round(micro(sides(rows, n, ranks, p)[name][0]), 1), tile))
        except Exception as error:  # a tile that does not fit into the device's shared memory
            print(name, tile, type(error).__name__)
    thin.TILES[name] = before
    return sorted(found)[:4]


def main(arguments: list[str]) -> None:
    options = parser(__doc__)
    options.add_argument("--shapes", default="1024x4096,4096x4096,4096x14336,16384x4096")
    options.add_argument("--ranks", default="16,64")
    options.add_argument("--dropout", default="0,0.05")
    options.add_argument("--tune", action="store_true")
    options.add_argument("--dry", action="store_true", help="print, and keep no result")
    args = options.parse_args(arguments)
    torch.set_default_device("cuda")
    found: dict[str, Any] = {"device": torch.cuda.get_device_name()}
    for _ in range(300):  # until the device's clocks are up
        torch.randn(4096, 4096) @ torch.randn(4096, 4096)
    for shape, ranks, p in itertools.product(args.shapes.split(","), args.ranks.split(","), args.dropout.split(",")):
        rows, n = map(int, shape.split("x"))
        one: dict[str, Any] = {}
        for name, (ours, plain, passes) in sides(rows, n, int(ranks), float(p)).items():
            fast, slow = micro(ours), micro(plain)
            rate = passes * rows * n * 2 / fast / 1000
            one[name] = {"triton": round(fast, 1), "torch": round(slow, 1), "gigabytes_a_second": round(rate)}
            if args.tune:
                one[name]["tiles"] = tuned(name, rows, n, int(ranks), float(p))
        weight, x = torch.randn(n, n, dtype=torch.bfloat16), torch.randn(rows, n, dtype=torch.bfloat16)
        one["layer"] = round(micro(lambda x=x, weight=weight: F.linear(x, weight)), 1)
        found[f"{shape} r {ranks} dropout {p}"] = one
        print(shape, ranks, p, one, flush=True)
    if not args.dry:
        keep("thin", found)
