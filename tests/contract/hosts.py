"""The layers that the contract suite puts every method on: small, never square, nothing divides anything."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class HostCase:
    make: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]

    def net(self) -> "Net":
        return Net(self.make())


class Net(nn.Module):
    """The layer, and a neighbour that nothing may touch; half of its flags are off to begin with."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer
        self.neighbour = nn.Linear(3, 2)
        self.neighbour.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def _fused_qkv() -> nn.Linear:
    """Three query heads and one key-value head of 8: grouped-query attention in one matrix."""
    return nn.Linear(24, (3 + 2 * 1) * 8, bias=False)


def _conv1d_of_gpt2() -> nn.Module:
    layer = Conv1D(48, 32)
    nn.init.normal_(layer.weight, std=0.2)
    nn.init.normal_(layer.bias)
    return layer


HOSTS = {
    "linear": HostCase(lambda: nn.Linear(32, 48), lambda: torch.randn(2, 5, 32)),
    "linear-no-bias": HostCase(lambda: nn.Linear(37, 53, bias=False), lambda: torch.randn(7, 37)),
    "linear-one-output": HostCase(lambda: nn.Linear(64, 1), lambda: torch.randn(5, 64)),
    "linear-fused-qkv": HostCase(_fused_qkv, lambda: torch.randn(2, 5, 24)),
    "conv1d-of-gpt2": HostCase(_conv1d_of_gpt2, lambda: torch.randn(2, 5, 32)),
    "embedding": HostCase(lambda: nn.Embedding(40, 16), lambda: torch.randperm(40).view(4, 10)),
    "conv1d": HostCase(lambda: nn.Conv1d(6, 9, 5, padding=2), lambda: torch.randn(2, 6, 11)),
    "conv2d": HostCase(
        lambda: nn.Conv2d(3, 8, (3, 2), stride=2, padding=(2, 1), dilation=2), lambda: torch.randn(2, 3, 9, 8)
    ),
    "conv2d-circular": HostCase(
        lambda: nn.Conv2d(3, 7, 3, padding="same", padding_mode="circular", bias=False), lambda: torch.randn(2, 3, 5, 6)
    ),
    "conv2d-grouped": HostCase(lambda: nn.Conv2d(6, 10, 3, groups=2), lambda: torch.randn(2, 6, 7, 7)),
    "conv2d-depthwise": HostCase(lambda: nn.Conv2d(6, 12, 3, groups=6), lambda: torch.randn(2, 6, 7, 7)),
    "conv3d": HostCase(lambda: nn.Conv3d(2, 5, 2), lambda: torch.randn(2, 2, 4, 4, 4)),
    "layernorm": HostCase(lambda: nn.LayerNorm(32), lambda: torch.randn(2, 5, 32)),
}
