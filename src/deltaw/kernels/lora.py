"""One linear layer with a low-rank change: y = x Wᵀ + bias + s·(D(x) Aᵀ) Bᵀ, and its gradients in the order that is cheap.

    forward     h = D(x) Aᵀ [T, r]     y = x Wᵀ + bias, then y += h (sB)ᵀ in place: no second tensor of y's size
    backward    q = g (sB) [T, r]      dx = g W, then dx += D(q A) in place      dA = qᵀ D(x)      dB = s gᵀ h

D is dropout, made again from its seed. With a gain c [out], of DoRA, W' = c ⊙ (W + s·BA):
    forward     z = x Wᵀ + h (sB)ᵀ     y = z + bias + (c − 1) ⊙ z: the bits of the base where c = 1 and B = 0
    backward    dc = Σ_t g ⊙ z         and g ⊙ c in the place of g

Kept for the backward pass: x itself, which siblings share (q, k, v), h, and z with a gain. A and B are fp32 masters; they are
cast to x's dtype, x never is. W is frozen. A product of the size of W is never formed.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from deltaw.kernels import thin
from deltaw.kernels.dropout import drawn, kept, mask, new_seed

Change = tuple[Tensor, Tensor, float | Tensor, Tensor | None, float]
"""a [r, in], b [out, r], scale (a number or a 0-dim tensor), gain [out] or None, share of D(x) that is dropped."""


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, gain: Tensor | None, seed: Tensor | None,
    scale: float | Tensor, p: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y, and to keep: h, and z (empty without a gain)."""
    y = linear(x, weight, bias)
    if seed is not None and y.is_contiguous() and thin.usable(x, a, b, scale):
        h = thin.down(x.flatten(0, -2).contiguous(), a, by=drawn(seed, p)).view(*x.shape[:-1], -1)
        thin.add(y.flatten(0, -2), h.flatten(0, -2), b.T, float(scale) / kept(p))
    else:
        h = F.linear(x if seed is None else x * mask(x, seed, p), a.to(x.dtype))
        y.flatten(0, -2).addmm_(h.flatten(0, -2), scaled(b, scale, p, x.dtype).T)
    if gain is None:
        return y, h, y.new_empty(0)
    y, z = gained(y, bias, gain)
    return y, h, z


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear, a tensor of its own: with a bias and an x of three dimensions torch's is a view, which no model could change in
    place once an autograd function gives it."""
    if bias is None or x.ndim < 3:
        return F.linear(x, weight, bias)
    y = F.linear(x.flatten(0, -2), weight, bias)
    return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], len(weight)))  # type: ignore[no-any-return]


def gained(y: Tensor, bias: Tensor | None, gain: Tensor) -> tuple[Tensor, Tensor]:
    """y with its gain [out], and z, what is multiplied."""
    z = y if bias is None else y - bias
    return torch.addcmul(y, z, (gain - 1).to(y.dtype)), z


def backward(
    g: Tensor, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, gain: Tensor | None, seed: Tensor | None,
    scale: float | Tensor, p: float, h: Tensor, z: Tensor, wanted: tuple[bool, ...] = (True, True, True, True),
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Of g [T, out] and x [T, in]: dx (in the weight's layout, [T, in]), da, db, dgain; wanted: which of them."""
    if torch.is_grad_enabled():  # the backward pass is itself differentiated: what was kept has no history
        h = (x if seed is None else x * mask(x, seed, p)) @ a.to(x.dtype).T
        z = z if gain is None else x @ weight.T + h @ scaled(b, scale, p, x.dtype).T
    dgain = None
    if gain is not None:
        dgain = (g * z).sum(0, dtype=gain.dtype) if wanted[3] else None
        g = torch.addcmul(g, g, (gain - 1).to(g.dtype))
    if seed is not None and not torch.is_grad_enabled() and thin.usable(x, a, b, scale):
        by, alpha = drawn(seed, p), float(scale) / kept(p)
        return *_thin(g.contiguous(), x.contiguous(), weight, a, b, by, alpha, h.contiguous(), wanted), dgain
    down, up = a.to(x.dtype), scaled(b, scale, p, x.dtype)
    ones = None if seed is None else mask(x, seed, p)
    inner = x if ones is None else x * ones
    q = g @ up  # [T, r]
    dx = g @ weight if wanted[0] else None
    if dx is not None:
        dx = dx.addmm_(q, down) if ones is None else dx.addcmul_(q @ down, ones)
    da = (q.T @ inner).to(a.dtype) if wanted[1] else None
    db = scale / kept(p) * (g.T @ h).to(b.dtype) if wanted[2] else None
    return dx, da, db, dgain


