"""Adapters of other tools: what all their readers share. A reader is pure: file tensors → states by part → AdapterState.

    Parts        the models of a base by their role: "unet", "text_encoder", …, or one, "model"   → its Layout
    States       the same roles → AdapterState; paths are those inside the part
    Reading      what a reader has placed so far; faults are collected, and raised together by `done`

Every tensor must land: on a module that the base has, in a shape that fits it. A base is given as its Layout, read off
the real model (`deltaw.models.outlines`), so that names are looked up and never guessed.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from deltaw.core.errors import FileError, did_you_mean, faults
from deltaw.core.host import HostSpec
from deltaw.core.method import Method, Shapes, Site
from deltaw.core.state import AdapterState, misfit
from deltaw.formats.layout import Layout
from deltaw.methods.dora import DoRA
from deltaw.methods.full import Full
from deltaw.methods.lora import LoRA

Parts = Mapping[str, Layout]
States = dict[str, AdapterState]
Piece = tuple[Method, Mapping[str, Tensor]]


class Reading:
    """What a reader has placed so far, by part."""

    def __init__(self, parts: Parts):
        self.parts = parts
        self.found: list[str] = []
        self.notes: list[str] = []
        self._placed: dict[str, dict[Site, Piece]] = {}
        self._specs: dict[str, dict[Site, HostSpec]] = {}
        self._shapes = Shapes()

    def spec(self, role: str, path: str, key: str) -> HostSpec | None:
        """The shape of the layer at `path`, or None with a fault that names the key."""
        layout = self.parts[role]
        found = layout.specs.get(Site(path))
        if found is None and path in layout.entries:
            self.found.append(f"key {key!r}: {path!r} of the base has no weight that carries adapters")
        elif found is None:
            layers = [site.path for site in layout.specs]
            self.found.append(f"key {key!r}: {path!r} is no module of the base{self.near(path, layers)}")
        return found

    def near(self, given: str, known: Iterable[str]) -> str:
        """`did_you_mean`, of the first few faults: looking for it takes longer than all the rest."""
        return did_you_mean(given, known) if len(self.found) < 5 else ""

    def put(self, role: str, path: str, method: Method, tensors: Mapping[str, Tensor]) -> None:
        """Place an adapter at the weight of a module that is there; a fault where it does not fit."""
        site, spec = Site(path), self.parts[role].specs[Site(path)]
        reason = misfit(method, tensors, spec, self._shapes)
        if reason or site in self._placed.get(role, {}):
            self.found.append(f"{path}: {reason or 'it is in the file twice'}")
            return
        self._placed.setdefault(role, {})[site] = method, tensors
        self._specs.setdefault(role, {})[site] = spec

    def put_bias(self, role: str, path: str, bias: Tensor) -> None:
        """Place a trained bias."""
        site = Site(path, "bias")
        self._placed.setdefault(role, {})[site] = Full(), {"copy": bias}
        self._specs.setdefault(role, {})[site] = HostSpec(tuple(bias.shape), linear=False)

    def done(self, tool: str) -> tuple[States, list[str]]:
        """The states and what a user should read. FileError with all faults, or where nothing was found."""
        if self.found:
            raise faults(FileError, f"this adapter of {tool} cannot be read", self.found)
        if not self._placed:
            raise FileError(f"the file holds no tensor of an adapter of {tool}")
        states = {
            role: AdapterState(
                {site: method for site, (method, _) in pieces.items()},
                {site: tensors for site, (_, tensors) in pieces.items()},
                self._specs[role],
            )
            for role, pieces in self._placed.items()
        }
        return states, self.notes


def lora(a: Tensor, b: Tensor, alpha: float, magnitude: Tensor | None = None) -> Piece:
    """A LoRA of these factors, A [r, in, *kernel] and B [out, r, *ones], with the scale α/r; a DoRA with a magnitude [out].

    An α below zero goes into B: our methods have none.
    """
    a, b = a.contiguous(), (-b if alpha < 0 else b).contiguous()
    fields: dict[str, Any] = {"rank": len(a), "alpha": abs(float(alpha))}
    if magnitude is None:
        return LoRA(**fields), {"lora_A": a, "lora_B": b}
    return DoRA(**fields), {"lora_A": a, "lora_B": b, "magnitude": magnitude.flatten().contiguous()}


def matrices(*tensors: Tensor) -> bool:
    """Are all of them matrices, and none empty?"""
    return all(tensor.ndim == 2 and tensor.numel() for tensor in tensors)


def shaped(a: Tensor, b: Tensor, spec: HostSpec) -> tuple[Tensor, Tensor]:
    """Factors [r, fan_in] and [out, r], whatever singleton dimensions they carry, in the layout of the layer."""
    kernel = spec.shape[2:]
    fits = a[0].numel() == spec.fan_in and b[0, 0].numel() == 1
    return (a.reshape(len(a), spec.shape[1], *kernel), b.reshape(*b.shape[:2], *[1] * len(kernel))) if fits else (a, b)


def number(tensor: Tensor) -> float:
    """The value of a tensor that holds one, as files keep α."""
    return float(tensor.reshape(-1)[0]) if tensor.numel() == 1 else float("nan")


def grouped(a: Tensor, b: Tensor, enabled: list[bool]) -> tuple[Tensor, Tensor]:
    """loralib's MergedLinear as plain factors of the whole fused weight: A [n·r, in], B [out, n·r].

    a [n·r, in] and b [n·out/m, n·r/g]: a convolution in g groups, each of which joins its rows of b with its rows of a;
    its output fills the n enabled ones of m blocks of the weight, and the others do not change.
    """
    groups = a.shape[0] // b.shape[1]
    blocks = torch.block_diag(*(block.flatten(1) for block in b.chunk(groups)))  # [n·out/m, n·r]
    size = blocks.shape[0] // sum(enabled)
    rows = iter(blocks.split(size))
    return a, torch.cat([next(rows) if on else blocks.new_zeros(size, blocks.shape[1]) for on in enabled])
