"""The exact mix: ΔW = Σ wᵢ·ΔWᵢ as one adapter, by concatenating factors. Ranks, alphas and scalings are free.

    A = [A₁; A₂; …]     B = [w₁s₁B₁  w₂s₂B₂  …]     scale 1, rank Σrᵢ

Adding A's and B's themselves is something else: the cross terms B₁A₂ are as large as the wanted ones. To take one adapter
away from another is the weights 1 and −1.
"""

from collections.abc import Sequence

from deltaw.core.errors import UseError
from deltaw.core.state import AdapterState, combine
from deltaw.mixing.base import Weights
from deltaw.mixing.through import through


def exact(states: Sequence[AdapterState], weights: Sequence[float], base: Weights | None = None) -> AdapterState:
    """Σ weights[i] · states[i], equal to `use(model, {name: weight, …})` to rounding.

    Methods with factors (LoRA, AdaLoRA, VeRA, …) mix with each other, as plain LoRA. Those without (DoRA) are refused:
    `mixing.svd` takes them in a given rank. Trained copies mix where weights sum to 1, or with the model as `base`.
    """
    try:
        return combine(states, weights)
    except UseError as refused:
        try:
            return through(states, weights, base=base, head="these adapters cannot be mixed exactly")[0]
        except UseError as error:
            raise (error if base is not None else refused) from None
