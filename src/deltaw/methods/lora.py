"""LoRA: W' = W + s·B·A, s = α/r (rsLoRA: α/√r).  Hu et al. 2021, arXiv 2106.09685; Kalajdzievski 2023, 2312.03732.

        x [T, in] ──────────── W [out, in], frozen ────────────┐
            └─ dropout ─ A [r, in] ─ [T, r] ─ B [out, r] ─ · s ─ + ─→ y [T, out]

Start: A ~ U(±1/√in) (kaiming-uniform with a = √5), B = 0, so that ΔW = 0 while B has a gradient. On embeddings the
other way round, as in the reference code: A [r, vocab] = 0, B [dim, r] ~ N(0, 1). Convolutions: A [r, in, *kernel],
B [out, r, *ones]. Experts: A [E, r, in], B [E, out, r], a pair for each. Trained tensors are fp32; the forward casts
these small ones to the activations' dtype, never x.

Other starts are in `methods.inits` and `methods.eva`. Those that take A₀, B₀ from W (PiSSA, OLoRA) publish W − sB₀A₀ + sBA.
Here W stays, A₀ and B₀ are kept, frozen:  ΔW = s(BA − B₀A₀) = s·[B − B₀, B₀]·[A; A − A₀], exactly zero at the start and
without the cancellation of two large products. Files hold these factors, a plain LoRA of rank 2r for any base and reader.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from deltaw.core.adapter import Adapter, Factors, WeightAdapter, compute_dtype
from deltaw.core.autocast import autocasts
from deltaw.core.host import HostSpec
from deltaw.core.method import Given, Method, Owned, Part, Site, register
from deltaw.kernels.lora import few, few_rows
from deltaw.methods import patterns
from deltaw.methods.eva import eva
from deltaw.methods.full import companions
from deltaw.methods.inits import STARTS, Start, loftq, split, within
from deltaw.methods.patterns import first_hit
from deltaw.methods.ranked import kaiming, positive, times, unfit_rank


class LoRAAdapter(WeightAdapter):
    thin = True

    def __init__(self, spec: HostSpec, rank: int, scale: float, dropout: float = 0.0):
        super().__init__()
        kernel, stack = spec.shape[2:], () if spec.stack is None else (spec.stack,)
        self.scale, self.dropout, self.inner = scale, dropout, len(stack) + 1
        self.lora_A = nn.Parameter(torch.zeros(*stack, rank, spec.shape[1], *kernel, dtype=torch.float32))
        self.lora_B = nn.Parameter(torch.zeros(*stack, spec.shape[0], rank, *[1] * len(kernel), dtype=torch.float32))

    def pair(self) -> tuple[Tensor, Tensor]:
        """The factors of the change in the layer's layout, A [r, in, *kernel] and B [out, r, *ones]."""
        return self.lora_A, self.lora_B

    def factors(self) -> Factors:
        a, b = self.pair()
        return Factors(a.flatten(self.inner), b.flatten(self.inner), self.scale)

    def merged(self, weight: Tensor) -> Tensor:
        a, b, scale = self.factors()
        return weight + scale * (b.to(weight.dtype) @ a.to(weight.dtype)).view(weight.shape)

    def branch(self, host: Any, x: Tensor) -> Tensor:
        return self.low_rank(host, self.dropped(x), self.scale)

    def weighted(self, host: Any, x: Tensor, strength: Tensor) -> Tensor:
        return self.low_rank(host, self.dropped(x), self.scale * strength)

    @property
    def movable(self) -> bool:
        linear = self.lora_A.ndim == 2 and not self.spec.lookup
        return type(self) is LoRAAdapter and linear and not (self.lora_A.requires_grad or self.lora_B.requires_grad)

    def move_into(self, a: Tensor, bt: Tensor) -> None:
        self.lora_A.data, self.lora_B.data = a.copy_(self.lora_A.data), bt.copy_(self.lora_B.data.T).T

    def low_rank(self, host: Any, x: Tensor, scale: float | Tensor) -> Tensor:
        (a, b), dtype = self.pair(), compute_dtype(host, x)
        if a.ndim == 2 and x.is_floating_point() and few(x, a) and not autocasts(x):
            return few_rows(x, a, b, scale)
        return host.low_rank(x, a.to(dtype), (scale * b).to(dtype))


