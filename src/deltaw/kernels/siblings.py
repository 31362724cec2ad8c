"""Linear layers that read the same x, each with a low-rank change (`kernels.lora`): thin products are made once for all.

    forward     H = x [A₁; A₂; …]ᵀ [T, Σr]      yᵢ = x Wᵢᵀ + biasᵢ, then yᵢ += Hᵢ (sᵢBᵢ)ᵀ in place
    backward    Q = [g₁ (s₁B₁), g₂ (s₂B₂), …] [T, Σr]       dx = Σ gᵢ Wᵢ + Q [A₁; A₂; …], all in one tensor
                [dA₁; dA₂; …] = Qᵀ x       dBᵢ = sᵢ gᵢᵀ Hᵢ

Each by itself reads x for its own H and dA, and makes a gradient of x's size, which autograd then adds to the others: that
costs more than what is thin about these products. Kept for the backward pass: x and H, as much as by each alone.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function


class Layer(NamedTuple):
    """One of them. W [out, in] and bias [out] are frozen; a [r, in], b [out, r]; scale: a number or a 0-dim tensor."""

    weight: Tensor
    bias: Tensor | None
    a: Tensor
    b: Tensor
    scale: float | Tensor


EACH = len(Layer._fields)


def _layers(flat: Sequence[Any]) -> list[Layer]:
    return [Layer(*flat[start : start + EACH]) for start in range(0, len(flat), EACH)]


def _down(layers: Sequence[Layer], dtype: torch.dtype) -> Tensor:
    return torch.cat([layer.a.to(dtype) for layer in layers])  # [Σr, in]


def _up(layer: Layer, dtype: torch.dtype) -> Tensor:
    return (layer.scale * layer.b).to(dtype)  # [out, r]


def _by_layer(layers: Sequence[Layer], dim: int, *wide: Tensor) -> Iterator[tuple[Any, ...]]:
    """Every layer with its share of what is Σr wide in that dimension."""
    ranks = [len(layer.a) for layer in layers]
    return zip(layers, *(tensor.split(ranks, dim) for tensor in wide), strict=True)


class Siblings(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, *flat: Any) -> tuple[Tensor, ...]:  # type: ignore[override]
        layers = _layers(flat)
        wide = F.linear(x, _down(layers, x.dtype))  # [.., Σr]
        outputs = []
        for layer, h in _by_layer(layers, -1, wide):
            y = F.linear(x, layer.weight, layer.bias)
            y.flatten(0, -2).addmm_(h.flatten(0, -2), _up(layer, x.dtype).T)
            outputs.append(y)
        return *outputs, wide

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, *flat = inputs
        layers = _layers(flat)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[-1])
        ctx.scales = [layer.scale for layer in layers]
        ctx.save_for_backward(x, output[-1], *(t for layer in layers for t in (layer.weight, layer.a, layer.b)))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, wide, *saved = ctx.saved_tensors
        layers = [
            Layer(weight, None, a, b, scale)
            for weight, a, b, scale in zip(saved[::3], saved[1::3], saved[2::3], ctx.scales, strict=True)
        ]
        rows, found, needed = x.flatten(0, -2), [], ctx.needs_input_grad
        if torch.is_grad_enabled():  # the backward pass is itself differentiated: what was kept has no history
            wide = F.linear(x, _down(layers, x.dtype))
        asked = [number for number, g in enumerate(grads[:-1]) if g is not None]  # an output may be left unused
        if not asked:
            return (None,) * len(needed)
        some = [layers[number] for number in asked]
        parts = [h for _, h in _by_layer(layers, -1, wide.flatten(0, -2))]
        given = [grads[number].flatten(0, -2) for number in asked]  # [T, out] each
        q = torch.cat([g @ _up(layer, g.dtype) for g, layer in zip(given, some, strict=True)], 1)  # [T, Σr]
        dx = None
        if needed[0]:
            for g, layer in zip(given, some, strict=True):
                dx = g @ layer.weight if dx is None else dx.addmm_(g, layer.weight)
            dx = dx.addmm_(q, _down(some, x.dtype)).view_as(x)  # type: ignore[union-attr]
        downs = {number: EACH * number + 3 for number in asked}  # where a is among the inputs
        das = q.T @ rows if any(needed[place] for place in downs.values()) else None
        shares = [None] * len(some) if das is None else [da for _, da in _by_layer(some, 0, das)]
        found = [None] * len(needed)
        found[0] = dx
        for number, g, layer, da in zip(asked, given, some, shares, strict=True):
            place = downs[number]
            if da is not None and needed[place]:
                found[place] = da.to(layer.a.dtype)
            if needed[place + 1]:
                found[place + 1] = layer.scale * (g.T @ parts[number]).to(layer.b.dtype)
        return tuple(found)


def siblings(x: Tensor, layers: Sequence[Layer]) -> tuple[Tensor, ...]:
    """x [.., in] of at least two dimensions → the output [.., out] of every layer. Factors of one dtype, fp32 masters."""
    return Siblings.apply(x, *(part for layer in layers for part in layer))[:-1]  # type: ignore[no-any-return]
