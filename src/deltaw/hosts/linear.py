"""nn.Linear and transformers' Conv1D: y = x Wᵀ + b, W: [out, in].

Conv1D (GPT-2) stores the transpose; its canonical weight is a view, so both are one idea.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltaw.core.adapter import WeightAdapter
from deltaw.core.autocast import autocasts
from deltaw.core.carried import base_class_of, carried
from deltaw.core.host import HostSpec, Map, WeightHost, register
from deltaw.core.rows import PerRow
from deltaw.kernels.grouped import grouped
from deltaw.kernels.lora import lora_add, lora_linear


@register(nn.Linear)
class LinearHost(WeightHost):
    module: Any
    grouped = staticmethod(grouped)

    def __init__(self, module: nn.Module, slot: str):
        super().__init__(module, slot)
        self.plain = self.fresh = base_class_of(module).forward is nn.Linear.forward

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
        x, frozen = args[0] if args else kwargs["input"], self._frozen()
        there = carried(self.module)
        one = frozen is not None and len(args) + len(kwargs) == 1
        first = one and there is not None and bool(there.live) and there.live[0][0] is adapter
        own = first and self._pristine
        change = None if autocasts(x) else adapter.as_change(self, strength, own)
        if change is None:
            return super().adapted(adapter, call, strength, *args, **kwargs)
        return (
            lora_linear(x, *frozen, change)
            if frozen is not None and first
            else lora_add(call(*args, **kwargs), x, change)
        )

    def simple(self) -> tuple[Tensor, Tensor | None, Any] | None:
        live = found.live if (found := carried(self.module)) is not None else ()
        frozen = self._frozen()
        if frozen is None or len(live) > 1 or autocasts(frozen[0]):
            return None
        if not live:
            return *frozen, None
        adapter, _, strength = live[0]
        if not isinstance(adapter, WeightAdapter) or isinstance(strength, PerRow):
            return None
        change = adapter.as_change(self, strength, alone=self._pristine)
        return None if change is None else (*frozen, change)

    @property
    def _pristine(self) -> bool:
        """Does the module compute with its own W, and nothing merged or trained in the place of it?"""
        found = carried(self.module)
        return found is None or self.slot not in found.pristine

    def _frozen(self) -> tuple[Tensor, Tensor | None] | None:
        """Weight and bias where the layer's own forward is that of nn.Linear and neither gets a gradient."""
        weight, bias = self.module.weight, self.module.bias
        trained = weight.requires_grad or (bias is not None and bias.requires_grad)
        return (weight, bias) if self.plain and not (trained and torch.is_grad_enabled()) else None

    def act(
        self, x: Tensor, dense: Callable[[], Tensor], vectors: Map | None = None, columns: Map | None = None
    ) -> Tensor:
        return self.op(x, dense()) if vectors is None else vectors(x)


@register("transformers.pytorch_utils.Conv1D")
class TransposedLinearHost(LinearHost):
    grouped = staticmethod(grouped)

    @property
    def weight(self) -> Tensor:
        return self.parameter.T  # stored [in, out]

    def write(self, weight: Tensor) -> None:
        super().write(weight.T)
