"""LoRA: W' = W + s·B·A, s = α/r (rsLoRA: α/√r).  Hu et al. 2021, arXiv 2106.09685; Kalajdzievski 2023, 2312.03732.

        x [T, in] ──────────── W [out, in], frozen ────────────┐
            └─ dropout ─ A [r, in] ─ [T, r] ─ B [out, r] ─ · s ─ + ─→ y [T, out]

Start: A ~ U(±1/√in) (kaiming-uniform with a = √5), B = 0, so that ΔW = 0 while B has a gradient. On embeddings the
other way round, as in the reference code: A [r, vocab] = 0, B [dim, r] ~ N(0, 1). Convolutions: A [r, in, *kernel],
B [out, r, *ones]. Experts: A [E, r, in], B [E, out, r], a pair for each. Trained tensors are fp32; the forward casts
these small ones to the activations' dtype, never x.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from deltaw.core.adapter import Adapter, Factors, WeightAdapter, compute_dtype
from deltaw.core.errors import did_you_mean
from deltaw.core.host import HostSpec
from deltaw.core.method import Method, Owned, Part, Site, register
from deltaw.methods.full import companions


class LoRAAdapter(WeightAdapter):
    def __init__(self, spec: HostSpec, rank: int, scale: float, dropout: float = 0.0):
        super().__init__()
        kernel, stack = spec.shape[2:], () if spec.stack is None else (spec.stack,)
        self.scale, self.dropout, self.inner = scale, dropout, len(stack) + 1
        self.lora_A = nn.Parameter(torch.zeros(*stack, rank, spec.shape[1], *kernel, dtype=torch.float32))
        self.lora_B = nn.Parameter(torch.zeros(*stack, spec.shape[0], rank, *[1] * len(kernel), dtype=torch.float32))

    def factors(self) -> Factors:
        return Factors(self.lora_A.flatten(self.inner), self.lora_B.flatten(self.inner), self.scale)

    def merged(self, weight: Tensor) -> Tensor:
        a, b, scale = self.factors()
        return weight + scale * (b.to(weight.dtype) @ a.to(weight.dtype)).view(weight.shape)

    def branch(self, host: Any, x: Tensor) -> Tensor:
        return self.low_rank(host, self.dropped(x), self.scale)

    def weighted(self, host: Any, x: Tensor, strength: Tensor) -> Tensor:
        return self.low_rank(host, self.dropped(x), self.scale * strength)

    def low_rank(self, host: Any, x: Tensor, scale: float | Tensor) -> Tensor:
        dtype = compute_dtype(host, x)
        return host.low_rank(x, self.lora_A.to(dtype), (scale * self.lora_B).to(dtype))


@register("lora")
@dataclass(frozen=True, kw_only=True)
class LoRA(Method):
    suits = "the default: all linear layers, r 16"
    stacks = True

    rank: int | None = None
    """Rank r of the change. Default: 16, or the layer's smaller dimension where that is less."""
    alpha: float | None = None
    """α; the scale is α/r. Default: 2r, or r with rslora."""
    dropout: float = 0.0
    """Dropout on the input of the low-rank branch only, in training."""
    rslora: bool = False
    """Scale α/√r instead of α/r."""
    init: Literal["kaiming", "gaussian", "normal"] = "kaiming"
    """How A starts: kaiming U(±1/√in); gaussian N(0, 1/r); normal N(0, init_std). B starts at zero."""
    init_std: float = 0.02
    """Standard deviation of init: normal."""
    plus: float = 1.0
    """Learning rate of B over that of A (LoRA+, Hayou et al. 2024, arXiv 2402.12354; there 16)."""
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    """Other ranks for some modules: {name or regular expression at the end of the path: rank}; the first hit wins."""
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    """Other alphas, in the same way."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Train biases too: none, those of the adapted modules (lora_only), or all of the model's."""
    modules_to_save: tuple[str, ...] = ()
    """Names of modules trained in full and stored with the adapter, e.g. a new classifier."""

    def invalid(self) -> Sequence[str]:
        wrong = [
            f"{k}={v!r} must be a table {{module: number}}"
            for k, v in (("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern))
            if not isinstance(v, Mapping)
        ]
        if isinstance(self.modules_to_save, str):
            wrong.append(
                f"modules_to_save={self.modules_to_save!r} must be a list of names: [{self.modules_to_save!r}]"
            )
        if wrong:
            return wrong
        ranks = {"rank": self.rank, **{f"rank_pattern[{k!r}]": v for k, v in self.rank_pattern.items()}}
        alphas = {"alpha": self.alpha, **{f"alpha_pattern[{k!r}]": v for k, v in self.alpha_pattern.items()}}
        found = [
            f"{k}={v!r} is not a whole number of at least 1"
            for k, v in ranks.items()
            if v is not None and not (type(v) is int and v >= 1)
        ]
        found += [
            f"{k}={v!r} is not a positive number" for k, v in alphas.items() if v is not None and not _positive(v)
        ]
        for option, pattern in self._patterns():
            try:
                re.compile(pattern)
            except re.error as error:
                found.append(f"{option}: {pattern!r} is not a valid regular expression: {error}")
        if not isinstance(self.rslora, bool):
            found.append(f"rslora={self.rslora!r} is neither true nor false")
        if not isinstance(self.dropout, int | float) or isinstance(self.dropout, bool) or not 0.0 <= self.dropout < 1.0:
            found.append(f"dropout={self.dropout!r} is not in [0, 1)")
        if not _positive(self.plus):
            found.append(f"plus={self.plus!r} is not a positive number")
        if not _positive(self.init_std):
            found.append(f"init_std={self.init_std!r} is not a positive number")
        for option, known in (("init", ("kaiming", "gaussian", "normal")), ("bias", ("none", "all", "lora_only"))):
            if getattr(self, option) not in known:
                found.append(f"{option}={getattr(self, option)!r} is none of {', '.join(known)}")
        return found

    def unfit(self, spec: HostSpec) -> str | None:
        small, large = sorted((spec.shape[0], spec.fan_in))
        if self.rank is None or self.rank <= large:
            return None
        return f"rank {self.rank} is above both dimensions, {small} and {large}: at most {small} is of use"

    def unused(self, paths: Sequence[str]) -> Sequence[str]:
        names = [path.rpartition(".")[2] for path in paths]
        return [
            f"{option} {p!r} matches no adapted module{did_you_mean(p, names)}"
            for option, p in self._patterns()
            if not any(_hit(p, path) for path in paths)
        ]

    def _patterns(self) -> list[tuple[str, str]]:
        fields = {"rank_pattern": self.rank_pattern, "alpha_pattern": self.alpha_pattern}
        return [(option, pattern) for option, patterns in fields.items() for pattern in patterns]

    def companions(self, parameters: Owned, targets: Sequence[str]) -> Mapping[Site, Method]:
        return companions(self.bias, self.modules_to_save, parameters, targets)

    def at(self, path: str, spec: HostSpec) -> Self:
        rank = next((r for p, r in self.rank_pattern.items() if _hit(p, path)), self.rank) or min(
            16, spec.shape[0], spec.fan_in
        )
        alpha = next((a for p, a in self.alpha_pattern.items() if _hit(p, path)), self.alpha) or (
            rank if self.rslora else 2 * rank
        )
        return dataclasses.replace(
            self, rank=rank, alpha=float(alpha), rank_pattern={}, alpha_pattern={}, bias="none", modules_to_save=()
        )

    @property
    def scale(self) -> float:
        """s = α/r, or α/√r; of a method resolved by `at`."""
        assert self.rank is not None and self.alpha is not None, "resolve the method with at() first"
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def build(self, spec: HostSpec, shared: Any = None) -> Adapter:
        method = self.at("", spec)
        assert method.rank is not None
        return method.start(LoRAAdapter(spec, method.rank, method.scale, method.dropout), spec)

    def start(self, adapter: LoRAAdapter, spec: HostSpec) -> LoRAAdapter:
        """Draw the random factor from torch's global generator; the other stays zero."""
        assert self.rank is not None
        if spec.lookup:
            nn.init.normal_(adapter.lora_B)
        elif self.init == "kaiming":
            nn.init.uniform_(adapter.lora_A, -1 / math.sqrt(spec.fan_in), 1 / math.sqrt(spec.fan_in))
        else:
            nn.init.normal_(adapter.lora_A, std=1 / self.rank if self.init == "gaussian" else self.init_std)
        return adapter

    def rates(self) -> Mapping[str, float]:
        return {"lora_B": self.plus} if self.plus != 1.0 else {}

    def factors(self, tensors: Mapping[str, Tensor]) -> Factors | None:
        return Factors(tensors["lora_A"].float().flatten(1), tensors["lora_B"].float().flatten(1), self.scale)

    def combine(self, parts: Sequence[Part]) -> tuple[Method, dict[str, Tensor]]:
        """Σ wᵢsᵢBᵢAᵢ = [w₁s₁B₁ …]·[A₁; …]: rank Σrᵢ, scale 1. Adding the factors themselves would make cross terms."""
        if any(not isinstance(method, LoRA) or method.factors(tensors) is None for method, tensors, _ in parts):
            return super().combine(parts)
        scales = [w * method.scale for method, _, w in parts]  # type: ignore[attr-defined]
        a = torch.cat([tensors["lora_A"].float() for _, tensors, _ in parts])
        b = torch.cat([s * tensors["lora_B"].float() for s, (_, tensors, _) in zip(scales, parts, strict=True)], dim=1)
        most = min(b.shape[0], a[0].numel())
        if a.shape[0] > most:  # more rank than the weight has: the product itself is smaller, and exact as well
            product = b.flatten(1) @ a.flatten(1)  # [out, fan_in]
            a, b = (product, torch.eye(most)) if most == b.shape[0] else (torch.eye(most), product)
            a, b = a.view(most, *parts[0][1]["lora_A"].shape[1:]), b.view(-1, most, *parts[0][1]["lora_B"].shape[2:])
        return LoRA(rank=a.shape[0], alpha=float(a.shape[0])), {"lora_A": a, "lora_B": b}


def _hit(pattern: str, path: str) -> bool:
    """PEFT's rule: the pattern, as a regular expression, is the end of the path after a dot or the whole of it."""
    return re.match(rf"(.*\.)?({pattern})$", path) is not None


def _positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0
