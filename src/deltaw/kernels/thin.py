"""The three products of a low-rank change on a CUDA device, in Triton: each passes once over the large tensor.

    down    h = s · D(x) wᵀ      x [T, n], w [r, n] → [T, r]          forward: w = A            backward: x = g, w = Bᵀ
    add     y += D(s · h w)      y [T, n], h [T, r], w [r, n]         forward: w = Bᵀ           backward: y = dx, w = A
    outer   c = s · qᵀ D(x)      q [T, r], x [T, n] → [r, n] fp32     dA: q = g(sB)             dB: its transpose, x = g

Masters of A and B are read in fp32 and cast where they are used, scales are folded in, and dropout's mask is made on the way
from its seed, so that none of these costs a pass of its own. The mask of an element is a function of its place and the seed:

    m = murmur(lowbias(place ⊕ low bits of the seed) + high bits)     kept where m / 2¹⁶ ≥ share · 2¹⁶

`mask` writes the same mask out, for whatever is not computed here. The plain twins are the lines of `kernels.lora` and
`hashed` below. A kernel is used where it gave what they give (`kernels.twins.trusted`).
Finalisers: C. Wellons, "Prospecting for hash functions" (2018), lowbias32; A. Appleby, MurmurHash3.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from deltaw.kernels import twins

tl: Any = None  # triton.language, once a kernel is compiled
STEPS = 1 << 16
HIGHEST_RANK = 128
PROGRAMS = 512  # that `outer` is spread over, some for each multiprocessor
TILES = {"down": (32, 256, 4, 5), "add": (64, 128, 4, 2), "outer": (32, 128, 4, 3)}
"""Rows and columns of a tile, warps, stages: the fastest on an H200 for r 16 in 16 bits (`python -m benchmarks thin --tune`)."""
FEWEST_ROWS = 512  # below it a call costs its launches, whoever makes them
HELPERS = ("_kept",)


def _kept(place, low, high, dropped):  # type: ignore[no-untyped-def]
    m = place.to(tl.uint32) ^ low.to(tl.uint32)
    m = (m ^ (m >> 16)) * 0x7FEB352D
    m = (m ^ (m >> 15)) * 0x846CA68B
    m = (m ^ (m >> 16)) + high.to(tl.uint32)
    m = (m ^ (m >> 16)) * 0x85EBCA6B
    m = (m ^ (m >> 13)) * 0xC2B2AE35
    return ((m ^ (m >> 16)) >> 16) >= dropped.to(tl.uint32)


def _mask(made, n, low, high, dropped, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    tl.store(made + i, tl.where(_kept(i, low, high, dropped), 1.0, 0.0).to(made.dtype.element_ty), mask=i < n)


def _down(x, w, h, rows, n, ranks, by_rank, by_column, scale, low, high, dropped,
          DROP: tl.constexpr, R: tl.constexpr, T: tl.constexpr, N: tl.constexpr):  # type: ignore[no-untyped-def]  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * T + tl.arange(0, T)
    r, total = tl.arange(0, R), tl.zeros([T, R], dtype=tl.float32)
    for start in range(0, n, N):
        i = start + tl.arange(0, N)
        place = t[:, None] * n + i[None, :]
        tile = tl.load(x + place, mask=(t[:, None] < rows) & (i[None, :] < n), other=0.0)
        if DROP:
            tile = tl.where(_kept(place, low, high, dropped), tile, 0.0).to(x.dtype.element_ty)
        there = (i[:, None] < n) & (r[None, :] < ranks)
        part = tl.load(w + r[None, :] * by_rank + i[:, None] * by_column, mask=there, other=0.0).to(tl.float32)
        total = tl.dot(tile, (part * scale).to(x.dtype.element_ty), total, input_precision="ieee")
    there = (t[:, None] < rows) & (r[None, :] < ranks)
    tl.store(h + t[:, None] * ranks + r[None, :], total.to(h.dtype.element_ty), mask=there)


def _add(y, h, w, rows, n, ranks, by_rank, by_column, scale, low, high, dropped,
         DROP: tl.constexpr, R: tl.constexpr, T: tl.constexpr, N: tl.constexpr):  # type: ignore[no-untyped-def]  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * T + tl.arange(0, T)
    i, r = tl.program_id(1) * N + tl.arange(0, N), tl.arange(0, R)
    there = (t[:, None] < rows) & (r[None, :] < ranks)
    left = tl.load(h + t[:, None] * ranks + r[None, :], mask=there, other=0.0)
    there = (r[:, None] < ranks) & (i[None, :] < n)
    right = tl.load(w + r[:, None] * by_rank + i[None, :] * by_column, mask=there, other=0.0).to(tl.float32)
    change = tl.dot(left, (right * scale).to(y.dtype.element_ty), input_precision="ieee")
    place, there = t[:, None] * n + i[None, :], (t[:, None] < rows) & (i[None, :] < n)
    if DROP:
        change = tl.where(_kept(place, low, high, dropped), change, 0.0)
    before = tl.load(y + place, mask=there, other=0.0).to(tl.float32)
    tl.store(y + place, (before + change).to(y.dtype.element_ty), mask=there)


def _outer(q, x, c, rows, n, ranks, by_rank, by_column, each, scale, low, high, dropped,
           DROP: tl.constexpr, R: tl.constexpr, T: tl.constexpr, N: tl.constexpr):  # type: ignore[no-untyped-def]  # fmt: skip
    i, r = tl.program_id(0) * N + tl.arange(0, N), tl.arange(0, R)
    first, total = tl.program_id(1).to(tl.int64) * each, tl.zeros([R, N], dtype=tl.float32)
    for start in range(0, each, T):
        t = first + start + tl.arange(0, T)
        inside = t[:, None] < rows
        left = tl.load(q + t[:, None] * ranks + r[None, :], mask=inside & (r[None, :] < ranks), other=0.0)
        place = t[:, None] * n + i[None, :]
        tile = tl.load(x + place, mask=inside & (i[None, :] < n), other=0.0)
        if DROP:
            tile = tl.where(_kept(place, low, high, dropped), tile, 0.0).to(x.dtype.element_ty)
        total = tl.dot(tl.trans(left), tile, total, input_precision="ieee")
    there = (r[:, None] < ranks) & (i[None, :] < n)
    part = c + tl.program_id(1).to(tl.int64) * ranks * n
    tl.store(part + r[:, None] * by_rank + i[None, :] * by_column, total * scale, mask=there)


Drawn = tuple[int, int, int]
"""Of a mask: low and high bits of its seed, share · 2¹⁶."""
NONE: Drawn = (0, 0, 0)


def drawn(seed: Tensor, dropped: int) -> Drawn:
    number = int(seed)
    return number & 0x7FFFFFFF, number >> 31 & 0x7FFFFFFF, dropped


def mask(like: Tensor, seed: Tensor, dropped: int) -> Tensor:
    """0 and 1, of the shape and dtype of `like`. dropped: share · 2¹⁶."""
    made = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    grid = (-(-made.numel() // twins.BLOCK),)
    twins.compiled(_mask)[grid](made, made.numel(), *drawn(seed, dropped), twins.BLOCK)
    return made


def hashed(like: Tensor, seed: Tensor, dropped: int) -> Tensor:
    """`mask` in torch's operators: its plain twin."""
    low, high, _ = drawn(seed, dropped)
    m = torch.arange(like.numel(), device=like.device) ^ low
    for add, shift, factor in ((0, 16, 0x7FEB352D), (0, 15, 0x846CA68B), (high, 16, 0x85EBCA6B), (0, 13, 0xC2B2AE35)):
        if add:
            m = ((m ^ (m >> 16)) + add) & 0xFFFFFFFF
        m = ((m ^ (m >> shift)) * factor) & 0xFFFFFFFF
    return (((m ^ (m >> 16)) >> 16) >= dropped).to(like.dtype).view(like.shape)


