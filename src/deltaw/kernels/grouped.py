"""Rows of a batch through the low-rank changes of different adapters: two batched products.

    x[rows] [K, n · T, in] → · aᵀ [K, n · T, r] → · weights → · bt [K, n · T, out] → added to y[rows], in place

rows [K, n] are those of adapter k, weights [K, n] fp32; a weight of 0 fills up a place where it has fewer, and adds nothing.
"""

import torch
from torch import Tensor

from deltaw.kernels import twins


def grouped(
    y: Tensor, x: Tensor, a: Tensor, bt: Tensor, rows: Tensor, weights: Tensor, weight: float | None, ordered: bool
) -> Tensor:
    """y [B, …, out] with the changes of x [B, …, in] added, in place. a [K, r, in], bt [K, r, out] in fp32.

    weight: that of all of them, where no place is filled up and they are one number. ordered: rows are 0 … B − 1.
    """
    if ordered and y.is_contiguous() and _twin(x, a):
        return twins.grouped(y.view(len(x), -1, y.shape[-1]), x, a, bt, weights).view(y.shape)
    mine = (x if ordered else x[rows]).reshape(len(rows), -1, x.shape[-1])  # [K, n · T, in]
    # the smaller side is cast: few rows, or the factors
    if mine.shape[1] <= a.shape[1] and x.dtype.itemsize < a.dtype.itemsize:
        mine = mine.to(a.dtype)
    else:
        a, bt = a.to(x.dtype), bt.to(x.dtype)
    h = torch.bmm(mine, a.mT)  # [K, n · T, r]
    if weight is None:
        h = (h.view(*rows.shape, -1) * weights[..., None]).to(bt.dtype).view(h.shape)
    out, alpha = torch.bmm(h, bt), 1.0 if weight is None else weight
    if ordered:  # every place is a row
        return y.add_(out.view(y.shape), alpha=alpha)
    out = out.view(*rows.shape, *y.shape[1:])
    if weight is None:  # 0 · NaN is not nothing
        out = torch.where(weights.view(*rows.shape, *[1] * (y.ndim - 1)) != 0, out, 0.0)
    return y.index_add_(0, rows.flatten(), out.flatten(0, 1).to(y.dtype), alpha=alpha)


def _twin(x: Tensor, a: Tensor) -> bool:
    """Few rows through fp32 factors, where nothing but reading them counts."""
    if not twins.usable(x) or a.dtype != torch.float32 or x.shape[:-1].numel() > len(a) * a.shape[1]:
        return False

    def pair() -> tuple[Tensor, Tensor]:
        y, one = twins.sample((4, 3, 33), 0, x), twins.sample((4, 3, 40), 1, x)
        first, second = twins.sample((2, 5, 40), 2, x, a.dtype), twins.sample((2, 5, 33), 3, x, a.dtype)
        weights = twins.sample((2, 2), 4, x, a.dtype)
        h = torch.einsum("knti,kri->kntr", one.view(2, 2, 3, 40).to(a.dtype), first) * weights[..., None, None]
        plain = y + torch.einsum("kntr,kro->knto", h, second).reshape(y.shape).to(y.dtype)
        return twins.grouped(y, one, first, second, weights), plain

    return twins.trusted(("grouped", x.device, x.dtype), pair)
