"""What benchmarks share: where inputs lie, where results go, and what this machine can measure."""

import argparse
import contextlib
import datetime
import functools
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from deltaw.training.watch import CLEAR, resident

RESULTS = Path(__file__).parent / "results"


def parser(about: str | None) -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--shared", type=Path, default=Path(__file__).parent.parent.parent / "shared")
    return found


def keep(name: str, result: dict[str, Any], beside: Sequence[str] | None = None) -> None:
    """Write results/NAME.json and print it.

    beside: keys whose entries stand beside those of an earlier run, of another dtype and perhaps another machine; () for the
    result itself. None: nothing earlier stays.
    """
    RESULTS.mkdir(exist_ok=True)
    file, whole = RESULTS / f"{name}.json", dict(result)
    if beside is not None and file.exists():
        before = json.loads(file.read_text(encoding="utf-8"))
        whole |= {key: {**before.get(key, {}), **result[key]} for key in beside}
        whole = whole if beside else {**before, **whole}
    file.write_text(json.dumps(whole, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2, ensure_ascii=False))


DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@functools.cache
def dtypes() -> list[str]:
    """Those of DTYPES that this CPU has units for: without, a product in bf16 takes up to 70 times as long as in fp32."""

    def seconds(dtype: torch.dtype) -> float:
        x, runs = torch.ones(512, 512, dtype=dtype), []
        for _ in range(5):
            began = time.perf_counter()
            x @ x
            runs.append(time.perf_counter() - began)
        return min(runs)

    if seconds(torch.bfloat16) < 3 * seconds(torch.float32):
        return list(DTYPES)
    print("this CPU has no units for bf16: fp32 alone is measured, and what stands in bf16 stays", flush=True)
    return ["fp32"]


def measured(rounds: int) -> str:
    """On what, how and when."""
    units = torch.backends.cpu.get_cpu_capability() + " CPU" + " with bf16 units" * ("bf16" in dtypes())
    return f"{units}, {torch.get_num_threads()} threads, medians of {rounds} rounds, {datetime.date.today()}"


@contextlib.contextmanager
def highest() -> Iterator[list[int]]:
    """At the end it holds by how much the resident size of this process rose in the block at most, in bytes."""
    found: list[int] = []
    before = resident("VmRSS")
    CLEAR.write_text("5", encoding="utf-8")  # the highest size so far is forgotten
    yield found
    found.append(resident("VmHWM") - before)
