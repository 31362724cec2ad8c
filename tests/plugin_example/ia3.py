"""IA3: W' = diag(l)·W, one trained number per output feature, l = 1 at the start.  Liu et al. 2022, arXiv 2205.05638."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.core.adapter import WeightAdapter
from deltaw.core.host import HostSpec
from deltaw.core.method import Method, register


class IA3Adapter(WeightAdapter):
    def __init__(self, spec: HostSpec):
        super().__init__()
        self.scales = nn.Parameter(torch.ones(spec.out_features))

    def merged(self, weight: Tensor) -> Tensor:
        return self.scales.view(-1, *[1] * (weight.ndim - 1)) * weight

    def branch(self, host: Any, x: Tensor) -> Tensor:
        y = host.op(x, host.weight)  # without bias
        return (self.scales - 1).to(y.dtype).view(-1, *[1] * (-1 - host.out_dim)) * y


@register("ia3_example")
@dataclass(frozen=True, kw_only=True)
class IA3(Method):
    def build(self, spec: HostSpec) -> IA3Adapter:
        return IA3Adapter(spec)