def _thin(
    g: Tensor, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, by: thin.Drawn, scale: float, h: Tensor,
    wanted: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """dx, da, db in the kernels of `thin`."""
    q = thin.down(g, b.T, scale)
    dx = thin.add(g @ weight, q, a, by=by) if wanted[0] else None
    da = thin.outer(q, x, by=by) if wanted[1] else None
    return dx, da, thin.outer(h, g, scale, turned=True) if wanted[2] else None


def scaled(b: Tensor, scale: float | Tensor, p: float, dtype: torch.dtype) -> Tensor:
    """s·B [out, r] for a product in `dtype`, with the factor of what dropout left."""
    return (scale / kept(p) * b).to(dtype)


class LoRALinear(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(  # type: ignore[override]
        x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, gain: Tensor | None,
        seed: Tensor | None, scale: float | Tensor, p: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        return forward(x, weight, bias, a, b, gain, seed, scale, p)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, weight, _, a, b, gain, seed, ctx.scale, ctx.p = inputs
        ctx.set_materialize_grads(False)  # no zeros for h and z
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(x, weight, a, b, gain, seed, output[1], None if gain is None else output[2])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        if grads[0] is None:
            return (None,) * 9
        x, weight, a, b, gain, seed, h, z = ctx.saved_tensors
        g, rows, h, z = (
            grads[0].flatten(0, -2),
            x.flatten(0, -2),
            h.flatten(0, -2),
            z if gain is None else z.flatten(0, -2),
        )
        need = ctx.needs_input_grad
        dx, da, db, dgain = backward(g, rows, weight, a, b, gain, seed, ctx.scale, ctx.p, h, z, (need[0], *need[3:6]))
        return None if dx is None else dx.view_as(x), None, None, da, db, dgain, None, None, None


def lora_linear(x: Tensor, weight: Tensor, bias: Tensor | None, change: Change) -> Tensor:
    """x [.., in], weight [out, in] frozen, bias [out] frozen or None → [.., out]."""
    a, b, scale, gain, p = change
    if x.ndim == 1:
        return lora_linear(x[None], weight, bias, change)[0]
    if few(x, a) and not p:
        y = _few_added(F.linear(x, weight, bias), x, a, b, scale)
        return y if gain is None else gained(y, bias, gain)[0]
    return LoRALinear.apply(x, weight, bias, a, b, gain, new_seed() if p else None, scale, p)[0]  # type: ignore[no-any-return]


def few(x: Tensor, a: Tensor) -> bool:
    """Are there few rows for the ranks, as in a decoding step, and no gradient? Then A and B are read and nothing is made of them."""
    return (
        not torch.is_grad_enabled() and x.dtype.itemsize <= a.dtype.itemsize and x.shape[:-1].numel() <= 4 * a.shape[0]
    )


def few_rows(x: Tensor, a: Tensor, b: Tensor, scale: float | Tensor) -> Tensor:
    """s·(x Aᵀ) Bᵀ in the factors' own dtype, rounded to x's at the end: A and B are only read."""
    return F.linear(F.linear(scale * x.to(a.dtype), a), b).to(x.dtype)


def _few_added(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float | Tensor) -> Tensor:
    """y [.., out] with s·(x Aᵀ) Bᵀ added in place: what torch is called for costs more than the sums, so it is called seldom."""
    change = F.linear(F.linear(x.to(a.dtype), a), b)
    if torch._C._are_functorch_transforms_active():  # y may be one for several changes
        return (y + scale * change).to(y.dtype)
    return y.add_(scale * change) if isinstance(scale, Tensor) else y.add_(change, alpha=scale)


def lora_add(y: Tensor, x: Tensor, change: Change) -> Tensor:
    """y [.., out] + s·(D(x) Aᵀ) Bᵀ in one pass over y, where something else made y. The gain is not looked at."""
    a, b, scale, _, p = change
    if x.ndim == 1:
        return lora_add(y[None], x[None], change)[0]
    if few(x, a) and not p:
        return _few_added(y.clone(), x, a, b, scale)
    h, up = Down.apply(x, a, new_seed(), p) if p else F.linear(x, a.to(x.dtype)), scaled(b, scale, p, x.dtype)
    return torch.addmm(y.flatten(0, -2), h.flatten(0, -2), up.T).view_as(y)


class Down(Function):
    """h = D(x) Aᵀ, keeping x; without the factor 1/kept(p)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, a: Tensor, seed: Tensor, p: float) -> Tensor:  # type: ignore[override]
        return F.linear(x * mask(x, seed, p), a.to(x.dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.p = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, a, seed = ctx.saved_tensors
        q, ones = grads[0], mask(x, seed, ctx.p)
        dx = (q @ a.to(x.dtype)) * ones if ctx.needs_input_grad[0] else None
        da = q.flatten(0, -2).T @ (x * ones).flatten(0, -2) if ctx.needs_input_grad[1] else None
        return dx, None if da is None else da.to(a.dtype), None, None
