"""MoRA: W' = W + (expand ∘ M ∘ compress), one square matrix M [r̂, r̂].  Jiang et al. 2024, arXiv 2405.12130.

r̂ = ⌊√((out + in)·r) + ½⌋: as many numbers as LoRA of rank r, but a change of higher rank. As the authors' code (kongds/MoRA):
x is continued circularly (x ‖ x ‖ …) to a multiple of r̂ and cut into G groups g₀ … of r̂. Then

    type 1   h = M·Σ g_t                         repeated down to `out`        for large ranks
    type 6   h = [M·R₀·g₀, M·R₁·g₁, …]           cut to `out`, or repeated     for small ranks, used in the paper's fine-tuning

R_t turns group t by the angles t·θᵢ, θᵢ = 10000^(−2i/r̂), halves paired as in RoPE of GPT-NeoX: g·cos + (−g₂, g₁)·sin.
Rounded, not floored, as the authors' code; type 6 needs pairs, so that r̂ is then floored to an even number. Of a wide layer type 6
reads only the first ⌈out/r̂⌉ groups. Inputs shorter than half of r̂ are continued more than once, where the authors' code fails.

Start: M = 0. No α: the scale is 1, as in the paper. Forward on vectors without an out × in product.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from deltaw.core.adapter import Adapter
from deltaw.core.host import HostSpec
from deltaw.core.method import Method, Part, register
from deltaw.methods.ranked import Ranked, RankedAdapter, times, trained


class MoRAAdapter(RankedAdapter):
    """The tables of angles follow from the sizes: they are no buffers, which would be the memory of training."""

    def __init__(self, spec: HostSpec, side: int, kind: int, dropout: float = 0.0):
        super().__init__(spec, 1.0, dropout)
        self.out, self.inputs, self.kind = spec.shape[0], spec.fan_in, kind
        self.mora_M = trained(side, side)
        self.groups = -(-self.inputs // side)
        if kind == 6:
            self.groups = min(self.groups, -(-self.out // side))  # the others would be cut away
            self.cos, self.sin = turns(self.groups, side, self.mora_M.device)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        result, m = super()._apply(fn, recurse), self.mora_M
        if self.kind == 6 and self.cos.device != m.device:
            self.cos, self.sin = turns(self.groups, len(m), m.device)
        return result

    def parts(self, scale: float | Tensor, dtype: Any) -> tuple[Tensor, ...]:
        return ((scale * self.mora_M).to(dtype),)

    def vectors(self, x: Tensor, *parts: Tensor) -> Tensor:
        (m,) = parts
        side = m.shape[0]
        g = _repeated(x, self.groups * side).unflatten(-1, (self.groups, side))  # [.., G, r̂]
        if self.kind == 1:
            return _repeated(F.linear(g.sum(-2), m), self.out)
        first, second = g.chunk(2, -1)
        g = g * self.cos.to(g.dtype) + torch.cat((-second, first), -1) * self.sin.to(g.dtype)
        h = F.linear(g.reshape(-1, side), m).view(*x.shape[:-1], self.groups * side)
        return _repeated(h, self.out)

    def dense(self, *parts: Tensor) -> Tensor:
        (m,) = parts
        if self.kind == 1:
            wide = m.repeat(1, self.groups)  # [r̂, G·r̂]
        else:
            first, second = m.chunk(2, -1)
            turned = torch.cat((second, -first), -1)
            wide = torch.block_diag(*(m * c + turned * s for c, s in zip(self.cos.to(m), self.sin.to(m), strict=True)))
        wide = F.pad(wide, (0, -wide.shape[1] % self.inputs))  # what read a continued input reads the input itself
        wide = wide.unflatten(1, (-1, self.inputs)).sum(1)
        return _repeated(wide.T, self.out).T


def turns(groups: int, side: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin of the angles of every group, [G, r̂] each, fp32; the same bits on every device."""
    places = torch.arange(0, side, 2, device="cpu")
    angles = torch.outer(torch.arange(groups, device="cpu"), 10000.0 ** (-places / side)).repeat(1, 2)
    return angles.cos().to(device), angles.sin().to(device)


def _repeated(x: Tensor, size: int) -> Tensor:
    """x ‖ x ‖ … cut to `size` in the last dimension."""
    times = -(-size // x.shape[-1])
    return (torch.cat([x] * times, -1) if times > 1 else x)[..., :size]


@register("mora")
@dataclass(frozen=True, kw_only=True)
class MoRA(Ranked):
    suits = "new facts, where LoRA's rank is the limit; type 1 for large ranks"

    rank: int | None = None
    """Rank of the LoRA with as many numbers. Default: 16, or the largest with no more numbers than the weight has."""
    type: Literal[1, 6] = 6
    """How inputs are grouped: 1 sums all groups, for large ranks; 6 turns each as RoPE does, for small ones."""

    def invalid(self) -> Sequence[str]:
        wrong = self.type not in (1, 6) or isinstance(self.type, bool)
        return [*super().invalid(), *([f"type={self.type!r} is neither 1 nor 6"] if wrong else [])]

    def side(self, spec: HostSpec, rank: int) -> int:
        """r̂, the size of M."""
        side = int(math.sqrt((spec.shape[0] + spec.fan_in) * rank) + 0.5)
        return side - side % 2 if self.type == 6 else side

    def most(self, spec: HostSpec) -> int:
        """The largest rank with no more numbers than the weight has; 0 where there is none."""
        return next((rank for rank in range(min(spec.shape[0], spec.fan_in), 0, -1) if self.fits(spec, rank)), 0)

    def fits(self, spec: HostSpec, rank: int) -> bool:
        return 1 <= self.side(spec, rank) ** 2 <= spec.numel

    def unfit(self, spec: HostSpec) -> str | None:
        if spec.lookup:
            return "MoRA groups neighbouring inputs, and the ids of tokens are no neighbours: use LoRA, LoHa or LoKr"
        rank, shape = self.rank or 1, "×".join(map(str, spec.shape))
        if self.fits(spec, rank):
            return None
        side, most = self.side(spec, rank), self.most(spec)
        use = f"at most rank {most} is of use" if most else "use another method for this layer"
        return f"rank {rank} makes a square matrix of {side}×{side}, the weight has only {shape} numbers: {use}"

    def at(self, path: str, spec: HostSpec) -> Self:
        method = super().at(path, spec)
        return method if self.rank else dataclasses.replace(method, rank=max(1, min(self.usual, self.most(spec))))

    def build(self, spec: HostSpec) -> Adapter:
        method = self.at("", spec)
        assert method.rank is not None
        return MoRAAdapter(spec, self.side(spec, method.rank), self.type, self.dropout)

    def combine(self, parts: Sequence[Part]) -> tuple[Method, dict[str, Tensor]]:
        """The change is linear in M: matrices of one size and type add up."""
        if any(method != self for method, _, _ in parts):
            return super().combine(parts)
        return self, {"mora_M": torch.stack([times(w, tensors["mora_M"].float()) for _, tensors, w in parts]).sum(0)}