class SplitLoRAAdapter(LoRAAdapter):
    """A LoRA that starts from factors of the weight itself."""

    thin = True

    lora_A0: Tensor
    lora_B0: Tensor

    def __init__(self, spec: HostSpec, rank: int, scale: float, dropout: float, start: Start):
        super().__init__(spec, rank, scale, dropout)
        self.start = start
        self.register_buffer("lora_A0", torch.zeros_like(self.lora_A))
        self.register_buffer("lora_B0", torch.zeros_like(self.lora_B))

    @torch.no_grad()
    def start_from(self, host: Any) -> None:
        a, b = self.start(host.weight.flatten(1).float(), len(self.lora_A), self.scale)  # [r, fan_in], [out, r]
        for tensor, value in ((self.lora_A, a), (self.lora_B, b), (self.lora_A0, a), (self.lora_B0, b)):
            tensor.copy_(value.view_as(tensor))

    def pair(self) -> tuple[Tensor, Tensor]:
        return split(self.lora_A, self.lora_B, self.lora_A0, self.lora_B0)


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
    init: Literal["kaiming", "gaussian", "normal", "pissa", "olora", "eva", "loftq"] = "kaiming"
    """How A starts, with B at zero: kaiming U(±1/√in); gaussian N(0, 1/r); normal N(0, init_std); eva: the main directions
    of the layer's inputs in the training data, with the ranks shared out by them. Or A and B from the weight: pissa, its
    largest singular values; olora, its QR decomposition; loftq, of a quantised base, what rounding took from it."""
    init_std: float = 0.02
    """Standard deviation of init: normal."""
    niter: int | None = None
    """Power iterations of a randomised SVD for init: pissa and loftq, much faster on large layers (paper: 4, 16). Default: exact."""
    rho: float = 2.0
    """With init: eva a layer gets at most this multiple of its rank."""
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
        found += [f"{k}={v!r} is not a positive number" for k, v in alphas.items() if v is not None and not positive(v)]
        found += [f"{option}: {said}" for option, pattern in self._patterns() if (said := patterns.invalid(pattern))]
        if not isinstance(self.rslora, bool):
            found.append(f"rslora={self.rslora!r} is neither true nor false")
        if not isinstance(self.dropout, int | float) or isinstance(self.dropout, bool) or not 0.0 <= self.dropout < 1.0:
            found.append(f"dropout={self.dropout!r} is not in [0, 1)")
        if not positive(self.plus):
            found.append(f"plus={self.plus!r} is not a positive number")
        if not positive(self.init_std):
            found.append(f"init_std={self.init_std!r} is not a positive number")
        if self.niter is not None and not (type(self.niter) is int and self.niter >= 0):
            found.append(f"niter={self.niter!r} is not a whole number of iterations")
        if not positive(self.rho) or self.rho < 1:
            found.append(f"rho={self.rho!r} is not a number of at least 1")
        for option, known in (
            ("init", ("kaiming", "gaussian", "normal", "eva", "loftq", *STARTS)),
            ("bias", ("none", "all", "lora_only")),
        ):
            if getattr(self, option) not in known:
                found.append(f"{option}={getattr(self, option)!r} is none of {', '.join(known)}")
        return found

    def unfit(self, spec: HostSpec) -> str | None:
        whole = self.init == "loftq" or self.init in STARTS
        if spec.stack is not None and (self.init == "eva" or whole):
            return f"init: {self.init} is for single weights, not for a stack of experts: choose another init"
        if self.init == "eva" and (spec.lookup or len(spec.shape) > 2):
            return "init: eva looks at a layer's input vectors, and this one reads ids or patches: choose another init"
        small = min(spec.shape[0], spec.fan_in)
        if whole and self.rank is not None and self.rank > small:
            return f"rank {self.rank} with init: {self.init} is more than the weight has: at most {small}"
        return None if self.rank is None else unfit_rank(self.rank, spec)

    def prepare(
        self, model: nn.Module, sites: Mapping[Site, tuple[Method, HostSpec]], given: Given
    ) -> Mapping[Site, tuple[Method, Mapping[str, Tensor]]]:
        ours = {site: (method, spec) for site, (method, spec) in sites.items() if isinstance(method, LoRA)}
        if self.init == "loftq":
            return {
                site: (m, loftq(model, site, given.weights, m.rank or 1, m.scale, m.niter))
                for site, (m, _) in ours.items()
            }
        if self.init != "eva" or not ours:
            return {}
        ranks = {site: method.rank or 1 for site, (method, _) in ours.items()}
        found = eva(model, ranks, given.batches, rho=self.rho)
        prepared: dict[Site, tuple[Method, Mapping[str, Tensor]]] = {}
        for site, a in found.items():
            method, rank = ours[site][0], len(a)
            alpha = method.scale * method._unit(rank)  # the scale stays what it was
            prepared[site] = dataclasses.replace(method, rank=rank, alpha=alpha), {"lora_A": a}
        return prepared

    @property
    def corrects(self) -> bool:
        return self.init == "loftq"

    def unused(self, paths: Sequence[str]) -> Sequence[str]:
        return patterns.unused(self._patterns(), paths)

    def _patterns(self) -> list[tuple[str, str]]:
        fields = {"rank_pattern": self.rank_pattern, "alpha_pattern": self.alpha_pattern}
        return [(option, pattern) for option, table in fields.items() for pattern in table]

    def companions(self, parameters: Owned, targets: Sequence[str]) -> Mapping[Site, Method]:
        return companions(self.bias, self.modules_to_save, parameters, targets)

    def at(self, path: str, spec: HostSpec) -> Self:
        rank = first_hit(self.rank_pattern, path) or self.rank or min(16, spec.shape[0], spec.fan_in)
        alpha = first_hit(self.alpha_pattern, path) or self.alpha
        alpha = alpha or (self._unit(rank) if self.init == "pissa" else rank if self.rslora else 2 * rank)
        return dataclasses.replace(
            self, rank=rank, alpha=float(alpha), rank_pattern={}, alpha_pattern={}, bias="none", modules_to_save=()
        )

    def _unit(self, rank: int) -> float:
        """The α that makes the scale 1."""
        return math.sqrt(rank) if self.rslora else rank

    @property
    def scale(self) -> float:
        """s = α/r, or α/√r; of a method resolved by `at`."""
        assert self.rank is not None and self.alpha is not None, "resolve the method with at() first"
        return self.alpha / self._unit(self.rank)

    def resolved(self, spec: HostSpec) -> Self:
        """Itself where `at` has been there."""
        done = self.rank is not None and self.alpha is not None and not (self.rank_pattern or self.alpha_pattern)
        return self if done else self.at("", spec)

    def build(self, spec: HostSpec) -> Adapter:
        method = self.resolved(spec)
        assert method.rank is not None
        if method.init in STARTS:
            start = functools.partial(STARTS[method.init], niter=method.niter)
            return SplitLoRAAdapter(spec, method.rank, method.scale, method.dropout, start)
        return method.start(LoRAAdapter(spec, method.rank, method.scale, method.dropout), spec)

    def start(self, adapter: LoRAAdapter, spec: HostSpec) -> LoRAAdapter:
        """Draw the random factor from torch's global generator; the other stays zero."""
        assert self.rank is not None
        if spec.lookup:
            nn.init.normal_(adapter.lora_B)
        elif self.init in ("kaiming", "eva", "loftq"):
            kaiming(adapter.lora_A, spec.fan_in)
        else:
            nn.init.normal_(adapter.lora_A, std=1 / self.rank if self.init == "gaussian" else self.init_std)
        return adapter

    def rates(self) -> Mapping[str, float]:
        return {"lora_B": self.plus} if self.plus != 1.0 else {}

    def finished(self, tensors: Mapping[str, Tensor]) -> tuple[Method, Mapping[str, Tensor]]:
        if "lora_A0" not in tensors:
            return self, tensors
        a, b = split(*(tensors[name].float() for name in ("lora_A", "lora_B", "lora_A0", "lora_B0")))
        a, b = within(a, b)
        rank = a.shape[0]
        plain = dataclasses.replace(self, rank=rank, alpha=self.scale * rank, rslora=False, init="kaiming", niter=None)
        return plain, {"lora_A": a, "lora_B": b}

    def factors(self, tensors: Mapping[str, Tensor]) -> Factors | None:
        plain = self.finished(tensors)[1]
        a, b = (plain[name].float().flatten(1) for name in ("lora_A", "lora_B"))
        return Factors(a, b, self.scale)

    def combine(self, parts: Sequence[Part]) -> tuple[Method, dict[str, Tensor]]:
        """Σ wᵢsᵢBᵢAᵢ = [w₁s₁B₁ …]·[A₁; …]: rank Σrᵢ, scale 1. Adding the factors themselves would make cross terms."""
        if any(not isinstance(method, LoRA) or method.factors(tensors) is None for method, tensors, _ in parts):
            return super().combine(parts)
        ends = [(*method.finished(tensors), w) for method, tensors, w in parts]
        wide = [times(w * m.scale, tensors["lora_B"].float()) for m, tensors, w in ends]  # type: ignore[attr-defined]
        a, b = within(torch.cat([tensors["lora_A"].float() for _, tensors, _ in ends]), torch.cat(wide, dim=1))
        return plain(a.shape[0], corrects=any(method.corrects for method, _, _ in parts)), {"lora_A": a, "lora_B": b}


def plain(rank: int, alpha: float | None = None, corrects: bool = False) -> LoRA:
    """A LoRA made of others, of scale 1 by default; init only says to which base it belongs (`Method.corrects`)."""
    return LoRA(rank=rank, alpha=float(alpha or rank), init="loftq" if corrects else "kaiming")
