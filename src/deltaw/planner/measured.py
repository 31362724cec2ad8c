"""What commands of this repository measured, as far as advice goes by it; benchmarks/results holds all of it.

A test keeps these numbers to the results, so that advice cannot outlive what it rests on.
"""

from typing import NamedTuple


class Cell(NamedTuple):
    """One method on the bundled task `records` (`python -m benchmarks methods`, docs/methods.md)."""

    rate: float
    """The best of four learning rates."""
    step: float
    """Time of a training step over LoRA's."""
    loss: float
    """Held-out loss, mean over three seeds; the base has 4.463."""


METHODS = {
    "adalora": Cell(0.03, 0.99, 0.0012),
    "boft": Cell(0.03, 3.23, 0.0015),
    "bottleneck": Cell(0.01, 0.91, 0.0031),
    "dora": Cell(0.01, 1.08, 0.0017),
    "full": Cell(0.003, 1.13, 0.0006),
    "ia3": Cell(0.1, 1.48, 0.0503),
    "llama_adapter": Cell(0.1, 0.95, 0.2441),
    "loha": Cell(0.03, 1.95, 0.0011),
    "lokr": Cell(0.03, 1.21, 0.0048),
    "lora": Cell(0.01, 1.00, 0.0021),
    "mora": Cell(0.01, 1.22, 0.0016),
    "oft": Cell(0.01, 1.73, 0.0012),
    "vera": Cell(0.1, 2.26, 0.0063),
}
TINY_RATES = (0.003, 0.01)
"""Best rates of LoRA on `tiny` (5.8 M): SCAN in 1,500 steps, `records` in 100."""

MERGED = (0.99, 0.99)
"""A decoding step with the adapter merged over the base's, lowest and highest of three batch sizes (docs/costs.md)."""
MOUNTED = (1.32, 1.34)
"""The same with one adapter mounted."""
EACH_ROW = (1.59, 2.14)
"""The same with another adapter in every row, of 8, 16 and 32 rows."""
STEP = (1.06, 1.08)
"""A training step of LoRA over the frozen base's, Llama of 75 M, lowest and highest of four cells."""
STEP_DROPOUT = (1.15, 1.37)
"""The same with dropout 0.05."""
STEP_OF_FULL = (0.76, 0.90)
"""The same over training all weights."""
SCAN = ((0.929, 0.012), (0.953, 0.005))
"""Exact match on SCAN, mean and sd of three seeds: LoRA r 16, all weights, each at its own rate."""


class Probed(NamedTuple):
    """Ranks by gradient spectra beside one rank for all, at equal parameters (`python -m benchmarks probe`)."""

    rank: int
    steps: int
    uniform: tuple[float, float]
    """Held-out loss, mean and sd of three seeds, at the better of three rates."""
    pattern: tuple[float, float]
    verdict: str
    """Of the pattern: better, worse, no better."""

    @property
    def said(self) -> str:
        (one, one_sd), (other, other_sd) = self.uniform, self.pattern
        return (
            f"Held-out loss after {self.steps} steps: rank {self.rank} everywhere {one:.4f} ± {one_sd:.4f}, the pattern "
            f"{other:.4f} ± {other_sd:.4f}, three seeds, each at its own rate."
        )


PROBED = Probed(4, 60, (0.0150, 0.0029), (0.0129, 0.0011), "no better")


def faster(method: str) -> float:
    """The method's best rate over LoRA's on the bundled task; 1 where it was not measured."""
    return METHODS[method].rate / METHODS["lora"].rate if method in METHODS else 1.0


def span(pair: tuple[float, float]) -> str:
    low, high = pair
    return f"{low:.2f}" if low == high else f"{low:.2f} to {high:.2f}"
