"""First factors of a LoRA from the weight itself: (W [out, in], r, s) → A₀ [r, in], B₀ [out, r].

PiSSA   Meng et al. 2024, arXiv 2404.02948: W = UΣVᵀ, B₀ = U_r √(Σ_r/s), A₀ = √(Σ_r/s) V_rᵀ, so that sB₀A₀ is the best
        approximation of rank r. The paper has α = r, which is the default here.
OLoRA   Büyükakyüz 2024, arXiv 2406.01775, as in PEFT: W = QR, B₀ = Q[:, :r], A₀ = R[:r], not divided by s.
LoftQ   Li et al. 2023, arXiv 2310.08659: quantised base Q and factors with Q + sBA close to W, by turns. The published
        code leaves s out, which is exact for α = r only; here both factors are divided by √s.

How PiSSA and OLoRA keep W as it is, is written in `methods.lora`. On a quantised base they start from its decoded values,
so that the error of quantisation stays (QPiSSA's base, which is W − sB₀A₀ quantised, is another one).
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Start = Callable[..., tuple[Tensor, Tensor]]


def pissa(weight: Tensor, rank: int, scale: float, *, niter: int | None = None) -> tuple[Tensor, Tensor]:
    """The largest singular values, shared evenly. niter: iterations of a randomised SVD, None for the exact one."""
    if niter is None:
        u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    else:
        most = min(weight.shape)
        u, s, v = torch.svd_lowrank(weight, q=min(2 * rank, most), niter=niter)
        vt = v.T
    root = (s[:rank] / scale).sqrt()
    return root[:, None] * vt[:rank], u[:, :rank] * root


def olora(weight: Tensor, rank: int, scale: float, **_: Any) -> tuple[Tensor, Tensor]:
    q, r = torch.linalg.qr(weight)
    return r[:rank], q[:, :rank]


def loftq(
    weight: Tensor, rank: int, scale: float, quantise: Callable[[Tensor], Tensor], *, turns: int = 5
) -> tuple[Tensor, Tensor, Tensor]:
    """(Q, A, B): Q the quantised W − sBA of the last turn, decoded; A, B the best rank-r factors of W − Q.

    quantise: a weight → its values after quantisation. One turn quantises W itself; more need not be better.
    """
    change = torch.zeros_like(weight)
    for _ in range(turns):
        decoded = quantise(weight - change)
        a, b = pissa(weight - decoded, rank, scale)
        change = scale * (b @ a)
    return decoded, a, b


STARTS: Mapping[str, Start] = {"pissa": pissa, "olora": olora}
"""Values of LoRA's `init` that take both factors from the weight."""


def split(a: Tensor, b: Tensor, a0: Tensor, b0: Tensor) -> tuple[Tensor, Tensor]:
    """BA − B₀A₀ as one pair of factors of rank 2r."""
    return torch.cat([a, a - a0]), torch.cat([b - b0, b0], dim=1)


def within(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The same product in no more rank than the weight has: there the product itself is smaller, and exact as well."""
    most = min(b.shape[0], a[0].numel())
    if a.shape[0] <= most:
        return a, b
    product = b.flatten(1) @ a.flatten(1)  # [out, fan_in]
    c, d = (product, torch.eye(most)) if most == b.shape[0] else (torch.eye(most), product)
    return c.view(most, *a.shape[1:]), d.view(-1, most, *b.shape[2:])
