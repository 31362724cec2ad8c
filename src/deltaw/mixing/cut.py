"""The nearest change of a lower rank, and what the cut loses.

    factors   s·B·A with B = QR, Aᵀ = PT: the SVD of s·RTᵀ [R, R], in fp64; O(d·R²), never a matrix d × d
    matrix    ΔW [m, n]: its SVD; of a large one that of a random sketch of it, for which the rank must be small beside it
    rank      as given, or by energy e the smallest r with Σ_{i≤r} σᵢ² ≥ e · ‖ΔW‖²
    error     ‖ΔW − B'A'‖ / ‖ΔW‖, which is √(Σ_{i>r} σᵢ²) / ‖ΔW‖; of a matrix taken from the difference itself

By Eckart and Young nothing of that rank is nearer; a sketch with four power iterations comes within a percent of it (Halko,
Martinsson and Tropp 2011, arXiv 0909.4061). Of a stack [E, m, n] every matrix is cut by itself, all at one rank.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from deltaw.core.adapter import Factors
from deltaw.core.change import decomposed
from deltaw.core.errors import UseError

SMALL = 512
"""Matrices up to this size are decomposed in full, in fp64."""
MORE, TURNS = 16, 4
"""Columns that a sketch has beyond the rank, and its power iterations."""
ROUNDING = 1e-12
"""Share of the energy that fp32 factors cannot tell from nothing: energy 1 leaves that out."""


class Cut(NamedTuple):
    """B'A' in balanced factors, a [.., r, n] and b [.., m, r] in fp32, and the share of ‖ΔW‖ that it lacks."""

    a: Tensor
    b: Tensor
    error: float

    @property
    def rank(self) -> int:
        return self.a.shape[-2]


def check(rank: object, energy: object) -> None:
    """UseError where these say no size of a change; None says nothing."""
    if rank is not None and rank != "full" and (type(rank) is not int or rank < 1):
        raise UseError(f"rank={rank!r} is not a whole number of at least 1")
    if energy is not None and (isinstance(energy, bool) or not isinstance(energy, int | float) or not 0 < energy <= 1):
        raise UseError(f"energy={energy!r} is not a share in (0, 1]: 0.99 keeps 99 % of the squared change")
    if rank == "full" and energy is not None:
        raise UseError("rank full keeps everything, energy cuts: give one of them")


def energy_of(factors: Factors) -> float:
    """‖ΔW‖² from the factors alone: s² · Σ (BᵀB) ∘ (A Aᵀ)."""
    a, b = factors.a.double(), factors.b.double()
    return factors.scale**2 * max(0.0, float(((b.mT @ b) * (a @ a.mT)).sum()))


def of_factors(factors: Factors, rank: int | None, energy: float | None = None, parts: float = 0.0) -> Cut:
    """The best approximation of s·B·A in `rank`, or in the smallest rank that keeps the energy; both: no more than either.

    parts: the energy of the changes that s·B·A is the sum of. Where they nearly cancel, their rounding is a larger share.
    """
    u, s, vt = decomposed(Factors(factors.a.double(), factors.b.double(), factors.scale))
    whole = float(s.square().sum())
    size = _rank(s, whole, rank, energy, parts)
    lost = float(s[..., size:].square().sum())
    return _balanced(u, s, vt, size, (lost / whole) ** 0.5 if whole else 0.0)


def of_matrix(matrix: Tensor, rank: int | None, energy: float | None = None) -> Cut:
    """As `of_factors`, of ΔW itself [.., m, n], fp32. The error is that of what comes back, sketch and rounding included."""
    least = min(matrix.shape[-2:])
    total = float(torch.linalg.vector_norm(matrix, dtype=torch.float64)) ** 2
    width = min(rank or 4 * MORE, least) + MORE
    while True:
        sketched = least > SMALL and 4 * width <= least
        u, s, vt = _sketch(matrix, width) if sketched else _whole(matrix)
        size = _rank(s, total, rank, energy)
        if not sketched or size <= width - MORE:  # what is wanted lies well inside of what was found
            break
        width *= 2
    cut = _balanced(u, s, vt, size, 0.0)
    rest = torch.linalg.vector_norm(matrix - cut.b @ cut.a, dtype=torch.float64)
    return cut._replace(error=float(rest) / total**0.5 if total else 0.0)


def whole(matrix: Tensor) -> Cut:
    """ΔW [.., m, n] as factors without an SVD, exactly: one of them is ΔW, the other 1."""
    m, n = matrix.shape[-2:]
    one = torch.eye(min(m, n)).expand(*matrix.shape[:-2], -1, -1)
    return Cut(matrix, one, 0.0) if m <= n else Cut(one, matrix, 0.0)


def _rank(values: Tensor, whole: float, rank: int | None, energy: float | None, parts: float = 0.0) -> int:
    """How many singular values [.., k] of a change with ‖ΔW‖² = whole are kept, at least one."""
    size = values.shape[-1] if rank is None else min(rank, values.shape[-1])
    if energy is None:
        return size
    square = values.double().square().reshape(-1, values.shape[-1]).sum(0)  # [k], over a stack
    left = whole - torch.cat([square.new_zeros(1), square.cumsum(0)])  # [k + 1]: what rank 0, 1, … leaves out
    enough = left <= max((1.0 - energy) * whole, ROUNDING * max(whole, parts))
    return max(1, min(size, int(enough.int().argmax()))) if bool(enough.any()) else size


def _whole(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    exact = matrix.double() if min(matrix.shape[-2:]) <= SMALL else matrix
    u, s, vt = torch.linalg.svd(exact, full_matrices=False)
    return u, s, vt


def _sketch(matrix: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    with torch.random.fork_rng(devices=[]):  # the same file from the same parts
        torch.manual_seed(0)
        u, s, v = torch.svd_lowrank(matrix, q=width, niter=TURNS)
    return u, s, v.mT


def _balanced(u: Tensor, s: Tensor, vt: Tensor, size: int, error: float) -> Cut:
    root = s[..., :size].sqrt()  # [r], or [E, r] of a stack
    a, b = root.unsqueeze(-1) * vt[..., :size, :], u[..., :size] * root.unsqueeze(-2)
    return Cut(a.float(), b.float(), error)
