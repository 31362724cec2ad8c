"""The outline of a base: every kind of folder by its configuration alone, and what is said of one that cannot be built."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers as t

from deltaw.core.errors import FileError, UseError
from deltaw.core.method import Site
from deltaw.models.outlines import outlines

TEXT = t.CLIPTextConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, max_position_embeddings=16,
    bos_token_id=0, eos_token_id=63,
)  # fmt: skip


def write(path: Path, record: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(record if isinstance(record, str) else json.dumps(record))
    return path.parent


def test_models_of_transformers(tmp_path: Path) -> None:
    tiny = outlines("tiny")
    assert list(tiny.parts) == ["model"] and not tiny.pipeline and tiny.config["model_type"] == "llama"
    spec = tiny.parts["model"].specs[Site("model.layers.0.self_attn.q_proj")]
    assert len(spec.shape) == 2 and tiny.parts["model"].specs[Site("model.embed_tokens")].lookup
    t.BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=32,
                 architectures=["BertForSequenceClassification"], num_labels=3).save_pretrained(tmp_path / "bert")  # fmt: skip
    bert = outlines(str(tmp_path / "bert")).parts["model"]
    assert bert.specs[Site("classifier")].shape == (3, 16) and "bias" in bert.entries["classifier"]
    gpt2 = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_layer": 1,
        "n_embd": 8,
        "n_head": 2,
        "vocab_size": 16,
    }
    fused = outlines(str(write(tmp_path / "gpt2/config.json", gpt2))).parts["model"]
    assert fused.specs[Site("transformer.h.0.attn.c_attn")].shape == (24, 8)  # canonical, whatever way it is stored
    assert "transformer.h.0.attn.c_attn" in fused.transposed
    clip = t.CLIPTextModel(TEXT)
    clip.config.architectures = ["CLIPTextModel"]
    clip.config.save_pretrained(tmp_path / "clip")
    assert list(outlines(str(tmp_path / "clip")).parts) == ["text_encoder"]


def test_a_base_that_cannot_be_built_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = {
        "_class_name": "StableDiffusionPipeline",
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": [None, None],
    }
    cases: list[tuple[Any, str]] = [
        (index, "none of the parts that carry adapters"),
        ({**index, "unet": ["diffusers", "UNet9DModel"]}, "UNet9DModel, which the installed diffusers does not have"),
        ({**index, "unet": ["other", "UNet"]}, "only parts of diffusers and transformers are known"),
        (
            {**index, "text_encoder": ["transformers", "CLAPModelX"]},
            "CLAPModelX, which the installed transformers does not have",
        ),
        ({**index, "text_encoder": ["transformers", "CLIPTextModel"]}, "holds no text_encoder/config.json"),
        ({**index, "unet": ["diffusers", "UNet2DConditionModel"]}, "cannot be built from its configuration"),
        ("{", "cannot be read"),
    ]
    for number, (record, said) in enumerate(cases):
        with pytest.raises(FileError, match=said):
            outlines(str(write(tmp_path / str(number) / "model_index.json", record)))
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UseError, match=r"pip install 'deltaw\[diffusion\]'"):
        outlines(str(write(tmp_path / "unet/config.json", {"_class_name": "UNet2DConditionModel"})))
