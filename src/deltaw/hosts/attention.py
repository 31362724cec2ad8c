"""Self-attention seen from inside, for methods that add to what the heads read before it is projected.

    family             queries                      keys, values of further tokens      what is added goes into
    Llama, Mistral     rotate(q_proj x)             k_proj, v_proj                      o_proj
    Qwen2, Qwen3       rotate(q_norm? q_proj x)     k_norm? k_proj, v_proj              o_proj
    GPT-2              first third of c_attn x      the other thirds                    c_proj (and its dropout)
    BERT, …            query x                      key, value                          the module's own output

All go through the layer's modules, so adapters on them and quantised weights count. The input is projected once: the
module's own forward is handed the result.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from deltaw.core.block import AttentionHost, shadowed, turn
from deltaw.core.host import HostSpec, register
from deltaw.hosts.block import BERT, LLAMA, classes

More = Callable[[Tensor], Tensor]


def once(project: More, x: Tensor) -> tuple[Tensor, More]:
    """x projected, and the projection as a function that does not compute that again."""
    projected = project(x)
    return projected, lambda other: projected if other is x else project(other)


class ScaledAttentionHost(AttentionHost):
    @property
    def scaling(self) -> float:
        return float(self.module.scaling)  # what the module itself passes to its attention function


@register(*classes(LLAMA, "Attention"))
class RotaryAttentionHost(ScaledAttentionHost):
    @property
    def spec(self) -> HostSpec:
        config = self.module.config
        return HostSpec((config.num_attention_heads, config.hidden_size), linear=False)

    def keys_values(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        m, groups = self.module, self.module.num_key_value_groups
        keys, values = self._normed("k_norm", m.k_proj(tokens[None])), self._split(m.v_proj(tokens[None]))
        return keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)

    def around(self, call: Callable[..., Any], more: More, *args: Any, **kwargs: Any) -> Any:
        hidden, (cos, sin) = (
            args[0] if args else kwargs["hidden_states"],
            args[1] if len(args) > 1 else kwargs["position_embeddings"],
        )
        m = self.module
        with turn():
            (projected, q_proj), o_proj = once(m.q_proj, hidden), m.o_proj
            queries = self._normed("q_norm", projected)  # [B, heads, T, d]
            left, right = queries.chunk(2, dim=-1)
            queries = queries * cos.unsqueeze(1) + torch.cat((-right, left), dim=-1) * sin.unsqueeze(1)
            heads = more(queries)
            with shadowed(m, q_proj=q_proj, o_proj=lambda x: o_proj(x + heads)):
                return call(*args, **kwargs)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.module.head_dim)).transpose(1, 2)

    def _normed(self, norm: str, x: Tensor) -> Tensor:
        """Split into heads, each normalised where the family does that (Qwen3)."""
        there = self.module._modules.get(norm)
        heads = x.unflatten(-1, (-1, self.module.head_dim))
        return (heads if there is None else there(heads)).transpose(1, 2)


@register(*classes([("gpt2", "GPT2")], "Attention"))
class FusedAttentionHost(ScaledAttentionHost):
    @property
    def spec(self) -> HostSpec:
        return HostSpec((self.module.num_heads, self.module.embed_dim), linear=False)

    def keys_values(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        _, keys, values = map(self._split, self.module.c_attn(tokens[None]).chunk(3, dim=-1))
        return keys, values

    def around(self, call: Callable[..., Any], more: More, *args: Any, **kwargs: Any) -> Any:
        m = self.module
        with turn():
            (projected, c_attn), c_proj = once(m.c_attn, args[0] if args else kwargs["hidden_states"]), m.c_proj
            heads = more(self._split(projected.chunk(3, dim=-1)[0]))
            with shadowed(m, c_attn=c_attn, c_proj=lambda x: c_proj(x + heads)):
                return call(*args, **kwargs)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.module.num_heads, -1)).transpose(1, 2)

    def fault(self) -> str | None:
        return (
            "this is cross-attention, prompts stand in self-attention"
            if self.module.is_cross_attention
            else super().fault()
        )


@register(*classes(BERT, "SelfAttention"))
class PlainAttentionHost(ScaledAttentionHost):
    @property
    def spec(self) -> HostSpec:
        return HostSpec((self.module.num_attention_heads, self.module.config.hidden_size), linear=False)

    def keys_values(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return self._split(self.module.key(tokens[None])), self._split(self.module.value(tokens[None]))

    def around(self, call: Callable[..., Any], more: More, *args: Any, **kwargs: Any) -> Any:
        m = self.module
        with turn():
            projected, query = once(m.query, args[0] if args else kwargs["hidden_states"])
            heads = more(self._split(projected))
            with shadowed(m, query=query):
                output, *rest = call(*args, **kwargs)
        return (output + heads, *rest)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.module.num_attention_heads, -1)).transpose(1, 2)
