"""First factors of a LoRA from the weight itself: (W [out, in], r, s) → A₀ [r, in], B₀ [out, r].

PiSSA   Meng et al. 2024, arXiv 2404.02948: W = UΣVᵀ, B₀ = U_r √(Σ_r/s), A₀ = √(Σ_r/s) V_rᵀ, so that sB₀A₀ is the best
        approximation of rank r. The paper has α = r, which is the default here.
OLoRA   Büyükakyüz 2024, arXiv 2406.01775, as in PEFT: W = QR, B₀ = Q[:, :r], A₀ = R[:r], not divided by s.
LoftQ   Li et al. 2023, arXiv 2310.08659, one turn: sBA is the best approximation of what quantising rounded off, W − Q.
        The published code leaves s out, which is exact for α = r only; here both factors are divided by √s. It also
        goes on by turns (quantise W − sBA, and so on), which needs another Q than the one that is loaded: not here.

How PiSSA and OLoRA keep W as it is, is written in `methods.lora`. On a quantised base they start from its decoded values,
so that the error of quantisation stays (QPiSSA's base, which is W − sB₀A₀ quantised, is another one). LoftQ keeps Q as it
is too, but not the output: the model starts nearer to the unquantised one, and the adapter belongs to the quantised base.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.core.errors import UseError
from deltaw.core.host import host_of
from deltaw.core.method import Site

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
    model: nn.Module, site: Site, weights: Callable[[Site], Tensor] | None, rank: int, scale: float, niter: int | None
) -> dict[str, Tensor]:
    """First tensors at a site of a quantised base. weights: site → canonical weight before it was quantised."""
    host = host_of(model.get_submodule(site.path), site.slot)
    if host.quantized is None:
        raise UseError(f"{site}: init: loftq makes up for rounding, and this layer is not quantised (quantize: nf4)")
    if weights is None:
        raise UseError("init: loftq needs the weights before they were quantised: attach(…, weights=site → weight)")
    original, decoded = weights(site).to(host.device).float(), host.weight
    if original.shape != decoded.shape:
        raise UseError(f"{site}: the weight given is {tuple(original.shape)}, the layer's is {tuple(decoded.shape)}")
    a, b = pissa(original - decoded, rank, scale, niter=niter)
    return {"lora_A": a, "lora_B": b}


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
