"""TIES: trim, elect signs, mean of those that agree.  Yadav et al. 2023, arXiv 2306.01708, on ΔW itself.

    τᵢ = wᵢ · trim(ΔWᵢ)     of every matrix the `density` · m · n numbers of largest magnitude stay, the others are 0
    γ  = sign(Σ τᵢ)         the sign with more mass
    ΔW = Σ_{i: sign τᵢ = γ} τᵢ / #{i: sign τᵢ = γ}

Number by number, so that it has no form on the factors: trimmed and elected A and B multiply to another matrix. The paper
trims over the whole model, here every module keeps its share. With all wᵢ = λ it is the paper's λ · TIES (there λ = 1,
density 0.2). What comes out is of full rank.
"""

from collections.abc import Sequence

import numpy
import torch
from torch import Tensor

from deltaw.core.errors import UseError
from deltaw.core.method import Site
from deltaw.core.state import AdapterState
from deltaw.mixing.base import Weights
from deltaw.mixing.through import Conversion, Rank, Track, through


def ties(
    states: Sequence[AdapterState],
    weights: Sequence[float],
    density: float,
    *,
    rank: Rank = "full",
    energy: float | None = None,
    base: Weights | None = None,
    track: Track = iter,
) -> tuple[AdapterState, Conversion]:
    """The TIES mix as plain LoRA, and what a cut to `rank` or `energy` cost by site (`svd` says how they are meant).

    "full" keeps it exactly, in factors as large as the matrix and once more its smaller side squared. One module is in
    memory at a time, its matrices of all parts. Trained copies and token rows are summed, as `exact` does. UseError.
    """
    check_density(density)

    def merge(site: Site, changes: Sequence[Tensor]) -> Tensor:
        return elected([trimmed(change, density) for change in changes])

    rank = None if energy is not None and rank == "full" else rank
    return through(states, weights, rank=rank, energy=energy, base=base, merge=merge, track=track)


def check_density(density: object) -> None:
    """UseError where it is no share of numbers to keep."""
    if isinstance(density, bool) or not isinstance(density, int | float) or not 0 < density <= 1:
        raise UseError(f"density={density!r} is not a share in (0, 1]: 0.2 keeps one number in five")


def trimmed(change: Tensor, density: float) -> Tensor:
    """[.., m, n] with all but its largest numbers set to zero; of a stack matrix by matrix."""
    size = change.abs().flatten(-2).numpy()
    place = size.shape[-1] - max(1, int(density * size.shape[-1]))
    least = torch.from_numpy(
        numpy.partition(size, place, axis=-1)[..., place, None, None]
    )  # four times as fast as kthvalue
    return torch.where(change.abs() >= least, change, 0.0)


def elected(changes: Sequence[Tensor]) -> Tensor:
    """The mean of the numbers that have the sign of their sum; where none has one, 0."""
    sign = sum(changes[1:], start=changes[0]).sign()
    total, count = torch.zeros_like(sign), torch.zeros_like(sign)
    for change in changes:
        agreeing = (change * sign).clamp_min_(0.0)
        total += agreeing
        count += agreeing > 0
    return total.mul_(sign).div_(count.clamp_min_(1.0))
