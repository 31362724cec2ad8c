"""What a run will take on a device: memory by part, seconds of a step, whether it fits, and what would make it fit.

Outlook + widest batch + Device → Forecast; where it does not fit, the cheapest changes that make it, in order
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from deltaw.config.schema import Config
from deltaw.models.base import DTYPES
from deltaw.planner.devices import Device, fits, measured, reserve, seconds
from deltaw.planner.memory import Memory, said
from deltaw.training.outlook import Batch, Outlook, outlook, widest
from deltaw.training.prepare import Prepared


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

    def record(self) -> dict[str, Any]:
        return {
            "device": {"name": self.device.name, "memory_bytes": self.device.memory, "measured": self.device.measured},
            "dtype": self.dtype,
            "batch": dataclasses.asdict(self.batch),
            "memory": self.memory.record(),
            "time": {"step_seconds": self.step_seconds},
            "fits": self.fits,
        }

    def __str__(self) -> str:
        b, room = self.batch, self.device.memory - reserve(self.memory.peak, self.device)
        verdict = "fits" if self.fits else "does NOT fit"
        return (
            f"memory of a step of {b.rows} rows of {b.length:,} tokens, {self.dtype}:\n{self.memory}\n"
            f"{verdict} in {self.device.name}, which has {said(room)} for it; about {_time(self.step_seconds)} a step at most"
        )


def forecast(config: Config, look: Outlook, batch: Batch, device: Device) -> Forecast:
    """The forecast of a run with batches of `batch` at most on `device`. Uses the outline of `look` up."""
    dtype = config.train.dtype if config.train.dtype != "auto" else ("bf16" if device.kind == "cuda" else "fp32")
    counted, memory = look.count(config, batch, device.kind, dtype)
    taken = config.train.gradient_accumulation * seconds(counted.work, device, dtype)
    return Forecast(device, dtype, batch, memory, taken, fits(memory.peak, device))


def foreseen(config: Config, look: Outlook, data: Prepared, model: nn.Module) -> dict[str, Any]:
    """The record of the forecast of a run on a loaded base, or why there is none: a run does not depend on it."""
    first = next(model.parameters())
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, dtype=_named(model)))
    try:
        return forecast(config, look, widest(config, data), measured(first.device)).record()
    except Exception as error:  # whatever a foreign model raises where its tensors have no numbers
        return {"unknown": f"{type(error).__name__}: {error}".splitlines()[0]}


def _named(model: nn.Module) -> Any:
    return next((name for name, dtype in DTYPES.items() if dtype == model.dtype), "auto")


@dataclass(frozen=True)
class Change:
    """A change of the configuration that saves memory: what to write, and what it costs."""

    write: str
    costs: str


def cheaper(config: Config, data: Prepared | None, device: Device) -> tuple[list[Change], Forecast | None]:
    """The cheapest changes, in order, after which the run fits on `device`, with what it then takes; None where none is enough.

    Each is kept only if it is needed beside the later ones.
    """
    taken: list[tuple[Change, Callable[[Config], Config]]] = []
    found: Forecast | None = None
    for change, apply in _changes(config):
        taken.append((change, apply))
        found = _with(config, [one for _, one in taken], data, device)
        if found.fits:
            break
    else:
        return [change for change, _ in taken], None
    for one in taken[:-1]:  # the last one is needed, or it would have fitted before
        others = [other for other in taken if other is not one]
        tried = _with(config, [apply for _, apply in others], data, device)
        if tried.fits:
            taken, found = others, tried
    return [change for change, _ in taken], found


def _with(
    config: Config, applied: Sequence[Callable[[Config], Config]], data: Prepared | None, device: Device
) -> Forecast:
    for apply in applied:
        config = apply(config)
    look = outlook(config)
    assert look is not None  # a run that goes on from an adapter has no forecast to begin with
    return forecast(config, look, widest(config, data), device)


def _changes(config: Config) -> list[tuple[Change, Callable[[Config], Config]]]:
    """What saves memory, the cheapest first."""
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
        if config.quantize == "none" or (config.quantize, kind) == ("nf4", "nf4-double"):
            apply = lambda c, kind=kind: dataclasses.replace(c, quantize=kind)  # noqa: E731
            found.append((Change(f"quantize={kind}", costs), apply))
    longest = config.data.max_length or 2048
    for length in (1024, 512, 256):
        if length < longest:
            apply = lambda c, n=length: dataclasses.replace(c, data=dataclasses.replace(c.data, max_length=n))  # noqa: E731
            found.append((Change(f"data.max_length={length}", "longer rows are left out"), apply))
    return found


def _time(taken: float) -> str:
    return f"{taken:,.1f} s" if taken >= 1 else f"{1000 * taken:,.0f} ms"
