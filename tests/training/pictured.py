"""A tiny LLaVA on disk with its processor, and rows about one-coloured pictures: seconds for some steps."""

import json
from pathlib import Path
from typing import Any

import torch
from pictures import llava
from PIL import Image
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220), "white": (250, 250, 250)}


def base(folder: Path, *, pixels: int = 16, patch: int = 4, vision: Any = None, **text: Any) -> Path:
    """Configuration, weights, tokenizer, processor. vision, text: other sizes of the tower and of the language model."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    tower = {
        **sizes,
        "num_hidden_layers": 3,
        "image_size": pixels,
        "patch_size": patch,
        "projection_dim": 32,
        **(vision or {}),
    }
    words = {
        **sizes, "vocab_size": 320, "num_hidden_layers": 2, "num_key_value_heads": 2, "max_position_embeddings": 256,
        "pad_token_id": 257, "bos_token_id": 258, "eos_token_id": 256, **text,
    }  # fmt: skip
    processor = llava()
    processor.image_processor.size, processor.patch_size = {"height": pixels, "width": pixels}, patch
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**tower), text_config=LlamaConfig(**words), image_token_id=processor.image_token_id,
        image_seq_length=(pixels // patch) ** 2, vision_feature_layer=-2,
    )  # fmt: skip
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def rows(folder: Path, *, pictured: int = 8, plain: int = 0) -> Path:
    """plain rows of text first, then rows with an image each."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, colour in COLOURS.items():
        Image.new("RGB", (16, 16), colour).save(folder / f"{name}.png")
    found: list[dict[str, Any]] = [{"prompt": f"say {n}", "completion": f"{n}."} for n in range(plain)]
    for number in range(pictured):
        name = list(COLOURS)[number % len(COLOURS)]
        found.append({"prompt": "<image>Colour?", "completion": f"{name}.", "image": f"{name}.png"})
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
    return file


def config(base: Path, rows: Path, output: Path, parts: Any, **train: Any) -> dict[str, Any]:
    settings = {"max_steps": 2, "batch_size": 4, "learning_rate": 1e-2, "log_every": 1, "warmup": 0.0, **train}
    return {
        "model": str(base), "data": {"train": str(rows), "eval": None}, "adapter": {"rank": 2, "parts": parts},
        "train": settings, "output": str(output),
    }  # fmt: skip
