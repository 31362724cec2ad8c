"""Bases that read images: what loads them, and adapters on them, to files and back, by our names and by older ones."""

import json
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from core import vlm
from safetensors.torch import load_file, save_file

import deltaw
from deltaw.core.errors import FileError, UseError
from deltaw.core.parts import find
from deltaw.methods.full import Full
from deltaw.methods.lora import LoRA
from deltaw.methods.token_rows import TokenRows
from deltaw.models.base import load_base, load_processor, outline
from deltaw.models.classes import class_for, loader
from deltaw.models.mapped import class_of
from deltaw.models.quantize import layers


@torch.no_grad()
def logits(model: Any, family: str) -> torch.Tensor:
    return model(**vlm.inputs(family)).logits


def moved(model: Any) -> Any:
    """Every trainable tensor moved, so that each part of the adapter has an effect."""
    torch.manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def test_a_base_that_reads_images_has_its_processor(tmp_path: Path) -> None:
    name = vlm.save("llava", tmp_path)
    base = load_base(name, dtype="fp32", device=torch.device("cpu"))
    assert type(base.model) is transformers.LlavaForConditionalGeneration and not base.model.training
    assert base.processor.tokenizer is base.tokenizer and base.max_length == 128
    assert torch.equal(logits(base.model, "llava"), logits(vlm.model("llava"), "llava"))
    assert find(outline(name)) == find(base.model)
    assert load_base("tiny", dtype="fp32").processor is None and load_processor("tiny") is None


def test_a_folder_without_a_processor(tmp_path: Path) -> None:
    name = vlm.save("gemma3", tmp_path)
    with pytest.raises(FileError, match="reads images and has no processor in its folder that can be loaded"):
        load_base(name, dtype="fp32")
    qwen = vlm.save("qwen2_vl", tmp_path / "qwen")
    kinds = {
        "processor_class": "Qwen2VLProcessor",
        "image_processor": {"image_processor_type": "Qwen2VLImageProcessor"},
    }
    (tmp_path / "qwen" / "processor_config.json").write_text(
        json.dumps({**kinds, "video_processor": {"video_processor_type": "NoSuchVideoProcessor"}})
    )
    with pytest.raises((FileError, UseError), match=r"has no processor|cannot be made"):
        load_processor(qwen)


def test_the_class_of_a_base_is_one_rule(tmp_path: Path) -> None:
    for family in vlm.FAMILIES:
        config = vlm.hollow(family).config
        found = loader(config, transformers)
        assert found.images and found.model is type(vlm.hollow(family))
        assert not loader(config.get_text_config(), transformers).images
    blind = transformers.Llama4Config(architectures=["Llama4ForCausalLM"])
    assert not loader(blind, transformers).images and loader(transformers.Llama4Config(), transformers).images
    bare = transformers.LlavaConfig(architectures=["LlavaModel"])
    assert class_for(bare, transformers) is transformers.AutoModelForImageTextToText
    assert class_for(bare, transformers, "LlavaModel") is transformers.LlavaModel
    assert class_of(vlm.save("llava", tmp_path)) is transformers.LlavaForConditionalGeneration


def adapted(family: str) -> Any:
    """LoRA on tower and language model, the projector in full, three token rows."""
    model = vlm.model(family)
    deltaw.attach(model, LoRA(rank=3, alpha=5), targets={"vision": "attention", "language": "all-linear"})
    deltaw.attach(model, Full(), targets={"projector": "all"})
    deltaw.attach(model, TokenRows(tokens=(3, 40, 101)), targets="embed_tokens")
    return moved(model)


@pytest.mark.parametrize("family", vlm.FAMILIES)
def test_an_adapter_of_all_parts_comes_back(family: str, tmp_path: Path) -> None:
    model = adapted(family)
    tuned, plain = logits(model, family), logits(vlm.model(family), family)
    assert (tuned - plain).abs().max() > 1e-3
    deltaw.save(model, tmp_path / "a")
    fresh = vlm.model(family)
    report = deltaw.load(fresh, tmp_path / "a")
    assert report.base == "match" and torch.equal(logits(fresh, family), tuned)
    theirs = peft.PeftModel.from_pretrained(vlm.model(family), str(tmp_path / "a"))
    assert (logits(theirs, family) - tuned).abs().max() < 1e-5


