"""Linear layers that read the same x, each with a low-rank change (`kernels.lora`): thin products are made once for all.

    forward     H = x [A₁; A₂; …]ᵀ [T, Σr]      yᵢ = x Wᵢᵀ + biasᵢ, then yᵢ += Hᵢ (sᵢBᵢ)ᵀ in place
    backward    Q = [g₁ (s₁B₁), g₂ (s₂B₂), …] [T, Σr]       dx = Σ gᵢ Wᵢ + Q [A₁; A₂; …], all in one tensor
                [dA₁; dA₂; …] = Qᵀ x       dBᵢ = sᵢ gᵢᵀ Hᵢ

A gain (DoRA) as there. Each by itself reads x for its own H and dA, and makes a gradient of x's size, which autograd then adds
to the others. Kept for the backward pass: x and H, and z with a gain, as much as by each alone.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from deltaw.kernels.lora import gained, linear, scaled


class Layer(NamedTuple):
    """One of them. W [out, in] and bias [out] are frozen; a [r, in], b [out, r]; scale: a number or a 0-dim tensor; gain [out]."""

    weight: Tensor
    bias: Tensor | None
    a: Tensor
    b: Tensor
    scale: float | Tensor
    gain: Tensor | None = None


EACH = len(Layer._fields)
A, B, GAIN = (1 + Layer._fields.index(name) for name in ("a", "b", "gain"))
"""Where those of the first layer stand among the function's inputs, of which x is the first."""


def _layers(flat: Sequence[Any]) -> list[Layer]:
    return [Layer(*flat[start : start + EACH]) for start in range(0, len(flat), EACH)]


def _down(layers: Sequence[Layer], dtype: torch.dtype) -> Tensor:
    return torch.cat([layer.a.to(dtype) for layer in layers])  # [Σr, in]


def _by_layer(layers: Sequence[Layer], dim: int, *wide: Tensor) -> Iterator[tuple[Any, ...]]:
    """Every layer with its share of what is Σr wide in that dimension."""
    ranks = [len(layer.a) for layer in layers]
    return zip(layers, *(tensor.split(ranks, dim) for tensor in wide), strict=True)


class Siblings(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, *flat: Any) -> tuple[Tensor, ...]:  # type: ignore[override]
        """The outputs, H, and of each layer z (empty without a gain)."""
        layers = _layers(flat)
        wide = F.linear(x, _down(layers, x.dtype))  # [.., Σr]
        outputs, before = [], []
        for layer, h in _by_layer(layers, -1, wide):
            y = linear(x, layer.weight, layer.bias)
            y.flatten(0, -2).addmm_(h.flatten(0, -2), scaled(layer.b, layer.scale, 0.0, x.dtype).T)
            y, z = (y, y.new_empty(0)) if layer.gain is None else gained(y, layer.bias, layer.gain)
            outputs.append(y)
            before.append(z)
        return *outputs, wide, *before

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, *flat = inputs
        layers = _layers(flat)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[len(layers) :])
        ctx.scales = [layer.scale for layer in layers]
        kept = [
            tensor
            for layer, z in zip(layers, output[len(layers) + 1 :], strict=True)
            for tensor in (layer.weight, layer.a, layer.b, layer.gain, None if layer.gain is None else z)
        ]
        ctx.save_for_backward(x, output[len(layers)], *kept)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, wide, *kept = ctx.saved_tensors
        needed, rows = ctx.needs_input_grad, x.flatten(0, -2)
        found: list[Tensor | None] = [None] * len(needed)
        layers, zs = [], kept[4::5]
        for number, scale in enumerate(ctx.scales):
            weight, a, b, gain = kept[5 * number : 5 * number + 4]
            layers.append(Layer(weight, None, a, b, scale, gain))
        if torch.is_grad_enabled():  # the backward pass is itself differentiated: what was kept has no history
            wide = F.linear(x, _down(layers, x.dtype))
            zs = [
                F.linear(x, one.weight) + h @ scaled(one.b, one.scale, 0.0, x.dtype).T
                for one, h in _by_layer(layers, -1, wide)
            ]
        asked = [number for number in range(len(layers)) if grads[number] is not None]  # an output may be left unused
        some, given = [layers[number] for number in asked], []
        for number, layer in zip(asked, some, strict=True):
            g = grads[number].flatten(0, -2)  # [T, out]
            if layer.gain is not None:
                if needed[number * EACH + GAIN]:
                    found[number * EACH + GAIN] = (g * zs[number].flatten(0, -2)).sum(0, dtype=layer.gain.dtype)
                g = torch.addcmul(g, g, (layer.gain - 1).to(g.dtype))
            given.append(g)
        if not asked:
            return tuple(found)
        q = torch.cat(
            [g @ scaled(layer.b, layer.scale, 0.0, g.dtype) for g, layer in zip(given, some, strict=True)], 1
        )  # [T, Σr]
        if needed[0]:
            dx = given[0] @ some[0].weight
            for g, layer in zip(given[1:], some[1:], strict=True):
                dx = dx.addmm_(g, layer.weight)
            found[0] = dx.addmm_(q, _down(some, x.dtype)).view_as(x)
        trains = any(needed[number * EACH + A] for number in asked)
        das = (q.T @ rows).split([len(layer.a) for layer in some]) if trains else [None] * len(some)
        parts = [h for _, h in _by_layer(layers, -1, wide.flatten(0, -2))]
        for number, g, layer, da in zip(asked, given, some, das, strict=True):
            if needed[number * EACH + A]:
                found[number * EACH + A] = da.to(layer.a.dtype)
            if needed[number * EACH + B]:
                found[number * EACH + B] = layer.scale * (g.T @ parts[number]).to(layer.b.dtype)
        return tuple(found)


def siblings(x: Tensor, layers: Sequence[Layer]) -> tuple[Tensor, ...]:
    """x [.., in] of at least two dimensions → the output [.., out] of every layer. Factors of one dtype, fp32 masters."""
    return Siblings.apply(x, *(part for layer in layers for part in layer))[: len(layers)]  # type: ignore[no-any-return]
