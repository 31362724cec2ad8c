"""OFT: W' = W·Rᵀ, R block-diagonal and orthogonal.  Qiu et al. 2023, arXiv 2306.07280.

The angles between the rows of W stay. R is applied to activations, as in OFTv2 (arXiv 2506.19847): y = W(Rᵀx), one b×b
product per block, none of W's size.

        R_i = (I + Q_i)(I − Q_i)⁻¹,  Q_i skew [b, b],  i = 1 … n/b        branch = op(x·R − x, W)
        R_i − I = 2(I − Q_i)⁻¹Q_i                                         exactly 0 at Q = 0

oft_R [n/b, b(b−1)/2] holds the upper triangles of the Q_i row by row, PEFT's layout; Q = 0 at the start. Convolutions
rotate all in × kernel inputs of an output. With other adapters live, R turns W only: the others add to the result.

Sign of Cayley: that of the paper and of PEFT's series (use_cayley_neumann, its default: `terms` with the same tensors).
PEFT's exact form is (I − Q)(I + Q)⁻¹, the inverse rotation: its tensors are ours times −1. The authors' code has both.

COFT: ‖Q_i‖_F ≤ ε/√(n/b), PEFT's radius; the authors bound their raw b×b parameter by ε·b²/√(n/b), so that their ε
is ours over b². They move the parameter back in every forward; here the forward computes with Q·min(1, radius/‖Q‖),
that factor a constant for the gradient. What is computed is the same, and nothing is written while computing.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from deltaw.core.adapter import Adapter, WeightAdapter
from deltaw.core.autocast import exact
from deltaw.core.host import HostSpec
from deltaw.core.method import Method, register


class OFTAdapter(WeightAdapter):
    def __init__(self, spec: HostSpec, block: int, share: bool = False, radius: float = 0.0, terms: int | None = None):
        super().__init__()
        self.block, self.radius, self.terms = block, radius, terms
        self.blocks = spec.fan_in // block
        self.flat = len(spec.shape) == 2
        self.oft_R = nn.Parameter(
            torch.zeros(1 if share else self.blocks, block * (block - 1) // 2, dtype=torch.float32)
        )

    def change(self) -> Tensor:
        """R − I, [n/b, b, b], fp32 also under autocast."""
        q = self.oft_R
        if self.radius:
            norm = math.sqrt(2) * q.detach().norm(dim=1, keepdim=True)  # of the whole Q, both triangles
            q = q * (self.radius / norm.clamp_min(self.radius))
        with exact(q):
            return cayley(skew(q, self.block), self.terms).expand(self.blocks, -1, -1)

    def merged(self, weight: Tensor) -> Tensor:
        return weight + turned(weight.flatten(1), self.change().mT).view(weight.shape)

    def branch(self, host: Any, x: Tensor) -> Tensor:
        return host.op(turned(x, self.change()), host.weight) if self.flat else super().branch(host, x)

    def weighted(self, host: Any, x: Tensor, strength: Tensor) -> Tensor:
        if not self.flat:
            return super().weighted(host, x, strength)
        return host.op(turned(x, strength * self.change()), host.weight)


def skew(upper: Tensor, size: int) -> Tensor:
    """Upper triangles [..., b(b−1)/2] → skew matrices [..., b, b]."""
    row, column = torch.triu_indices(size, size, 1, device=upper.device)
    whole = upper.new_zeros(*upper.shape[:-1], size, size)
    whole[..., row, column] = upper
    return whole - whole.mT


def cayley(q: Tensor, terms: int | None = None) -> Tensor:
    """R − I of skew matrices; with `terms` = k the series 2Q + 2Q² + … + 2Q^(k−2) + Q^(k−1), off by ‖Q‖^(k−1)."""
    if terms is None:
        return torch.linalg.solve(torch.eye(q.shape[-1], dtype=q.dtype, device=q.device) - q, 2 * q)
    total, power = 2 * q, q
    for _ in range(terms - 3):
        power = power @ q
        total = total + 2 * power
    return total + power @ q


def turned(x: Tensor, blocks: Tensor) -> Tensor:
    """x·blockdiag(blocks) along the last dimension: [..., n] with [n/b, b, b]."""
    parts = x.unflatten(-1, blocks.shape[:2])
    return torch.einsum("...kb,kbc->...kc", parts, blocks.to(x.dtype)).flatten(-2)


def usual_block(size: int, most: int) -> int:
    """The largest divisor of `size` in 2 … most, or the smallest above."""
    below = [b for b in range(most, 1, -1) if size % b == 0]
    return below[0] if below else next((b for b in range(most + 1, size) if size % b == 0), size)


def unturnable(spec: HostSpec) -> str | None:
    """Why no rotation of the inputs can act on a layer of this shape, or None."""
    if spec.lookup:
        return "its inputs are ids, there is nothing to rotate"
    return "a layer with one input has nothing to rotate" if spec.fan_in < 2 else None


def indivisible(block: int, spec: HostSpec) -> str:
    some = [str(b) for b in range(2, spec.fan_in + 1) if spec.fan_in % b == 0]
    near = sorted(sorted(some, key=lambda b: abs(int(b) - block))[:3], key=int)
    return f"block={block} does not divide its {spec.fan_in} inputs: use {', '.join(near)}, or leave it out"


@register("oft")
@dataclass(frozen=True, kw_only=True)
class OFT(Method):
    suits = "keeping what the base knows; COFT keeps it closest"

    block: int | None = None
    """Size b of the rotated blocks. Default: the largest divisor of the layer's inputs up to 32, or the smallest above."""
    share: bool = False
    """One rotation for all blocks of a layer."""
    coft: bool = False
    """COFT: keep the rotation near the identity, ‖Q‖ of a block at most eps/√(number of blocks)."""
    eps: float = 6e-5
    """Size of the ball of coft."""
    terms: int | None = None
    """Terms of the series that stands for Cayley's exact form, at least 4 (PEFT's default is 5); not quite orthogonal."""

    def invalid(self) -> Sequence[str]:
        found = []
        if self.block is not None and not (type(self.block) is int and self.block >= 2):
            found.append(f"block={self.block!r} is not a whole number of at least 2")
        if self.terms is not None and not (type(self.terms) is int and self.terms >= 4):
            found.append(f"terms={self.terms!r} is not a whole number of at least 4 (PEFT computes its 3 as 4)")
        if isinstance(self.eps, bool) or not isinstance(self.eps, int | float) or not 0 < self.eps < math.inf:
            found.append(f"eps={self.eps!r} is not a positive number")
        for switch in ("share", "coft"):
            if not isinstance(getattr(self, switch), bool):
                found.append(f"{switch}={getattr(self, switch)!r} is neither true nor false")
        return found

    def unfit(self, spec: HostSpec) -> str | None:
        if (reason := unturnable(spec)) or self.block is None:
            return reason
        return indivisible(self.block, spec) if spec.fan_in % self.block else None

    def at(self, path: str, spec: HostSpec) -> Self:
        if unturnable(spec):
            return self
        return dataclasses.replace(self, block=self.block or usual_block(spec.fan_in, 32))

    def build(self, spec: HostSpec) -> Adapter:
        block = self.at("", spec).block
        assert block is not None
        radius = self.eps / math.sqrt(1 if self.share else spec.fan_in // block) if self.coft else 0.0
        return OFTAdapter(spec, block, self.share, radius, self.terms)
