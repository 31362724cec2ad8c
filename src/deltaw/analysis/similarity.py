"""Do two changes use the same directions? Subspace similarity with its random baseline (LoRA paper, §7.2 and Appendix G).

    φ(A, B, i, j) = ‖UᵢᵀUⱼ‖²_F / min(i, j)      Uᵢ: the first i left singular vectors of ΔW_A, Uⱼ: j of ΔW_B; 0 … 1
    of random subspaces of R^d in the mean      E φ = max(i, j) / d
    cos(ΔW_A, ΔW_B) = ⟨ΔW_A, ΔW_B⟩ / (‖ΔW_A‖ ‖ΔW_B‖),  ⟨ΔW_A, ΔW_B⟩ = Σᵢⱼ σᵢσ'ⱼ (UᵀU')ᵢⱼ (VᵀV')ᵢⱼ

E φ: ‖UᵢᵀUⱼ‖² is a sum of i·j squared coordinates of random unit vectors, each 1/d in the mean. The right spaces are those of V.
The paper takes the right singular vectors of A alone, whose first ones depend on how a change is split into A and B; those of ΔW
do not.
"""

import torch
from torch import Tensor

from deltaw.core.change import Singular


def phi(u: Tensor, v: Tensor) -> float:
    """φ of two orthonormal bases u [d, i] and v [d, j] of subspaces of one R^d."""
    return float((u.mT @ v).double().square().sum()) / min(u.shape[-1], v.shape[-1])


def phis(u: Tensor, v: Tensor) -> Tensor:
    """φ(i, j) for the first i and j vectors, all i ≤ u's and j ≤ v's: [i, j], as the paper's heat maps show it."""
    shared = (u.mT @ v).double().square().cumsum(0).cumsum(1)
    i, j = (torch.arange(1, n + 1, dtype=torch.float64) for n in shared.shape)
    return shared / torch.minimum(i.unsqueeze(1), j)


def by_chance(i: int, j: int, dimension: int) -> float:
    """E φ of two random subspaces of i and j dimensions in R^d."""
    return max(i, j) / dimension


def inner(one: Singular, other: Singular) -> float:
    """⟨ΔW, ΔW'⟩ of two matrices of one shape, without forming a third of that shape."""
    shared = (one.u.mT @ other.u) * (one.vt @ other.vt.mT)  # [k, k']
    return float((one.s.unsqueeze(-1) * shared * other.s).double().sum())


def cosine(one: Singular, other: Singular) -> float | None:
    """cos(ΔW, ΔW'); None where one of them is zero."""
    sizes = float(one.s.double().norm() * other.s.double().norm())
    return inner(one, other) / sizes if sizes else None
