"""One batch, a route for every row: row b of the output is what route b alone would give it.

    y[b] = W x[b] + Σ_k w_bk · ΔW_k x[b]        x [B, …]; w_bk the strength of adapter k in route b

An adapter computes on its own rows alone, taken out of x and added back into y. No row is touched by a tensor that is not
of its route: what is not finite in one adapter stays in its own rows.

Frozen low-rank adapters of one linear layer are computed together (`core.bank`).
"""

from typing import Any, NamedTuple

from torch import Tensor

from deltaw.core.adapter import Adapter, Call, WeightAdapter
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
