"""DARE: drop and rescale.  Yu et al. 2024, arXiv 2311.03099, on ΔW itself.

    δᵢ = ΔWᵢ ⊙ mᵢ / density,   mᵢ ~ Bernoulli(density), the paper's p = 1 − density; its expectation is ΔWᵢ
    ΔW = Σ wᵢδᵢ                or, with elect, TIES' election and mean on the wᵢδᵢ (DARE-TIES)

The masks come from the seed, the module's path and the place of the part: a module has the same one whatever else is
mixed. Dropping multiplies ‖ΔWᵢ‖² by 1/density, all of it noise of full rank: a cut to a low rank takes most of that noise
out again, and with it the error that is reported is large. To keep the mix as the paper has it, keep the full rank.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from deltaw.core.errors import UseError
from deltaw.core.method import Site
from deltaw.core.state import AdapterState
from deltaw.mixing.base import Weights
from deltaw.mixing.through import Conversion, Rank, Track, through
from deltaw.mixing.ties import check_density, elected


def dare(
    states: Sequence[AdapterState],
    weights: Sequence[float],
    density: float,
    *,
    seed: int = 0,
    elect: bool = False,
    rank: Rank = "full",
    energy: float | None = None,
    base: Weights | None = None,
    track: Track = iter,
) -> tuple[AdapterState, Conversion]:
    """The DARE mix as plain LoRA, and what a cut cost by site; arguments and memory as of `ties`. UseError."""
    check_density(density)
    if type(seed) is not int:
        raise UseError(f"seed={seed!r} is not a whole number")

    def merge(site: Site, changes: Sequence[Tensor]) -> Tensor:
        sparse = [dropped(change, density, f"{seed} {site} {number}") for number, change in enumerate(changes)]
        return elected(sparse) if elect else sum(sparse[1:], start=sparse[0])

    rank = None if energy is not None and rank == "full" else rank
    return through(states, weights, rank=rank, energy=energy, base=base, merge=merge, track=track)


def dropped(change: Tensor, density: float, name: str) -> Tensor:
    """The change with a share of 1 − density of its numbers set to zero, the others divided by the density."""
    number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") >> 1
    mask = torch.rand(change.shape, generator=torch.Generator().manual_seed(number)) < density
    return torch.where(mask, change / density, 0.0)
