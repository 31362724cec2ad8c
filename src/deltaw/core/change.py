"""ΔW of one site as a matrix: by its singular value decomposition, or dense where there is no other way.

factors       B = QR, Aᵀ = PT, s·R·Tᵀ = UΣVᵀ   →   ΔW = s·B·A = (QU) Σ (PV)ᵀ        never [out, in]
no factors    ΔW = merged(W) − W, dense; of some methods it is the same whatever W is (LoHa, LoKr)
"""

from typing import NamedTuple

import torch
from torch import Tensor

from deltaw.core.adapter import Factors
from deltaw.core.host import HostSpec, ParameterHost
from deltaw.core.method import Site
from deltaw.core.state import AdapterState, delta


class Singular(NamedTuple):
    """ΔW = u · diag(s) · vt with s descending: u [out, k], s [k], vt [k, fan_in]; of a stack of E weights each [E, …]."""

    u: Tensor
    s: Tensor
    vt: Tensor


def decomposed(factors: Factors) -> Singular:
    """The SVD of s·B·A, of every weight of a stack by itself; in the dtype of the factors, k = their rank."""
    a, b, scale = factors
    q, r = torch.linalg.qr(b)  # [out, r], [r, r]
    p, t = torch.linalg.qr(a.mT)  # [fan_in, r], [r, r]
    u, s, vt = torch.linalg.svd(scale * r @ t.mT, full_matrices=False)
    return Singular(q @ u, s, vt @ p.mT)


def singular_values(factors: Factors) -> Tensor:
    """Those of s·B·A alone, descending, [r] or [E, r]: the triangular factors have them, Q and P are not made."""
    a, b, scale = factors
    r, t = (torch.linalg.qr(tensor, mode="r")[1] for tensor in (b, a.mT))
    return torch.linalg.svdvals(scale * r @ t.mT)


def independent(state: AdapterState, site: Site) -> Tensor | None:
    """Dense ΔW where it is the same whatever the base's weight is, of shape `spec.whole` in fp32; else None.

    Tried on a weight of zeros, which adds no rounding, and on a random one. Raises UseError for methods without a ΔW.
    """
    method = state.methods[site]
    if method.host is ParameterHost or method.follows_ties:
        return None  # a changed copy of the parameter itself
    spec: HostSpec = state.specs[site]
    any_weight = torch.randn(spec.whole, generator=torch.Generator().manual_seed(0))
    nothing, anything = delta(state, site, torch.zeros(spec.whole)), delta(state, site, any_weight)
    apart = float((nothing - anything).norm())
    return nothing if apart <= 1e-3 * float(nothing.norm()) + 3e-7 * float(any_weight.norm()) else None
