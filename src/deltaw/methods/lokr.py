"""LoKr: W' = W + s·(C ⊗ D), s = α/r, C small, D of rank r or full.  Yeh et al. 2023 (LyCORIS), arXiv 2309.14859.

C [a, b], D [c, d], out = a·c, in = b·d. (a, c) and (b, d) are the divisors of out and in nearest to their square roots, or
those that decompose_factor asks for. Tensors and rules are PEFT's: D = lokr_w2_a [c, r] · lokr_w2_b [r, d] as long as r < max(c, d)/2, else
lokr_w2 [c, d]; C = lokr_w1 [a, b], or lokr_w1_a · lokr_w1_b with decompose_both and r < max(a, b)/2. Convolutions flatten
their kernel into d (lokr_w2 keeps it: [c, d, *kernel]); `in` and `out` are channels, those of one group.

Where published code disagrees:
    start   C (or lokr_w1_a) = 0, the rest kaiming-uniform, as PEFT; LyCORIS zeroes D (or lokr_w2_b). ΔW = 0 in both.
    scale   α/r always, as PEFT; LyCORIS forces 1 where C and D are both full.
    factor  a divisor above the square root gives the larger part to C (32 with 8 → 8·4), as PEFT; LyCORIS swaps them (4·8).
    Conv1d  with a full D, PEFT 0.21 takes the Kronecker product over the wrong dimensions (its own Conv2d does not):
            the same tensors are another ΔW here.

No out × in product on vectors:  (C ⊗ D) x = C·(X·Dᵀ) with x as X [b, d]; through A and B of D = B·A, C acts in between:
    X [T, b, d] ─ A ─ [T, b, r] ─ C ─ [T, a, r] ─ B ─ [T, a, c]           b·d·r + a·b·r + a·c·r per vector, LoRA's size
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deltaw.core.adapter import Adapter, Factors
from deltaw.core.host import HostSpec
from deltaw.core.method import Method, Part, register
from deltaw.methods.ranked import RankedAdapter, Scaled, kaiming, times, trained


def factorization(size: int, factor: int = -1) -> tuple[int, int]:
    """`size` as a product of two: `factor` first if it divides, else the largest divisor up to it and up to √size."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    most = math.isqrt(size) if factor < 0 else min(factor, math.isqrt(size))
    small = next(divisor for divisor in range(most, 0, -1) if size % divisor == 0)
    return small, size // small


