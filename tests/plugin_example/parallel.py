"""A low-rank branch beside a whole feed-forward block: y = FFN(x) + s·B·A·x, s = α/r, B = 0 at the start.

The block is not linear, so no weight can hold the branch: a forward-only host, and an adapter that cannot be merged.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.core.adapter import Adapter, Call
from deltaw.core.host import Host, HostSpec
from deltaw.core.host import register as register_host
from deltaw.core.method import Method, register


class FeedForward(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.up, self.down = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


@register_host(FeedForward)
class FeedForwardHost(Host):
    """The block as one slot that is no parameter."""

    slots = ("block",)

    @classmethod
    def has(cls, module: nn.Module, slot: str) -> bool:
        return slot == "block"

    @property
    def spec(self) -> HostSpec:
        return HostSpec((self.module.down.out_features, self.module.up.in_features), linear=False)


class ParallelAdapter(Adapter):
    def __init__(self, spec: HostSpec, rank: int, scale: float):
        super().__init__()
        out, dim = spec.shape
        self.scale = scale
        self.a = nn.Parameter(torch.randn(rank, dim) / dim**0.5)
        self.b = nn.Parameter(torch.zeros(out, rank))

    def forward(self, host: Any, call: Call, strength: Tensor | None, x: Tensor) -> Tensor:
        return call(x) + self.scale * (x @ self.a.T @ self.b.T)


@register("parallel_example")
@dataclass(frozen=True, kw_only=True)
class ParallelBranch(Method):
    host = FeedForwardHost

    rank: int = 8
    """Width of the branch."""
    alpha: float = 16.0
    """The branch is scaled by alpha / rank."""

    def build(self, spec: HostSpec) -> ParallelAdapter:
        return ParallelAdapter(spec, self.rank, self.alpha / self.rank)
