"""W' = W + Σ wᵢ·ΔWᵢ for one tensor on disk at a time: every ΔWᵢ from the base's own W, in fp32, rounded once.

    low rank   ΔW = s·B·A        some rows after the other, in the layout of the file: no copy of W in fp32 is made
    any other  ΔW = merged(W) − W   of the whole weight; alone and at strength 1, merged(W) itself

Only low-rank changes sit on stacks (experts); of a stack each tensor on disk gets its own part.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.core.adapter import WeightAdapter
from deltaw.core.host import wide
from deltaw.models.names import Piece

VALUES = 1 << 18
"""Numbers of W that are computed at once: they stay in the cache of a processor."""


@dataclass(frozen=True)
class Term:
    """One adapter's change of one slot, and its strength."""

    adapter: WeightAdapter
    host: Any
    strength: float


@dataclass
class Tally:
    """What became of the tensors that were to change."""

    changed: set[str] = field(default_factory=set)
    infinite: set[str] = field(default_factory=set)


def low_rank(terms: Sequence[Term]) -> bool:
    """Is the sum of the changes one of low rank?"""
    return all(term.adapter.factors() is not None for term in terms)


def blocks(
    key: str, piece: Piece, read: Callable[[], Tensor], terms: Sequence[Term], tally: Tally
) -> Callable[[torch.dtype], Iterator[Tensor]]:
    """What `disk.write` asks for the new values of the tensor `key`, which read() gives as it is now."""
    make = _rows if low_rank(terms) else _whole
    return partial(_counted, key, read, partial(make, piece, terms), tally)


def _counted(key: str, read: Callable[[], Tensor], make: Any, tally: Tally, dtype: torch.dtype) -> Iterator[Tensor]:
    """The new values in `dtype`; what changed and what is no longer finite is told to the tally."""
    for before, after in make(read()):
        rounded = after.to(dtype)
        if key not in tally.changed and not torch.equal(rounded, before.to(dtype).view(rounded.shape)):
            tally.changed.add(key)
        if not torch.isfinite(rounded.sum(dtype=after.dtype)) and not torch.isfinite(rounded).all():
            tally.infinite.add(key)
        yield rounded


@torch.no_grad()
def _rows(piece: Piece, terms: Sequence[Term], weight: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    pairs = [_stored_factors(term, piece) for term in terms]
    left = pairs[0][0]
    if left.ndim == 2:
        yield from _sums(weight.view(len(left), -1), pairs)
        return
    for number, one in enumerate(weight.view(*left.shape[:2], -1)):  # a whole stack in one tensor
        yield from _sums(one, [(l[number], r[number], scale) for l, r, scale in pairs])


def _sums(matrix: Tensor, pairs: Sequence[tuple[Tensor, Tensor, float]]) -> Iterator[tuple[Tensor, Tensor]]:
    """W + Σ s·L·R for some rows of W after the other. W: [rows, columns], L: [rows, r], R: [r, columns]."""
    count = max(1, VALUES // matrix.shape[1])
    for first in range(0, len(matrix), count):
        before = matrix[first : first + count]
        after = None
        for left, right, scale in pairs:
            change = (left[first : first + count] @ right).mul_(scale)
            after = change.add_(before) if after is None else after.add_(change)
        assert after is not None
        yield before, after


def _stored_factors(term: Term, piece: Piece) -> tuple[Tensor, Tensor, float]:
    """(L, R, s) with s·L·R the change of this piece in the layout of the file; [E, …] of a whole stack."""
    factors = term.adapter.factors()
    assert factors is not None
    dtype = torch.promote_types(term.host.stored.dtype, torch.float32)
    left, right = factors.b.to(dtype), factors.a.to(dtype)
    if transposed(term.host):
        left, right = right.mT, left.mT
    if piece.weight is not None:
        left, right = left[piece.weight], right[piece.weight]
        left = left if piece.rows is None else left[slice(*piece.rows)]
    return left.contiguous(), right.contiguous(), factors.scale * term.strength


def transposed(host: Any) -> bool:
    """Does the file hold the transpose of the canonical weight? Asked of a tensor without values: some have only a shape."""
    parameters, stored = host.module._parameters, host.stored
    bare = nn.Parameter(torch.empty(stored.shape, device="meta"), requires_grad=False)
    try:
        parameters[host.slot] = bare
        return bool(host.weight.stride() != bare.stride())
    finally:
        parameters[host.slot] = stored


@torch.no_grad()
def _whole(piece: Piece, terms: Sequence[Term], weight: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    assert piece.weight is None, "changes that are not of low rank do not sit on stacks"
    alone = len(terms) == 1 and terms[0].strength == 1
    after = None if alone else wide(weight)
    for term in terms:
        seen = wide(term.host.weight)
        merged = term.adapter.merged(seen)
        change = merged if alone else (merged - seen).mul_(term.strength)
        change = change.mT if transposed(term.host) else change
        after = change if after is None else after + change
    assert after is not None
    yield from zip(weight.flatten().split(VALUES), after.reshape(-1).split(VALUES), strict=True)
