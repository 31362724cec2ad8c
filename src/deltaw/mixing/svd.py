"""A weighted sum of changes in a given rank: its best approximation, from the factors alone and never as a matrix d × d.

Σ wᵢΔWᵢ = BA exactly (`mixing.exact`), B = QR, Aᵀ = PT   →   SVD of RTᵀ [Σrᵢ, Σrᵢ], cut at the rank
"""

from collections.abc import Sequence

from deltaw.core.state import AdapterState
from deltaw.mixing.convert import Conversion, to_lora
from deltaw.mixing.exact import exact


def svd(states: Sequence[AdapterState], weights: Sequence[float], rank: int) -> tuple[AdapterState, Conversion]:
    """One plain LoRA of at most this rank, and what the cut cost: by site ‖Σ wᵢΔWᵢ − ΔW‖ / ‖Σ wᵢΔWᵢ‖.

    Sites where the sum has no more ranks stay exact. Raises UseError as `exact` does, and for a rank that is none.
    """
    return to_lora(exact(states, weights), rank=rank)
