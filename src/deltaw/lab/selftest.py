"""The self-test: an adapter's whole life on the bundled base, in seconds and offline, every step of it checked.

    load → attach → gradients → training → save and load → merge → detach

What is compared: bits where nothing may change, logits within rounding where weights are written.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deltaw.config.schema import Source
from deltaw.core.attach import attach, detach
from deltaw.core.base import base_parameters
from deltaw.core.merge import merge, unmerge
from deltaw.core.route import use
from deltaw.data.collate import Collator
from deltaw.data.dataset import encode_rows
from deltaw.data.encode import Policy
from deltaw.data.rows import read_rows
from deltaw.infer.loss import SFTLoss
from deltaw.lab.tasks import load_task
from deltaw.methods.lora import LoRA
from deltaw.models.adapters import load, save
from deltaw.models.base import load_base
from deltaw.ship.check import TOLERANCE, logits, probe

STEPS, ROWS, RATE = 8, 8, 5e-3
SECONDS = 10.0
"""No further step is made after these, so that a slow machine is done within twenty."""
FALLS = 0.9
"""The loss on the rows that it learns from must end below this share of its start; two steps are enough for it."""


class Step(NamedTuple):
    """One thing that was tried."""

    name: str
    right: bool
    said: str


class Wrong(Exception):
    """Something computed, and computed another thing than it must."""


def selftest() -> list[Step]:
    """Every step up to the first that fails: what follows would say nothing."""
    life, found = _Life(), list[Step]()
    steps: dict[str, Callable[[], str]] = {
        "load": life.load, "attach": life.attach, "gradients": life.gradients, "training": life.training,
        "save and load": life.save_and_load, "merge": life.merge, "detach": life.detach,
    }  # fmt: skip
    for name, step in steps.items():
        began = time.monotonic()
        try:
            said = step()
        except Exception as error:  # whatever an installation may break, here is where it is told
            kind = "" if isinstance(error, Wrong) else f"{type(error).__name__}: "
            found.append(Step(name, False, f"{kind}{' '.join(str(error).split())[:300]}"))
            break
        found.append(Step(name, True, f"{said}, {time.monotonic() - began:.1f} s"))
    return found


class _Life:
    """The base, its adapter, and what they gave before."""

    base: Any
    model: Any
    batch: dict[str, Tensor]
    ids: Tensor
    plain: Tensor
    kept: dict[str, Tensor]

    def load(self) -> str:
        self.base = load_base("tiny", dtype="fp32")
        self.model = self.base.model
        device = next(self.model.parameters()).device
        self.ids = probe(self.model).to(device)
        self.plain = self.logits()
        self.kept = {key: value.clone() for key, value in self.model.state_dict().items()}
        rows = read_rows(Source(path=str(load_task("records").train), rows=ROWS))
        encoded, _ = encode_rows(rows, self.base.tokenizer, Policy(self.base.max_length))
        self.batch = {k: v.to(device) for k, v in Collator(self.base.tokenizer)(encoded).items()}
        if not torch.isfinite(self.plain).all():
            raise Wrong(f"the logits of the bundled base are not finite on {device}")
        return f"tiny on {device}"

    def attach(self) -> str:
        torch.manual_seed(0)
        plan = attach(self.model, LoRA(rank=8, alpha=16), targets="all-linear")
        if not torch.equal(self.logits(), self.plain):
            raise Wrong("an adapter that was not trained changes the logits of the base")
        return f"{len(plan)} adapters, logits those of the base to the bit"

    def gradients(self) -> str:
        self.model.train()
        self.loss().backward()
        leaks = [path for path, parameter in base_parameters(self.model) if parameter.grad is not None]
        reached = [p for p in self.model.parameters() if p.grad is not None and p.grad.any()]
        self.model.zero_grad()
        if leaks:
            raise Wrong(f"{len(leaks)} tensors of the base have a gradient, {leaks[0]} first")
        if not reached:
            raise Wrong("no gradient reaches the adapter")
        return "on the adapter alone"

    def training(self) -> str:
        optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=RATE)
        began, losses = time.monotonic(), list[float]()
        while len(losses) <= STEPS and (len(losses) < 3 or time.monotonic() - began < SECONDS):
            loss = self.loss()
            losses.append(float(loss.detach()))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        self.model.eval()
        if not losses[-1] < FALLS * losses[0]:
            raise Wrong(f"the loss went from {losses[0]:.3f} to {losses[-1]:.3f} in {len(losses) - 1} steps")
        return f"loss {losses[0]:.3f} → {losses[-1]:.3f} in {len(losses) - 1} steps"

    def save_and_load(self) -> str:
        tuned = self.logits()
        with tempfile.TemporaryDirectory() as folder:
            save(self.model, Path(folder) / "adapter")
            load(self.model, Path(folder) / "adapter", name="again")
        with use(self.model, "again"):
            same = torch.equal(self.logits(), tuned)
        detach(self.model, "again")
        use(self.model, "default")
        if not same:
            raise Wrong("an adapter that was written and read back gives other logits")
        return "equal logits from the files"

    def merge(self) -> str:
        tuned = self.logits()
        merge(self.model, keep_base=True)
        difference, allowed = float((self.logits() - tuned).abs().max()), float(tuned.abs().max())
        unmerge(self.model)
        if not difference <= TOLERANCE[torch.float32] * allowed:
            raise Wrong(f"merged weights give logits that differ by {difference:.3g} of {allowed:.3g}")
        if not torch.equal(self.logits(), tuned):
            raise Wrong("unmerge did not bring back the bits of the weights")
        return f"largest logit difference {difference:.1e} of {allowed:.1f}, undone to the bit"

    def detach(self) -> str:
        detach(self.model)
        now = self.model.state_dict()
        if now.keys() != self.kept.keys() or not all(torch.equal(now[key], kept) for key, kept in self.kept.items()):
            raise Wrong("the base is not what it was before the adapter")
        if not torch.equal(self.logits(), self.plain):
            raise Wrong("the base gives other logits than before the adapter")
        return "keys, weights and logits those of the base to the bit"

    def logits(self) -> Tensor:
        return logits(self.model, self.ids)

    def loss(self) -> Tensor:
        total, count = SFTLoss(self.model)(self.batch)
        return total / count
