"""One batch, a route for every row: row b of the output is what route b alone would give it.

    y[b] = W x[b] + Σ_k w_bk · ΔW_k x[b]        x [B, …]; w_bk the strength of adapter k in route b

An adapter computes on its own rows alone, taken out of x and added back into y. No row is touched by a tensor that is not
of its route: what is not finite in one adapter stays in its own rows.

Low-rank adapters of one linear layer, all frozen, move into a `Bank`: their factors become slices of two tensors, so that
all of them are two batched products. They stay parameters with their values; nothing is copied at a switch.

    a [K, r, in], bt [K, r, out]     fp32; smaller ranks end in zeros
    rows [K, n], weights [K, n]      the rows of adapter k in the batch, and strength · scale there; 0 where it has fewer
    y[rows] += weights · (x[rows] aᵀ) bt
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deltaw.core.adapter import Adapter, Call, WeightAdapter
from deltaw.core.carried import Carried
from deltaw.core.errors import UseError
from deltaw.core.host import Host, WeightHost


class PerRow(NamedTuple):
    """In the place of an adapter's strength: the rows of the batch that it acts in."""

    strengths: Tensor
    """[n], never 0."""
    rows: Tensor
    """[n], numbers of rows in the batch."""
    batch: int
    """Rows of the whole batch, B."""


def whole(adapter: Adapter, host: Host) -> str | None:
    """Why the adapter cannot act in some rows of a batch alone, or None."""
    if not isinstance(adapter, WeightAdapter) or type(adapter).forward is not WeightAdapter.forward:
        return f"{type(adapter).__name__} acts on the layer and not beside it"
    if not isinstance(host, WeightHost) or adapter.spec.stack is not None:
        return "experts see rows of tokens, not of the batch"
    return None


def by_rows(adapter: Any, host: Any, call: Call, there: PerRow, *args: Any, **kwargs: Any) -> Any:
    """The call with the adapter's change added in its own rows."""
    y, x = call(*args, **kwargs), args[0] if args else kwargs["input"]
    if x.shape[0] != there.batch:
        raise UseError(
            f"the layer sees {x.shape[0]} rows, the route names {there.batch}: give `use` one route for every row of the "
            "batch (beams and several answers for one prompt are rows too)"
        )
    rows, strengths = there.rows.to(x.device), there.strengths.to(x.device)
    change = adapter.branch(host, x[rows])  # [n, …, out]
    change = (strengths.view(-1, *[1] * (change.ndim - 1)) * change).to(y.dtype)  # in fp32, or wider
    return y.index_add(0, rows, change)


