"""What happens around the steps: events into the run directory, the gradient check, progress, and a clean stop.

The gradient check runs once, before the first optimizer step: only adapter tensors may have a gradient, and each
adapter must have one that is not zero. A branch that never trains is named, not averaged away.
"""

import math
import signal
import statistics
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from deltaw.core.adapter import Adapter
from deltaw.core.attach import adapters, kinds
from deltaw.core.base import base_parameters
from deltaw.core.errors import TrainError, faults
from deltaw.core.method import Site
from deltaw.core.parts import SEEING, Parts
from deltaw.runs.directory import RunDirectory
from deltaw.training.watch import peak_memory


class Events(TrainerCallback):
    """Logs every step line and evaluation; stops at once where the loss is not finite."""

    def __init__(self, run: RunDirectory):
        self.run = run
        self._began = 0.0
        self._taken: list[float] = []

    @property
    def step_seconds(self) -> float | None:
        """The median of an optimizer step; the first, which compiles and fills caches, counts where there is no other."""
        return statistics.median(self._taken[1:] or self._taken) if self._taken else None

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._taken.append(time.perf_counter() - self._began)
        control.should_log |= state.global_step >= state.max_steps  # the last loss, however rare the lines

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        if "eval_loss" in logs:
            self.run.log("eval", step=state.global_step, loss=logs["eval_loss"])
        elif "loss" in logs:
            facts = {key: logs[key] for key in ("grad_norm", "learning_rate", "epoch") if key in logs}
            self.run.log("step", step=state.global_step, loss=logs["loss"], **facts, peak_memory=peak_memory())
        loss = logs.get("loss", logs.get("eval_loss", 0.0))
        if not math.isfinite(loss):
            raise TrainError(
                f"the loss is {loss} at step {state.global_step}: lower train.learning_rate, or train in fp32"
            )


class GradientCheck(TrainerCallback):
    """parts: of a run that goes part by part: one that is trained and gets no gradient at all is an error. features: have
    the batches so far held more than text? Where rows have images and the first batch has none, its parts wait for one."""

    def __init__(
        self, run: RunDirectory, name: str, parts: Parts | None = None, images: bool = False,
        features: Callable[[], bool] = lambda: False,
    ):  # fmt: skip
        self.run, self.name, self.parts, self.images, self.features = run, name, parts, images, features
        self.waits = False

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        whole = not self.images or self.features()
        if state.global_step == 0 or (self.waits and whole):
            dead = check_gradients(model, self.name, whole and self.parts is None)
            if dead and whole:
                self._parts(model, dead)
                self.run.log(
                    "warning",
                    text=f"no gradient reaches {len(dead)} adapters, they will not train: {', '.join(dead[:8])}",
                )
        self.waits = not whole and (self.waits or state.global_step == 0)

    def _parts(self, model: nn.Module, dead: list[str]) -> None:
        """TrainError for the parts that get no gradient at all."""
        parts: dict[str | None, list[bool]] = {}
        for site in _trained(model, self.name) if self.parts is not None else ():
            parts.setdefault(self.parts.of(site.path), []).append(str(site) in dead)
        found = [
            f"no gradient reaches {part}: {self._why(part)}; freeze it ({part}: frozen), or leave it out"
            for part, gone in parts.items()
            if all(gone)
        ]
        if found:
            raise faults(TrainError, "adapter.parts", found)

    def _why(self, part: str | None) -> str:
        if part in SEEING and not self.features():
            return "no row has an image"
        return "is it run under no_grad, read before the layers that are trained, or followed by weights that are zero?"


def check_gradients(model: nn.Module, name: str, strict: bool = True) -> list[str]:
    """Sites whose tensors have no non-zero gradient from the loss. TrainError if base tensors have one, or no adapter.

    Tensors in a method's penalty have its gradient in any case: of these counts one that points elsewhere (clipping has
    scaled it, accumulation has summed it). strict: is no gradient at all an error here?
    """
    leaks = [f"{path} is of the base and has a gradient" for path, p in base_parameters(model) if p.grad is not None]
    if leaks:
        raise faults(TrainError, "training would change the base", leaks)
    there, penalties = _trained(model, name), dict[int, Tensor]()
    for method, kind in kinds(model, name, trained=True):
        penalty = method.penalty(kind)
        parameters = [p for adapter in kind for p in adapter.parameters()]
        if penalty is not None:
            found = torch.autograd.grad(penalty, parameters, allow_unused=True)
            penalties |= {id(p): grad for p, grad in zip(parameters, found, strict=True) if grad is not None}
    dead = [
        str(site)
        for site, adapter in there.items()
        if not any(_reached(p.grad, penalties.get(id(p))) for p in adapter.parameters())
    ]
    if strict and len(dead) == len(there):
        raise TrainError("no gradient reaches the adapter: are the adapted modules part of the forward pass?")
    return dead


def _trained(model: nn.Module, name: str) -> dict[Site, Adapter]:
    return {s: a for s, a in adapters(model, name).items() if any(p.requires_grad for p in a.parameters())}


def _reached(grad: Tensor | None, penalty: Tensor | None) -> bool:
    """Is there more in a gradient than that of the penalty, up to its size and rounding?"""
    if grad is None or not grad.any():
        return False
    if penalty is None or not penalty.any():
        return True
    return float((grad / grad.norm() - penalty / penalty.norm()).norm()) > 1e-5


class Steps(TrainerCallback):
    """Tells the methods of every optimizer step (`Method.after_step`), the gradients still there."""

    def __init__(self, model: nn.Module, name: str):
        self.kinds = kinds(model, name, trained=True)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        for method, there in self.kinds:
            method.after_step(there, state.global_step + 1, state.max_steps)


class CleanStop(TrainerCallback):
    """Ctrl-C finishes the step, writes a checkpoint and stops; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.interrupted = False
        self._before: Any = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.interrupted = getattr(
            signal.getsignal(signal.SIGINT), "seen", False
        )  # one that Python lost on the way here
        try:
            self._before = signal.signal(signal.SIGINT, self._note)
        except ValueError:  # not the main thread: whoever owns the process handles its signals
            self._before = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.interrupted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.interrupted:
            control.should_save = control.should_training_stop = True

    def release(self) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)


class ProgressBar(TrainerCallback):
    """A bar with ETA on stderr of a terminal, else a line every half minute."""

    def __init__(self, quiet: bool = False):
        self.console = Console(stderr=True, quiet=quiet)
        self.bar: Progress | None = None
        self.text, self.last, self.began = "", 0.0, 0.0

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.began = self.last = time.monotonic()
        self.first = state.global_step
        if self.console.is_terminal:
            columns = (
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                TextColumn("{task.description}"),
            )
            self.bar = Progress(*columns, console=self.console)
            self.task = self.bar.add_task("", total=state.max_steps, completed=state.global_step)
            self.bar.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        now = time.monotonic()
        if self.bar is not None:
            self.bar.update(self.task, completed=state.global_step, description=self.text)
        elif now - self.last > 30:
            self.last = now
            left = (now - self.began) / max(1, state.global_step - self.first) * (state.max_steps - state.global_step)
            self.console.print(f"step {state.global_step}/{state.max_steps}  {self.text}  ETA {left:.0f} s")

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        if "loss" in logs:
            self.text = f"loss {logs['loss']:.3f}"
        elif "eval_loss" in logs:
            self.text += f"  held-out {logs['eval_loss']:.3f}"

    def release(self) -> None:
        if self.bar is not None:
            self.bar.stop()
