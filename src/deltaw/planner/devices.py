"""What a run may be paid for with: memory, speed of matrix products and of memory, of this machine and of known cards.

    seconds of a step on a card = max(Σ over its operators of max(operations / flops, bytes / bandwidth), operators · host)
    on a CPU the two are summed: the processor that calls the operators is the one that computes

Cards are by their vendors' data sheets (dense products with sums in fp32), slowed down to what such products and copies
reach in practice: REACHED, measured on an H200 (docs/memory.md). This machine is measured, which takes about a second, and
remembered in a file of the user's cache.
"""

import contextlib
import json
import os
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch

from deltaw.core.errors import UseError, did_you_mean
from deltaw.core.files import write_text

REACHED = {"flops": 0.65, "bandwidth": 0.75}
"""Shares of a data sheet's figures that a training step's products and passes reach."""
HOST = 3e-5
"""Seconds that Python, modules and autograd take for an operator of a training step: 27 to 33 µs beside an H200."""
GB, GiB = 10**9, 2**30


@dataclass(frozen=True)
class Device:
    """memory in bytes; flops a second by dtype; bandwidth in bytes a second."""

    name: str
    kind: str
    """cpu, cuda or mps"""
    memory: int
    flops: dict[str, float]
    bandwidth: float
    measured: bool = False


def _card(name: str, gigabytes: float, bf16: float, fp32: float, bandwidth: float) -> Device:
    return Device(name, "cuda", int(gigabytes * GiB), {"bf16": bf16 * 1e12, "fp32": fp32 * 1e12}, bandwidth * GB)


# usable GiB (what the driver reports), TFLOP/s of bf16 (as in fp32 where it is emulated) and fp32, GB/s
CARDS = {
    card.name: card
    for card in (
        _card("t4-16g", 14.7, 8.1, 8.1, 320),
        _card("rtx3060-12g", 11.7, 51, 12.7, 360),
        _card("rtx3090-24g", 23.6, 71, 35.6, 936),
        _card("rtx4090-24g", 23.5, 165, 82.6, 1008),
        _card("rtx5090-32g", 31.4, 209, 104.8, 1792),
        _card("l4-24g", 22.0, 121, 30.3, 300),
        _card("a10g-24g", 22.0, 70, 31.2, 600),
        _card("a6000-48g", 47.4, 155, 38.7, 768),
        _card("l40s-48g", 44.4, 362, 91.6, 864),
        _card("a100-40g", 39.4, 312, 19.5, 1555),
        _card("a100-80g", 79.2, 312, 19.5, 2039),
        _card("h100-80g", 79.2, 989, 67.0, 3350),
        _card("h200-141g", 139.8, 989, 67.0, 4800),
        _card("b200-180g", 178.0, 2250, 75.0, 8000),
    )
}


def named(name: str, here: Callable[[str], Device]) -> Device:
    """A device by its name: `here`, a card, or cpu-16g for this machine's processor with so many GB. UseError otherwise.

    here: what trains on this machine ("here"), or its processor ("cpu").
    """
    if name == "here":
        return here("here")
    if name in CARDS:
        card = CARDS[name]
        flops = {dtype: value * REACHED["flops"] for dtype, value in card.flops.items()}
        return replace(card, flops=flops, bandwidth=card.bandwidth * REACHED["bandwidth"])
    kind, _, size = name.partition("-")
    if kind == "cpu" and size.endswith("g") and size[:-1].isdigit() and int(size[:-1]):
        return replace(here("cpu"), name=name, memory=int(size[:-1]) * GiB)
    raise UseError(
        f"no device {name!r}{did_you_mean(name, CARDS)}: write here, cpu-24g (any number of GB), or one of {', '.join(CARDS)}"
    )


def room(device: Device) -> int:
    """Bytes that tensors can have: without 0.6 GiB of context and 4 % of fragments on a card, 1 GiB of the system on a CPU."""
    return int(0.96 * device.memory - 0.6 * GiB) if device.kind != "cpu" else device.memory - GiB


def seconds(work: Iterable[tuple[int, int, float]], device: Device, dtype: str) -> float:
    """Of a step: (operations, bytes, how many times) of its operators."""
    flops, listed = device.flops[dtype], list(work)
    computed = sum(n * max(done / flops, moved / device.bandwidth) for done, moved, n in listed)
    called = HOST * sum(n for _, _, n in listed)
    return computed + called if device.kind == "cpu" else max(computed, called)


def measured(device: torch.device, processor: str, memory: int) -> Device:
    """This machine's device, measured once and then read from the user's cache.

    processor, memory: the name of its processor and the bytes it has, where that computes.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor
    key = f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    file = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deltaw" / "devices.json"
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not there, or cut off: it is measured again
        known = {}
    if set(known.get(key, ())) != {field.name for field in fields(Device)}:  # not there, or of another version
        known[key] = asdict(_measure(device, name))
        with contextlib.suppress(OSError):  # a home that cannot be written: it is measured each time
            file.parent.mkdir(parents=True, exist_ok=True)
            write_text(file, json.dumps(known, indent=1))
    if device.type == "cuda":
        memory = int(torch.cuda.mem_get_info(device)[1])
    return replace(Device(**known[key]), memory=memory)


def _measure(device: torch.device, name: str) -> Device:
    size = 512 if device.type == "cpu" else 4096
    flops = {}
    for label, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        flops[label] = 2 * size**3 / _timed(lambda a=a, b=b: a @ b, device)
    x = torch.randn(2**24 if device.type == "cpu" else 2**28, device=device)
    y = torch.empty_like(x)
    bandwidth = 2 * x.numel() * 4 / _timed(lambda: y.copy_(x), device)
    return Device(name, device.type, 0, flops, bandwidth, measured=True)


def _timed(act: Callable[[], object], device: torch.device, rounds: int = 7, most: float = 1.0) -> float:
    """Median seconds of some calls after the first; of one alone where it is slow."""

    def once() -> float:
        began = time.perf_counter()
        act()
        if device.type != "cpu":
            getattr(torch, device.type).synchronize()
        return time.perf_counter() - began

    taken = [once()]
    while len(taken) <= rounds and sum(taken) < most:
        taken.append(once())
    return statistics.median(taken[1:] or taken)
