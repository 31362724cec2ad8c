"""Dropout that is made again from its seed in the backward pass: neither the mask nor a second x is kept.

    dropped(x, seed, p) = x ⊙ m,  m ∈ {0, 1}, the same for the same seed and shape      kept(p) = share of ones in m

The factor 1/kept(p) belongs to whoever multiplies next, in fp32: in bf16 it would be 0.2 % off at p = 0.05. 16 random bits
an element decide, four elements a draw, so that p is rounded to 1/65536. The seed comes from torch's global generator, as a
mask of torch's own does: checkpointing and a resumed run see the same mask. An operator of its own, since a generator in
the forward ends a compiled graph.
"""

from typing import Any

import torch
from torch import Tensor

_STEPS = 1 << 16


def new_seed() -> Tensor:
    """A number of torch's global generator on the CPU: a device waits for nothing."""
    return torch.randint(1 << 62, (), dtype=torch.int64, device="cpu")


def kept(p: float) -> float:
    """The share of elements that stay."""
    return 1 - round(p * _STEPS) / _STEPS


@torch.library.custom_op("deltaw::dropped", mutates_args=())
def dropped(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """x with the share p of its elements, drawn from `seed`, set to zero; the others as they are."""
    generator = torch.Generator(x.device).manual_seed(int(seed))
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device)
    bits = draws.random_(-(2**63), None, generator=generator).view(torch.int16)[: x.numel()].view(x.shape)
    return x.masked_fill(bits < round(p * _STEPS) - _STEPS // 2, 0.0)


@dropped.register_fake
def _(x: Tensor, seed: Tensor, p: float) -> Tensor:
    return torch.empty_like(x)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, seed, ctx.p = inputs
    ctx.save_for_backward(seed)


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
    return dropped(g, *ctx.saved_tensors, ctx.p), None, None  # type: ignore[no-any-return]


dropped.register_autograd(_backward, setup_context=_remember)
