"""TokenRows: a few rows of an embedding trained in full, e.g. those of new special tokens. E'[tokens] = rows.

Rows are absolute values, [n, dim], as in PEFT's trainable_token_indices. y = E[ids], with rows[j] where id = tokens[j].
They are rows of the table itself: where a head is tied to it, the same rows give the scores of those tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.core.adapter import Adapter, Call, WeightAdapter
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

    def forward(self, host: Any, call: Call, strength: Tensor | None, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The rows stand in the output itself: y + (rows − base) would lose them to rounding in bf16."""
        y, tokens = call(input, *args, **kwargs), torch.tensor(self.tokens, device=input.device)
        lookup = host.spec.lookup
        base = (host.weight[:, tokens].T if lookup else host.weight[tokens]).float()  # [n, dim]
        rows = self.rows.float() if strength is None else base + strength * (self.rows.float() - base)
        if not lookup:  # the tied head: the rows give the scores of their tokens
            others = y.index_select(-1, tokens) - host.op(input, base.to(host.weight.dtype))  # bias, other adapters
            return y.index_copy(-1, tokens, host.op(input, rows.to(host.weight.dtype)) + others)
        place = input.unsqueeze(-1) == tokens  # [T, n]
        hit = place.any(-1, keepdim=True)
        row = host.op(place.int().argmax(-1), rows.T.to(y.dtype))
        others = y - host.op(input, host.weight)
        return torch.where(hit, row + others, y)


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