def bank_rows(y: Tensor, x: Tensor, a: Tensor, bt: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    """y [B, …, out] with the changes of x [B, …, in] added."""
    mine = x[rows].flatten(1, -2)  # [K, n · T, in]
    # the smaller side is cast: few rows, or the factors
    if mine.shape[1] <= a.shape[1] and x.dtype.itemsize < a.dtype.itemsize:
        mine = mine.to(a.dtype)
    else:
        a, bt = a.to(x.dtype), bt.to(x.dtype)
    out = torch.bmm(torch.bmm(mine, a.mT), bt).view(*rows.shape, *y.shape[1:])
    weights = weights.view(*rows.shape, *[1] * (y.ndim - 1))
    # rows that are filled up add nothing, and not 0 · NaN
    change = torch.where(weights != 0, weights.to(out.dtype) * out, 0.0)
    return y.index_add(0, rows.flatten(), change.flatten(0, 1).to(y.dtype))


SKEW = 4
"""Most that filling up ranks or rows to the largest may cost, as a multiple of what is there."""


class Plan(NamedTuple):
    """Of a batch and a bank: which adapters act (all: None), on which rows, with which weights."""

    acting: Tensor | None
    rows: Tensor
    """[K, n]"""
    weights: Tensor
    """[K, n]"""
    batch: int


class Bank:
    """The factors of all adapters of one module side by side, [K, r, in] and [K, r, out], and the plan of the live batch."""

    def __init__(self, adapters: Sequence[Any]):
        self.adapters = tuple(adapters)
        ranks = [len(adapter.factors().a) for adapter in adapters]
        a, b, _ = adapters[0].factors()
        self.a = a.new_zeros(len(adapters), max(ranks), a.shape[1])
        self.bt = b.new_zeros(len(adapters), max(ranks), b.shape[0])
        self.slices = [(self.a[number, :rank], self.bt[number, :rank]) for number, rank in enumerate(ranks)]
        for adapter, place in zip(self.adapters, self.slices, strict=True):
            adapter.move_into(*place)
        self.live: Any = None
        self.plan: Any = None

    def holds(self, adapters: Sequence[Any]) -> bool:
        """Are these its adapters, and are their factors still here? A move to another device takes them away."""
        same = len(adapters) == len(self.adapters) and all(a is b for a, b in zip(adapters, self.adapters, strict=True))
        return same and all(adapter.lies_in(*place) for adapter, place in zip(adapters, self.slices, strict=True))

    def route(self, live: Sequence[Any], plans: dict[Any, Plan | None]) -> None:
        """Plan the batch of these entries; `plans` holds those of other modules, where they are the same."""
        place = {id(adapter): number for number, adapter in enumerate(self.adapters)}
        parts = sorted((place[id(adapter)], adapter.scale, there) for adapter, _, there in live)
        key = (self.a.device, len(self.adapters), *((number, scale, id(there)) for number, scale, there in parts))
        if key not in plans:
            plans[key] = _plan(parts, len(self.adapters), self.a.device)
        self.live, self.plan = live, plans[key]

    def __call__(self, call: Call, *args: Any, **kwargs: Any) -> Any:
        """The layer's call with all changes, or None where the rows must be computed one adapter after the other."""
        x, plan = args[0] if args else kwargs["input"], self.plan
        fits = plan is not None and x.shape[0] == plan.batch and x.ndim > 1
        if not fits or any(adapter.drops for adapter in self.adapters) or not self.holds(self.adapters):
            return None
        a, bt = (self.a, self.bt) if plan.acting is None else (self.a[plan.acting], self.bt[plan.acting])
        return bank_rows(call(*args, **kwargs), x, a, bt, plan.rows, plan.weights)


def _plan(parts: Sequence[tuple[int, float, PerRow]], everyone: int, device: torch.device) -> Plan | None:
    most = max(len(there.rows) for _, _, there in parts)
    if most * len(parts) > SKEW * sum(len(there.rows) for _, _, there in parts):
        return None
    rows, weights = torch.zeros(len(parts), most, dtype=torch.long), torch.zeros(len(parts), most)
    for number, (_, scale, there) in enumerate(parts):
        rows[number, : len(there.rows)], weights[number, : len(there.rows)] = there.rows, scale * there.strengths
    acting = None if len(parts) == everyone else torch.tensor([number for number, _, _ in parts], device=device)
    return Plan(acting, rows.to(device), weights.to(device), parts[0][2].batch)


def settle(there: Carried, live: tuple[Any, ...], plans: dict[Any, Plan | None]) -> None:
    """Route the module's bank for these entries, made anew where its adapters are others; none where there can be none."""
    adapters = [adapter for group in there.entries.values() for adapter, _, _ in group]
    if (
        not live
        or len(adapters) < 2
        or not all(isinstance(adapter, WeightAdapter) and adapter.movable for adapter in adapters)
    ):
        there.bank = None
        return
    if there.bank is None or not there.bank.holds(adapters):
        ranks = [len(adapter.factors().a) for adapter in adapters]
        there.bank = Bank(adapters) if max(ranks) * len(ranks) <= SKEW * sum(ranks) else None
    if there.bank is not None:
        there.bank.route(live, plans)
