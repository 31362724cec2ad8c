"""BOFT: W' = diag(s)·W·Rᵀ, R = M_k … M_2·M_1 a product of sparse rotations.  Liu et al. 2024, arXiv 2311.06243.

M_i = P_i·blockdiag(R_i1 … R_i,n/b)·P_iᵀ, the R_ij by Cayley from skew matrices as in `oft`.

P_i pairs half-blocks of b/2 inputs that lie 2^(i−1) half-blocks apart: of each stretch of b·2^(i−1) inputs, block j
takes the j-th half-block of its first and of its second half. P_1 = I, so that one factor is OFT with a scale; every
further one doubles the share of R that is not zero; log2(n/b) + 1 of them reach all of it. P_i is a reshape and a
transpose, no matrix. These are the permutations and the order of PEFT.

boft_R [k, n/b, b(b−1)/2] holds the upper triangles of Q, 0 at the start, and boft_s [m, 1] the scales, 1 at the start.
PEFT stores b×b parameters X with Q = ½(X − Xᵀ) and has the other sign of Cayley, (I − Q)(I + Q)⁻¹: our Q is its
½(Xᵀ − X). Without its CUDA extension PEFT silently computes a single factor, whatever was asked for; here all are real.
The bias is not scaled, as there. With other adapters live, s and R act on W only: the others add to the result.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from deltaw.core.adapter import Adapter, WeightAdapter
from deltaw.core.autocast import exact
from deltaw.core.host import HostSpec
from deltaw.core.method import Method, register
from deltaw.methods.oft import cayley, indivisible, skew, turned, unturnable, usual_block


class BOFTAdapter(WeightAdapter):
    def __init__(self, spec: HostSpec, block: int, levels: int):
        super().__init__()
        self.block, self.flat = block, len(spec.shape) == 2
        size = block * (block - 1) // 2
        self.boft_R = nn.Parameter(torch.zeros(levels, spec.fan_in // block, size, dtype=torch.float32))
        self.boft_s = nn.Parameter(torch.ones(spec.shape[0], 1, dtype=torch.float32))

    def change(self) -> Tensor:
        """R_ij − I, [k, n/b, b, b], fp32 also under autocast."""
        with exact(self.boft_R):
            return cayley(skew(self.boft_R, self.block))

    def rotated(self, x: Tensor, back: bool = False) -> Tensor:
        """x·R − x along the last dimension; with `back` x·Rᵀ − x. Sums of changes, so that 0 stays 0."""
        each = list(enumerate(self.change().unbind()))
        total: Tensor | None = None
        for level, blocks in each if back else reversed(each):
            moved = butterfly(x if total is None else x + total, blocks.mT if back else blocks, level)
            total = moved if total is None else total + moved
        assert total is not None
        return total

    def merged(self, weight: Tensor) -> Tensor:
        flat = weight.flatten(1)
        return (self.boft_s * (flat + self.rotated(flat, back=True))).view(weight.shape)

    def branch(self, host: Any, x: Tensor) -> Tensor:
        return self.weighted(host, x, None)

    def weighted(self, host: Any, x: Tensor, strength: Tensor | None) -> Tensor:
        if not self.flat:
            return super().branch(host, x) if strength is None else super().weighted(host, x, strength)
        weight, s = host.weight, self.boft_s.flatten()
        more, scale = (s - 1, s) if strength is None else (strength * (s - 1), strength * s)
        turned, plain = host.op(self.rotated(x), weight), host.op(x, weight)
        return scale.to(turned.dtype) * turned + more.to(plain.dtype) * plain


def butterfly(x: Tensor, blocks: Tensor, level: int) -> Tensor:
    """x·P·blockdiag(blocks)·Pᵀ along the last dimension; level 0 has P = I."""
    half = blocks.shape[-1] // 2
    if level == 0:
        return turned(x, blocks)
    parts = x.unflatten(-1, (-1, 2, 2**level, half))  # [..., stretch, first or second half, j, half-block]
    mixed = turned(parts.transpose(-2, -3).flatten(-4), blocks)
    return mixed.unflatten(-1, (-1, 2**level, 2, half)).transpose(-2, -3).flatten(-4)


@register("boft")
@dataclass(frozen=True, kw_only=True)
class BOFT(Method):
    suits = "rotations that reach all inputs with few parameters; slower steps"

    block: int | None = None
    """Size b of the rotated blocks, even with several levels. Default: the largest that fits, up to 8."""
    levels: int | None = None
    """Number of butterfly factors in R; b·2^(levels − 1) must divide the layer's inputs. Default: 2, or 1 where 2 do not fit."""

    def invalid(self) -> Sequence[str]:
        found = [
            f"{name}={value!r} is not a whole number of at least {least}"
            for name, value, least in (("block", self.block, 2), ("levels", self.levels, 1))
            if value is not None and not (type(value) is int and value >= least)
        ]
        if not found and self.block is not None and self.block % 2 and (self.levels or 1) > 1:
            found.append(
                f"block={self.block} is odd: with several levels a block is made of two halves, use an even one"
            )
        return found

    def unfit(self, spec: HostSpec) -> str | None:
        if reason := unturnable(spec):
            return reason
        n, levels = spec.fan_in, self.levels or 1
        reach = 2 ** (levels - 1)
        if self.block is not None and n % self.block:
            return indivisible(self.block, spec)
        if self.block is not None and n % (self.block * reach):
            most = next(k for k in range(levels, 0, -1) if n % (self.block * 2 ** (k - 1)) == 0)
            return (
                f"levels={levels} with block={self.block} needs inputs divisible by {self.block * reach}, and it has {n}: "
                f"at most levels={most} with this block"
            )
        if self.block is None and levels > 1 and n % (2 * reach):
            return f"levels={levels} needs inputs divisible by {2 * reach}, and it has {n}: use fewer, or leave it out"
        return None

    def at(self, path: str, spec: HostSpec) -> Self:
        if unturnable(spec):
            return self
        n, block, levels = spec.fan_in, self.block, self.levels
        if levels is None:
            unit = 4 if block is None else 2 * block if block % 2 == 0 else 0
            levels = 2 if unit and n % unit == 0 else 1
        if block is None:
            evens = (b for b in range(8, 1, -2) if n % (b * 2 ** (levels - 1)) == 0)
            block = next(evens, None) if levels > 1 else usual_block(n, 8)
        return dataclasses.replace(self, block=block, levels=levels)

    def build(self, spec: HostSpec) -> Adapter:
        method = self.at("", spec)
        assert method.block is not None and method.levels is not None
        return BOFTAdapter(spec, method.block, method.levels)
