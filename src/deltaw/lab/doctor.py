"""deltaw doctor: is this installation sound? Facts of the machine and a self-test, each judged, each fault with its fix.

examine(machine)  →  checks of versions, devices, hub and conflicts, from facts alone
tested()          →  checks of an adapter's whole life on the bundled base
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from deltaw.core.errors import UseError
from deltaw.lab.selftest import selftest
from deltaw.models.base import require_transformers
from deltaw.models.installed import Package, within
from deltaw.models.machine import Cpu, Machine

DEVELOPERS = ("test", "bench", "dev")
"""Extras for work on deltaw itself: nobody else needs them."""
LITTLE_DISK, LITTLE_CACHE = 1e9, 5e9
"""Bytes: a run with its checkpoints takes hundreds of megabytes, a base of 1 to 3 B parameters in the cache 2 to 6 GB."""
ENOUGH_MEMORY = 1e9
"""Bytes free below which not even small bases fit beside the interpreter and torch."""
TRUE = ("1", "ON", "YES", "TRUE")
"""Values of an environment variable that huggingface_hub takes for yes."""

Verdict = Literal["ok", "warning", "fault"]


@dataclass(frozen=True)
class Check:
    """One thing that was looked at. `fix` is empty where it is ok."""

    group: str
    name: str
    verdict: Verdict
    said: str
    fix: str = ""


def examine(machine: Machine) -> list[Check]:
    """What the facts say."""
    return [*_versions(machine), *_devices(machine), *_hub(machine), *_conflicts(machine)]


def tested() -> list[Check]:
    """What the self-test says; without transformers there is no base to test on."""
    try:
        require_transformers()
    except UseError as error:
        fix = "pip install 'deltaw[train]'"
        return [Check("self-test", "base", "warning", f"not run: {str(error).partition(':')[0]}", fix)]
    steps = selftest()
    fix = "reinstall in a fresh environment; where that stays, report the line with the output of deltaw doctor --json"
    return [
        Check("self-test", one.name, "ok" if one.right else "fault", one.said, "" if one.right else fix)
        for one in steps
    ]


def worst(checks: Sequence[Check]) -> Verdict:
    order: tuple[Verdict, ...] = ("fault", "warning", "ok")
    return next((verdict for verdict in order if any(one.verdict == verdict for one in checks)), "ok")


def table(checks: Sequence[Check]) -> str:
    """The checks for people, group by group; a fix stands below its line."""
    width, lines = max(len(one.name) for one in checks), list[str]()
    for group in dict.fromkeys(one.group for one in checks):
        lines.append(group)
        for one in checks:
            if one.group == group:
                lines.append(f"  {one.verdict:8} {one.name:{width}}  {one.said}")
                lines += [f"  {'':8} {'':{width}}  fix: {one.fix}"] if one.fix else []
    return "\n".join(lines)


def _versions(machine: Machine) -> Iterator[Check]:
    fits = within(machine.python, machine.python_wanted)
    said = f"{machine.python} ({machine.python_wanted or 'what deltaw wants is not known'})"
    fix = "" if fits else f"make an environment with a Python in {machine.python_wanted}"
    yield Check("versions", "python", "ok" if fits else "fault", said, fix)
    where = machine.copies[0] if machine.copies else "an unknown folder"
    if machine.packages:
        yield Check("versions", "deltaw", "ok", f"{machine.version} in {where}")
    else:
        said = f"{machine.version} in {where}, not installed: what it wants of other packages is not known"
        yield Check("versions", "deltaw", "warning", said, "pip install -e '.[train]' in the folder of the clone")
    yield from map(_package, machine.packages)


def _package(package: Package) -> Check:
    extras = [extra for extra in package.extras if extra not in DEVELOPERS]
    role = f"extra {', '.join(package.extras)}" if package.extras else "core"
    wants = f"{package.wanted or 'any'}, {role}"
    trains = not package.extras or "train" in package.extras
    fix = f"pip install 'deltaw[{extras[0]}]'" if extras else f"pip install '{package.name}{package.wanted}'"
    if package.version is None:
        if not package.extras:
            return Check("versions", package.name, "fault", f"not installed ({wants})", fix)
        if "train" in package.extras:
            said = f"not installed ({wants}): train, plan, eval, generate, chat and merge need it"
            return Check("versions", package.name, "warning", said, fix)
        why = f"{fix} brings it" if extras else "deltaw does without it"
        return Check("versions", package.name, "ok", f"not installed ({wants}): {why}")
    if package.fits:
        return Check("versions", package.name, "ok", f"{package.version} ({wants})")
    said = f"{package.version} is outside what deltaw is made for ({wants})"
    return Check("versions", package.name, "fault" if trains else "warning", said, f"{fix} --upgrade")


def _devices(machine: Machine) -> Iterator[Check]:
    cpu = machine.cpu
    yield Check(
        "devices", "cpu", "ok", f"{cpu.name}, {cpu.cores} cores, torch uses {cpu.threads} threads, {_bf16(cpu)}"
    )
    free = "free not known" if cpu.free is None else f"{_gb(cpu.free)} free"
    short = cpu.free is not None and cpu.free < ENOUGH_MEMORY
    fix = "end other programs, or use a machine with more memory" if short else ""
    yield Check("devices", "memory", "warning" if short else "ok", f"{_gb(cpu.memory)}, {free}", fix)
    for device in machine.devices:
        if device.fault is not None:
            fix = "end what holds the card, or update its driver; CUDA_VISIBLE_DEVICES= computes on the CPU"
            yield Check("devices", device.kind, "fault", f"{device.name} cannot be used: {device.fault}", fix)
            continue
        facts = [device.name]
        facts += [f"{_gb(device.memory)}, {_gb(device.free or 0)} free"] if device.memory is not None else []
        facts += [f"capability {device.capability}"] if device.capability else []
        facts += ["bf16" if device.bf16 else "no bf16: bases are held in fp32"]
        yield Check("devices", device.kind, "ok", ", ".join(facts))
    if not machine.devices:
        yield Check("devices", "accelerator", "ok", "none: everything runs on the CPU")


def _bf16(cpu: Cpu) -> str:
    if cpu.bf16 is None:
        return "bf16 in hardware not known"
    if cpu.bf16:
        return f"bf16 in hardware ({', '.join(cpu.bf16)})"
    return "no bf16 in hardware: it saves memory and no time"


def _hub(machine: Machine) -> Iterator[Check]:
    set_here = [name for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if _true(machine.environment.get(name))]
    said = f"offline ({', '.join(set_here)}): bases and data come from folders and the cache" if set_here else "online"
    yield Check("hub", "network", "ok", said)
    if machine.cache_writable:
        yield Check("hub", "cache", "ok", f"{machine.cache}, writable")
    else:
        said = f"{machine.cache} cannot be written: no base and no data set can be downloaded"
        yield Check(
            "hub",
            "cache",
            "ok" if set_here else "warning",
            said,
            "" if set_here else "set HF_HOME to a folder that can",
        )
    for name, free, least in (
        ("disk here", machine.disk, LITTLE_DISK),
        ("disk of the cache", machine.cache_disk, LITTLE_CACHE),
    ):
        short = free < least
        fix = (
            ("free some, or give output= on another disk" if name == "disk here" else "free some, or set HF_HOME")
            if short
            else ""
        )
        yield Check("hub", name, "warning" if short else "ok", f"{_gb(free)} free", fix)


def _conflicts(machine: Machine) -> Iterator[Check]:
    cuda = [device for device in machine.devices if device.kind == "cuda" and device.fault is None]
    built = machine.build or "the CPU alone"
    if machine.build and not machine.devices:
        hidden = machine.environment.get("CUDA_VISIBLE_DEVICES")
        why = f", CUDA_VISIBLE_DEVICES={hidden!r}" if hidden is not None else ""
        fix = (
            "update the driver, or unset CUDA_VISIBLE_DEVICES"
            if machine.nvidia
            else "nothing to do without a card; the CPU build is smaller"
        )
        said = f"torch is built for {built} and sees no device{why}"
        yield Check("conflicts", "torch", "fault" if machine.nvidia and hidden is None else "warning", said, fix)
    elif machine.nvidia and not machine.build:
        said = "there is an NVIDIA driver, and torch is built for the CPU alone: the card is not used"
        yield Check(
            "conflicts",
            "torch",
            "warning",
            said,
            "pip install torch --upgrade --force-reinstall, from the CUDA index of pytorch.org",
        )
    else:
        yield Check("conflicts", "torch", "ok", f"built for {built}, which is what is here")
    if cuda and not machine.triton:
        said = "triton is not installed: deltaw's and torch.compile's kernels for the card are left out"
        yield Check("conflicts", "triton", "warning", said, "pip install triton")
    else:
        said = "there" if machine.triton else "not installed, and not needed without a CUDA device"
        yield Check("conflicts", "triton", "ok", said)
    if machine.natives is not None:
        yield _bitsandbytes(machine, machine.natives, bool(cuda))
    threads, cores = machine.environment.get("OMP_NUM_THREADS", ""), machine.cpu.cores
    if (threads.isdigit() and int(threads) > cores) or machine.cpu.threads > cores:
        said = (
            f"{threads or machine.cpu.threads} threads on {cores} cores: they wait for each other, small products most"
        )
        yield Check("conflicts", "threads", "warning", said, f"export OMP_NUM_THREADS={cores}")
    else:
        yield Check("conflicts", "threads", "ok", f"{machine.cpu.threads} on {cores} cores")
    if len(machine.copies) > 1:
        said = f"{machine.copies[0]} is imported, {', '.join(machine.copies[1:])} is there too"
        yield Check("conflicts", "copies", "warning", said, "pip uninstall one of them, or leave it out of PYTHONPATH")
    else:
        yield Check("conflicts", "copies", "ok", "one deltaw")


def _bitsandbytes(machine: Machine, natives: Sequence[str], cuda: bool) -> Check:
    fix = "pip install 'deltaw[quant]' --upgrade --force-reinstall"
    if not natives:
        said = "bitsandbytes is installed without its compiled library: quantize cannot work"
        return Check("conflicts", "bitsandbytes", "fault", said, fix)
    kind, _, number = (machine.build or "").partition(" ")
    wanted = f"cuda{''.join(number.split('.')[:2])}" if kind == "cuda" and cuda else "cpu"
    if kind == "rocm" or wanted in natives:
        return Check(
            "conflicts", "bitsandbytes", "ok", f"has its library for {wanted if kind != 'rocm' else machine.build}"
        )
    said = f"bitsandbytes has no library for {wanted} (it has {', '.join(natives)}): quantize may not work here"
    return Check("conflicts", "bitsandbytes", "warning", said, fix)


def _true(value: str | None) -> bool:
    return value is not None and value.upper() in TRUE


def _gb(count: float) -> str:
    return f"{count / 1e9:.1f} GB"
