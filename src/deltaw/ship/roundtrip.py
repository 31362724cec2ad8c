"""Two weights to merge an adapter into that was trained on a quantised base, and which of them is nearer to it.

adapter on the quantised base   y = decode(encode(W)) x + ΔW x     what training saw
into the original               W + ΔW                             the base is whole again, but another one for ΔW
into the decoded weights        decode(encode(W)) + ΔW             what training saw, written out in full
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deltaw.core.base import base_modules
from deltaw.core.host import host_of


@dataclass(frozen=True)
class Distance:
    """Between logits over all probe positions."""

    largest: float
    mean: float


@dataclass(frozen=True)
class RoundTrip:
    """Both merges held against the adapter on the quantised base, in fp32, before anything is rounded to be written."""

    quantize: str
    original: Distance
    dequantized: Distance

    @property
    def closer(self) -> str:
        return "original" if self.original.mean <= self.dequantized.mean else "dequantized"

    def __str__(self) -> str:
        ways = {"the original weights": self.original, "those read back from it": self.dequantized}
        lines = [f"beside the adapter on the base in {self.quantize}, logits of the adapter merged into"]
        lines += [f"  {way:24} differ by at most {d.largest:.3g}, on average {d.mean:.3g}" for way, d in ways.items()]
        return "\n".join([*lines, f"  closer: --into {self.closer}"])


def decoded(model: nn.Module) -> dict[str, Tensor]:
    """The canonical weights of the quantised layers of `model`, by path."""
    hosts = {path: host_of(module) for path, module in base_modules(model)}
    return {path: host.weight.cpu() for path, host in hosts.items() if host is not None and host.quantized}


def round_trip(
    model: nn.Module,
    ways: Mapping[str, Mapping[str, Tensor]],
    wanted: Sequence[Tensor],
    logits: Callable[[], Sequence[Tensor]],
) -> dict[str, Distance]:
    """Put each of several weights of the base in place, and hold `logits()` of the adapters on them against the wanted ones.

    Merged in fp32 they compute the same to rounding. The base has the weights of the last way afterwards.
    """
    found = {}
    for way, weights in ways.items():
        put(model, weights)
        apart = [(a - b).abs().flatten() for a, b in zip(logits(), wanted, strict=True)]
        found[way] = Distance(float(torch.cat(apart).max()), float(torch.cat(apart).mean()))
    return found


@torch.no_grad()
def put(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Write canonical weights into layers of `model`; what they held before comes back."""
    before = {}
    for path, weight in weights.items():
        host = host_of(model.get_submodule(path))
        before[path] = host.weight.clone()
        host.write(weight)
    return before
