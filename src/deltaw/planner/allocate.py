"""Gradient spectra → a rank for every module under a budget of parameters, by energy per parameter.

A change of rank k of one weight can follow at most the energy Σ_{i ≤ k} σᵢ² of its gradient G. Each further rank costs
out + in parameters and brings σᵢ² more. Since σ falls, taking what brings most per parameter first is the best there is
up to the last rank that does not fit. Every module keeps rank 1, so that no target disappears.
"""

import heapq
from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Spectrum(NamedTuple):
    """Of the gradient of one weight: its shape, and the energies σᵢ² of its largest singular values, falling."""

    out: int
    into: int
    energies: Sequence[float]
    total: float
    """Σσᵢ² over all of them."""

    def captured(self, rank: int) -> float:
        """Share of the energy in the first `rank` directions."""
        return sum(self.energies[:rank]) / self.total if self.total else 0.0


def allocate(spectra: Mapping[str, Spectrum], budget: int, most: int) -> dict[str, int]:
    """path → rank, between 1 and `most`, with at most `budget` parameters in all."""
    ranks = dict.fromkeys(spectra, 1)
    left = budget - sum(s.out + s.into for s in spectra.values())
    waiting = [gain for path, s in spectra.items() if (gain := _next(path, s, 1, most))]
    heapq.heapify(waiting)
    while waiting:
        _, path = heapq.heappop(waiting)
        spectrum = spectra[path]
        cost = spectrum.out + spectrum.into
        if cost > left:
            continue  # a smaller layer may still fit
        ranks[path] += 1
        left -= cost
        if gain := _next(path, spectrum, ranks[path], most):
            heapq.heappush(waiting, gain)
    return ranks


def _next(path: str, spectrum: Spectrum, rank: int, most: int) -> tuple[float, str] | None:
    """What one more rank of a module brings per parameter, negative for the heap; None at its end."""
    if rank >= min(most, len(spectrum.energies)) or not spectrum.energies[rank]:
        return None
    return -spectrum.energies[rank] / (spectrum.out + spectrum.into), path


def parameters(spectra: Mapping[str, Spectrum], ranks: Mapping[str, int]) -> int:
    return sum(rank * (spectra[path].out + spectra[path].into) for path, rank in ranks.items())


def captured(spectra: Mapping[str, Spectrum], ranks: Mapping[str, int]) -> float:
    """Share of the energy of all gradients that these ranks can follow."""
    total = sum(s.total for s in spectra.values())
    return sum(sum(spectra[path].energies[:rank]) for path, rank in ranks.items()) / total if total else 0.0
