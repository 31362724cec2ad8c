"""Intruder dimensions: directions that fine-tuning put among the largest of W and that W did not have.

Shuttleworth et al. 2024 (arXiv 2410.21228): of the top-k left singular vectors u' of W + ΔW those with
max_j |cos(u', u_j)| < ε over all left singular vectors u_j of W. They go with forgetting; all weights trained have few.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Intruders:
    """`cosines`: of each of the top-k directions of W + ΔW with the nearest one of W, the largest direction first."""

    cosines: tuple[float, ...]
    below: float

    @property
    def places(self) -> tuple[int, ...]:
        """Which of the top-k directions are intruders, from 0."""
        return tuple(place for place, cosine in enumerate(self.cosines) if cosine < self.below)

    @property
    def share(self) -> float:
        return len(self.places) / len(self.cosines)


def intruders(weight: Tensor, change: Tensor, top: int = 10, below: float = 0.5) -> Intruders:
    """weight, change: W and ΔW, [out, in, *kernel]. Two dense decompositions (`seconds`): for a few weights."""
    w, moved = (t.detach().flatten(1).float() for t in (weight, weight + change))
    own = torch.linalg.svd(w, full_matrices=False)[0]  # [out, k]
    new = torch.linalg.svd(moved, full_matrices=False)[0][:, :top]  # [out, top]
    nearest = (new.T @ own).abs().amax(1)  # [top]
    return Intruders(tuple(nearest.clamp(max=1.0).tolist()), below)


def seconds(shapes: Iterable[Sequence[int]]) -> float:
    """About how long dense decompositions of weights [out, in, …] take on this machine: one of 384 × 384 is timed.

    m·n·min(m, n) operations each, at the rate of that one.
    """
    probe = torch.randn(384, 384, generator=torch.Generator().manual_seed(0))
    torch.linalg.svd(probe[:64, :64])  # the library is loaded
    began = time.perf_counter()
    torch.linalg.svd(probe)
    rate = (time.perf_counter() - began) / 384**3
    sizes = [(shape[0], torch.Size(shape[1:]).numel()) for shape in shapes]
    return rate * sum(m * n * min(m, n) for m, n in sizes)
