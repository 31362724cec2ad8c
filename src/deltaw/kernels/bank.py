"""Many adapters of one layer in one batch: each multiplies its own rows, all of them in two batched products.

    a [K, r, in], bt [K, r, out]     the factors of K adapters, fp32; smaller ranks end in zeros
    rows [K, n], weights [K, n]      the rows of adapter k in the batch, and strength · scale there; 0 where it has fewer
    y[rows] += weights · (x[rows] aᵀ) bt

No product has rows of one adapter and factors of another, so that what is not finite in one never reaches the other's rows.
"""

import torch
from torch import Tensor


def bank_rows(y: Tensor, x: Tensor, a: Tensor, bt: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    """y [B, …, out] with the changes of x [B, …, in] added."""
    mine = x[rows].flatten(1, -2)  # [K, n · T, in]
    if mine.shape[1] <= a.shape[1]:  # the smaller side is cast: few rows, or the factors
        mine = mine.to(a.dtype)
    else:
        a, bt = a.to(x.dtype), bt.to(x.dtype)
    out = torch.bmm(torch.bmm(mine, a.mT), bt).view(*rows.shape, *y.shape[1:])
    weights = weights.view(*rows.shape, *[1] * (y.ndim - 1))
    change = torch.where(
        weights != 0, weights.to(out.dtype) * out, 0.0
    )  # rows that are filled up add nothing, not 0 · NaN
    return y.index_add(0, rows.flatten(), change.flatten(0, 1).to(y.dtype))
