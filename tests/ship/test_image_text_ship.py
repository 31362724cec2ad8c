"""Adapters of bases that read images: merged in memory and into a folder, checked on a picture, exported."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from core import vlm
from safetensors.torch import load_file, save_file

import deltaw
from deltaw.core.errors import MergeError
from deltaw.methods.full import Full
from deltaw.methods.lora import LoRA
from deltaw.methods.token_rows import TokenRows
from deltaw.models.base import load_base
from deltaw.ship import check as checking
from deltaw.ship.acceptance import read_facts
from deltaw.ship.engines import check
from deltaw.ship.export import export
from deltaw.ship.look import base_of
from deltaw.ship.merge import merge_to_folder
from deltaw.ship.picture import picture

EVERYWHERE = {"vision": "all-linear", "language": ["q_proj", "v_proj"]}


@torch.no_grad()
def logits(model: Any, family: str) -> torch.Tensor:
    return model.eval()(**vlm.inputs(family)).logits


def trained(family: str, folder: Path, targets: Any, full: bool = False, tokens: tuple[int, ...] = ()) -> Any:
    """An adapter that does something, in a folder, and the model that it is on."""
    model = vlm.model(family)
    if targets:
        deltaw.attach(model, LoRA(rank=3, alpha=6), targets=targets)
    if full:
        deltaw.attach(model, Full(), targets={"projector": "all"})
    if tokens:
        deltaw.attach(model, TokenRows(tokens=tokens), targets=["embed_tokens", "lm_head"])
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.1)
    deltaw.save(model, folder)
    return model


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_a_merged_folder_sees_what_the_adapter_saw(family: str, tmp_path: Path) -> None:
    base = vlm.save(family, tmp_path / "base")
    tuned = logits(trained(family, tmp_path / "a", EVERYWHERE, full=True, tokens=(3, 40)), family)
    done = merge_to_folder(base, tmp_path / "a", tmp_path / "m")
    assert done.way == "shards" and not done.vanished and done.max_logit_difference < 1e-4 < done.effect
    merged = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "m", dtype=torch.float32)
    assert type(merged) is type(vlm.model(family))
    assert (logits(merged, family) - tuned).abs().max() < 1e-5
    blind = [said for said in done.remarks if "no row with a picture was compared" in said]
    assert bool(blind) == (family == "qwen2_vl")  # its folder has no processor
    if family == "llava":
        again = load_base(str(tmp_path / "m"), dtype="fp32", device=torch.device("cpu"))
        assert again.processor.tokenizer is again.tokenizer


@pytest.mark.parametrize("family", vlm.FAMILIES)
def test_merged_in_memory_it_computes_the_same(family: str, tmp_path: Path) -> None:
    model = trained(family, tmp_path / "a", EVERYWHERE if "qwen" not in family else {"vision": "all-linear"}, full=True)
    tuned = logits(model, family)
    report = deltaw.merge(model)
    assert report.changed == report.weights
    assert (logits(model, family) - tuned).abs().max() < 1e-5


def test_what_changes_in_seeing_alone_is_held_against_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = vlm.save("llava", tmp_path / "base")
    trained("llava", tmp_path / "a", {"vision": "attention"})
    done = merge_to_folder(base, tmp_path / "a", tmp_path / "m")
    assert done.effect > 1e-4 > done.max_logit_difference and not done.remarks
    row = picture(base).row
    assert row is not None and int((row["input_ids"] == vlm.IMAGE).sum()) == 16 and row["pixel_values"].ndim == 4
    assert torch.equal(row["pixel_values"], picture(base).row["pixel_values"]) and picture("tiny").row is None

    plain = checking.logits

    def blurred(model: Any, row: Any) -> torch.Tensor:  # as if the tower had been written wrong
        written = not any(hasattr(module, "adapters") for module in model.modules())
        return plain(model, row) + (written and not isinstance(row, torch.Tensor))

    monkeypatch.setattr(checking, "logits", blurred)
    with pytest.raises(MergeError, match="differs from the adapter by"):
        merge_to_folder(base, tmp_path / "a", tmp_path / "n")
    assert not (tmp_path / "n").exists()


def test_a_merge_in_memory_keeps_the_processor(tmp_path: Path) -> None:
    """Rows of new tokens make the tables grow, which is done in memory."""
    base = vlm.save("llava", tmp_path / "base")
    trained("llava", tmp_path / "a", {"language": "attention"}, tokens=(128, 129))
    done = merge_to_folder(base, tmp_path / "a", tmp_path / "m")
    assert done.way == "memory" and done.max_logit_difference < 1e-4
    merged = load_base(str(tmp_path / "m"), dtype="fp32", device=torch.device("cpu"))
    assert merged.processor is not None and merged.model.get_input_embeddings().weight.shape[0] == 130


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
@pytest.mark.parametrize("old", [False, True], ids=["today's names", "old names"])
def test_exports_name_the_modules_of_the_base(family: str, old: bool, tmp_path: Path) -> None:
    base = vlm.save(family, tmp_path / "base")
    tuned = logits(trained(family, tmp_path / "a", {"language": ["q_proj", "gate_proj"]}), family)
    adapter = tmp_path / "a"
    if old:
        (adapter / "deltaw.json").unlink()
        tensors = load_file(adapter / "adapter_model.safetensors")
        start, then = "base_model.model.", "language_model.model." if family == "llava" else "model."
        moved = {key.replace(f"{start}model.language_model.", start + then): t for key, t in tensors.items()}
        save_file(moved, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    for profile in ("portable", "peft"):
        options = {"dtype": "fp32"} if profile == "portable" else {}
        done = export(adapter, tmp_path / profile, profile, model=base, **options)
        assert done.error < 1e-5
        keys = load_file(tmp_path / profile / "adapter_model.safetensors")
        assert keys and all(key.startswith("base_model.model.model.language_model.layers.") for key in keys)
        names = (
            {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"} if profile == "portable" else {"q_proj", "gate_proj"}
        )
        assert {key.split(".")[-3] for key in keys} == names
        fresh = vlm.model(family)
        deltaw.load(fresh, tmp_path / profile)
        assert (logits(fresh, family) - tuned).abs().max() < 1e-5


def test_a_full_projector_goes_to_peft_and_not_into_a_portable_file(tmp_path: Path) -> None:
    base = vlm.save("llava", tmp_path / "base")
    tuned = logits(trained("llava", tmp_path / "a", EVERYWHERE, full=True), "llava")
    export(tmp_path / "a", tmp_path / "p", "peft", model=base)
    fresh = vlm.model("llava")
    deltaw.load(fresh, tmp_path / "p")
    assert (logits(fresh, "llava") - tuned).abs().max() < 1e-6
    with pytest.raises(deltaw.DeltawError, match=r"multi_modal_projector.linear_1: a trained copy of a parameter"):
        export(tmp_path / "a", tmp_path / "q", model=base)


def test_vllm_is_told_to_adapt_towers(tmp_path: Path) -> None:
    base = base_of(vlm.hollow("llava"))
    for name, targets in (("all", EVERYWHERE), ("text", {"language": ["q_proj", "v_proj"]})):
        trained("llava", tmp_path / name, targets)
        [found] = check(read_facts(tmp_path / name, base), ["vllm"])
        needs = [one.why for one in found.findings if one.rule == "towers"]
        assert found.takes and bool(needs) == (name == "all")
        assert (
            not needs
            or "--enable-tower-connector-lora (experimental), or it passes over model.vision_tower" in needs[0]
        )
