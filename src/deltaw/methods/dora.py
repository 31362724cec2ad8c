"""DoRA: W' = M · (W + s·B·A) / ‖W + s·B·A‖, row by row.  Liu et al. 2024, arXiv 2402.09353 (direction and magnitude).

M [out] starts as the row norms of W, one magnitude per output feature (the norm runs over all inputs, as in the
authors' code and PEFT; the paper writes "column-wise" for its transposed W). The norm is a constant for the gradient
(paper §4.3). Forward, with c = M / ‖W + sBA‖:   y = base(x) + (c − 1)·W x + c·s·B(A(x)); the bias is never scaled.

Row norms without a weight-sized temporary:  ‖W + sBA‖² = ‖W‖² + 2s·rowsum((W Aᵀ)∘B) + s²·rowsum((B(A Aᵀ))∘B).
With other adapters live, M scales W + its own sBA only: the others add to the result.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.core.adapter import Adapter, compute_dtype
from deltaw.core.host import HostSpec
from deltaw.core.method import Method, Part, register
from deltaw.methods.lora import LoRA, LoRAAdapter


class DoRAAdapter(LoRAAdapter):
    def __init__(self, spec: HostSpec, rank: int, scale: float, dropout: float = 0.0):
        super().__init__(spec, rank, scale, dropout)
        self.magnitude = nn.Parameter(torch.ones(spec.shape[0], dtype=torch.float32))

    def start_from(self, host: Any) -> None:
        with torch.no_grad():
            self.magnitude.copy_(host.weight.float().flatten(1).norm(dim=1))

    def norms(self, weight: Tensor) -> Tensor:
        """‖W + sBA‖ per row, [out], fp32, outside the graph."""
        a, b, s = (t.detach().float() if isinstance(t, Tensor) else t for t in super().factors())
        w = weight.detach().flatten(1).float()
        cross, gram = w @ a.T, a @ a.T  # [out, r], [r, r]
        square = w.square().sum(1) + 2 * s * (cross * b).sum(1) + s * s * ((b @ gram) * b).sum(1)
        return square.clamp_min(torch.finfo(torch.float32).tiny).sqrt()

    def factors(self) -> None:  # type: ignore[override]
        return None

    def merged(self, weight: Tensor) -> Tensor:
        a, b = self.lora_A.flatten(1).float(), self.lora_B.flatten(1).float()
        full = weight + self.scale * (b @ a).view(weight.shape)
        ratio = self.magnitude.float() / full.flatten(1).norm(dim=1)
        return ratio.view(-1, *[1] * (weight.ndim - 1)) * full

    def branch(self, host: Any, x: Tensor) -> Tensor:
        dtype, weight = compute_dtype(host, x), host.weight
        c = (self.magnitude / self.norms(weight)).view(-1, *[1] * (-1 - host.out_dim))
        low_rank = super().branch(host, x)
        if self.dropout and self.training and x.is_floating_point():
            x = torch.nn.functional.dropout(x, self.dropout)
        return (c - 1).to(dtype) * host.op(x, weight) + c.to(dtype) * low_rank


@register("dora")
@dataclass(frozen=True, kw_only=True)
class DoRA(LoRA):
    def build(self, spec: HostSpec, shared: Any = None) -> Adapter:
        method = self.at("", spec)
        assert method.rank is not None
        return method.start(DoRAAdapter(spec, method.rank, method.scale, method.dropout), spec)

    def factors(self, tensors: Any) -> None:
        return None

    def combine(self, parts: list[Part]) -> tuple[Method, dict[str, Tensor]]:  # type: ignore[override]
        return Method.combine(self, parts)
