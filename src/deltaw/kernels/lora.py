"""One linear layer with a low-rank change: y = x Wᵀ + bias + s·(x Aᵀ) Bᵀ, and its gradients in the order that is cheap.

    forward     h = x Aᵀ [T, r]       y = x Wᵀ + bias, then y += h (sB)ᵀ in place: no second tensor of y's size
    backward    q = g (sB) [T, r]     dx = g W, then dx += q A in place      dA = qᵀ x      dB = s gᵀ h

Kept for the backward pass: x itself, which siblings share (q, k, v), and h. A and B are fp32 masters; they are cast to
x's dtype, x never is. W is frozen. A product of the size of W is never formed.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function


class LoRALinear(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(  # type: ignore[override]
        x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float | Tensor
    ) -> tuple[Tensor, Tensor]:
        down, up = a.to(x.dtype), (scale * b).to(x.dtype)
        y, h = F.linear(x, weight, bias), F.linear(x, down)  # [.., out], [.., r]
        y.flatten(0, -2).addmm_(h.flatten(0, -2), up.T)
        return y, h

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, weight, _, a, b, ctx.scale = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(x, weight, a, b, output[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight, a, b, h = ctx.saved_tensors
        g, rows = grads[0].flatten(0, -2), x.flatten(0, -2)
        down, up = a.to(x.dtype), (ctx.scale * b).to(x.dtype)
        # h again where the backward pass is itself differentiated: what was kept has no history
        inner = rows @ down.T if torch.is_grad_enabled() else h.flatten(0, -2)
        q = g @ up  # [T, r]
        dx = (g @ weight).addmm_(q, down).view_as(x) if ctx.needs_input_grad[0] else None
        da = (q.T @ rows).to(a.dtype) if ctx.needs_input_grad[3] else None
        db = ctx.scale * (g.T @ inner).to(b.dtype) if ctx.needs_input_grad[4] else None
        return dx, None, None, da, db, None


def lora_linear(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float | Tensor) -> Tensor:
    """x [.., in], weight [out, in] frozen, a [r, in], b [out, r], scale a number or a 0-dim tensor → [.., out]."""
    if few(x, a) or x.ndim == 1:
        return lora_add(F.linear(x, weight, bias), x, a, b, scale)
    return LoRALinear.apply(x, weight, bias, a, b, scale)[0]  # type: ignore[no-any-return]


def few(x: Tensor, a: Tensor) -> bool:
    """Are there no more rows than ranks, as in a decoding step, and no gradient? Then x is the smaller thing to cast."""
    return not torch.is_grad_enabled() and x.dtype.itemsize < a.dtype.itemsize and x.shape[:-1].numel() <= a.shape[0]


def few_rows(x: Tensor, a: Tensor, b: Tensor, scale: float | Tensor) -> Tensor:
    """s·(x Aᵀ) Bᵀ in the factors' own dtype, rounded to x's at the end: A and B are only read."""
    return F.linear(F.linear(scale * x.to(a.dtype), a), b).to(x.dtype)


def lora_add(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float | Tensor) -> Tensor:
    """y [.., out] + s·(x Aᵀ) Bᵀ in one pass over y, where something else made y."""
    if few(x, a):
        return y + few_rows(x, a, b, scale)
    h = F.linear(x, a.to(x.dtype))
    up = (scale * b).to(x.dtype)
    return torch.addmm(y.flatten(0, -2), h.flatten(0, -2), up.T).view_as(y) if y.ndim > 1 else y + F.linear(h, up)
