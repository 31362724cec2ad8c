"""The exact mix: ΔW = Σ wᵢ·ΔWᵢ as one adapter, by concatenating factors. Ranks and alphas are free.

    A = [A₁; A₂; …]     B = [w₁s₁B₁  w₂s₂B₂  …]     scale 1, rank Σrᵢ

Adding A's and B's themselves is something else: the cross terms B₁A₂ are as large as the wanted ones.
"""

from collections.abc import Sequence

from deltaw.core.state import AdapterState, combine


def exact(states: Sequence[AdapterState], weights: Sequence[float]) -> AdapterState:
    """Σ weights[i] · states[i], equal to `use(model, {name: weight, …})` to rounding.

    Methods whose change is not a sum of factors (DoRA) are refused; trained copies mix where weights sum to 1.
    """
    return combine(states, weights)
