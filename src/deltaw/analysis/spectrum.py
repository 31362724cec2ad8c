"""The spectrum of a change: how many directions it really uses, and how unevenly.

ΔW = UΣVᵀ
effective rank   exp(−Σ pᵢ ln pᵢ), pᵢ = σᵢ/Σσ            Roy & Vetterli 2007: 1 … number of directions
stable rank      ‖ΔW‖²_F / σ₁²                           ≤ effective number of directions as large as the first
energy           Σ_{i≤k} σᵢ² / Σ σᵢ²                     what a cut at rank k keeps of ‖ΔW‖²
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deltaw.core.adapter import Factors
from deltaw.core.change import Singular, decomposed, singular_values
from deltaw.core.method import Site
from deltaw.core.state import AdapterState

ROUNDING = 1e-6
"""Singular values below this share of the largest are rounding of fp32, not directions."""


@dataclass(frozen=True)
class Spectrum:
    """Singular values of one ΔW, descending; of a change that is zero they are zeros and every rank is 0."""

    values: tuple[float, ...]

    @property
    def norm(self) -> float:
        """‖ΔW‖_F."""
        return math.hypot(*self.values)

    @property
    def full_rank(self) -> int:
        """Number of singular values above rounding: the rank of ΔW."""
        return sum(value > ROUNDING * self.values[0] for value in self.values)

    @property
    def effective_rank(self) -> float:
        total = sum(self.values)
        shares = [value / total for value in self.values if value > 0]
        return math.exp(-sum(p * math.log(p) for p in shares)) if shares else 0.0

    @property
    def stable_rank(self) -> float:
        return sum((value / self.values[0]) ** 2 for value in self.values) if any(self.values) else 0.0

    @property
    def energy(self) -> tuple[float, ...]:
        """Share of ‖ΔW‖² in the first k directions, k = 1, 2, …; empty for a zero change."""
        squares = list(itertools.accumulate(value**2 for value in self.values))
        return tuple(square / squares[-1] for square in squares) if any(self.values) else ()

    def rank(self, share: float) -> int:
        """The least rank that keeps this share of the energy (0.9, 0.99)."""
        return next((k for k, kept in enumerate(self.energy, 1) if kept >= share - 1e-12), 0)


def of_values(values: Tensor) -> tuple[Spectrum, ...]:
    """values: [k], or [E, k] of a stack, which gives one spectrum for each of its weights."""
    rows: list[list[float]] = values.double().reshape(-1, values.shape[-1]).tolist()
    return tuple(Spectrum(tuple(row)) for row in rows)


def of_dense(change: Tensor) -> tuple[Spectrum, ...]:
    """Of ΔW itself, [out, in, *kernel]: a dense decomposition, seconds at 2048 × 2048 and minutes above."""
    return of_values(torch.linalg.svdvals(change.flatten(1)))


def of_factors(factors: Factors) -> tuple[Spectrum, ...]:
    """Of s·B·A from its factors, in fp64: two triangular factors of r columns, never [out, in]."""
    return of_values(singular_values(_wide(factors)))


def directions(state: AdapterState, site: Site) -> Singular | None:
    """ΔW's singular value decomposition from its factors, in fp64; None where it has none.

    u [out, r], s [r], vt [r, fan_in]; of a stack with E in front.
    """
    factors = state.factors(site)
    return None if factors is None else decomposed(_wide(factors))


def spectra(state: AdapterState) -> dict[Site, tuple[Spectrum, ...] | None]:
    """Of every site: one spectrum, or as many as a stack has weights; None where ΔW has no factors."""
    found = {site: state.factors(site) for site in state.methods}
    return {site: None if factors is None else of_factors(factors) for site, factors in found.items()}


def _wide(factors: Factors) -> Factors:
    return factors._replace(a=factors.a.double(), b=factors.b.double())


def mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)
