"""Dropout that is made again from its seed in the backward pass: neither the mask nor a second x is kept.

    D(x) = x ⊙ mask(x, seed, p)     mask ∈ {0, 1}, the same for the same seed and shape      kept(p) = share of ones in it

The factor 1/kept(p) belongs to whoever multiplies next, in fp32: in bf16 it would be 0.2 % off at p = 0.05. 16 random bits
an element decide, four elements a draw, so that p is rounded to 1/65536. The seed comes from torch's global generator, as a
mask of torch's own does: checkpointing and a resumed run see the same mask. An operator of its own, since a generator in
the forward ends a compiled graph.
"""

import torch
from torch import Tensor

from deltaw.kernels import thin

_STEPS = thin.STEPS


def new_seed() -> Tensor:
    """A number of torch's global generator on the CPU: a device waits for nothing."""
    return torch.randint(1 << 62, (), dtype=torch.int64, device="cpu")


def kept(p: float) -> float:
    """The share of elements that stay."""
    return 1 - _dropped(p) / _STEPS


def drawn(seed: Tensor | None, p: float) -> thin.Drawn:
    """What the kernels of `thin` draw this mask from."""
    return thin.NONE if seed is None else thin.drawn(seed, _dropped(p))


def _dropped(p: float) -> int:
    return min(round(p * _STEPS), _STEPS - 1)


def mask(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """Of x's shape and dtype: 0 for the share p of its elements, drawn from `seed`, and 1 for the others."""
    return _mask(x.detach(), seed, p)


@torch.library.custom_op("deltaw::dropout_mask", mutates_args=())
def _mask(x: Tensor, seed: Tensor, p: float) -> Tensor:
    if thin.draws(x):
        return thin.mask(x, seed, _dropped(p))
    generator = torch.Generator(x.device).manual_seed(int(seed))
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device)
    bits = draws.random_(-(2**63), None, generator=generator).view(torch.int16)[: x.numel()].view(x.shape)
    made = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return torch.ge(bits, _dropped(p) - _STEPS // 2, out=made)


@_mask.register_fake
def _(x: Tensor, seed: Tensor, p: float) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)
