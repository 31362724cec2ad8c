"""LLaMA-Adapter: heads + tanh(g)·attention to K learned tokens P per layer.  Zhang et al. 2023, arXiv 2303.16199.

    k_P, v_P = W_k P, W_v P                                    frozen W; no positions, no causal mask
    heads    = softmax(q kᵀ/√d)·v  +  tanh(g_h)·softmax(q k_Pᵀ/√d)·v_P        two softmaxes, one gate per head
    y        = W_o heads

P [K, width] ~ N(0, 1), g [heads] = 0: it starts as the base to the bit. K·width + heads numbers per layer; the paper has
K = 10 on the upper 30 of 32 layers (`layers: "2-31"`). The prompts go through the layer's own projections (and, in Qwen3,
norms), the queries carry their positions as in the authors' code. Not mergeable: no weight holds a second softmax.

Where sources disagree. The authors train with tanh(g) and run v1 inference with plain g, from the same file; v2 has tanh
throughout, as here, in training and inference alike. PEFT (AdaptionPrompt) has one gate for all heads and no tanh: its
function is `gate: plain`, except on GPT-2, where it leaves out the output projection. Its files cannot hold a gate per
head: these are stored in our own layout.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from deltaw.core.adapter import Adapter, Call
from deltaw.core.block import AttentionHost
from deltaw.core.host import HostSpec
from deltaw.core.method import Method, Owned, Site, register
from deltaw.methods.full import companions


class LlamaAdapterAdapter(Adapter):
    def __init__(self, gates: int, width: int, length: int, plain: bool):
        super().__init__()
        self.plain = plain
        self.prompt = nn.Parameter(torch.zeros(length, width, dtype=torch.float32))
        self.gate = nn.Parameter(torch.zeros(gates, dtype=torch.float32))

    def read(self, host: AttentionHost, queries: Tensor) -> Tensor:
        """queries [B, heads, T, d] → what the heads read from the prompt, gated: [B, T, heads·d]"""
        keys, values = host.keys_values(self.prompt.to(queries.dtype))  # [1, heads, K, d]
        scores = (queries @ keys.transpose(-1, -2)) * host.scaling  # [B, heads, T, K]
        gate = self.gate if self.plain else self.gate.tanh()
        weights = gate.view(-1, 1, 1) * scores.float().softmax(-1)
        return (weights.to(values.dtype) @ values).transpose(1, 2).flatten(2)

    def forward(self, host: Any, call: Call, strength: Tensor | None, *args: Any, **kwargs: Any) -> Any:
        return host.around(call, partial(self.read, host), *args, **kwargs)


@register("llama_adapter")
@dataclass(frozen=True, kw_only=True)
class LlamaAdapter(Method):
    host = AttentionHost
    suits = "very few numbers on large models; learns slowly, stays mounted"

    length: int = 10
    """Learned tokens K of every adapted layer."""
    gate: Literal["tanh", "plain"] = "tanh"
    """What scales the prompts' part: one number per head through tanh, as in the paper, or one per layer as it is (plain),
    which is the form that PEFT's files hold."""
    modules_to_save: tuple[str, ...] = ()
    """Names of modules trained in full and stored with the adapter, e.g. a new classifier."""

    def invalid(self) -> Sequence[str]:
        found = []
        if type(self.length) is not int or self.length < 1:
            found.append(f"length={self.length!r} is not a whole number of at least 1")
        if self.gate not in ("tanh", "plain"):
            found.append(f"gate={self.gate!r} is none of tanh, plain")
        if isinstance(self.modules_to_save, str):
            found.append(
                f"modules_to_save={self.modules_to_save!r} must be a list of names: [{self.modules_to_save!r}]"
            )
        return found

    def companions(self, parameters: Owned, targets: Sequence[str]) -> Mapping[Site, Method]:
        return companions("none", self.modules_to_save, parameters, targets)

    def at(self, path: str, spec: HostSpec) -> "LlamaAdapter":
        return dataclasses.replace(self, modules_to_save=())

    def build(self, spec: HostSpec) -> Adapter:
        heads, width = spec.shape
        plain = self.gate == "plain"
        adapter = LlamaAdapterAdapter(1 if plain else heads, width, self.length, plain)
        nn.init.normal_(adapter.prompt)
        return adapter
