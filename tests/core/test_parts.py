"""Which modules are a model's vision encoder, projector, language model and head."""

import re
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from core import tiny, vlm
from deltaw.core.attach import attach
from deltaw.core.errors import TargetError
from deltaw.core.parts import find
from deltaw.methods.full import Full
from deltaw.methods.lora import LoRA

LORA = LoRA(rank=4, alpha=8)
USUAL = {
    "vision": ("model.vision_tower",),
    "projector": ("model.multi_modal_projector",),
    "language": ("model.language_model",),
    "head": ("lm_head",),
}
QWEN = {**USUAL, "vision": ("model.visual",), "projector": ("model.visual.merger",)}
IDEFICS = {
    **USUAL, "vision": ("model.vision_model",), "projector": ("model.connector",), "language": ("model.text_model",),
}  # fmt: skip
ROOTS = {
    "llava": USUAL,
    "qwen2_vl": QWEN,
    "qwen2_5_vl": QWEN,
    "qwen3_vl": {**QWEN, "projector": ("model.visual.merger", "model.visual.deepstack_merger_list")},
    "gemma3": USUAL,
    "paligemma": USUAL,
    "idefics3": IDEFICS,
    "smolvlm": IDEFICS,
    "internvl": USUAL,
}


@pytest.mark.parametrize("family", vlm.FAMILIES)
def test_every_parameter_of_a_known_family_has_a_part(family: str) -> None:
    model = vlm.model(family)
    parts = find(model)
    assert parts is not None and dict(parts.roots) == ROOTS[family] and parts.unowned == ()
    assert find(vlm.hollow(family)) == parts
    owners = {parts.of(name) for name, _ in model.named_parameters(remove_duplicate=False)}
    assert owners == {"vision", "projector", "language", "head"}


@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "gemma3"])
def test_adapters_change_nothing(family: str) -> None:
    model = vlm.model(family)
    before = find(model)
    attach(model, LORA, targets={"vision": "all-linear", "language": "all-linear"})
    attach(model, Full(), targets="lm_head", name="whole")
    assert find(model) == before
    bare = vlm.model(family).model
    parts = find(bare)
    assert parts is not None and parts.unowned == () and parts.roots["language"] == ("language_model",)
    assert "head" not in parts.roots


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5", "clip"])
def test_a_model_of_one_part_has_none(family: str) -> None:
    assert find(tiny.model(family)) is None
    assert find(nn.Sequential(nn.Linear(3, 4))) is None


def test_the_longest_root_owns() -> None:
    parts = find(vlm.model("qwen2_vl"))
    assert parts is not None
    assert parts.of("model.visual.merger.mlp.0") == "projector"
    assert parts.of("model.visual.blocks.0.attn.qkv") == parts.of("model.visual") == "vision"
    assert parts.of("model") is parts.of("") is parts.of("model.visualiser") is None


class Sees(nn.Module):
    """A tower beside a language model, with a parameter of its own and a part that no name tells."""

    def __init__(self) -> None:
        super().__init__()
        self.tower, self.language, self.lift = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.head, self.newline = nn.Linear(6, 9), nn.Parameter(torch.zeros(6))

    def get_encoder(self, modality: str) -> Any:
        return self.tower if modality == "image" else self

    def get_decoder(self) -> Any:
        return self.language

    def get_output_embeddings(self) -> Any:
        return self.head


def test_what_no_part_owns_is_said_and_the_user_says_whose_it_is() -> None:
    parts = find(Sees())
    assert parts is not None
    assert parts.roots == {"vision": ("tower",), "language": ("language",), "head": ("head",)}
    assert parts.unowned == ("newline", "lift.weight", "lift.bias")
    told = find(Sees(), {"projector": ["lift", "newline"]})
    assert told is not None and told.unowned == () and told.of("newline") == told.of("lift.bias") == "projector"


class Reads(Sees):
    """Its encoder is what it gives unasked: one of text (SeamlessM4T, T5Gemma 2)."""

    def get_encoder(self, modality: str | None = None) -> Any:
        return self.tower


def test_an_encoder_of_text_is_no_tower() -> None:
    assert find(Reads()) is None


def test_what_is_given_wins() -> None:
    model = vlm.model("qwen2_vl")
    parts = find(model, {"output_projector": ["mlp.2"], "vision": ["patch_embed"]})  # names, at any depth
    assert parts is not None
    assert parts.of("model.visual.merger.mlp.2") == "output_projector"
    assert parts.of("model.visual.merger.mlp.0") == "projector"
    assert parts.roots["vision"] == ("model.visual.patch_embed", "model.visual")
    whole = find(model, {"vision": ["model.visual"]})
    assert whole is not None and "projector" not in whole.roots
    llama = find(tiny.model("llama"), {"lower": ["model.layers.0"]})
    assert llama is not None and llama.roots == {"lower": ("model.layers.0",)}
    assert "model.layers.1.mlp.up_proj.weight" in llama.unowned


def test_given_parts_that_are_not_there() -> None:
    with pytest.raises(TargetError) as error:
        find(vlm.model("llava"), {"audio": ["audio_tower"], "projector": ["vision_towr"]})
    assert len(error.value.faults) == 2
    assert "part 'projector': no module or parameter is called 'vision_towr'; did you mean 'vision_tower'?" in str(
        error.value
    )
    sentence = "model.visual.merger is said to be of 'a' and of 'b': leave one out"
    with pytest.raises(TargetError, match=re.escape(sentence)):
        find(vlm.model("qwen2_vl"), {"a": ["merger"], "b": ["model.visual.merger"]})


def test_an_encoder_that_hears_is_a_part() -> None:
    text = {**vlm.TEXT, "model_type": "qwen2"}
    hears = {
        "model_type": "qwen2_audio_encoder", "encoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 64,
        "d_model": 32, "num_mel_bins": 16, "max_source_positions": 16,
    }  # fmt: skip
    with torch.device("meta"):
        model = transformers.Qwen2AudioForConditionalGeneration(
            transformers.Qwen2AudioConfig(text_config=text, audio_config=hears)
        )
    parts = find(model)
    assert parts is not None and parts.unowned == ()
    assert set(parts.roots) == {"audio", "projector", "language", "head"}
