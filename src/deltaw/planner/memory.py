"""Bytes of a training step, by part: what is arithmetic. What the step itself keeps is counted by `training.rehearsal`.

    peak = weights + adapters + optimizer + gradients + activations + work + overhead

    weights     16 bit: 2 a value    nf4: ½ + 4/64    nf4-double: ½ + 1/64 + 4/(64 · 256)    int8: 1, and 4 a row
    adapters    fp32 masters: 4 a value
    gradients   4
    optimizer   AdamW: 8    with 8-bit states: 2, and 8 for each 256 values
    activations what the forward pass keeps for the backward pass
    work        the largest of the tensors that live for a moment: a chunk of logits, gradients of activations
    overhead    what libraries and allocators take beside tensors, from measurements (docs/memory.md)

Quantisation as bitsandbytes does it: Dettmers et al. 2023, arXiv 2305.14314 (blocks of 64, second blocks of 256).
"""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import NamedTuple

BLOCK, SECOND, STATE = 64, 256, 256
SMALLEST_STATE = 4096
"""Tensors of fewer values keep fp32 states in bitsandbytes' 8-bit optimizers."""


class Weight(NamedTuple):
    """A tensor of the base: values, rows, and whether it is the weight of a layer that is quantised."""

    values: int
    rows: int
    quantized: bool


@dataclass(frozen=True)
class Memory:
    """Bytes by part at the moment when most are alive; `evaluation` is the peak of an evaluation, for itself."""

    weights: int
    adapters: int
    optimizer: int
    gradients: int
    activations: int
    work: int
    overhead: int
    evaluation: int

    @property
    def peak(self) -> int:
        return self.weights + self.increment

    @property
    def increment(self) -> int:
        """Above the loaded base."""
        return self.adapters + self.optimizer + self.gradients + self.activations + self.work + self.overhead

    def record(self) -> dict[str, int]:
        """{part}_bytes, and the sums."""
        parts = {f"{name}_bytes": value for name, value in asdict(self).items()}
        return {**parts, "increment_bytes": self.increment, "peak_bytes": self.peak}

    def __str__(self) -> str:
        rows = {name: value for name, value in asdict(self).items() if name != "evaluation"}
        width = max(map(len, rows))
        lines = [f"{name:{width}}  {said(value):>9}" for name, value in rows.items()]
        return "\n".join([*lines, f"{'peak':{width}}  {said(self.peak):>9}  (evaluation {said(self.evaluation)})"])


def said(size: float) -> str:
    """Bytes for people, in powers of ten."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= unit:
            return f"{size / unit:,.2f} {name}"
    return f"{size:,.0f} B"


def weight_bytes(weights: Iterable[Weight], itemsize: int, quantize: str = "none") -> int:
    """Of a base whose tensors are `itemsize` bytes a value, with its linear layers quantised: none, nf4, nf4-double, int8."""
    return sum(
        _quantized(weight, quantize) if weight.quantized and quantize != "none" else weight.values * itemsize
        for weight in weights
    )


def _quantized(weight: Weight, quantize: str) -> int:
    if quantize == "int8":
        return weight.values + 4 * weight.rows
    blocks = math.ceil(weight.values / BLOCK)
    scales = 4 * blocks if quantize == "nf4" else blocks + 4 * math.ceil(blocks / SECOND) + 4 * SECOND
    return math.ceil(weight.values / 2) + scales


def optimizer_bytes(sizes: Iterable[int], optimizer: str) -> int:
    """States of tensors of these numbers of values: adamw, adamw-8bit, paged-adamw-8bit."""
    if optimizer == "adamw":
        return 8 * sum(sizes)
    return sum(2 * size + 8 * math.ceil(size / STATE) if size >= SMALLEST_STATE else 8 * size for size in sizes)
