"""nn.Linear and transformers' Conv1D: y = x Wᵀ + b, W: [out, in].

Conv1D (GPT-2) stores the transpose; its canonical weight is a view, so both are one idea.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from deltaw.core.host import HostSpec, Map, WeightHost, register


@register(nn.Linear)
class LinearHost(WeightHost):
    @property
    def spec(self) -> HostSpec:
        return HostSpec(tuple(self.weight.shape))

    def op(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)

    def low_rank(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return F.linear(F.linear(x, a), b)  # [T, in] → [T, r] → [T, out]

    def act(
        self, x: Tensor, dense: Callable[[], Tensor], vectors: Map | None = None, columns: Map | None = None
    ) -> Tensor:
        return self.op(x, dense()) if vectors is None else vectors(x)


@register("transformers.pytorch_utils.Conv1D")
class TransposedLinearHost(LinearHost):
    @property
    def weight(self) -> Tensor:
        return self.parameter.T  # stored [in, out]

    def write(self, weight: Tensor) -> None:
        super().write(weight.T)
