"""Tiny random image-text models of nine families, and inputs for them: 42,000 to 90,000 parameters each.

A row is bos, the image's tokens (between start and end where the family has them) and six tokens of text, of which the
last four are labelled.
"""

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers as t

FAMILIES = ("llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "gemma3", "paligemma", "idefics3", "smolvlm", "internvl")
TEXT = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16,
    "patch_size": 4,
}  # fmt: skip
IMAGE, START, END = 100, 102, 103
QWEN_IDS = {
    "image_token_id": IMAGE, "video_token_id": 101, "vision_start_token_id": START, "vision_end_token_id": END,
}  # fmt: skip
QWEN_VISION = {
    "depth": 2, "hidden_size": 32, "num_heads": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3,
    "patch_size": 4,
}  # fmt: skip
ROPE = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}


def _llava() -> Any:
    vision = t.CLIPVisionConfig(**{**VISION, "num_hidden_layers": 3}, projection_dim=32)
    config = t.LlavaConfig(
        vision_config=vision, text_config=t.LlamaConfig(**TEXT), image_token_index=IMAGE, image_token_id=IMAGE,
        vision_feature_layer=-2, vision_feature_select_strategy="default", image_seq_length=16,
    )  # fmt: skip
    return t.LlavaForConditionalGeneration(config)


def _qwen2_vl() -> Any:
    vision = {**QWEN_VISION, "embed_dim": 32, "mlp_ratio": 2}
    text = {**TEXT, "rope_parameters": ROPE}
    return t.Qwen2VLForConditionalGeneration(t.Qwen2VLConfig(text_config=text, vision_config=vision, **QWEN_IDS))


def _qwen2_5_vl() -> Any:
    sizes = {"out_hidden_size": 32, "intermediate_size": 64, "window_size": 16, "fullatt_block_indexes": [1]}
    config = t.Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_parameters": ROPE}, vision_config={**QWEN_VISION, **sizes}, **QWEN_IDS
    )
    return t.Qwen2_5_VLForConditionalGeneration(config)


def _qwen3_vl() -> Any:
    sizes = {"out_hidden_size": 32, "intermediate_size": 64, "num_position_embeddings": 16}
    text = {**TEXT, "head_dim": 8, "rope_parameters": {**ROPE, "mrope_interleaved": True}}
    vision = {**QWEN_VISION, **sizes, "deepstack_visual_indexes": [0]}
    return t.Qwen3VLForConditionalGeneration(t.Qwen3VLConfig(text_config=text, vision_config=vision, **QWEN_IDS))


def _gemma3() -> Any:
    config = t.Gemma3Config(
        text_config={**TEXT, "head_dim": 8, "sliding_window": 32}, mm_tokens_per_image=4, image_token_index=IMAGE,
        vision_config={**VISION, "vision_use_head": False}, image_token_id=IMAGE, boi_token_index=START,
        eoi_token_index=END,
    )  # fmt: skip
    return t.Gemma3ForConditionalGeneration(config)


def _paligemma() -> Any:
    text = {**TEXT, "model_type": "gemma", "num_key_value_heads": 1, "head_dim": 8}
    vision = {**VISION, "model_type": "siglip_vision_model", "vision_use_head": False}
    config = t.PaliGemmaConfig(
        text_config=text, vision_config=vision, projection_dim=32, hidden_size=32, image_token_index=IMAGE,
        image_token_id=IMAGE,
    )  # fmt: skip
    return t.PaliGemmaForConditionalGeneration(config)


def _idefics(model: type, config: type) -> Any:
    text = t.LlamaConfig(**TEXT)
    return model(config(text_config=text, vision_config=VISION, scale_factor=2, pad_token_id=0, image_token_id=IMAGE))


def _idefics3() -> Any:
    return _idefics(t.Idefics3ForConditionalGeneration, t.Idefics3Config)


def _smolvlm() -> Any:
    return _idefics(t.SmolVLMForConditionalGeneration, t.SmolVLMConfig)


def _internvl() -> Any:
    config = t.InternVLConfig(
        text_config=t.Qwen2Config(**TEXT), vision_config={**VISION, "image_size": [16, 16], "patch_size": [4, 4]},
        image_token_id=IMAGE, image_seq_length=4, downsample_ratio=0.5, vision_feature_layer=-1,
    )  # fmt: skip
    return t.InternVLForConditionalGeneration(config)


BUILDERS: dict[str, Callable[[], Any]] = {name: globals()[f"_{name}"] for name in FAMILIES}


@functools.cache
def _built(family: str) -> Any:
    torch.manual_seed(3)
    model = BUILDERS[family]()
    if family == "gemma3":  # it starts at zero, and nothing in the tower would get a gradient
        torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.1)
    return model


def model(family: str) -> Any:
    """A fresh copy, in eval mode."""
    return copy.deepcopy(_built(family)).eval()


def hollow(family: str) -> Any:
    """The same on the meta device."""
    with torch.device("meta"):
        return BUILDERS[family]()


def inputs(family: str) -> dict[str, Any]:
    """Two rows with an image each, and their labels: what the model's forward takes."""
    generator = torch.Generator().manual_seed(5)
    framed = "qwen" in family or family == "gemma3"
    tokens = [IMAGE] * (16 if family in ("llava", "paligemma") else 4)
    image = [START, *tokens, END] if framed else tokens
    text = torch.randint(3, 99, (2, 6), generator=generator)
    ids = torch.cat([torch.tensor([[1, *image]] * 2), text], 1)
    labels = ids.clone()
    labels[:, :-4] = -100
    pixels = (
        (32, 96) if "qwen" in family else (2, 1, 3, 16, 16) if family in ("idefics3", "smolvlm") else (2, 3, 16, 16)
    )
    batch: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    batch["pixel_values"] = torch.randn(pixels, generator=generator)
    if "qwen" in family:
        batch["image_grid_thw"] = torch.tensor([[1, 4, 4]] * 2)
        batch["mm_token_type_ids"] = (ids == IMAGE).int()
    if family == "gemma3":
        batch["token_type_ids"] = (ids == IMAGE).long()
    if family == "paligemma":
        batch["token_type_ids"] = (labels != -100).long()
    return batch


def tokenizer() -> Any:
    """Characters and the special tokens, with the ids that the models have for them."""
    words = ["<pad>", "<s>", "</s>", *map(chr, range(32, 127))]
    words += [f"<{number}>" for number in range(len(words), 128)]
    words[IMAGE : END + 1] = ["<image>", "<video>", "<start>", "<end>"]
    table = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="~"))
    table.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    table.decoder = tokenizers.decoders.Fuse()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    images = {"image_token": "<image>", "video_token": "<video>"}
    return t.PreTrainedTokenizerFast(
        tokenizer_object=table, **special, extra_special_tokens=images, additional_special_tokens=["<start>", "<end>"]
    )


def processor() -> Any:
    """LLaVA's: images of any size become 16×16, which is 16 tokens."""
    images = t.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    return t.LlavaProcessor(
        images, tokenizer(), patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )


def save(family: str, folder: Path) -> str:
    """The model in a folder, with a tokenizer, and LLaVA's with a processor."""
    model(family).save_pretrained(folder)
    (processor() if family == "llava" else tokenizer()).save_pretrained(folder)
    return str(folder)
