"""The layers that the contract suite puts every method on: small, never square, nothing divides anything."""

from collections.abc import Callable
from dataclasses import dataclass

import bitsandbytes
import torch
from torch import Tensor, nn
from transformers import BertConfig, GPT2Config, GptOssConfig, LlamaConfig, MixtralConfig, Qwen3Config
from transformers.models.bert.modeling_bert import BertLayer
from transformers.models.gpt2.modeling_gpt2 import GPT2Block
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer
from transformers.pytorch_utils import Conv1D


def plainly(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x)


def routed(experts: nn.Module, x: Tensor) -> Tensor:
    """Two experts for each of the tokens x: [T, in], the first the more; the last expert gets none."""
    token = torch.arange(len(x))[:, None] * torch.tensor([1, 2])
    weights = torch.tensor([0.7, 0.4], dtype=x.dtype).expand(len(x), 2)
    return experts(x, (token + torch.tensor([0, 1])) % (experts.num_experts - 1), weights)


@dataclass(frozen=True)
class HostCase:
    make: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    linear: bool = True
    """Is the output linear in the weights? Of a whole block it is not: changes of weights add up, those of outputs do not."""
    lossy: bool = False
    """Writing a weight rounds it to a few bits: what that loses is part of what a merge must compute, to the same 1e-5."""
    rounds_input: bool = False
    """In evaluation the layer itself rounds its input: outputs of the two modes are compared by what the adapter adds."""
    call: Callable[[nn.Module, Tensor], Tensor] = plainly

    def net(self) -> "Net":
        return Net(self.make(), self.call)


class Net(nn.Module):
    """The layer, and a neighbour that nothing may touch; half of its flags are off to begin with."""

    def __init__(self, layer: nn.Module, call: Callable[[nn.Module, Tensor], Tensor] = plainly):
        super().__init__()
        self.layer = layer
        self.call = call
        self.neighbour = nn.Linear(3, 2)
        self.neighbour.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.layer, x)


def _fused_qkv() -> nn.Linear:
    """Three query heads and one key-value head of 8: grouped-query attention in one matrix."""
    return nn.Linear(24, (3 + 2 * 1) * 8, bias=False)


def _conv1d_of_gpt2() -> nn.Module:
    layer = Conv1D(48, 32)
    nn.init.normal_(layer.weight, std=0.2)
    nn.init.normal_(layer.bias)
    return layer


class Rotated(nn.Module):
    """A decoder layer that is called with its positions."""

    def __init__(self, layer: nn.Module, head: int):
        super().__init__()
        self.block = layer
        angles = torch.arange(16)[:, None] * 100.0 ** -(torch.arange(head // 2) / (head // 2))  # [T, d/2]
        self.angles = torch.cat((angles, angles), dim=-1)  # no buffer: positions are not rounded with the weights

    def forward(self, x: Tensor) -> Tensor:
        angles = self.angles[None, : x.shape[1]]
        positions = (angles.cos().to(x.dtype), angles.sin().to(x.dtype))
        return self.block(x, position_embeddings=positions, attention_mask=None)


def _wide(block: nn.Module) -> nn.Module:
    """Weights as large as those of a trained block: libraries start near zero."""
    for parameter in block.parameters():
        nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.2)
    return block


GROUPED = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 8,
}


def _llama_block() -> nn.Module:
    config = LlamaConfig(**GROUPED, attention_bias=True, attn_implementation="sdpa")
    return _wide(Rotated(LlamaDecoderLayer(config, 0), 8))


def _qwen_block() -> nn.Module:
    """Heads that are normalised, and together wider than the layer."""
    config = Qwen3Config(**{**GROUPED, "num_attention_heads": 4, "num_key_value_heads": 2}, attn_implementation="sdpa")
    return _wide(Rotated(Qwen3DecoderLayer(config, 0), 8))


def _gpt2_block() -> nn.Module:
    off = {"attn_pdrop": 0.0, "resid_pdrop": 0.0}
    return _wide(GPT2Block(GPT2Config(n_embd=24, n_head=3, n_inner=40, attn_implementation="sdpa", **off), 0))


