"""Tiny Stable Diffusion and SDXL of random weights, as folders of configurations and as live parts; shared by the tests here."""

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers as t
from torch import nn

SMALL: dict[str, Any] = {"sample_size": 8, "norm_num_groups": 8, "attention_head_dim": 4, "cross_attention_dim": 32}
UNETS: dict[str, dict[str, Any]] = {
    "sd": {
        **SMALL, "block_out_channels": (16, 32), "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    },
    "sdxl": {
        **SMALL, "block_out_channels": (16, 32, 32), "layers_per_block": 1, "use_linear_projection": True,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "transformer_layers_per_block": (1, 1, 2),
        "addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 80,
    },
}  # fmt: skip
ENCODERS = {"sd": ("text_encoder",), "sdxl": ("text_encoder", "text_encoder_2")}
CLASSES = {"unet": ("diffusers", "UNet2DConditionModel"), "text_encoder": ("transformers", "CLIPTextModel")}
CLASSES["text_encoder_2"] = ("transformers", "CLIPTextModelWithProjection")
LOADERS = {
    "sd": diffusers.loaders.StableDiffusionLoraLoaderMixin,
    "sdxl": diffusers.loaders.StableDiffusionXLLoraLoaderMixin,
}
IDS = torch.randint(1, 60, (2, 9), generator=torch.Generator().manual_seed(0))


def build(family: str) -> dict[str, nn.Module]:
    """The parts that carry adapters, with the same weights every time."""
    torch.manual_seed(7)
    text = t.CLIPTextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, projection_dim=32,
        max_position_embeddings=16, bos_token_id=0, eos_token_id=63,
    )  # fmt: skip
    parts: dict[str, nn.Module] = {"unet": diffusers.UNet2DConditionModel(**UNETS[family])}
    for role in ENCODERS[family]:
        parts[role] = getattr(t, CLASSES[role][1])(text)
    return {role: part.eval().requires_grad_(False) for role, part in parts.items()}


def folder(family: str, path: Path) -> Path:
    """The pipeline's configurations, as its folder has them."""
    index: dict[str, Any] = {"_class_name": "StableDiffusionPipeline", "vae": ["diffusers", "AutoencoderKL"]}
    for role, part in build(family).items():
        index[role] = CLASSES[role]
        if role == "unet":
            part.save_config(path / role)  # type: ignore[operator]
        else:
            part.config.save_pretrained(path / role)  # type: ignore[operator, union-attr]
    (path / "model_index.json").write_text(json.dumps({**index, "safety_checker": [None, None]}))
    return path


@torch.no_grad()
def outputs(part: nn.Module) -> torch.Tensor:
    """What a part makes of fixed inputs."""
    random = torch.Generator().manual_seed(1)
    if isinstance(part, t.PreTrainedModel):
        return part(input_ids=IDS).last_hidden_state
    image, words = torch.randn(2, 4, 8, 8, generator=random), torch.randn(2, 5, 32, generator=random)
    added = {"text_embeds": torch.randn(2, 32, generator=random), "time_ids": torch.rand(2, 6, generator=random)}
    return part(image, 3, encoder_hidden_states=words, added_cond_kwargs=added).sample


def randomise(part: nn.Module) -> None:
    """Move every trained tensor, so that the adapter has an effect."""
    random = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in part.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=random) * 0.2)


def load_with_diffusers(family: str, path: Path, parts: dict[str, nn.Module]) -> None:
    """As `pipeline.load_lora_weights(path)` does, into the parts."""
    loader: Any = LOADERS[family]
    options = {"unet_config": parts["unet"].config} if family == "sdxl" else {}
    state, alphas, metadata = loader.lora_state_dict(str(path), return_lora_metadata=True, **options)
    loader.load_lora_into_unet(state, network_alphas=alphas, unet=parts["unet"], metadata=metadata)
    for role in ENCODERS[family]:
        loader.load_lora_into_text_encoder(
            state, network_alphas=alphas, text_encoder=parts[role], prefix=role, metadata=metadata
        )
