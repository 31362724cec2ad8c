"""Does the written model compute what the adapters do? Logits of both on the same rows, one model in memory at a time.

    reference = logits(base with the adapters live)      fp32
    merged    = logits(what was written, read back)      fp32 arithmetic on the written weights

Rows are prompts that are given, or fixed pseudo-random ids; with them every token whose row an adapter brings, and of a base
that reads images a row with a picture (`deltaw.ship.picture`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.core.attach import adapters
from deltaw.core.base import base_modules
from deltaw.core.errors import MergeError, UseError
from deltaw.core.host import host_of
from deltaw.core.route import use
from deltaw.methods.token_rows import TokenRowsAdapter
from deltaw.ship.roundtrip import RoundTrip

TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest accepted logit difference, as a share of the largest logit; rounding of the weights makes most of it."""
POSITIONS = 1024
"""Positions of prompts that are compared at most: the logits of all of them are kept."""


Row = Tensor | Mapping[str, Tensor]
"""[rows, length] ids, or all that the forward of a model takes, with its input_ids."""


@dataclass(frozen=True)
class Reference:
    """What the merged model must compute."""

    rows: Sequence[Row]
    """One batch after the other."""
    tuned: Sequence[Tensor]
    effect: float
    """Largest logit difference between the base with and without the adapters: what the merge must keep."""
    round_trip: RoundTrip | None = None
    unseen: str | None = None
    """Why no row holds a picture, where the base reads images."""
    routed: bool = False
    """Does the model choose experts? Where rounding tips a choice, one position differs by much and nothing is wrong: then
    the median position must agree, else every one."""

    @property
    def positions(self) -> int:
        return sum(ids_of(row).numel() for row in self.rows)

    @property
    def remarks(self) -> list[str]:
        """What the comparison does not prove."""
        said = ["the compared rows do not reach what the adapters change: the logits prove nothing here"]
        blind = [
            f"no row with a picture was compared ({self.unseen}): of what the adapters change in seeing, nothing is proven"
        ]
        return [*(said if self.effect == 0 else []), *(blind if self.unseen else [])]

    def held(self, merged: nn.Module, dtype: torch.dtype) -> float:
        """The largest logit difference to a model that was written in `dtype`. MergeError where it is too large."""
        pairs = zip(self.rows, self.tuned, strict=True)
        apart = torch.cat([(logits(merged, row) - tuned).abs().amax(-1).flatten() for row, tuned in pairs])
        difference = float(apart.median() if self.routed else apart.max())  # NaN where one is
        allowed = TOLERANCE[dtype] * max(float(tuned.abs().max()) for tuned in self.tuned)
        if not difference <= allowed:
            raise MergeError(
                f"the merged model differs from the adapter by {difference:.3g} in its logits, more than {allowed:.3g}: "
                f"nothing was written. Merge with dtype fp32 to see whether rounding is the cause"
            )
        return float(apart.max())


def reference(
    model: nn.Module, route: Mapping[str, float], rows: Sequence[Row], round_trip: RoundTrip | None = None,
    unseen: str | None = None,
) -> Reference:  # fmt: skip
    """What base and adapters in `model` compute on the rows."""
    with use(model, route):
        tuned = [logits(model, row) for row in rows]
    if not all(bool(torch.isfinite(one).all()) for one in tuned):
        raise MergeError(
            "the base with the adapters on it computes logits that are not finite, there is nothing to hold the merge "
            "against: nothing was written. Are the strengths too large?"
        )
    size, effects = model.get_input_embeddings().weight.shape[0], [0.0]  # type: ignore[operator]
    with use(model, {}):
        for row, one in zip(rows, tuned, strict=True):
            known = (ids_of(row) < size).all(1)
            if known.all() or (known.any() and isinstance(row, Tensor)):
                plain = logits(model, row[known] if isinstance(row, Tensor) else row)
                effects.append(float((one[known][..., : plain.shape[-1]] - plain).abs().max()))
    hosts = (host_of(module) for _, module in base_modules(model))
    routed = any(host is not None and host.has(host.module, host.slot) and host.spec.stack for host in hosts)
    return Reference(rows, tuned, max(effects), round_trip, unseen, routed)


def ids_of(row: Row) -> Tensor:
    """[rows, length]"""
    return row if isinstance(row, Tensor) else row["input_ids"]


def rows_for(model: nn.Module, names: Sequence[str], prompts: Sequence[str], tokenizer: Any) -> list[Tensor]:
    """Rows to compare on, with every second id one of the tokens that the adapters `names` bring: else nothing would read
    their rows."""
    tokens = new_tokens(model, names)
    first = [probe(model)] if not prompts else encoded(prompts, tokenizer)
    most, width = 96, 24
    tokens = tokens[:: -(-len(tokens) // most)] if tokens else []
    if not tokens:
        return first
    more = probe(model, -(-len(tokens) // (width // 2)), width)
    places = torch.arange(more.numel()).view(more.shape)[:, 1::2].flatten()[: len(tokens)]
    more.view(-1)[places] = torch.tensor(tokens, dtype=more.dtype)
    return [*first, more]


def encoded(prompts: Sequence[str], tokenizer: Any) -> list[Tensor]:
    """Prompts as rows of ids, [1, length] each, up to POSITIONS in all."""
    rows, left = list[Tensor](), POSITIONS
    for prompt in prompts:
        ids = torch.tensor([tokenizer(prompt)["input_ids"][:left]], dtype=torch.long)
        if ids.numel():
            rows.append(ids)
            left -= ids.numel()
        if left <= 0:
            break
    if not rows:
        raise UseError("the prompts hold no token to compare the merged model on: one prompt to a line")
    return rows


def new_tokens(model: nn.Module, names: Sequence[str]) -> list[int]:
    """The tokens whose rows the adapters bring."""
    found = [adapter for name in names for adapter in adapters(model, name).values()]
    return sorted({token for adapter in found if isinstance(adapter, TokenRowsAdapter) for token in adapter.tokens})


def probe(model: nn.Module, rows: int = 4, length: int = 24) -> Tensor:
    """Fixed pseudo-random token ids, [rows, length]: any input will do to compare two models."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, model.get_input_embeddings().weight.shape[0], (rows, length), generator=generator)  # type: ignore[operator]


@torch.no_grad()
def logits(model: nn.Module, row: Row) -> Tensor:
    """Of an encoder-decoder, of its decoder reading the same ids."""
    config: Any = getattr(model, "config", None)
    given = {"input_ids": row} if isinstance(row, Tensor) else dict(row)
    if getattr(config, "is_encoder_decoder", False):
        return model.eval()(**given, decoder_input_ids=ids_of(row), use_cache=False).logits.float()  # type: ignore[no-any-return]
    cached = {"use_cache": False} if hasattr(config, "use_cache") else {}
    return model.eval()(**given, **cached).logits.float()  # type: ignore[no-any-return]
