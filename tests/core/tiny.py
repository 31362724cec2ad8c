"""Tiny random models of the families people adapt. Built once, copied for every test."""

import copy
import functools
from typing import Any

import torch
import transformers


@functools.cache
def _built(family: str) -> Any:
    torch.manual_seed(1)
    return globals()[f"_{family}"]()


def model(family: str) -> Any:
    """A fresh copy, in eval mode: llama, gpt2, bert, t5 or clip."""
    return copy.deepcopy(_built(family)).eval()


def ids(rows: int = 2, length: int = 7) -> torch.Tensor:
    return torch.randint(3, 60, (rows, length))


def _llama(**changes: Any) -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**sizes, **heads, **changes}))


def _tied() -> Any:
    return _llama(tie_word_embeddings=True)


def _gpt2() -> Any:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=64)
    )


def _bert() -> Any:
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=64
        )
    )


def _t5() -> Any:
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=64)
    )


def _clip() -> Any:
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    return transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config={**small, "vocab_size": 64, "max_position_embeddings": 16},
            vision_config={**small, "image_size": 8, "patch_size": 4},
            projection_dim=16,
        )
    )
