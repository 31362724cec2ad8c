"""TokenRows: E' = E with E'[tokens] = rows, trained in full; tokens from the end of the table on are new rows of it.

Rows are absolute values, [n, dim], as in PEFT's trainable_token_indices. y = E'[ids], and of a head the scores of these
tokens. They are rows of the table itself: where a head is tied to it, the same rows give the scores. The base keeps its
own table and its size; a token that is new has no row there, so strength w gives w · row, and E + ΔE needs a table that
has grown (`deltaw merge` grows it). Adapters with the same new tokens add up: 0.5·row + 0.5·row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltaw.core.adapter import Adapter, Call, WeightAdapter
from deltaw.core.carried import here
from deltaw.core.host import HostSpec, wide
from deltaw.core.method import Method, register


class TokenRowsAdapter(WeightAdapter):
    def __init__(self, tokens: tuple[int, ...], dim: int, size: int):
        super().__init__()
        self.tokens, self.size = tokens, size
        self.new = tuple(token for token in tokens if token >= size)
        self.added = len(self.new)
        self.rows = nn.Parameter(torch.zeros(len(tokens), dim, dtype=torch.float32))

    def start_from(self, host: Any) -> None:
        """The base's own rows; new ones begin as the mean of all."""
        with torch.no_grad():
            table = table_of(host)
            self.rows.copy_(self.own(table))
            fresh = [place for place, token in enumerate(self.tokens) if token in self.new]
            self.rows[fresh] = table.float().mean(0)

    def own(self, table: Tensor) -> Tensor:
        """The base's rows of the tokens, [n, dim] fp32 or wider; zero for those that are new."""
        tokens = torch.tensor(self.tokens, device=table.device)
        rows = wide(table[tokens.clamp_max(self.size - 1)])
        return torch.where((tokens < self.size).unsqueeze(1), rows, 0.0) if self.new else rows

    def merged(self, weight: Tensor) -> Tensor:
        turned = self.spec.lookup
        table = F.pad(weight.T if turned else weight, (0, 0, 0, len(self.new)))  # [vocabulary + new, dim]
        table = table.index_copy(0, torch.tensor(self.tokens, device=weight.device), self.rows.to(table.dtype))
        return table.T if turned else table

    def forward(self, host: Any, call: Call, strength: Tensor | None, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Of a table the rows stand in the output itself: y + (rows − base) would lose them to rounding in bf16."""
        tokens = torch.tensor(self.tokens, device=input.device)
        base = self.own(table_of(host))  # [n, dim]
        rows = self.rows if strength is None else base + strength * (self.rows - base)
        if not host.spec.lookup:  # a head: the rows give the scores of their tokens
            y = call(input, *args, **kwargs)
            y = F.pad(y, (0, max(0, self.size + self.added - y.shape[-1])))  # other rows may have made room already
            before, after = (wide(host.op(input, table.to(host.weight.dtype))) for table in (base, rows))  # [T, n]
            return y.index_copy(-1, tokens, (wide(y.index_select(-1, tokens)) + (after - before)).to(y.dtype))
        place = input.unsqueeze(-1) == tokens  # [T, n]
        first = self.first(host)
        unread = place[..., first].any(-1)  # nothing inside knows these ids: it is asked for another one, and ignored
        y = call(torch.where(unread, 0, input) if first else input, *args, **kwargs)
        row = host.op(place.int().argmax(-1), rows.T.to(y.dtype))
        own = host.op(input.clamp_max(self.size - 1) if self.new else input, host.weight)
        if self.new:  # of which the base has no row
            own = torch.where((input < self.size).unsqueeze(-1), own, 0.0)
            y = torch.where(unread.unsqueeze(-1), 0.0, y)
        return torch.where(place.any(-1, keepdim=True), row + (y - own), y)

    def first(self, host: Any) -> list[int]:
        """Places of the new tokens that no other rows inside of these bring as well: they must not be asked inside."""
        inside: list[int] = []
        for adapter, _, _ in here(host.module).live:
            if adapter is self:
                break
            inside += adapter.new if isinstance(adapter, TokenRowsAdapter) else ()
        return [place for place, token in enumerate(self.tokens) if token in self.new and token not in inside]


@register("token_rows")
@dataclass(frozen=True, kw_only=True)
class TokenRows(Method):
    follows_ties = True
    suits = "new or unused tokens (`data.tokens`)"

    tokens: tuple[int, ...] = (0,)
    """Ids of the rows that are trained; ids from the end of the vocabulary on are new rows."""

    def invalid(self) -> Sequence[str]:
        wrong = [t for t in self.tokens if type(t) is not int or t < 0]
        if wrong or not self.tokens or len(set(self.tokens)) != len(self.tokens):
            return [f"tokens={self.tokens!r} must be distinct token ids, at least one"]
        return ()

    def unfit(self, spec: HostSpec) -> str | None:
        if len(spec.shape) != 2 or not spec.linear:
            return "token rows belong to an embedding or a head"
        size = _size(spec)
        new = sorted(t for t in self.tokens if t >= size)
        if new != list(range(size, size + len(new))):
            return f"tokens {new} are outside the vocabulary of {size}, new ones would be {size}, {size + 1}, …"
        return None

    def build(self, spec: HostSpec) -> Adapter:
        size = _size(spec)
        adapter = TokenRowsAdapter(self.tokens, spec.numel // size, size)
        adapter.spec = spec
        return adapter


def _size(spec: HostSpec) -> int:
    """Rows of the table."""
    return spec.shape[1] if spec.lookup else spec.shape[0]


def table_of(host: Any) -> Tensor:
    """The weight of an embedding or head as the table [vocabulary, dim]."""
    weight: Tensor = host.weight
    return weight.T if host.spec.lookup else weight