def down(x: Tensor, w: Tensor, scale: float = 1.0, by: Drawn = NONE) -> Tensor:
    """x [T, n] contiguous, w [r, n] in fp32 with any strides → [T, r] in x's dtype."""
    (rows, n), ranks = x.shape, len(w)
    h = torch.empty(rows, ranks, dtype=x.dtype, device=x.device)
    _run(_down, "down", lambda t, _: (-(-rows // t),), (x, w, h, rows, n, ranks, *w.stride()), scale, by)
    return h


def add(y: Tensor, h: Tensor, w: Tensor, scale: float = 1.0, by: Drawn = NONE) -> Tensor:
    """In place: y [T, n] and h [T, r] contiguous, w [r, n] in fp32 with any strides."""
    (rows, n), ranks = y.shape, len(w)
    _run(_add, "add", lambda t, c: (-(-rows // t), -(-n // c)), (y, h, w, rows, n, ranks, *w.stride()), scale, by)
    return y


def outer(q: Tensor, x: Tensor, scale: float = 1.0, by: Drawn = NONE, turned: bool = False) -> Tensor:
    """q [T, r] and x [T, n] contiguous → [r, n] in fp32, or [n, r] where it is turned. Sums in an order of its own."""
    (rows, n), ranks = x.shape, q.shape[1]
    t, columns, *_ = _tile("outer", ranks, x)
    blocks = -(-n // columns)
    each = -(-rows // max(1, min(rows // 256, PROGRAMS // blocks)) // t) * t  # rows that one program sums over
    parts = -(-rows // each)
    c = torch.empty((parts, n, ranks) if turned else (parts, ranks, n), dtype=torch.float32, device=x.device)
    strides = (1, ranks) if turned else (n, 1)
    _run(_outer, "outer", lambda *_: (blocks, parts), (q, x, c, rows, n, ranks, *strides, each), scale, by)
    return c[0] if parts == 1 else c.sum(0)


def _run(
    kernel: Any, name: str, grid: Callable[[int, int], tuple[int, ...]], given: tuple[Any, ...], scale: float, by: Drawn
) -> None:
    """given: what the kernel takes before its scale; the number of ranks is the sixth."""
    t, columns, warps, stages = _tile(name, given[5], given[0])
    constants = by[2] > 0, _power(given[5]), t, columns
    twins.compiled(kernel)[grid(t, columns)](*given, scale, *by, *constants, num_warps=warps, num_stages=stages)


def _tile(name: str, ranks: int, x: Tensor) -> tuple[int, int, int, int]:
    """Fewer columns where the ranks or the values are wider, so that all stages fit into a multiprocessor's memory."""
    t, columns, warps, stages = TILES[name]
    wider = _power(ranks) // 16 * max(1, x.element_size() // 2)
    return t, max(32, columns // wider), warps, stages if wider == 1 else min(stages, 3)


def _power(ranks: int) -> int:
    return max(16, 1 << (ranks - 1).bit_length())


def usable(x: Tensor, a: Tensor, b: Tensor, scale: float | Tensor) -> bool:
    """Do these make the products of a layer with dropout on x [.., n], masters a and b?

    With it they are 1.5 to 5 times as fast on an H200 as torch's operators and a mask; without it those are as fast, and cost
    the processor less to call (docs/costs.md).
    """
    fits = not isinstance(scale, Tensor) and len(a) <= HIGHEST_RANK and x.shape[:-1].numel() >= FEWEST_ROWS
    return fits and a.dtype == b.dtype == torch.float32 and twins.usable(x) and _trusted(x, _power(len(a)))


def draws(x: Tensor) -> bool:
    """Does `mask` draw here? The same answer for tensors of one device and dtype: a backward pass draws as its forward did."""

    def pair() -> tuple[Tensor, Tensor]:
        seed, like = torch.tensor(1 << 40 | 12345, dtype=torch.int64), twins.sample((7, 333), 0, x)
        return mask(like, seed, STEPS // 3), hashed(like, seed, STEPS // 3)

    return twins.usable(x) and twins.trusted(("mask", x.device, x.dtype), pair)


def _trusted(x: Tensor, power: int) -> bool:
    def pair() -> tuple[list[Tensor], list[Tensor]]:
        ranks, one = power - 3, twins.sample((70, 205), 0, x)
        y, h = twins.sample((70, 205), 1, x), twins.sample((70, ranks), 2, x)
        w = twins.sample((205, ranks), 3, x, torch.float32).T / math.sqrt(205)
        seed = torch.tensor(3 << 33 | 77, dtype=torch.int64)
        by, ones = drawn(seed, STEPS // 4), hashed(one, seed, STEPS // 4)
        ours = [
            down(one, w, 1.5, by),
            add(y.clone(), h, w, 1.5, by),
            outer(h, one, 0.1, by),
            outer(h, one, 0.1, by, True),
        ]
        cast, inner = (1.5 * w).to(x.dtype), one * ones
        c = 0.1 * (h.T @ inner).float()
        return ours, [inner @ cast.T, torch.addcmul(y, h @ cast, ones), c, c.T]

    return draws(x) and twins.trusted(("thin", power, x.device, x.dtype), pair)
