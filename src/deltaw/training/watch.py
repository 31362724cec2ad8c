"""What a run takes: the most bytes in use since the base was loaded, above what was in use then.

On a CUDA device bytes of tensors, as its allocator counts them. On a CPU the resident size of the process (Linux; elsewhere
there is no way to forget an earlier peak, and nothing is said). The base's tensors are touched first: a checkpoint that
is mapped into memory becomes resident page by page, and the first step would be charged for it.
"""

import contextlib
import ctypes
import gc
import os
import platform
import resource
import sys
from pathlib import Path

import torch
from torch import nn

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
PAGE = 4096


def peak_memory() -> int:
    """Most bytes in use since a `Watch` was made, else so far: of the accelerator where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Watch:
    """Made where the base is loaded and nothing else is."""

    def __init__(self, model: nn.Module):
        self.cuda = next(model.parameters()).device.type == "cuda"
        gc.collect()
        self._start: int | None = None
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            self._start = torch.cuda.memory_allocated()
        elif CLEAR.exists():
            for tensor in (*model.parameters(), *model.buffers()):
                if tensor.device.type == "cpu":
                    torch.tensor([], dtype=torch.uint8).set_(tensor.untyped_storage())[::PAGE].sum()  # type: ignore[call-overload]
            _trim()
            with contextlib.suppress(OSError):  # a container that may not ask: nothing is said
                CLEAR.write_text("5", encoding="utf-8")  # the highest size so far is forgotten
                self._start = resident("VmRSS")

    @property
    def rise(self) -> int | None:
        """Bytes, or None where nobody knows."""
        if self._start is None:
            return None
        return (torch.cuda.max_memory_allocated() if self.cuda else resident("VmHWM")) - self._start


def resident(word: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    lines = STATUS.read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{word}:")))


def _trim() -> None:
    """What was freed while loading goes back to the system, where the C library can do that (glibc)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


THRESHOLD = "MALLOC_MMAP_THRESHOLD_"
HOLES = 0.77
"""Of the bytes of a step's tensors, what glibc keeps beside them in holes that the next tensor does not fit (docs/memory.md)."""


GIVEN_BACK: list[bool] = []
"""It holds for the rest of a process."""


def give_back() -> bool:
    """Have glibc return what is freed: blocks of 1 MB and more get pages of their own. False where there is no such library.

    As it comes, it raises that limit to 32 MB by itself, and checkpointing then saves nothing: what a layer frees stays in
    holes. The pages of each large tensor are then made anew, which costs time; so it is not done where nobody asked for memory.
    A limit that the environment sets stays.
    """
    if _glibc() and THRESHOLD not in os.environ:
        with contextlib.suppress(OSError, AttributeError):
            GIVEN_BACK.append(bool(ctypes.CDLL("libc.so.6").mallopt(-3, 1 << 20)))  # M_MMAP_THRESHOLD
    return any(GIVEN_BACK) or THRESHOLD in os.environ


def holes(checkpointing: bool) -> float:
    """Share of a step's tensors that the C library will keep beside them."""
    returned = checkpointing or any(GIVEN_BACK) or THRESHOLD in os.environ
    return 0.0 if returned or not _glibc() else HOLES


def _glibc() -> bool:
    return platform.libc_ver()[0] == "glibc"
