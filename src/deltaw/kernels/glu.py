"""The second half of a gated MLP in one: y = (act(gate) ⊙ up) Wᵀ + bias + s·(· Aᵀ) Bᵀ, keeping gate and up alone.

    p = act(gate) ⊙ up [T, inner]      y = p Wᵀ + bias, then y += (p Aᵀ)(sB)ᵀ
    dp = g W + (g sB) A     dup = dp ⊙ act(gate)     dgate = dp ⊙ up ⊙ act'(gate)     dA = (g sB)ᵀ p     dB = s gᵀ (p Aᵀ)

Autograd by itself keeps gate, act(gate), up and, beside an adapter, p: four tensors of [T, inner] where two are enough.
act(gate) and p are made again in the backward pass, which costs two products without a matrix.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

aten: Any = torch.ops.aten


class Activation(NamedTuple):
    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]
    """(gradient of the output, input) → gradient of the input."""


def _silu_backward(g: Tensor, x: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return aten.silu_backward(g, x)  # type: ignore[no-any-return]
    sigma = x.sigmoid()  # torch has no second derivative of it
    return g * sigma * (1 + x * (1 - sigma))


ACTIVATIONS: Mapping[str, Activation] = {
    "silu": Activation(F.silu, _silu_backward),
    "gelu": Activation(F.gelu, lambda g, x: aten.gelu_backward(g, x)),
    "gelu_tanh": Activation(
        lambda x: F.gelu(x, approximate="tanh"), lambda g, x: aten.gelu_backward(g, x, approximate="tanh")
    ),
}
Change = tuple[Tensor, Tensor, float | Tensor]
"""a [r, inner], b [out, r] in fp32, and the scale."""


class GLUDown(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(  # type: ignore[override]
        gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor | None, b: Tensor | None,
        scale: float | Tensor, kind: str,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        p = ACTIVATIONS[kind].forward(gate).mul_(up)
        y = F.linear(p, weight, bias)
        if a is None or b is None:
            return y, y.new_empty(0)
        h = F.linear(p, a.to(p.dtype))
        y.flatten(0, -2).addmm_(h.flatten(0, -2), (scale * b).to(p.dtype).T)
        return y, h

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        gate, up, weight, _, a, b, ctx.scale, ctx.kind = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(gate, up, weight, a, b, output[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        gate, up, weight, a, b, h = ctx.saved_tensors
        act, g, da, db = ACTIVATIONS[ctx.kind], grads[0].flatten(0, -2), None, None
        opened = act.forward(gate)
        dp = g @ weight  # [T, inner]
        if a is not None:
            down, p = a.to(gate.dtype), (opened * up).flatten(0, -2)
            # h again where the backward pass is itself differentiated: what was kept has no history
            inner = p @ down.T if torch.is_grad_enabled() else h.flatten(0, -2)
            q = g @ (ctx.scale * b).to(gate.dtype)
            dp.addmm_(q, down)
            da, db = (q.T @ p).to(a.dtype), ctx.scale * (g.T @ inner).to(b.dtype)
        dp = dp.view_as(gate)
        return act.backward(dp * up, gate), dp * opened, None, None, da, db, None, None


def glu_down(gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor | None, change: Change | None, kind: str) -> Tensor:
    """gate, up [.., inner], weight [out, inner] frozen → [.., out]. kind: a key of ACTIVATIONS."""
    a, b, scale = (None, None, 1.0) if change is None else change
    return GLUDown.apply(gate, up, weight, bias, a, b, scale, kind)[0]  # type: ignore[no-any-return]
