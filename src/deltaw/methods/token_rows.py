"""TokenRows: a few rows of an embedding trained in full, e.g. those of new special tokens. E'[tokens] = rows.

Rows are absolute values, [n, dim], as in PEFT's trainable_token_indices. y = E[ids], with rows[j] where id = tokens[j].
They are rows of the table itself: where a head is tied to it, the same rows give the scores of those tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.core.adapter import Adapter, WeightAdapter
from deltaw.core.host import HostSpec
from deltaw.core.method import Method, register


class TokenRowsAdapter(WeightAdapter):
    def __init__(self, tokens: tuple[int, ...], dim: int):
        super().__init__()
        self.tokens = tokens
        self.rows = nn.Parameter(torch.zeros(len(tokens), dim, dtype=torch.float32))

    def start_from(self, host: Any) -> None:
        with torch.no_grad():
            self.rows.copy_(host.weight[:, list(self.tokens)].T)

    def merged(self, weight: Tensor) -> Tensor:
        return weight.index_copy(1, torch.tensor(self.tokens, device=weight.device), self.rows.float().T)

    def branch(self, host: Any, x: Tensor) -> Tensor:
        tokens = torch.tensor(self.tokens, device=x.device)
        if not host.spec.lookup:  # the tied head: W is [vocab, dim], its rows are the scores of the tokens
            base = host.weight[tokens]  # [n, dim]
            change = host.op(x, (self.rows - base.float()).to(base.dtype))  # [T, n]
            return change.new_zeros(*change.shape[:-1], host.weight.shape[0]).index_copy(-1, tokens, change)
        base = host.weight[:, tokens]  # [dim, n]
        change = (self.rows.T - base.float()).to(base.dtype)
        place = x.unsqueeze(-1) == tokens  # [T, n]
        position = torch.where(place.any(-1), place.int().argmax(-1), len(self.tokens))
        padded = torch.cat([change, change.new_zeros(change.shape[0], 1)], dim=1)  # the last column changes nothing
        return host.op(position, padded)


@register("token_rows")
@dataclass(frozen=True, kw_only=True)
class TokenRows(Method):
    follows_ties = True

    tokens: tuple[int, ...] = (0,)
    """Ids of the rows that are trained."""

    def invalid(self) -> Sequence[str]:
        wrong = [t for t in self.tokens if type(t) is not int or t < 0]
        if wrong or not self.tokens or len(set(self.tokens)) != len(self.tokens):
            return [f"tokens={self.tokens!r} must be distinct token ids, at least one"]
        return ()

    def unfit(self, spec: HostSpec) -> str | None:
        if not spec.lookup:
            return "token rows belong to an embedding"
        over = [t for t in self.tokens if t >= spec.shape[1]]
        return f"tokens {over} are outside the vocabulary of {spec.shape[1]}" if over else None

    def build(self, spec: HostSpec, shared: Any = None) -> Adapter:
        return TokenRowsAdapter(self.tokens, spec.shape[0])
