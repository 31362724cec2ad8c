"""The machine as it is: what computes, how much memory and disk is there, where the hub's files lie. Facts, no judgement."""

import os
import platform
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from deltaw.models import installed
from deltaw.models.installed import Package

HARDWARE_BF16 = ("avx512_bf16", "amx_bf16", "bf16")
"""Flags of processors that multiply in bf16: AVX512-bf16 and AMX of x86, bf16 of Arm."""
NAMED = ("OMP_NUM_THREADS", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "CUDA_VISIBLE_DEVICES", "HF_HOME", "HF_HUB_CACHE")
"""Environment variables that change what deltaw does here."""


@dataclass(frozen=True)
class Cpu:
    name: str
    cores: int
    """Those that this process may use."""
    threads: int
    """Those that torch uses."""
    memory: int
    free: int | None
    bf16: tuple[str, ...] | None
    """Flags of bf16 in hardware; None where the system does not say."""


@dataclass(frozen=True)
class Device:
    """An accelerator. `fault` says why it cannot be used."""

    kind: str
    name: str
    memory: int | None = None
    free: int | None = None
    capability: str | None = None
    bf16: bool = False
    fault: str | None = None


@dataclass(frozen=True)
class Machine:
    python: str
    python_wanted: str
    version: str
    """Of the deltaw that runs."""
    packages: tuple[Package, ...]
    copies: tuple[str, ...]
    triton: bool
    """Is it installed?"""
    natives: tuple[str, ...] | None
    """What bitsandbytes has compiled code for; None where it is not installed."""
    cpu: Cpu
    devices: tuple[Device, ...]
    build: str | None
    """What torch was built for: cuda 12.8, rocm 6.4, or None for the CPU alone."""
    nvidia: bool
    """Does the system have an NVIDIA driver?"""
    cache: str
    """Where the hub's files are kept."""
    cache_writable: bool
    disk: int
    """Bytes free in the working directory."""
    cache_disk: int
    environment: Mapping[str, str] = field(default_factory=dict)


def look(version: str) -> Machine:
    """This machine. version: that of deltaw."""
    cache = hub_cache(os.environ)
    above = existing(cache)
    built = {"cuda": torch.version.cuda, "rocm": getattr(torch.version, "hip", None)}
    return Machine(
        python=platform.python_version(), python_wanted=installed.python_wanted(), version=version,
        packages=tuple(installed.packages()), copies=tuple(map(str, installed.copies())),
        natives=installed.natives(), triton=installed.version("triton") is not None,
        cpu=cpu(), devices=tuple(devices()), build=next((f"{kind} {number}" for kind, number in built.items() if number), None),
        nvidia=Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None,
        cache=str(cache), cache_writable=os.access(above, os.W_OK), disk=shutil.disk_usage(".").free,
        cache_disk=shutil.disk_usage(above).free, environment={k: os.environ[k] for k in NAMED if k in os.environ},
    )  # fmt: skip


def cpu() -> Cpu:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = (
        _read("/sys/fs/cgroup/cpu.max").strip().partition(" ")
    )  # of a container: microseconds in a period
    cores = min(cores, max(1, -(-int(quota) // int(period)))) if quota.isdigit() and period.isdigit() else cores
    info = _read("/proc/cpuinfo")
    named = re.search(r"^model name\s*:\s*(.+)$", info, re.M)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", info, re.M)
    found = None if flags is None else tuple(flag for flag in HARDWARE_BF16 if flag in flags[1].split())
    name = named[1] if named else platform.processor() or platform.machine()
    return Cpu(name, cores, torch.get_num_threads(), *memory(), found)


def memory() -> tuple[int, int | None]:
    """Bytes in all, and free where the system says; of a container its limit."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
    known = re.search(r"^MemAvailable:\s*(\d+) kB$", _read("/proc/meminfo"), re.M)
    free = int(known[1]) * 1024 if known else None
    limit, used = (_read(f"/sys/fs/cgroup/memory.{name}").strip() for name in ("max", "current"))
    if limit.isdigit() and used.isdigit() and int(limit) < total:
        total = int(limit)
        free = min(total - int(used), total if free is None else free)
    return total, free


def devices() -> list[Device]:
    """Every accelerator that torch sees."""
    found = [_cuda(index) for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    if torch.backends.mps.is_available():
        found.append(Device("mps", platform.processor() or "Apple GPU", bf16=True))
    return found


def _cuda(index: int) -> Device:
    try:
        facts = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
    except RuntimeError as error:  # a card that is seen and cannot be opened: busy, or of a driver that is too old
        return Device("cuda", f"device {index}", fault=" ".join(str(error).split())[:200])
    bf16 = bool(getattr(torch.version, "hip", None)) or facts.major >= 8
    return Device("cuda", facts.name, total, free, f"{facts.major}.{facts.minor}", bf16)


def hub_cache(environment: Mapping[str, str]) -> Path:
    """Where huggingface_hub keeps files, by its own rules: it need not be installed."""
    home = environment.get("HF_HOME") or str(Path(environment.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
    named = environment.get("HF_HUB_CACHE") or environment.get("HUGGINGFACE_HUB_CACHE") or str(Path(home) / "hub")
    return Path(os.path.expandvars(named)).expanduser()


def existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there: the one in which it would be made."""
    return next(one for one in (path, *path.absolute().parents) if one.exists())


def _read(path: str) -> str:
    """A file of the system; empty where there is none, as on other systems."""
    file = Path(path)
    return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
