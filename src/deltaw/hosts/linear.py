"""nn.Linear and transformers' Conv1D: y = x Wᵀ + b, W: [out, in].

Conv1D (GPT-2) stores the transpose; its canonical weight is a view, so both are one idea.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltaw.core.adapter import WeightAdapter
from deltaw.core.carried import base_class_of, carried, here
from deltaw.core.host import HostSpec, Map, WeightHost, register
from deltaw.core.rows import PerRow
from deltaw.kernels.lora import lora_add, lora_linear


@register(nn.Linear)
class LinearHost(WeightHost):
    module: Any

    def __init__(self, module: nn.Module, slot: str):
        super().__init__(module, slot)
        self.plain = base_class_of(module).forward is nn.Linear.forward

    @property
    def spec(self) -> HostSpec:
        return HostSpec(tuple(self.weight.shape))

    def op(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)

    def low_rank(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return F.linear(F.linear(x, a), b)  # [T, in] → [T, r] → [T, out]

    def adapted(
        self, adapter: Any, call: Callable[..., Any], strength: Tensor | None, *args: Any, **kwargs: Any
    ) -> Any:
        x = args[0] if args else kwargs["input"]
        if not adapter.thin or torch.is_autocast_enabled(x.device.type):
            return super().adapted(adapter, call, strength, *args, **kwargs)
        frozen, (a, b, scale) = self._frozen(), _change(adapter, strength)
        if frozen is not None and here(self.module).live[0][0] is adapter and not adapter.drops:
            return lora_linear(x, *frozen, a, b, scale)
        return lora_add(call(x), adapter.dropped(x), a, b, scale)

    def simple(self) -> tuple[Tensor, Tensor | None, Any] | None:
        live = found.live if (found := carried(self.module)) is not None else ()
        frozen = self._frozen()
        if frozen is None or len(live) > 1 or torch.is_autocast_enabled(frozen[0].device.type):
            return None
        if not live:
            return *frozen, None
        adapter, _, strength = live[0]
        alone = isinstance(adapter, WeightAdapter) and adapter.thin and not adapter.drops
        return (*frozen, _change(adapter, strength)) if alone and not isinstance(strength, PerRow) else None

    def _frozen(self) -> tuple[Tensor, Tensor | None] | None:
        """Weight and bias where the layer's own forward is that of nn.Linear and trains neither."""
        weight, bias = self.module.weight, self.module.bias
        trained = weight.requires_grad or (bias is not None and bias.requires_grad)
        return (weight, bias) if self.plain and not trained else None

    def act(
        self, x: Tensor, dense: Callable[[], Tensor], vectors: Map | None = None, columns: Map | None = None
    ) -> Tensor:
        return self.op(x, dense()) if vectors is None else vectors(x)


def _change(adapter: Any, strength: Tensor | None) -> tuple[Tensor, Tensor, float | Tensor]:
    a, b, scale = adapter.factors()
    return a, b, scale if strength is None else scale * strength


@register("transformers.pytorch_utils.Conv1D")
class TransposedLinearHost(LinearHost):
    @property
    def weight(self) -> Tensor:
        return self.parameter.T  # stored [in, out]

    def write(self, weight: Tensor) -> None:
        super().write(weight.T)