class LoKrAdapter(RankedAdapter):
    def __init__(self, spec: HostSpec, method: "LoKr"):
        super().__init__(spec, method.scale, method.dropout)
        (a, c), (b, d) = (factorization(size, method.decompose_factor) for size in spec.shape[:2])
        kernel, r = spec.shape[2:], method.rank
        assert r is not None
        for name in ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"):
            self.register_parameter(name, None)
        if method.decompose_both and r < max(a, b) / 2:
            self.lokr_w1_a, self.lokr_w1_b = trained(a, r), trained(r, b)
        else:
            self.lokr_w1 = trained(a, b)
        if r < max(c, d) / 2:
            self.lokr_w2_a, self.lokr_w2_b = trained(c, r), trained(r, d * math.prod(kernel))
        else:
            self.lokr_w2 = trained(c, d, *kernel)

    def parts(self, scale: float | Tensor, dtype: Any) -> tuple[Tensor, ...]:
        return tuple(t.to(dtype) for t in _parts(self._parameters, scale))  # C, A (or D), and B if there is one

    def dense(self, *parts: Tensor) -> Tensor:
        c, a, *b = parts
        return torch.kron(c, b[0] @ a if b else a)

    def vectors(self, x: Tensor, *parts: Tensor) -> Tensor:
        """In products of two dimensions alone: those of more round differently where no gradient is asked for."""
        c, a, *b = parts
        (up, down), r = c.shape, a.shape[0]
        h = F.linear(x.reshape(-1, a.shape[1]), a)  # [T·b, d] → [T·b, r]
        h = F.linear(h.view(-1, down, r).transpose(1, 2).reshape(-1, down), c)  # [T·r, b] → [T·r, a]
        h = h.view(-1, r, up).transpose(1, 2).reshape(-1, r)  # [T·a, r]
        return (F.linear(h, b[0]) if b else h).view(*x.shape[:-1], self.shape[0])  # [T·a, c] → [T, out]

    def columns(self, ids: Tensor, *parts: Tensor) -> Tensor:
        c, a, *b = parts
        size = a.shape[1]
        left, right = F.embedding(ids // size, c.T), F.embedding(ids % size, a.T)  # [T, a], [T, r]
        right = right @ b[0].T if b else right  # [T, c]
        return (left.unsqueeze(-1) * right.unsqueeze(-2)).flatten(-2)

    def factors(self) -> Factors | None:
        return _low_rank(self._parameters, self.scale)


@register("lokr")
@dataclass(frozen=True, kw_only=True)
class LoKr(Scaled):
    suits = "small files; styles in image models"

    rank: int | None = None
    """Rank r of the large factor D [c, d]; from max(c, d)/2 on D is a full matrix. Default: 16, capped by the layer."""
    decompose_factor: int = -1
    """Size of the small factor: the largest divisor of each dimension up to this; -1: nearest to the square root."""
    decompose_both: bool = False
    """Give the small factor rank r as well, where r is below half its size."""

    def invalid(self) -> Sequence[str]:
        found, factor = list(super().invalid()), self.decompose_factor
        if type(factor) is not int or (factor != -1 and factor < 1):
            found.append(f"decompose_factor={factor!r} is neither -1 nor a whole number of at least 1")
        if not isinstance(self.decompose_both, bool):
            found.append(f"decompose_both={self.decompose_both!r} is neither true nor false")
        return found

    def build(self, spec: HostSpec) -> Adapter:
        adapter = LoKrAdapter(spec, self.at("", spec))
        for name, tensor in adapter.named_parameters():
            if name not in ("lokr_w1", "lokr_w1_a"):  # C is zero
                reads_inputs = name != "lokr_w2_a"
                kaiming(tensor, 1 if spec.lookup and reads_inputs else tensor[0].numel())
        return adapter

    def factors(self, tensors: Mapping[str, Tensor]) -> Factors | None:
        return _low_rank(tensors, self.scale)

    def combine(self, parts: Sequence[Part]) -> tuple[Method, dict[str, Tensor]]:
        """One change times a number is exact; the sum of two Kronecker products is none."""
        if len(parts) > 1:
            return super().combine(parts)
        ((_, tensors, weight),) = parts
        zeroed = "lokr_w1" if "lokr_w1" in tensors else "lokr_w1_a"
        return self, {**tensors, zeroed: times(weight, tensors[zeroed].float())}


def _parts(tensors: Mapping[str, Tensor | None], scale: float | Tensor) -> tuple[Tensor, ...]:
    """s·C [a, b], then D [c, d·kernel], or A [r, d·kernel] and B [c, r] with D = B·A."""
    get = tensors.get
    c, d, left, up = get("lokr_w1"), get("lokr_w2"), get("lokr_w1_a"), get("lokr_w2_a")
    small = scale * c if c is not None else (scale * left) @ tensors["lokr_w1_b"]  # type: ignore[operator]
    return (small, d.flatten(1)) if d is not None else (small, tensors["lokr_w2_b"], up)  # type: ignore[return-value]


def _low_rank(tensors: Mapping[str, Tensor | None], scale: float) -> Factors | None:
    """Exact factors: C ⊗ BA = (C ⊗ B)(I ⊗ A), or (I ⊗ B)(C ⊗ A) where C is taller than wide; rank min(a, b)·r."""
    c, a, *b = (t.float() for t in _parts(tensors, 1.0))
    up = b[0] if b else torch.eye(a.shape[0])
    rank = min(c.shape) * a.shape[0]
    if rank >= min(c.shape[0] * up.shape[0], c.shape[1] * a.shape[1]):
        return None  # ΔW itself is smaller
    one = torch.eye(min(c.shape))
    left, right = (c, one) if c.shape[1] <= c.shape[0] else (one, c)
    return Factors(torch.kron(right, a), torch.kron(left, up), scale)
