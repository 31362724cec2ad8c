"""The second half of a gated MLP in one: p = act(gate) ⊙ up [T, inner], y = p through `kernels.lora`; gate and up alone are kept.

    dp by `kernels.lora`     dup = dp ⊙ act(gate)     dgate = dp ⊙ up ⊙ act'(gate)

Autograd by itself keeps gate, act(gate), up and, beside an adapter, p: four tensors of [T, inner] where two are enough.
act(gate) and p are made again in the backward pass, which costs two products without a matrix.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from deltaw.kernels import twins
from deltaw.kernels.dropout import new_seed
from deltaw.kernels.lora import Change, backward, forward

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


def _twin(x: Tensor, kind: str) -> bool:
    """Do `kernels.twins` make the products here?"""
    act = ACTIVATIONS[kind]

    def pair() -> tuple[list[Tensor], list[Tensor]]:
        g, gate, up = (twins.sample((3, 41), phase, x) for phase in range(3))
        ours = [twins.product(gate, up, kind), *twins.product_back(g, gate, up, kind)]
        return ours, [act.forward(gate) * up, act.backward(g * up, gate), g * act.forward(gate)]

    return twins.usable(x) and twins.trusted(("product", kind, x.device, x.dtype), pair)


class GLUDown(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(  # type: ignore[override]
        gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor | None, b: Tensor | None,
        gain: Tensor | None, seed: Tensor | None, scale: float | Tensor, share: float, kind: str,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        p = twins.product(gate, up, kind) if _twin(gate, kind) else ACTIVATIONS[kind].forward(gate).mul_(up)
        if a is None or b is None:
            y = F.linear(p, weight, bias)
            return y, y.new_empty(0), y.new_empty(0)
        return forward(p, weight, bias, a, b, gain, seed, scale, share)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        gate, up, weight, _, a, b, gain, seed, ctx.scale, ctx.share, ctx.kind = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(gate, up, weight, a, b, gain, seed, output[1], None if gain is None else output[2])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        if grads[0] is None:
            return (None,) * 11
        gate, up, weight, a, b, gain, seed, h, z = ctx.saved_tensors
        act, g, da, db, dgain = ACTIVATIONS[ctx.kind], grads[0].flatten(0, -2), None, None, None
        fast = not torch.is_grad_enabled() and _twin(gate, ctx.kind)
        opened = None if fast else act.forward(gate)
        if a is None:
            dp: Any = g @ weight  # [T, inner]
        else:
            p = (twins.product(gate, up, ctx.kind) if opened is None else opened * up).flatten(0, -2)
            h, z = h.flatten(0, -2), z if gain is None else z.flatten(0, -2)
            dp, da, db, dgain = backward(g, p, weight, a, b, gain, seed, ctx.scale, ctx.share, h, z)
        dp = dp.view_as(gate)
        if opened is None:
            dgate, dup = twins.product_back(dp, gate, up, ctx.kind)
        else:
            dgate, dup = act.backward(dp * up, gate), dp * opened
        return dgate, dup, None, None, da, db, dgain, None, None, None, None


def glu_down(gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor | None, change: Change | None, kind: str) -> Tensor:
    """gate, up [.., inner], weight [out, inner] frozen → [.., out]. kind: a key of ACTIVATIONS."""
    a, b, scale, gain, share = (None, None, 1.0, None, 0.0) if change is None else change
    seed = new_seed() if share else None
    return GLUDown.apply(gate, up, weight, bias, a, b, gain, seed, scale, share, kind)[0]  # type: ignore[no-any-return]
