"""DoRA: W' = M · (W + s·B·A) / ‖W + s·B·A‖, row by row.  Liu et al. 2024, arXiv 2402.09353 (direction and magnitude).

M [out] starts as the row norms of W, one magnitude per output feature (the norm runs over all inputs, as in the
authors' code and PEFT; the paper writes "column-wise" for its transposed W). The norm is a constant for the gradient
(paper §4.3). Forward, with c = M / ‖W + sBA‖:   y = base(x) + (c − 1)·W x + c·s·B(A(x)); the bias is never scaled.

Row norms without a weight-sized temporary:  ‖W + sBA‖² = ‖W‖² + 2s·rowsum((W Aᵀ)∘B) + s²·rowsum((B(A Aᵀ))∘B), in fp32,
some rows of W after the other. On linear layers one kernel makes all of y (`kernels.lora`, gain c).
Start, forward and merge share this one formula, so that c is exactly 1 as long as B = 0.
With other adapters live, M scales W + its own sBA only: the others add to the result.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.core.adapter import Adapter, Change
from deltaw.core.autocast import exact
from deltaw.core.host import HostSpec
from deltaw.core.method import Method, Part, register
from deltaw.methods.inits import STARTS
from deltaw.methods.lora import LoRA, LoRAAdapter

VALUES = 1 << 18
"""Numbers of W that are widened at once on a CPU, where they then stay in its cache; 64 times as many elsewhere."""


class DoRAAdapter(LoRAAdapter):
    thin = True

    def __init__(self, spec: HostSpec, rank: int, scale: float, dropout: float = 0.0):
        super().__init__(spec, rank, scale, dropout)
        self.magnitude = nn.Parameter(torch.ones(spec.shape[0], dtype=torch.float32))

    def start_from(self, host: Any) -> None:
        with torch.no_grad():
            self.magnitude.copy_(self.norms(host.weight))

    def norms(self, weight: Tensor) -> Tensor:
        """‖W + sBA‖ per row, [out], fp32 also under autocast, outside the graph."""
        with torch.no_grad(), exact(weight):
            a, b, s = self.lora_A.flatten(1), self.lora_B.flatten(1), self.scale
            gram, square = a @ a.T, []  # [r, r]
            values = VALUES if weight.device.type == "cpu" else 64 * VALUES
            size = len(weight) if torch.compiler.is_compiling() else max(1, values // max(1, a.shape[1]))
            for w, rows in zip(weight.flatten(1).split(size), b.split(size), strict=True):
                w = w.to(a.dtype)
                cross = 2 * s * ((w @ a.T) * rows).sum(1) + s * s * ((rows @ gram) * rows).sum(1)
                square.append(torch.linalg.vector_norm(w, dim=1).square() + cross)
            return torch.cat(square).clamp_min(torch.finfo(torch.float32).tiny).sqrt()

    def ratio(self, weight: Tensor) -> Tensor:
        """c = M / ‖W + sBA‖ per row, [out]; of fp32 norms, and then as wide as W."""
        return (self.magnitude / self.norms(weight)).to(torch.promote_types(weight.dtype, torch.float32))

    def factors(self) -> None:  # type: ignore[override]
        return None

    def as_change(self, host: Any, strength: Tensor | None, alone: bool) -> Change | None:
        if not (self.thin and alone) or strength is not None or self.drops:  # dropout reaches (c − 1)·W x as well
            return None
        if host.bias is not None and host.weight.dtype.itemsize < 4:
            return None  # z would be (z + bias) − bias, of which a large bias leaves little in 16 bits
        return Change(self.lora_A, self.lora_B, self.scale, self.ratio(host.weight))

    def merged(self, weight: Tensor) -> Tensor:
        a, b = (t.flatten(1).to(weight.dtype) for t in (self.lora_A, self.lora_B))
        full = weight + self.scale * (b @ a).view(weight.shape)
        return self.ratio(weight).view(-1, *[1] * (weight.ndim - 1)) * full

    def branch(self, host: Any, x: Tensor) -> Tensor:
        return self.weighted(host, x, None)

    def weighted(self, host: Any, x: Tensor, strength: Tensor | None) -> Tensor:
        weight, x = host.weight, self.dropped(x)  # one mask for both terms
        c = self.ratio(weight).view(-1, *[1] * (-1 - host.out_dim))
        base, change = host.op(x, weight), self.low_rank(host, x, self.scale)
        more = c - 1
        if strength is not None:
            more, c = strength * more, strength * c
        return more.to(base.dtype) * base + c.to(change.dtype) * change


@register("dora")
@dataclass(frozen=True, kw_only=True)
class DoRA(LoRA):
    suits = "small ranks, where LoRA falls short"

    def invalid(self) -> Sequence[str]:
        found = list(super().invalid())
        if self.init in STARTS or self.init == "loftq":
            found.append(
                f"init={self.init!r} starts with a change beside W, for which DoRA has no norm: use LoRA, or init=eva"
            )
        return found

    def build(self, spec: HostSpec) -> Adapter:
        method = self.resolved(spec)
        assert method.rank is not None
        return method.start(DoRAAdapter(spec, method.rank, method.scale, method.dropout), spec)

    def factors(self, tensors: Any) -> None:
        return None

    def combine(self, parts: list[Part]) -> tuple[Method, dict[str, Tensor]]:  # type: ignore[override]
        return Method.combine(self, parts)
