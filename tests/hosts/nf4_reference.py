"""NF4 written out from the paper's definition, in plain torch: what bitsandbytes' kernels are held against.

The code book: quantiles of N(0, 1) at evenly spaced probabilities, 8 above zero and 7 below, and zero itself, divided by
the largest.  Dettmers et al. 2023, arXiv 2305.14314, §3; the offset is that of their code, ½((1 − 1/32) + (1 − 1/30)).
"""

from statistics import NormalDist

import torch
from torch import Tensor

OFFSET = 0.5 * ((1 - 1 / 32) + (1 - 1 / 30))


def code_book() -> Tensor:
    """The 16 values, ascending."""

    def quantiles(count: int) -> list[float]:
        step = (OFFSET - 0.5) / count
        return [NormalDist().inv_cdf(OFFSET - step * number) for number in range(count)]

    values = sorted([*quantiles(8), 0.0, *(-q for q in quantiles(7))])
    return torch.tensor(values, dtype=torch.float64) / values[-1]


def dynamic_map() -> Tensor:
    """256 values for the scales: in every decade 10⁻⁶ … 10⁰ twice as many as in the one below; both signs, 0 and 1."""
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1.0, 2**decade + 1, dtype=torch.float64)
        for middle in ((edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade - 6)).tolist():
            values += [middle, -middle]
    return torch.tensor(sorted(values), dtype=torch.float64)


def nearest(x: Tensor, codes: Tensor) -> Tensor:
    """Each value replaced by the nearest code."""
    return codes[torch.searchsorted((codes[1:] + codes[:-1]) / 2, x)]


def scales(w: Tensor, block: int = 64) -> Tensor:
    """The largest |w| of every block, [blocks]."""
    return w.double().reshape(-1, block).abs().amax(1)


def doubly(scale: Tensor, block: int = 256) -> Tensor:
    """Scales after their own 8-bit quantisation: less their mean, in blocks."""
    mean = scale.mean()
    blocks = (scale - mean).split(block)
    return torch.cat([nearest(part / part.abs().max(), dynamic_map()) * part.abs().max() for part in blocks]) + mean


def round_trip(w: Tensor, double: bool = False) -> Tensor:
    """decode(encode(w)), fp32."""
    scale = scales(w)
    codes = nearest(w.double().reshape(-1, 64) / scale.unsqueeze(1), code_book())
    return (codes * (doubly(scale) if double else scale).unsqueeze(1)).reshape(w.shape).float()
