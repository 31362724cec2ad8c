"""AdaLoRA: W' = W + s·P Λ Q, s = α/r, whose Λ is pruned to a budget.  Zhang et al. 2023, arXiv 2303.10512.

    P = lora_B [out, r]     Λ = diag(lora_E), lora_E [r, 1]     Q = lora_A [r, fan_in]      (PEFT's names and shapes)

Start: Λ = 0, so that ΔW = 0; P, Q ~ N(0, 0.02²). r is the initial rank and the scale never changes; PEFT divides by
r + 1e-5 instead, a factor of 1 − 1e-5/r. Beside the loss: γ · mean over all P and Q of ‖PᵀP − I‖_F, ‖QQᵀ − I‖_F, not
squared, as in the authors' code and PEFT, for which the published γ were chosen (eq. 4 has squares and a sum).

After optimizer step t of T, gradients still there, for every number w of P, Λ, Q (eq. 8 to 11):
    I = |w·∂L/∂w|     Ī ← β₁Ī + (1 − β₁)I     Ū ← β₂Ū + (1 − β₂)|I − Ī|, Ī the new one     score(w) = Ī·Ū
    score of triplet i = score(λᵢ) + mean score(P[:, i]) + mean score(Q[i, :])
and where t is a multiple of Δ, λ = 0 for all but the b(t) highest of all modules together. They stay trainable and may
come back. With b₀ = Σ initial ranks and b_T = Σ target ranks:
    b(t) = b₀ up to t_i     b_T + (b₀ − b_T)·(1 − (t − t_i)/(T − t_f − t_i))³ in between     b_T in the last t_f steps
That is the form of both codes: eq. 14 subtracts t_f in the numerator too, which gives b(t_i) > b₀. In the last t_f steps
scores are frozen and Λ is masked after every step. Exactly b(t) are kept: the codes' threshold also drops its equals, and
fails where b(t) = b₀.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from deltaw.core.adapter import Adapter, Factors
from deltaw.core.errors import UseError
from deltaw.core.host import HostSpec
from deltaw.core.method import Method, register
from deltaw.methods.lora import LoRAAdapter
from deltaw.methods.ranked import number, unfit_rank


class AdaLoRAAdapter(LoRAAdapter):
    thin = True

    def __init__(self, spec: HostSpec, rank: int, scale: float, dropout: float = 0.0):
        super().__init__(HostSpec((spec.shape[0], spec.fan_in)), rank, scale, dropout)
        self.shape = spec.shape
        self.lora_E = nn.Parameter(torch.zeros(rank, 1, dtype=torch.float32))
        nn.init.normal_(self.lora_A, std=0.02)
        nn.init.normal_(self.lora_B, std=0.02)
        for name, parameter in list(self.named_parameters()):  # of training only: not part of the finished adapter
            for kind in ("mean", "spread"):  # Ī and Ū
                self.register_buffer(f"{kind}_{name}", torch.zeros_like(parameter), persistent=False)

    def pair(self) -> tuple[Tensor, Tensor]:
        b = self.lora_B * self.lora_E.T
        return self.lora_A.view(-1, *self.shape[1:]), b.view(*b.shape, *[1] * (len(self.shape) - 2))

    def observe(self, beta1: float, beta2: float) -> None:
        """Ī and Ū after one step, from the parameters as they are now and the gradients that moved them."""
        for name, parameter in self.named_parameters():
            mean, spread = self.get_buffer(f"mean_{name}"), self.get_buffer(f"spread_{name}")
            now = torch.zeros_like(mean) if parameter.grad is None else (parameter * parameter.grad).abs()
            mean.mul_(beta1).add_(now, alpha=1 - beta1)
            spread.mul_(beta2).add_((now - mean).abs(), alpha=1 - beta2)

    def scores(self) -> Tensor:
        """Of the triplets, [r]."""
        a, b, e = (
            self.get_buffer(f"mean_{name}") * self.get_buffer(f"spread_{name}")
            for name in ("lora_A", "lora_B", "lora_E")
        )
        return e.view(-1) + (a.mean(1) + b.mean(0))


@register("adalora")
@dataclass(frozen=True, kw_only=True)
class AdaLoRA(Method):
    suits = "a tight budget of parameters: finds the modules that need them"
    common = ("tinit", "tfinal", "delta_t", "beta1", "beta2", "orth")

    rank: int | None = None
    """Rank that every module starts with. Default: 1.5 × target_rank, 12, or the layer's smaller dimension if less."""
    target_rank: int | None = None
    """Rank that is left in the end, on average over the modules. Default: ⅔ of rank, so 8."""
    alpha: float | None = None
    """α; the scale is α/rank, of the initial rank, throughout. Default: 2 × rank."""
    dropout: float = 0.0
    """Dropout on the input of the low-rank branch only, in training."""
    tinit: int | float = 0.1
    """Steps before the first pruning; below 1: a share of all steps (in the paper's runs 0.09 to 0.15)."""
    tfinal: int | float = 0.5
    """Steps at the end with a fixed budget; below 1: a share of all steps (in the paper's runs 0.44 to 0.58)."""
    delta_t: int = 1
    """Steps from one pruning to the next."""
    beta1: float = 0.85
    """Smoothing of the importance."""
    beta2: float = 0.85
    """Smoothing of its uncertainty."""
    orth: float = 0.5
    """γ, weight of the orthogonality term in the loss; 0 leaves it out."""

    def invalid(self) -> Sequence[str]:
        whole = {"rank": self.rank, "target_rank": self.target_rank, "delta_t": self.delta_t}
        found = [
            f"{k}={v!r} is not a whole number of at least 1"
            for k, v in whole.items()
            if v is not None and not (type(v) is int and v >= 1)
        ]
        if not found and self.rank and self.target_rank and self.target_rank > self.rank:
            found.append(f"target_rank={self.target_rank} is above the initial rank={self.rank}: it only falls")
        if self.alpha is not None and not (number(self.alpha) and self.alpha > 0):
            found.append(f"alpha={self.alpha!r} is not a positive number")
        if not (number(self.dropout) and 0 <= self.dropout < 1):
            found.append(f"dropout={self.dropout!r} is not in [0, 1)")
        parts = {"tinit": self.tinit, "tfinal": self.tfinal}
        wrong = [k for k, v in parts.items() if not (number(v) and (0 <= v < 1 or (v >= 1 and v == int(v))))]
        found += [f"{k}={parts[k]!r} is neither a whole number of steps nor a share of them in [0, 1)" for k in wrong]
        if not wrong and self.tinit < 1 and self.tfinal < 1 and self.tinit + self.tfinal >= 1:
            found.append(f"tinit={self.tinit} and tfinal={self.tfinal} leave no steps to prune in: together below 1")
        betas = {"beta1": self.beta1, "beta2": self.beta2}
        found += [f"{k}={v!r} is not in (0, 1)" for k, v in betas.items() if not (number(v) and 0 < v < 1)]
        if not (number(self.orth) and self.orth >= 0):
            found.append(f"orth={self.orth!r} is not a number of at least 0")
        return found

    def unfit(self, spec: HostSpec) -> str | None:
        ranks = [rank for rank in (self.rank, self.target_rank) if rank is not None]
        return unfit_rank(max(ranks), spec) if ranks else None

    def at(self, path: str, spec: HostSpec) -> Self:
        wanted = 12 if self.target_rank is None else -(-3 * self.target_rank // 2)
        rank = self.rank or max(self.target_rank or 1, min(wanted, spec.shape[0], spec.fan_in))
        target = self.target_rank or max(1, 2 * rank // 3)
        return dataclasses.replace(self, rank=rank, target_rank=target, alpha=float(self.alpha or 2 * rank))

    @property
    def scale(self) -> float:
        """s = α/r; of a method resolved by `at`."""
        assert self.rank is not None and self.alpha is not None, "resolve the method with at() first"
        return self.alpha / self.rank

    def build(self, spec: HostSpec) -> Adapter:
        method = self.at("", spec)
        assert method.rank is not None
        return AdaLoRAAdapter(spec, method.rank, method.scale, method.dropout)

    def factors(self, tensors: Mapping[str, Tensor]) -> Factors:
        a, b, e = (tensors[name].float() for name in ("lora_A", "lora_B", "lora_E"))
        return Factors(a, b * e.T, self.scale)

    def penalty(self, adapters: Sequence[Adapter]) -> Tensor | None:
        if not self.orth:
            return None
        grams = [g for adapter in adapters for q in (adapter.lora_A, adapter.lora_B.T) for g in [q @ q.T]]  # type: ignore[operator]
        off = [(gram - torch.eye(len(gram), device=gram.device)).norm().to(grams[0].device) for gram in grams]
        return self.orth * torch.stack(off).mean()

    def phases(self, total: int) -> tuple[int, int]:
        """The steps before the first pruning, and the step from which on the budget is fixed."""
        start, end = (int(t if t >= 1 else t * total) for t in (self.tinit, self.tfinal))
        if start + end >= total:
            raise UseError(f"adalora: tinit={start} and tfinal={end} leave no steps of {total} to prune in: lower them")
        return start, total - end

    def budget(self, step: int, total: int, first: int, last: int) -> tuple[int, bool]:
        """b(t) between `first` = b₀ and `last` = b_T, and whether Λ is pruned after this step."""
        start, fixed = self.phases(total)
        if step <= start:
            return first, False
        if step >= fixed:
            return last, True
        return int(last + (first - last) * (1 - (step - start) / (fixed - start)) ** 3), step % self.delta_t == 0

    def settled(self, step: int, total: int) -> bool:
        return step >= self.phases(total)[1]

    @torch.no_grad()
    def after_step(self, adapters: Sequence[Adapter], step: int, total: int) -> None:
        ours = [adapter for adapter in adapters if isinstance(adapter, AdaLoRAAdapter)]
        first, last = (sum(getattr(adapter.method, f) for adapter in ours) for f in ("rank", "target_rank"))
        budget, prunes = self.budget(step, total, first, last)
        if step < self.phases(total)[1]:
            for adapter in ours:
                adapter.observe(self.beta1, self.beta2)
        if not prunes:
            return
        scores = torch.cat([adapter.scores().cpu() for adapter in ours])
        gone = torch.zeros(len(scores), dtype=torch.bool)
        gone[scores.argsort(stable=True)[: first - budget]] = True
        for adapter, mask in zip(ours, gone.split([len(adapter.lora_E) for adapter in ours]), strict=True):
            adapter.lora_E[mask.to(adapter.lora_E.device)] = 0.0
