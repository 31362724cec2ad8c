"""IA3: W' = diag(l)·W and b' = l ⊙ b, or W' = W·diag(l).  Liu et al. 2022, arXiv 2205.05638 (T-Few).

A layer's outputs, or its inputs, are scaled by trained numbers:

    side="output":  y = l ⊙ (W x + b)        W' = diag(l)·W,  b' = l ⊙ b,   l [m, 1]
    side="input":   y = W (l ⊙ x) + b        W' = W·diag(l),  b' = b,       l [1, n]

l = 1 at the start; branch = (l − 1) ⊙ (op(x, W) + b), or op((l − 1) ⊙ x, W). A merge writes the scaled bias too.
The paper scales keys, values and the inner activation of the FFN: outputs of k and v, inputs of the down-projection
(`feedforward`). T5 has no biases, and the authors' code has it both ways: its path for IA3 scales W x + b, its general
path the weight only. This is the first, as in PEFT. Learning rates are about ten times those of LoRA (there 3e-3).
Convolutions: l per channel, [m, 1, …] or [1, n, …]; of groups, one for every channel that goes in.
With other adapters live, l scales W and b only: the others add to the result.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from deltaw.core.adapter import Adapter, WeightAdapter
from deltaw.core.host import Host, HostSpec
from deltaw.core.method import Method, register
from deltaw.methods import patterns
from deltaw.methods.patterns import hits


class IA3Adapter(WeightAdapter):
    def __init__(self, spec: HostSpec, side: str):
        super().__init__()
        out, into, kernel = spec.shape[0], spec.shape[1] * spec.groups, [1] * len(spec.shape[2:])
        self.side, self.groups = side, spec.groups
        shape = (out, 1, *kernel) if side == "output" else (1, into, *kernel)
        self.ia3_l = nn.Parameter(torch.ones(shape, dtype=torch.float32))

    def merged(self, weight: Tensor) -> Tensor:
        scales = self.ia3_l.to(weight.dtype)
        if self.side == "input" and self.groups > 1:  # every group has its own channels: [g·n] → [m, n]
            rows = scales.view(self.groups, 1, *weight.shape[1:2], *scales.shape[2:])
            scales = rows.expand(-1, weight.shape[0] // self.groups, *[-1] * (weight.ndim - 1)).flatten(0, 1)
        return scales * weight

    def beside(self, host: Any) -> "Sequence[tuple[WeightAdapter, Host]]":
        return [(ScaledBias(self), host.bias)] if self.side == "output" and host.bias is not None else ()

    def branch(self, host: Any, x: Tensor) -> Tensor:
        return self.weighted(host, x, None)

    def weighted(self, host: Any, x: Tensor, strength: Tensor | None) -> Tensor:
        along = (-1, *[1] * (-1 - host.out_dim))  # channels stand at the same place in x and in y
        more = (self.ia3_l - 1 if strength is None else strength * (self.ia3_l - 1)).view(along)
        if self.side == "input":
            return host.op(more.to(x.dtype) * x, host.weight)
        y = host.op(x, host.weight)
        if host.bias is not None:
            y = y + host.bias.weight.view(along).to(y.dtype)
        return more.to(y.dtype) * y


class ScaledBias(WeightAdapter):
    """b' = l ⊙ b: the bias's part of a merge. It holds no tensors of its own."""

    def __init__(self, scales: IA3Adapter):
        super().__init__()
        self.name, self.method = scales.name, scales.method
        self.scales = scales.ia3_l.detach().flatten()

    def merged(self, weight: Tensor) -> Tensor:
        return self.scales.to(weight.dtype) * weight


@register("ia3")
@dataclass(frozen=True, kw_only=True)
class IA3(Method):
    suits = "the smallest files; learning rates ten times LoRA's"

    side: Literal["output", "input"] = "output"
    """What is scaled: the layer's outputs, its bias included, or its inputs."""
    feedforward: tuple[str, ...] = ()
    """Modules with scaled inputs instead, e.g. [down_proj]: names or regular expressions at the end of the path."""

    def invalid(self) -> Sequence[str]:
        found = [] if self.side in ("output", "input") else [f"side={self.side!r} is neither output nor input"]
        if isinstance(self.feedforward, str):
            return [*found, f"feedforward={self.feedforward!r} must be a list of names: [{self.feedforward!r}]"]
        return found + [f"feedforward: {said}" for pattern in self.feedforward if (said := patterns.invalid(pattern))]

    def unfit(self, spec: HostSpec) -> str | None:
        return "its inputs are ids, there is nothing to scale" if spec.lookup and self.side == "input" else None

    def unused(self, paths: Sequence[str]) -> Sequence[str]:
        return patterns.unused([("feedforward", pattern) for pattern in self.feedforward], paths)

    def at(self, path: str, spec: HostSpec) -> Self:
        hit = any(hits(pattern, path) for pattern in self.feedforward)
        return dataclasses.replace(self, side="input" if hit else self.side, feedforward=())

    def build(self, spec: HostSpec) -> Adapter:
        return IA3Adapter(spec, self.at("", spec).side)
