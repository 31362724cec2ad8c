"""How large is the change? ‖ΔW‖_F per site, from the factors and without forming ΔW.

‖s·B·A‖² = s² · Σ (BᵀB) ∘ (A Aᵀ)          two r × r products
"""

from deltaw.core.adapter import Factors
from deltaw.core.method import Site
from deltaw.core.state import AdapterState


def norm(factors: Factors) -> float:
    """‖ΔW‖_F of one site; of a stack over all its weights."""
    a, b, scale = factors
    square = float(((b.double().mT @ b.double()) * (a.double() @ a.double().mT)).sum())
    return abs(scale) * max(square, 0.0) ** 0.5


def norms(state: AdapterState) -> dict[Site, float | None]:
    """‖ΔW‖_F of every site; None where the change depends on the base's weight (DoRA, trained copies)."""
    result: dict[Site, float | None] = {}
    for site in state.methods:
        factors = state.factors(site)
        result[site] = None if factors is None else norm(factors)
    return result


def does_nothing(state: AdapterState) -> bool:
    """Is the change zero at every site, as far as the files alone tell?"""
    return all(size == 0 for size in norms(state).values())
