"""What a run will take on a device: memory by part, seconds of a step, whether it fits, and what would make it fit.

Outlook + widest batch + Device → Forecast; where it does not fit, the cheapest changes that make it, in order
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from deltaw.config.schema import Config
from deltaw.core.parts import find
from deltaw.core.plan import Target
from deltaw.methods.full import Full
from deltaw.models.base import pick_device
from deltaw.models.machine import cpu
from deltaw.planner.devices import Device, measured, named, room, seconds
from deltaw.planner.memory import Memory, said
from deltaw.training.outlook import Batch, Outlook, outlook, steps, widest
from deltaw.training.prepare import Prepared, longest

TOWER = "the activations of the image tower are not counted: without its weights this model does not run on images"
ROWLESS = "images are not counted: without rows (data.train) their number and size are not known"


@dataclass(frozen=True)
class Forecast:
    """Of one run on one device."""

    device: Device
    dtype: str
    batch: Batch
    memory: Memory
    step_seconds: float
    """Of an optimizer step of the widest batches; narrower ones take less."""
    fits: bool
    notes: tuple[str, ...] = ()
    """What is not counted."""

    def record(self) -> dict[str, Any]:
        return {
            "device": {"name": self.device.name, "memory_bytes": self.device.memory, "measured": self.device.measured},
            "dtype": self.dtype,
            "batch": self.batch.record(),
            "memory": self.memory.record(),
            "time": {"step_seconds": self.step_seconds},
            "warnings": self.warnings,
            "notes": list(self.notes),
            "fits": self.fits,
        }

    def __str__(self) -> str:
        b = self.batch
        verdict = "fits" if self.fits else "does NOT fit"
        lines = [
            f"a step of {b.rows} × {b.length:,} tokens in {self.dtype} takes",
            *(f"  {line}" for line in str(self.memory).splitlines()),
            f"{verdict} in {self.device.name}: {said(room(self.device))} are free for it, {_time(self.step_seconds)} a step at most",
        ]
        return "\n".join([*lines, *self.warnings, *(f"note: {note}" for note in self.notes)])

    @property
    def short(self) -> dict[str, Any]:
        return {
            "name": self.device.name, "fits": self.fits, "peak_bytes": self.memory.peak, "step_seconds": self.step_seconds
        }  # fmt: skip

    @property
    def warnings(self) -> list[str]:
        """What the device is bad at."""
        slow = self.device.flops["fp32"] / self.device.flops["bf16"]
        if self.dtype == "bf16" and slow > 2:
            return [f"note: {self.device.name} computes bf16 {slow:.0f} times slower than fp32: set train.dtype=fp32"]
        return []


def forecast(config: Config, look: Outlook, batch: Batch, device: Device) -> Forecast:
    """The forecast of a run with batches of `batch` at most on `device`."""
    dtype = _dtype(config, device)
    counted, memory = look.count(config, batch, device.kind, dtype)
    taken = config.train.gradient_accumulation * seconds(counted.work, device, dtype)
    notes = () if counted.features and (batch.features or not batch.images) else (TOWER,)
    if batch.images is None and find(look.model) is not None:
        notes = (ROWLESS,)
    return Forecast(device, dtype, batch, memory, taken, memory.peak <= room(device), notes)


class Looks:
    """The outlooks of variants of one configuration: one for each dtype, quantised and not.

    carried: what the adapter that it goes on from holds (`Outlook.carried`).
    """

    def __init__(self, carried: Sequence[Target] | None = None) -> None:
        self._carried = carried
        self._there: dict[tuple[bool, str], Outlook] = {}

    def forecast(self, config: Config, data: Prepared | None, device: Device, look: Outlook | None = None) -> Forecast:
        key = config.quantize != "none", _dtype(config, device)
        if key not in self._there:
            found = look or outlook(config, self._carried)
            assert found is not None  # a run that goes on from an adapter has no forecast to begin with
            self._there[key] = found
        there = self._there[key]
        return forecast(config, there, widest(config, data, there.limit), device)


def _dtype(config: Config, device: Device) -> str:
    if config.train.dtype != "auto":
        return config.train.dtype
    return "bf16" if device.kind == "cuda" and device.flops["bf16"] > device.flops["fp32"] else "fp32"


def foreseen(config: Config, look: Outlook, data: Prepared) -> tuple[dict[str, Any], list[str]]:
    """The record of the forecast of a run here, and what there is to warn of; or why there is none: a run does not depend on it."""
    try:
        found = forecast(config, look, widest(config, data, look.limit), here())
    except Exception as error:  # whatever a foreign model raises where its tensors have no numbers
        return {"unknown": _why(error)}, []
    warnings = list(found.warnings)
    if not found.fits:
        needed = (
            f"a step takes {said(found.memory.peak)} at most, and {found.device.name} has {said(found.device.memory)}"
        )
        warnings.append(f"{needed}: deltaw plan says what would make it fit")
    return found.record(), warnings


def costs(config: Config, look: Outlook, data: Prepared | None, devices: Sequence[str]) -> dict[str, Any]:
    """What a run takes on some devices, as plain data: the first in full, with what would make it fit, the others in short.

    UseError for a device that is not known.
    """
    looks, chosen = Looks(look.carried), [named(name, here) for name in devices]
    try:
        found = [looks.forecast(config, data, device, look if not n else None) for n, device in enumerate(chosen)]
    except Exception as error:  # whatever a foreign model raises where its tensors have no numbers
        return {"unknown": _why(error), "text": f"what a step takes is not known: {_why(error)}"}
    first, total = found[0], 0 if data is None else steps(config, len(data.encoded))[0]
    record = first.record()
    record["text"] = str(first)
    if total:
        record["time"] |= {"steps": total, "total_seconds": total * first.step_seconds}
        record["text"] += f"; {total:,} steps, at most {_time(total * first.step_seconds)}"
    if not first.fits:
        changes, after = cheaper(config, data, chosen[0], looks, look)
        record["changes"] = [dataclasses.asdict(change) for change in changes]
        record["after_changes"] = None if after is None else after.memory.record()
        if after is None:
            record["text"] += "\nno change of the configuration makes it fit: a smaller base or a larger device would"
        else:
            lines = [f"  {change.write}  ({change.costs})" for change in changes]
            ends = f"then it takes {said(after.memory.peak)} and {_time(after.step_seconds)} a step"
            record["text"] += "\n" + "\n".join(["what makes it fit, the cheapest first:", *lines, ends])
    record["devices"] = [f.short for f in found]
    for other in found[1:]:
        verdict = "fits" if other.fits else "does NOT fit"
        record["text"] += (
            f"\n{verdict} in {other.device.name}: {said(other.memory.peak)} in {other.dtype}, "
            f"{_time(other.step_seconds)} a step at most"
        )
    return record


def here(kind: str = "here") -> Device:
    """The device that training would take on this machine, or its processor ("cpu")."""
    processor = cpu()
    device = pick_device() if kind == "here" else torch.device("cpu")
    return measured(device, processor.name, processor.memory)


@dataclass(frozen=True)
class Change:
    """A change of the configuration that saves memory: what to write, and what it costs."""

    write: str
    costs: str


def cheaper(
    config: Config, data: Prepared | None, device: Device, looks: Looks, look: Outlook
) -> tuple[list[Change], Forecast | None]:
    """The cheapest changes, in order, after which the run fits on `device`, with what it then takes; nothing where none is enough.

    Each is kept only if it is needed beside the later ones.
    """

    def tried(some: Sequence[tuple[Change, Callable[[Config], Config]]]) -> Forecast | None:
        try:
            there = looks.forecast(_with(config, [apply for _, apply in some]), data, device)
        except Exception:  # a variant that a foreign model does not run is none
            return None
        return there if there.fits else None

    taken = _changes(config, look)
    found = tried(taken)
    if found is None:
        return [], None
    too_few, enough = 0, len(taken)
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        there = tried(taken[:middle])
        too_few, enough, found = (middle, enough, found) if there is None else (too_few, middle, there)
    taken = taken[:enough]
    for one in taken[:-1]:  # the last one is needed, or it would have fitted before
        others = [other for other in taken if other is not one]
        less = tried(others)
        if less is not None:
            taken, found = others, less
    return [change for change, _ in taken], found


def _with(config: Config, applied: Sequence[Callable[[Config], Config]]) -> Config:
    for apply in applied:
        config = apply(config)
    return config


def _changes(config: Config, look: Outlook) -> list[tuple[Change, Callable[[Config], Config]]]:
    """What saves memory, the cheapest first."""
    whole = any(isinstance(target.method, Full) for target in look.plan.targets)
    t, found = config.train, []

    def train(**values: Any) -> Callable[[Config], Config]:
        return lambda c: dataclasses.replace(c, train=dataclasses.replace(c.train, **values))

    if t.batch_size > 1:
        both = {"batch_size": 1, "gradient_accumulation": t.batch_size * t.gradient_accumulation}
        text = " ".join(f"train.{key}={value}" for key, value in both.items())
        found.append((Change(text, "the same step, in smaller products"), train(**both)))
    if not t.checkpointing:
        change = Change("train.checkpointing=true", "the same step, about a third more time")
        found.append((change, train(checkpointing=True)))
    if t.dtype == "fp32":
        found.append((Change("train.dtype=bf16", "the base in 16 bits"), train(dtype="bf16")))
    if t.optimizer == "adamw":
        change = Change("train.optimizer=adamw-8bit", "moments in 8 bits")
        found.append((change, train(optimizer="adamw-8bit")))
    for kind, costs in (
        ("int8", "the base in 8 bits, slower"),
        ("nf4", "the base in 4 bits"),
        ("nf4-double", "the base in 4 bits, its scales in 8"),
    ):
        if whole or look.quantized:  # a copy of a quantised weight is not trained, a quantised base not quantised again
            break
        if config.quantize == "none" or (config.quantize, kind) == ("nf4", "nf4-double"):
            apply = lambda c, kind=kind: dataclasses.replace(c, quantize=kind)  # noqa: E731
            found.append((Change(f"quantize={kind}", costs), apply))
    for length in (1024, 512, 256):
        if length < longest(config, look.limit):
            apply = lambda c, n=length: dataclasses.replace(c, data=dataclasses.replace(c.data, max_length=n))  # noqa: E731
            found.append((Change(f"data.max_length={length}", "longer rows are left out"), apply))
    return found


def _why(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _time(taken: float) -> str:
    for size, name in ((86400, "days"), (3600, "hours"), (60, "minutes"), (1, "s")):
        if taken >= 2 * size or size == 1 <= taken:
            return f"{taken / size:,.1f} {name}"
    return f"{1000 * taken:,.0f} ms"