def _bert_block() -> nn.Module:
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = BertConfig(hidden_size=24, num_attention_heads=3, intermediate_size=40, attn_implementation="sdpa", **off)
    return _wide(BertLayer(config, 0))


def _nf4(double: bool) -> nn.Module:
    return bitsandbytes.nn.LinearNF4(64, 48, compress_statistics=double).to("cpu")


def _int8() -> nn.Module:
    return bitsandbytes.nn.Linear8bitLt(64, 48, has_fp16_weights=False).to("cpu")


def _experts(kind: type[nn.Module], config: type, implementation: str) -> nn.Module:
    """Five experts, wider inside than outside."""
    small = config(hidden_size=24, intermediate_size=40, num_local_experts=5)
    small._experts_implementation = implementation
    experts = kind(small)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.2)
    return experts


HOSTS = {
    "linear": HostCase(lambda: nn.Linear(32, 48), lambda: torch.randn(2, 5, 32)),
    "linear-no-bias": HostCase(lambda: nn.Linear(37, 53, bias=False), lambda: torch.randn(7, 37)),
    "linear-one-output": HostCase(lambda: nn.Linear(64, 1), lambda: torch.randn(5, 64)),
    "linear-fused-qkv": HostCase(_fused_qkv, lambda: torch.randn(2, 5, 24)),
    "conv1d-of-gpt2": HostCase(_conv1d_of_gpt2, lambda: torch.randn(2, 5, 32)),
    "embedding": HostCase(lambda: nn.Embedding(40, 16), lambda: torch.randperm(40).view(4, 10)),
    "conv1d": HostCase(lambda: nn.Conv1d(6, 9, 5, padding=2), lambda: torch.randn(2, 6, 11)),
    "conv2d": HostCase(
        lambda: nn.Conv2d(3, 8, (3, 2), stride=2, padding=(2, 1), dilation=2), lambda: torch.randn(2, 3, 9, 8)
    ),
    "conv2d-circular": HostCase(
        lambda: nn.Conv2d(3, 7, 3, padding="same", padding_mode="circular", bias=False), lambda: torch.randn(2, 3, 5, 6)
    ),
    "conv2d-grouped": HostCase(lambda: nn.Conv2d(6, 10, 3, groups=2), lambda: torch.randn(2, 6, 7, 7)),
    "conv2d-depthwise": HostCase(lambda: nn.Conv2d(6, 12, 3, groups=6), lambda: torch.randn(2, 6, 7, 7)),
    "conv3d": HostCase(lambda: nn.Conv3d(2, 5, 2), lambda: torch.randn(2, 2, 4, 4, 4)),
    "bnb-nf4": HostCase(lambda: _nf4(False), lambda: torch.randn(2, 5, 64), lossy=True),
    "bnb-nf4-double": HostCase(lambda: _nf4(True), lambda: torch.randn(2, 5, 64), lossy=True),
    "bnb-int8": HostCase(_int8, lambda: torch.randn(2, 5, 64), lossy=True, rounds_input=True),
    "layernorm": HostCase(lambda: nn.LayerNorm(32), lambda: torch.randn(2, 5, 32)),
    "llama-block": HostCase(_llama_block, lambda: torch.randn(2, 5, 24), linear=False),
    "qwen-block": HostCase(_qwen_block, lambda: torch.randn(2, 5, 24), linear=False),
    "gpt2-block": HostCase(_gpt2_block, lambda: torch.randn(2, 5, 24), linear=False),
    "bert-block": HostCase(_bert_block, lambda: torch.randn(2, 5, 24), linear=False),
    "experts": HostCase(
        lambda: _experts(MixtralExperts, MixtralConfig, "batched_mm"),
        lambda: torch.randn(7, 24),
        linear=False,
        call=routed,
    ),
    "experts-transposed": HostCase(
        lambda: _experts(GptOssExperts, GptOssConfig, "grouped_mm"),
        lambda: torch.randn(7, 24),
        linear=False,
        call=routed,
    ),
}
