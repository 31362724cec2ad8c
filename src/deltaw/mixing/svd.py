"""A weighted sum of changes in a given rank: its best approximation, from the factors alone and never as a matrix d × d.

    Σ wᵢΔWᵢ = BA exactly (`mixing.exact`), B = QR, Aᵀ = PT   →   SVD of RTᵀ [Σrᵢ, Σrᵢ], cut at the rank (`mixing.cut`)

Where a part has no factors (DoRA, OFT, LoHa of a large rank, …) the sum of that site is formed and cut as a matrix.
"""

from collections.abc import Sequence

from deltaw.core.errors import UseError
from deltaw.core.state import AdapterState
from deltaw.mixing.base import Weights
from deltaw.mixing.through import Conversion, Rank, Track, through


def svd(
    states: Sequence[AdapterState],
    weights: Sequence[float],
    rank: Rank = None,
    *,
    energy: float | None = None,
    base: Weights | None = None,
    track: Track = iter,
) -> tuple[AdapterState, Conversion]:
    """One plain LoRA, and what the cut cost: by site ‖Σ wᵢΔWᵢ − ΔW‖ / ‖Σ wᵢΔWᵢ‖, the root of the discarded energy.

    rank: at most this one, "full" for all there is. energy: by site the smallest rank that keeps this share of
    ‖Σ wᵢΔWᵢ‖²; with a rank, no more than that. base: the model, or path → weight, where a change depends on it.
    Sites where the sum has no more ranks stay exact. Raises UseError as `exact` does, and for a rank that is none.
    """
    if rank is None and energy is None:
        raise UseError("give the rank to cut the sum at, or the share of energy to keep; mixing.exact cuts nothing")
    return through(states, weights, rank=rank, energy=energy, base=base, track=track)
