"""What a change does to its base: does it strengthen directions that W hardly uses? (LoRA paper, §7.3 and Table 7)

ΔW = UΣVᵀ cut at r         UᵀWV: W seen through the directions of ΔW
amplification              ‖ΔW‖_F / ‖UᵀWV‖_F
beside it                  the same with the r largest directions of W:  √Σ_{i≤r} σᵢ(W)²
                           with random directions, in the mean:          ‖W‖_F · r / √(out · in)
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from deltaw.analysis.spectrum import ROUNDING
from deltaw.core.change import Singular

EXACT = 512
"""Up to this small side W's singular values are exact, above from a sketch of it (a little too small)."""


@dataclass(frozen=True)
class Amplification:
    """‖UᵀWV‖_F for three choices of r directions, and ‖ΔW‖_F over the first of them."""

    rank: int
    change: float
    """‖ΔW‖_F, of the part in the r directions."""
    seen: float
    """U and V of ΔW."""
    largest: float
    """U and V of W: the most that any r directions see."""
    random: float
    """Random U and V: √ of the mean square."""

    @property
    def factor(self) -> float:
        return self.change / self.seen if self.seen else math.inf


def amplification(svd: Singular, weight: Tensor, rank: int | None = None) -> Amplification:
    """svd: of ΔW, u [out, k], s [k], vt [k, fan_in]; weight: [out, in, *kernel]; rank: r ≤ k, all above rounding by default.

    Costs r products with W, and a sketch of r + 16 directions of it. No dense decomposition above `EXACT`.
    """
    w = weight.detach().flatten(1).float()  # [out, fan_in]
    there = int((svd.s > ROUNDING * svd.s[0]).sum())
    r = there if rank is None else min(rank, there)
    seen = svd.u[:, :r].float().T @ w @ svd.vt[:r].float().T  # [r, r]
    size = float(torch.linalg.vector_norm(w, dtype=torch.float64))
    return Amplification(
        r, float(svd.s[:r].double().norm()), float(seen.norm()), float(largest(w, r).norm()),
        size * r / math.sqrt(w.numel()),
    )  # fmt: skip


def largest(weight: Tensor, rank: int) -> Tensor:
    """The first `rank` singular values of a weight [out, in], descending: exact, or by a seeded sketch (Halko et al. 2011)."""
    small = min(weight.shape)
    if small <= EXACT or rank + 16 >= small:
        return torch.linalg.svdvals(weight)[:rank]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return torch.svd_lowrank(weight, q=rank + 16, niter=2)[1][:rank]
