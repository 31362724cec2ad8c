"""Ready-made layers for people who write their own model: ordinary modules that `attach` has adapted.

LoRALinear(1024, 1024, rank=8, alpha=16)                      y = x Wᵀ + b + (α/r)·(x Aᵀ) Bᵀ, W and b frozen
LoRALinear.from_linear(linear, rank=8, alpha=16)              the same around a layer that exists
LoRAAttention(1024, rank=4, num_heads=16, targets="qkv")      softmax(Q Kᵀ / √head_dim)·V, LoRA on q, k and v
"""

from typing import Any, Self

import torch.nn.functional as F
from torch import Tensor, nn

from deltaw.core.attach import attach
from deltaw.core.errors import ConfigError
from deltaw.core.method import get


def _adapt(model: nn.Module, targets: list[str], **options: Any) -> None:
    lora: Any = get("lora")  # from the registry: rooms of one row do not import each other
    attach(model, lora(**options), targets=targets)


class LoRALinear(nn.Linear):
    """A frozen nn.Linear with a trainable LoRA beside it; `options` are the other fields of the LoRA method."""

    def __init__(self, in_features: int, out_features: int, rank: int, alpha: float, bias: bool = True, **options: Any):
        super().__init__(in_features, out_features, bias)
        _adapt(self, [""], rank=rank, alpha=alpha, **options)

    @classmethod
    def from_linear(cls, linear: nn.Linear, rank: int, alpha: float, **options: Any) -> Self:
        """Around the weights of `linear`: shared, not copied, and frozen from now on."""
        layer = cls.__new__(cls)
        nn.Linear.__init__(layer, linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        layer.weight, layer.bias = linear.weight, linear.bias
        _adapt(layer, [""], rank=rank, alpha=alpha, **options)
        return layer.train(linear.training)


class LoRAAttention(nn.Module):
    """Attention over [batch, length, embed_dim] with frozen q, k, v, o and LoRA on the letters in `targets`."""

    def __init__(self, embed_dim: int, rank: int, num_heads: int = 1, targets: str = "qkv", *,
                 alpha: float | None = None, causal: bool = False, **options: Any):  # fmt: skip
        super().__init__()
        if embed_dim % num_heads or not targets or set(targets) - set("qkvo"):
            raise ConfigError(f"{embed_dim=} must be a multiple of {num_heads=}, and {targets=} letters of 'qkvo'")
        self.num_heads, self.causal = num_heads, causal
        self.q, self.k, self.v, self.o = (nn.Linear(embed_dim, embed_dim) for _ in range(4))
        _adapt(self, sorted(set(targets)), rank=rank, alpha=alpha, **options)

    def forward(self, query: Tensor, key: Tensor | None = None, value: Tensor | None = None) -> Tensor:
        key = query if key is None else key
        inputs = self.q(query), self.k(key), self.v(key if value is None else value)
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in inputs)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)  # [batch, heads, length, head_dim]
        return self.o(y.transpose(1, 2).flatten(2))
