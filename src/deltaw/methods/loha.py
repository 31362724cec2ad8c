"""LoHa: W' = W + s·(B₁·A₁) ∘ (B₂·A₂), s = α/r.  Hyeon-Woo et al. 2021 (FedPara), arXiv 2108.06098; LyCORIS, 2309.14859.

The Hadamard product of two matrices of rank r has rank up to r². Tensors have PEFT's names: hada_w1_a = B₁ [out, r],
hada_w1_b = A₁ [r, in], hada_w2_a = B₂, hada_w2_b = A₂; convolutions flatten their kernel into `in` (PEFT's
use_effective_conv2d=False; the Tucker form has other tensors). 2r(out + in) numbers, as many as LoRA of rank 2r.

Start: A₂ = 0, the others kaiming-uniform, as PEFT; LyCORIS draws normal values and zeroes B₂. Either gives ΔW = 0, and
files do not depend on it. On embeddings, which PEFT's LoHa leaves out, A₁ reads one input at a time: U(±1).
Scale: α/r once, as PEFT. LyCORIS at f49d30d multiplies by it a second time in get_diff_weight, so that its merge differs from
its forward unless α = r.

Memory: neither product is kept for the backward pass, nor on linear layers ΔW itself: they are rebuilt from the factors.
    G = ∂L/∂ΔW:   ∂B₁ = (G ∘ B₂A₂) A₁ᵀ    ∂A₁ = B₁ᵀ (G ∘ B₂A₂)    and the same with 1 and 2 exchanged
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from deltaw.core.adapter import Adapter, Factors
from deltaw.core.host import HostSpec
from deltaw.core.method import Method, Part, register
from deltaw.methods.ranked import RankedAdapter, Scaled, kaiming, times, trained


def product(b1: Tensor, a1: Tensor, b2: Tensor, a2: Tensor) -> Tensor:
    return (b1 @ a1) * (b2 @ a2)  # [out, in]


def gradients(g: Tensor, b1: Tensor, a1: Tensor, b2: Tensor, a2: Tensor) -> tuple[Tensor, ...]:
    """Gradients of the four factors from g = ∂L/∂ΔW, with one product in memory at a time."""
    h = g * (b2 @ a2)
    first = (h @ a1.T, b1.T @ h)
    h = g * (b1 @ a1)
    return (*first, h @ a2.T, b2.T @ h)


class Product(torch.autograd.Function):
    """ΔW from its factors; keeps the factors alone."""

    @staticmethod
    def forward(ctx: Any, *factors: Tensor) -> Tensor:
        ctx.save_for_backward(*factors)
        return product(*factors)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        saved = ctx.saved_tensors
        found = gradients(g, *(t.to(g.dtype) for t in saved))  # autocast computes in another dtype than it is given
        return tuple(grad.to(t.dtype) for grad, t in zip(found, saved, strict=True))


class Linear(torch.autograd.Function):
    """x ΔWᵀ; keeps x and the factors, and forms ΔW once more for the gradient of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *factors: Tensor) -> Tensor:
        ctx.save_for_backward(x, *factors)
        return F.linear(x, product(*factors))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        saved = ctx.saved_tensors
        x, *factors = (t.to(g.dtype) for t in saved)
        of_x = g @ product(*factors) if ctx.needs_input_grad[0] else None
        change = g.flatten(0, -2).T @ x.flatten(0, -2)  # [out, in]
        found = (of_x, *gradients(change, *factors))
        return tuple(None if d is None else d.to(t.dtype) for d, t in zip(found, saved, strict=True))


class LoHaAdapter(RankedAdapter):
    def __init__(self, spec: HostSpec, rank: int, scale: float, dropout: float = 0.0):
        super().__init__(spec, scale, dropout)
        self.hada_w1_a, self.hada_w1_b = trained(spec.shape[0], rank), trained(rank, spec.fan_in)
        self.hada_w2_a, self.hada_w2_b = trained(spec.shape[0], rank), trained(rank, spec.fan_in)

    def parts(self, scale: float | Tensor, dtype: Any) -> tuple[Tensor, ...]:
        factors = (scale * self.hada_w1_a, self.hada_w1_b, self.hada_w2_a, self.hada_w2_b)
        return tuple(t.to(dtype) for t in factors)

    def dense(self, *parts: Tensor) -> Tensor:
        return Product.apply(*parts)  # type: ignore[no-untyped-call]

    def vectors(self, x: Tensor, *parts: Tensor) -> Tensor:
        return Linear.apply(x, *parts)  # type: ignore[no-untyped-call]

    def columns(self, ids: Tensor, *parts: Tensor) -> Tensor:
        b1, a1, b2, a2 = parts
        return (F.embedding(ids, a1.T) @ b1.T) * (F.embedding(ids, a2.T) @ b2.T)  # [T, r] → [T, out]

    def factors(self) -> Factors | None:
        return _low_rank(self.hada_w1_a, self.hada_w1_b, self.hada_w2_a, self.hada_w2_b, self.scale)


@register("loha")
@dataclass(frozen=True, kw_only=True)
class LoHa(Scaled):
    suits = "more rank than LoRA from as many numbers; styles in image models"
    usual: ClassVar[int] = 8

    rank: int | None = None
    """Rank r of each of the two matrices. Default: 8 (as many numbers as LoRA of 16), or the layer's smaller dimension."""

    def build(self, spec: HostSpec) -> Adapter:
        method = self.at("", spec)
        assert method.rank is not None
        adapter = LoHaAdapter(spec, method.rank, method.scale, method.dropout)
        kaiming(adapter.hada_w1_a, method.rank)
        kaiming(adapter.hada_w1_b, 1 if spec.lookup else spec.fan_in)
        kaiming(adapter.hada_w2_a, method.rank)
        return adapter

    def factors(self, tensors: Mapping[str, Tensor]) -> Factors | None:
        b1, a1, b2, a2 = (tensors[f"hada_{name}"].float() for name in ("w1_a", "w1_b", "w2_a", "w2_b"))
        return _low_rank(b1, a1, b2, a2, self.scale)

    def combine(self, parts: Sequence[Part]) -> tuple[Method, dict[str, Tensor]]:
        """One change times a number is exact; the sum of two Hadamard products is none."""
        if len(parts) > 1:
            return super().combine(parts)
        ((_, tensors, weight),) = parts
        return self, {**tensors, "hada_w1_a": times(weight, tensors["hada_w1_a"].float())}


def _low_rank(b1: Tensor, a1: Tensor, b2: Tensor, a2: Tensor, scale: float) -> Factors | None:
    """Exact factors of rank r²: column (i, j) of B is B₁[:, i] ∘ B₂[:, j], row (i, j) of A is A₁[i] ∘ A₂[j]."""
    if b1.shape[1] ** 2 >= min(b1.shape[0], a1.shape[1]):
        return None  # ΔW itself is smaller
    b = (b1[:, :, None] * b2[:, None, :]).flatten(1)  # [out, r²]
    return Factors((a1[:, None] * a2[None]).flatten(0, 1), b, scale)
