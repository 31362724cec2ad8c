"""All low-rank adapters of one linear layer in two tensors, so that the rows of a batch are two batched products.

    a [K, r, in], bt [K, r, out]     fp32; smaller ranks end in zeros
    rows [K, n], weights [K, n]      the rows of adapter k in the batch, and strength · scale there; 0 where it has fewer
    y[rows] += (weights · x[rows] aᵀ) bt

The adapters' factors, all frozen, become slices of the two: they stay parameters with their values, nothing is copied at
a switch, and what is written into them counts. A model that moved has its tensors elsewhere: then the bank is made anew.
"""

import itertools
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deltaw.core.adapter import Call, WeightAdapter
from deltaw.core.carried import Carried
from deltaw.core.host import WeightHost

_PARAMETERS, _FACTS = operator.attrgetter("_parameters"), operator.attrgetter("scale", "dropout")
SKEW = 4
"""Most that filling up ranks or rows to the largest may cost, as a multiple of what is there."""


class Plan(NamedTuple):
    """Of a batch: which adapters of a bank act (all: None), on which rows, with which weights."""

    acting: Tensor | None
    rows: Tensor
    """[K, n]"""
    weights: Tensor
    """[K, n], fp32"""
    batch: int
    weight: float | None
    """That of all of them, where no place is filled up and they are one number."""
    ordered: bool
    """Are the rows the batch as it is, so that nothing is gathered?"""


class Bank:
    """The factors of all adapters of one module side by side; `host` is what computes with them."""

    def __init__(self, adapters: Sequence[Any], host: Any):
        self.adapters, self.host = tuple(adapters), host
        ranks = [len(adapter.factors().a) for adapter in adapters]
        a, b, _ = adapters[0].factors()
        self.a = a.new_zeros(len(adapters), max(ranks), a.shape[1])
        self.bt = b.new_zeros(len(adapters), max(ranks), b.shape[0])
        for number, (adapter, rank) in enumerate(zip(adapters, ranks, strict=True)):
            adapter.move_into(self.a[number, :rank], self.bt[number, :rank])
        self.places, self.drops = self._places(), any(adapter.dropout for adapter in adapters)

    def _places(self) -> list[Any]:
        """Where every factor lies, the scales and dropouts: what plans and routes rely on."""
        parameters = itertools.chain.from_iterable(map(dict.values, map(_PARAMETERS, self.adapters)))
        return [*map(Tensor.data_ptr, parameters), *map(_FACTS, self.adapters)]  # at every call: no loop in Python

    def holds(self, adapters: Sequence[Any]) -> bool:
        """Are these its adapters, and are their factors still here?"""
        mine = self.adapters
        return len(adapters) == len(mine) and all(map(operator.is_, adapters, mine)) and self._places() == self.places

    def plan(self, live: Sequence[Any], plans: dict[Any, Plan | None]) -> Plan | None:
        """For the batch of these entries; `plans` holds those of other modules, where they are the same."""
        order = {id(adapter): number for number, adapter in enumerate(self.adapters)}
        parts = sorted((order[id(adapter)], adapter.scale, there) for adapter, _, there in live)
        key = (self.a.device, len(self.adapters), *((number, scale, id(there)) for number, scale, there in parts))
        if key not in plans:
            plans[key] = _plan(parts, len(self.adapters), self.a.device)
        return plans[key]

    def __call__(self, plan: Plan, call: Call, *args: Any, **kwargs: Any) -> Any:
        """The layer's call with all changes, or None where the rows must be computed one adapter after the other."""
        x = args[0] if args else kwargs["input"]
        drops = self.drops and any(adapter.drops for adapter in self.adapters)
        if drops or x.shape[0] != plan.batch or x.ndim == 1 or self._places() != self.places:
            return None
        a, bt = (self.a, self.bt) if plan.acting is None else (self.a[plan.acting], self.bt[plan.acting])
        y = call(*args, **kwargs)
        y = y if self.host.fresh else y.clone()  # it is added to in place
        return self.host.grouped(y, x, a, bt, plan.rows, plan.weights, plan.weight, plan.ordered)


def _plan(parts: Sequence[tuple[int, float, Any]], everyone: int, device: torch.device) -> Plan | None:
    most, filled = max(len(there.rows) for _, _, there in parts), sum(len(there.rows) for _, _, there in parts)
    if most * len(parts) > SKEW * filled:
        return None
    rows, weights = torch.zeros(len(parts), most, dtype=torch.long), torch.zeros(len(parts), most)
    for number, (_, scale, there) in enumerate(parts):
        rows[number, : len(there.rows)], weights[number, : len(there.rows)] = there.rows, scale * there.strengths
    acting = None if len(parts) == everyone else torch.tensor([number for number, _, _ in parts], device=device)
    batch, full = parts[0][2].batch, filled == rows.numel()
    ordered = full and torch.equal(rows.flatten(), torch.arange(batch))
    weight = float(weights[0, 0]) if full and bool((weights == weights[0, 0]).all()) else None
    return Plan(acting, rows.to(device), weights.to(device), batch, weight, ordered)


class Batch(NamedTuple):
    """What a module does with the rows of a batch, as long as `live` is live."""

    live: tuple[Any, ...]
    bank: Bank
    plan: Plan


def settle(there: Carried, live: tuple[Any, ...], plans: dict[Any, Plan | None]) -> Batch | None:
    """The module's batch for these entries; its bank is made anew where its adapters are others, none where it does not fit."""
    adapters = [adapter for group in there.entries.values() for adapter, _, _ in group]
    host = live[0][1] if live else None
    if not live or len(adapters) < 2:
        return None
    if there.bank is None or not there.bank.holds(adapters):
        there.bank = None
        there.routed.clear()  # it would keep the old one
        able = isinstance(host, WeightHost) and host.grouped is not None
        if able and all(isinstance(adapter, WeightAdapter) and adapter.movable for adapter in adapters):
            ranks = [len(adapter.factors().a) for adapter in adapters]
            there.bank = Bank(adapters, host) if max(ranks) * len(ranks) <= SKEW * sum(ranks) else None
    plan = None if there.bank is None else there.bank.plan(live, plans)
    return None if plan is None else Batch(live, there.bank, plan)