OLD = {  # today's prefix → that of transformers before 4.52
    "llava": [
        ("model.language_model.", "language_model.model."),
        ("lm_head", "language_model.lm_head"),
        ("model.vision_tower.", "vision_tower.vision_model."),
        ("model.multi_modal_projector", "multi_modal_projector"),
    ],
    "qwen2_vl": [("model.language_model.", "model."), ("model.visual.", "visual.")],
}
OLD |= {"gemma3": OLD["llava"], "paligemma": OLD["llava"], "qwen2_5_vl": OLD["qwen2_vl"]}


def aged(name: str, family: str) -> str:
    return next((old + name.removeprefix(new) for new, old in OLD[family] if name.startswith(new)), name)


@pytest.mark.parametrize("family", OLD)
@pytest.mark.parametrize("full", [False, True], ids=["lora", "projector in full"])
def test_names_of_older_transformers_are_read(family: str, full: bool, tmp_path: Path) -> None:
    """A file made by PEFT, its keys renamed to what they were then."""
    projector = "merger" if "qwen" in family else "multi_modal_projector"
    towers = ["qkv"] if "qwen" in family else []
    config = peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=["q_proj", "v_proj", "gate_proj", *towers], init_lora_weights=False,
        modules_to_save=[projector] if full else None,
    )  # fmt: skip
    model = moved(peft.get_peft_model(vlm.model(family), config))
    tuned = logits(model.eval(), family)
    model.save_pretrained(str(tmp_path))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    start = "base_model.model."
    old = {start + aged(key.removeprefix(start), family): tensor for key, tensor in tensors.items()}
    assert not old.keys() & tensors.keys()
    save_file(old, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    fresh = vlm.model(family)
    report = deltaw.load(fresh, tmp_path)
    assert torch.allclose(logits(fresh, family), tuned, atol=1e-6)
    note = r"\d+ modules have names of another version of transformers: \S+ is read as model\.\S+, and so on"
    assert any(re.fullmatch(note, said) for said in report.notes)
    deltaw.save(fresh, tmp_path / "new")
    again = vlm.model(family)
    assert not [said for said in deltaw.load(again, tmp_path / "new").notes if "version" in said]
    assert torch.equal(logits(again, family), logits(fresh, family))


def test_names_that_are_nobodys_are_still_refused(tmp_path: Path) -> None:
    model = peft.get_peft_model(vlm.model("llava"), peft.LoraConfig(r=2, target_modules=["linear_1"]))
    model.save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_model.safetensors"
    save_file({key.replace("linear_1", "linear_9"): tensor for key, tensor in load_file(file).items()}, file)
    with pytest.raises(FileError, match="the model has no such module"):
        deltaw.load(vlm.model("llava"), tmp_path)


def test_only_the_language_model_is_quantized(tmp_path: Path) -> None:
    """The projector can be trained in full beside it, and what a plan counts is what is quantised."""
    base = load_base(str(vlm.save("llava", tmp_path / "llava")), quantize="nf4", dtype="fp32")
    parts = find(base.model)
    assert parts is not None
    coarse = {path for path, module in base.model.named_modules() if type(module).__name__ == "Linear4bit"}
    assert coarse and {parts.of(path) for path in coarse} == {"language"}
    hollow = outline(base.name)
    names = {id(module): path for path, module in hollow.named_modules()}
    assert {names[id(module)] for module in layers(hollow)} == coarse
    deltaw.attach(base.model, Full(), targets={"projector": "all"})
    loss = base.model(**vlm.inputs("llava")).loss
    loss.backward()
    trained = [p for p in base.model.parameters() if p.requires_grad]
    assert trained and all(p.grad is not None and p.grad.any() for p in trained)
