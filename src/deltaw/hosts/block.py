"""Sublayers of transformer blocks, seen where their output joins the residual stream.

    family              attention           feed-forward    where the output is known
    Llama, Qwen, …      self_attn           mlp             the module's own output: x + self_attn(norm(x))
    GPT-2               attn                mlp             the same, after its dropout
    BERT, RoBERTa, …    attention.output    output          inside: LayerNorm(dropout(dense(h)) + x)

BERT's modules add the residual themselves, so what follows the dropout stands in the dropout's place while they run. Their
second argument is the residual, which of the feed-forward sublayer is also its input.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from deltaw.core.block import FeedForwardHost, SublayerHost, shadowed, turn
from deltaw.core.host import register

LLAMA = [("llama", "Llama"), ("mistral", "Mistral"), ("qwen2", "Qwen2"), ("qwen3", "Qwen3")]
BERT = [("bert", "Bert"), ("roberta", "Roberta"), ("xlm_roberta", "XLMRoberta"), ("camembert", "Camembert")]


def classes(families: list[tuple[str, str]], part: str) -> list[str]:
    """Qualified names of one part of several families of transformers."""
    return [f"transformers.models.{room}.modeling_{room}.{family}{part}" for room, family in families]


@register(*classes([*LLAMA, ("gpt2", "GPT2")], "Attention"))
class OwnOutputHost(SublayerHost):
    """A module that returns the sublayer's output, alone or first in a tuple."""

    @property
    def width(self) -> int:
        return int(self.module.config.hidden_size)

    def after(self, call: Callable[..., Any], change: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Any:
        y = call(*args, **kwargs)
        return (change(y[0]), *y[1:]) if isinstance(y, tuple) else change(y)


@register(*classes(LLAMA, "MLP"))
class FeedForward(OwnOutputHost, FeedForwardHost):
    def beside(self, call: Callable[..., Any], branch: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Any:
        (x,) = (*args, *kwargs.values())
        return call(x) + branch(x)


@register(*classes([("gpt2", "GPT2")], "MLP"))
class GPT2FeedForward(FeedForward):
    @property
    def width(self) -> int:
        return int(self.module.c_proj.nf)


@register(*classes(BERT, "SelfOutput"))
class ResidualInsideHost(SublayerHost):
    """forward(h, x) = LayerNorm(dropout(dense(h)) + x)."""

    @property
    def width(self) -> int:
        return int(self.module.LayerNorm.normalized_shape[0])

    def after(self, call: Callable[..., Any], change: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Any:
        with turn():
            dropout = self.module.dropout
            with shadowed(self.module, dropout=lambda y: change(dropout(y))):
                return call(*args, **kwargs)


@register(*classes(BERT, "Output"))
class BertFeedForward(ResidualInsideHost, FeedForwardHost):
    def beside(self, call: Callable[..., Any], branch: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Any:
        hidden, x = (*args, *kwargs.values())
        return call(hidden, x + branch(x))
