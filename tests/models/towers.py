"""Tiny random towers and language models in folders, for what is assembled of them."""

from pathlib import Path
from typing import Any

import torch
import transformers

from deltaw.models.base import TINY

TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
SEEN = {"image_size": 16, "patch_size": 4}
WORDS = {
    "vocab_size": 4096, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "eos_token_id": 4, "bos_token_id": None,
}  # fmt: skip
LANGUAGES = {
    "llama": transformers.LlamaConfig,
    "mistral": transformers.MistralConfig,
    "gemma": transformers.GemmaConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
}


def clip(folder: Path, *, whole: bool = False, size: int = 16) -> str:
    """A CLIP tower of 4 x 4 patches; `whole`: with its text side, as CLIP is published."""
    torch.manual_seed(1)
    vision = {**TOWER, **SEEN, "projection_dim": 32}
    if whole:
        text = {
            **TOWER,
            "num_hidden_layers": 1,
            "vocab_size": 64,
            "projection_dim": 32,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        transformers.CLIPModel(
            transformers.CLIPConfig(vision_config=vision, text_config=text, projection_dim=32)
        ).save_pretrained(folder)
    else:
        transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**vision)).save_pretrained(folder)
    crop = {"height": size, "width": size}
    transformers.CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size=crop).save_pretrained(folder)
    return str(folder)


def siglip(folder: Path) -> str:
    torch.manual_seed(2)
    transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**TOWER, **SEEN)).save_pretrained(folder)
    transformers.SiglipImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return str(folder)


def convnext(folder: Path) -> str:
    """Four stages, 4 to 32 pixels to a cell."""
    torch.manual_seed(3)
    config = transformers.ConvNextConfig(hidden_sizes=[8, 16, 32, 64], depths=[1, 1, 2, 1])
    transformers.ConvNextModel(config).save_pretrained(folder)
    transformers.ConvNextImageProcessorPil(size={"shortest_edge": 64}).save_pretrained(folder)
    return str(folder)


def language(folder: Path, kind: str = "llama", **changes: Any) -> str:
    """A random language model of a kind, with the bundled base's tokenizer."""
    torch.manual_seed(4)
    config = LANGUAGES[kind](**{**WORDS, "head_dim": 8, **changes})
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(TINY).save_pretrained(folder)
    return str(folder)


def picture(seed: int = 0, size: tuple[int, int] = (20, 14)) -> Any:
    """A picture of noise."""
    from PIL import Image

    noise = torch.randint(0, 256, (*size, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(noise.numpy())
