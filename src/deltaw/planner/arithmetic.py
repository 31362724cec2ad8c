"""Arithmetic before you spend, exact and without a model: parameters, bytes, multiplications of low-rank changes.

    W [out, in] beside s·B·A, rank r:   r(out + in) parameters, as many as W itself at r = out·in/(out + in)
    mounted, a call multiplies          out·in + r(out + in)        merged: out·in
    a training step multiplies          2·out·in + 3r(out + in)     all weights: 3·out·in

Bytes are decimal, GB = 1e9; a count of parameters is never one of bytes.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

TRAINED_BYTES = {"fp32": 16, "mixed": 12, "bf16": 8}
"""Bytes of a trained number: weight, gradient and two moments of Adam, all fp32; weight and gradient bf16; all bf16."""


class Layer(NamedTuple):
    """One weight with a change of this rank (None where the method has none)."""

    path: str
    out: int
    into: int
    rank: int | None = None
    stack: int = 1
    """Weights of this shape side by side (experts)."""

    @property
    def weights(self) -> int:
        return self.stack * self.out * self.into

    @property
    def added(self) -> int:
        """Numbers of the two factors."""
        return self.stack * low_rank(self.out, self.into, self.rank or 0)

    @property
    def break_even(self) -> float:
        return break_even(self.out, self.into)


def low_rank(out: int, into: int, rank: int) -> int:
    """Parameters of B·A."""
    return rank * (out + into)


def break_even(out: int, into: int) -> float:
    """The rank at which B·A has as many parameters as W."""
    return out * into / (out + into)


def unmerged_share(layers: Iterable[Layer]) -> float:
    """Multiplications that mounted factors add, over those of the layers: r(out + in)/(out·in) of a single one."""
    found = list(layers)
    return sum(layer.added for layer in found) / sum(layer.weights for layer in found)


def training_share(layers: Iterable[Layer]) -> float:
    """Multiplications of a training step over those of training the weights: (2N² + 6NR)/(3N²) where square."""
    return 2 / 3 + unmerged_share(layers)


def optimizer_steps(rows: int, batch: int, epochs: float) -> int:
    """Steps of `batch` rows, the last of a pass with fewer."""
    return max(1, math.ceil(math.ceil(rows / batch) * epochs))


def training_bytes(parameters: int, kind: str = "fp32") -> int:
    """Bytes of what is trained, with its gradient and Adam's moments; activations and the frozen base are apart."""
    return parameters * TRAINED_BYTES[kind]


def share(part: float, whole: float) -> float:
    """In per cent: what remains, or is trained; not by how much it is less."""
    return 100 * part / whole
