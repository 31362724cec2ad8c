"""Full: W' = a trained copy of W, as part of an adapter; biases, heads, norms, whole modules.

The base keeps its own tensor; while the adapter is live the module runs with the copy in its place. Strength w gives
W + w·(copy − W). Kept in fp32 beside a base of any dtype and cast to it in the forward.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.core.adapter import Adapter, Call, WeightAdapter
from deltaw.core.errors import ConfigError, UseError, did_you_mean, faults
from deltaw.core.host import HostSpec, ParameterHost, wide
from deltaw.core.method import Method, Owned, Part, Site, register


class FullAdapter(WeightAdapter):
    def __init__(self, shape: tuple[int, ...]):
        super().__init__()
        self.copy = nn.Parameter(torch.zeros(shape, dtype=torch.float32))

    def start_from(self, host: ParameterHost) -> None:
        with torch.no_grad():
            self.copy.copy_(host.weight)

    def merged(self, weight: Tensor) -> Tensor:
        return self.copy.to(weight.dtype)

    def forward(self, host: Any, call: Call, strength: Tensor | None, *args: Any, **kwargs: Any) -> Any:
        def change(current: Tensor, base: Tensor) -> Tensor:
            copy = self.copy.to(base.dtype)
            if strength is None and current is base:
                return copy
            whole = wide(base)  # in fp32: copy − base is small beside both
            change = (self.copy - whole) if strength is None else strength * (self.copy - whole)
            return (wide(current) + change).to(base.dtype)

        with host.replaced(change):
            return call(*args, **kwargs)


@register("full")
@dataclass(frozen=True, kw_only=True)
class Full(Method):
    host = ParameterHost
    suits = "heads, norms and biases beside another method; the baseline where memory is no question"

    def build(self, spec: HostSpec) -> Adapter:
        return FullAdapter(spec.shape)

    def combine(self, parts: Sequence[Part]) -> tuple[Method, dict[str, Tensor]]:
        if any(not isinstance(method, Full) for method, _, _ in parts):
            return super().combine(parts)
        of_one_shape([tensors["copy"] for _, tensors, _ in parts])
        total = sum(weight for _, _, weight in parts)
        if abs(total - 1.0) > 1e-6:
            raise UseError(
                f"weights of trained copies sum to {total:g}: copies are absolute values, their mix is exact only "
                "where the weights sum to 1 (mixing.exact([a, b], [w, 1 - w])), with the base (mixing.exact(…, base=model), "
                "deltaw mix --model), or live with use(model, {...})"
            )
        return self, {"copy": torch.stack([tensors["copy"].float() * w for _, tensors, w in parts]).sum(0)}


def of_one_shape(copies: Sequence[Tensor]) -> None:
    """UseError where copies of one parameter have several shapes: heads of different tasks."""
    shapes = sorted({tuple(copy.shape) for copy in copies})
    if len(shapes) > 1:
        raise UseError(
            f"the trained copies have different shapes, {' and '.join(map(str, shapes))}: take the one of one adapter, "
            "with weights by block (mixing.blocks, deltaw mix --block NAME=1,0)"
        )


def companions(
    bias: str, modules_to_save: Sequence[str], parameters: Owned, targets: Sequence[str], norms: bool = False
) -> dict[Site, Method]:
    """Sites of the trained biases, modules and norms that a method's options ask for.

    A norm is a module that owns a vector `weight`, whatever its class: LayerNorm, a model's own RMSNorm, ...
    """
    result: dict[Site, Method] = {}
    if bias != "none":
        chosen = parameters if bias == "all" else targets
        result |= {Site(path, "bias"): Full() for path in chosen if "bias" in parameters[path]}
    if norms:
        scaled = [path for path, own in parameters.items() if len(own.get("weight", ())) == 1]
        result |= {Site(path, slot): Full() for path in scaled for slot in parameters[path]}
    found: list[str] = []
    for name in modules_to_save:
        inside = [path for path in parameters if re.search(rf"(^|\.){re.escape(name)}(\.|$)", path)]
        owned = {Site(path, slot): Full() for path in inside for slot in parameters[path]}
        if not owned:
            found.append(
                f"modules_to_save={name!r} matches no module with parameters{did_you_mean(name, _leaves(parameters))}"
            )
        result |= owned
    if found:
        raise faults(ConfigError, "modules to train in full", found)
    return result


def _leaves(parameters: Owned) -> list[str]:
    return [path.rpartition(".")[2] for path, own in parameters.items() if own]
