"""Patch info mining: every token of an image looks up what a finer map shows of its own patch (arXiv 2403.18814, section 3).

    T = X + softmax(φ(X) φ(K)ᵀ / √d) φ(V)

    X   (n, d)      the tower's tokens: the queries, one to a patch
    K,V (n, m, c)   the finer map, cut into one window of m cells per patch: attention never leaves the window
    φ               LayerNorm and linear layer, one for each of the three, to the width d

The finer map is that of all stages of a convolutional tower, brought to the size of the first and joined by channels.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Mining(nn.Module):
    """`width`: of the tokens, d. `channels`: of the finer map, c."""

    def __init__(self, width: int, channels: int):
        super().__init__()
        self.query, self.key, self.value = (
            nn.Sequential(nn.LayerNorm(size), nn.Linear(size, width)) for size in (width, channels, channels)
        )

    def forward(self, tokens: Tensor, fine: Tensor) -> Tensor:
        """tokens (b, n, d), row by row over a square; fine (b, c, h, h) → (b, n, d)."""
        cells = windows(fine, math.isqrt(tokens.shape[1]))  # (b, n, m, c)
        query = self.query(tokens).unsqueeze(-2)  # (b, n, 1, d)
        scores = query @ self.key(cells).transpose(-1, -2) / math.sqrt(tokens.shape[-1])  # (b, n, 1, m)
        return tokens + (scores.softmax(-1) @ self.value(cells)).squeeze(-2)


def windows(fine: Tensor, side: int) -> Tensor:
    """(b, c, h, h) → (b, side², (h / side)², c): the cells of each patch of a square of `side` by `side`, row by row."""
    size = fine.shape[-1]
    if fine.shape[-2] != size or size % side:
        raise ValueError(f"a map of {fine.shape[-2]} x {size} cells cannot be cut into {side} x {side} windows")
    cut = fine.unflatten(-1, (side, -1)).unflatten(-3, (side, -1))  # (b, c, row, in row, column, in column)
    return cut.permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(1, 2)


def joined(stages: Sequence[Tensor]) -> Tensor:
    """Maps (b, c_i, h_i, h_i), the finest first → (b, Σ c_i, h_0, h_0)."""
    first, *others = stages
    size = first.shape[-2:]
    return torch.cat([first, *(F.interpolate(s, size=size, mode="bilinear", align_corners=False) for s in others)], 1)
