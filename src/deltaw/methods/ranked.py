"""What methods with a rank and a change of their own share: W' = W + s·ΔW(trained tensors); no method by itself.

ΔW has up to three forms: dense [out, in · kernel], as a map of vectors, and as columns for ids. A method writes dense,
and the others where they are cheaper; the host takes the one it can use.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltaw.core.adapter import WeightAdapter, compute_dtype
from deltaw.core.errors import UseError
from deltaw.core.host import HostSpec
from deltaw.core.method import Method, Owned, Site
from deltaw.methods.full import companions


class RankedAdapter(WeightAdapter):
    def __init__(self, spec: HostSpec, scale: float, dropout: float):
        super().__init__()
        self.shape, self.scale, self.dropout = spec.shape, scale, dropout

    def parts(self, scale: float | Tensor, dtype: Any) -> tuple[Tensor, ...]:
        """The trained tensors in `dtype`, with the scale folded into one of them in fp32; never larger than they are."""
        raise NotImplementedError

    def dense(self, *parts: Tensor) -> Tensor:
        """ΔW, [out, in · kernel]."""
        raise NotImplementedError

    def vectors(self, x: Tensor, *parts: Tensor) -> Tensor:
        """x ΔWᵀ, [.., in] → [.., out]."""
        return F.linear(x, self.dense(*parts))

    def columns(self, ids: Tensor, *parts: Tensor) -> Tensor:
        """The column of ΔW for each id, [..] → [.., out]."""
        return F.embedding(ids, self.dense(*parts).T)

    def merged(self, weight: Tensor) -> Tensor:
        return weight + self.dense(*self.parts(self.scale, weight.dtype)).view(weight.shape)

    def branch(self, host: Any, x: Tensor) -> Tensor:
        return self.act(host, x, self.scale)

    def weighted(self, host: Any, x: Tensor, strength: Tensor) -> Tensor:
        return self.act(host, x, self.scale * strength)

    def act(self, host: Any, x: Tensor, scale: float | Tensor) -> Tensor:
        parts = self.parts(scale, compute_dtype(host, x))
        return host.act(
            self.dropped(x),
            dense=lambda: self.dense(*parts).view(self.shape),
            vectors=lambda vectors: self.vectors(vectors, *parts),
            columns=lambda ids: self.columns(ids, *parts),
        )


@dataclass(frozen=True, kw_only=True)
class Ranked(Method):
    usual: ClassVar[int] = 16
    """The default rank, where the layer is large enough."""

    rank: int | None = None
    """Rank r of the change. Default: 16, or the layer's smaller dimension where that is less."""
    dropout: float = 0.0
    """Dropout on the input of the adapter's branch only, in training."""
    modules_to_save: tuple[str, ...] = ()
    """Names of modules trained in full and stored with the adapter, e.g. a new classifier."""

    def invalid(self) -> Sequence[str]:
        found = []
        if self.rank is not None and not (type(self.rank) is int and self.rank >= 1):
            found.append(f"rank={self.rank!r} is not a whole number of at least 1")
        if not number(self.dropout) or not 0.0 <= self.dropout < 1.0:
            found.append(f"dropout={self.dropout!r} is not in [0, 1)")
        if isinstance(self.modules_to_save, str):
            found.append(
                f"modules_to_save={self.modules_to_save!r} must be a list of names: [{self.modules_to_save!r}]"
            )
        return found

    def unfit(self, spec: HostSpec) -> str | None:
        return None if self.rank is None else unfit_rank(self.rank, spec)

    def companions(self, parameters: Owned, targets: Sequence[str]) -> Mapping[Site, Method]:
        return companions("none", self.modules_to_save, parameters, targets)

    def at(self, path: str, spec: HostSpec) -> Self:
        rank = self.rank or min(self.usual, spec.shape[0], spec.fan_in)
        return dataclasses.replace(self, rank=rank, modules_to_save=())


@dataclass(frozen=True, kw_only=True)
class Scaled(Ranked):
    """With the scale α/r in front of the change."""

    alpha: float | None = None
    """α; the scale is α/r. Default: r, a scale of 1."""

    def invalid(self) -> Sequence[str]:
        wrong = self.alpha is not None and not positive(self.alpha)
        return [*super().invalid(), *([f"alpha={self.alpha!r} is not a positive number"] if wrong else [])]

    def at(self, path: str, spec: HostSpec) -> Self:
        method = super().at(path, spec)
        return dataclasses.replace(method, alpha=float(method.alpha or method.rank or 1))

    @property
    def scale(self) -> float:
        """s = α/r, of a method resolved by `at`."""
        assert self.rank is not None and self.alpha is not None, "resolve the method with at() first"
        return self.alpha / self.rank


def unfit_rank(rank: int, spec: HostSpec) -> str | None:
    """Why no factors of this rank belong on a layer of this shape, or None."""
    small, large = sorted((spec.shape[0], spec.fan_in))
    if rank <= large:
        return None
    return f"rank {rank} is above both dimensions, {small} and {large}: at most {small} is of use"


def trained(*shape: int) -> nn.Parameter:
    """A trained tensor, zero."""
    return nn.Parameter(torch.zeros(shape, dtype=torch.float32))


def kaiming(tensor: Tensor, inputs: int) -> None:
    """U(±1/√inputs): kaiming-uniform with a = √5 for a matrix that reads so many inputs at once."""
    nn.init.uniform_(tensor, -1 / math.sqrt(inputs), 1 / math.sqrt(inputs))


def times(weight: float, tensor: Tensor) -> Tensor:
    """weight · tensor. UseError where that falls out of the dtype's normal range: digits, or all of it, would be lost."""
    made = weight * tensor
    if weight and made.numel():
        before, after = float(tensor.abs().max()), float(made.abs().max())
        if after < min(before, torch.finfo(made.dtype).tiny):
            raise UseError(f"its change times {weight:g} is too small for fp32: give a larger weight")
    return made


def number(value: Any) -> bool:
    """Is it a finite number? True and False are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def positive(value: Any) -> bool:
    return number(value) and bool(value > 0)
