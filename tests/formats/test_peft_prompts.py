"""PEFT's AdaptionPrompt files, PEFT as the oracle both ways: LLaMA-Adapter with one plain gate per layer."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as t
from families import GQA, IDS, build
from safetensors.torch import load_file, save_file
from test_peft_corners import CONFIG, WEIGHTS, config_of, near, theirs_equal

import deltaw
from deltaw.core.errors import ConfigError, FileError
from deltaw.formats.peft import parse_config
from deltaw.methods.llama_adapter import LlamaAdapter

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def make(family: str = "llama") -> Any:
    if family != "mistral":
        return build(family)
    torch.manual_seed(3)
    return t.MistralForCausalLM(t.MistralConfig(**GQA, sliding_window=None)).eval()


@torch.no_grad()
def run(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits


@torch.no_grad()
def theirs(folder: Path, family: str = "llama", layers: int = 2) -> torch.Tensor:
    config = peft.AdaptionPromptConfig(adapter_len=5, adapter_layers=layers, task_type="CAUSAL_LM")
    model = peft.get_peft_model(make(family), config).eval()
    for number, module in enumerate(m for m in model.modules() if hasattr(m, "adaption_prompt")):
        module.adaption_gate.fill_(1.5 - number)  # tanh reaches no 1.5
    model.save_pretrained(str(folder))
    return run(model)


@torch.no_grad()
def ours(family: str = "llama", **options: Any) -> Any:
    model = make(family)
    torch.manual_seed(5)
    deltaw.attach(model, LlamaAdapter(length=4, gate="plain"), **{"targets": "all-linear", **options})
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.ndim == 1:
            parameter.fill_(0.8)
    return model


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_what_peft_made(family: str, layers: int, tmp_path: Path) -> None:
    expected, model = theirs(tmp_path / "theirs", family, layers), make(family)
    base = run(model)
    assert float((expected - base).abs().max()) > 1e-3
    report = deltaw.load(model, tmp_path / "theirs")
    near(run(model), expected)
    assert not report.notes
    deltaw.save(model, tmp_path / "ours")
    theirs_equal(tmp_path / "ours", lambda: make(family), run, expected)
    a, b = (load_file(tmp_path / name / WEIGHTS) for name in ("theirs", "ours"))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    deltaw.detach(model)
    assert torch.equal(run(model), base)


@pytest.mark.parametrize("layers", [None, "1"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_what_we_made(family: str, layers: str | None, tmp_path: Path) -> None:
    model = ours(family, layers=layers)
    expected = run(model)
    assert float((expected - run(make(family))).abs().max()) > 1e-3
    deltaw.save(model, tmp_path)
    config = config_of(tmp_path)
    assert config["peft_type"] == "ADAPTION_PROMPT" and config["target_modules"] == "self_attn"
    assert set(config) - set(peft.AdaptionPromptConfig().to_dict()) == set()
    theirs_equal(tmp_path, lambda: make(family), run, expected)
    back = make(family)
    deltaw.load(back, tmp_path)
    assert torch.equal(run(back), expected)


@pytest.mark.parametrize(
    ("family", "options"),
    [("llama", {"layers": "0"}), ("qwen", {}), ("gpt2", {})],
)
def test_what_peft_cannot_hold(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Not the topmost layers, and families it has no prompts for, or another function."""
    model = ours(family, **options)
    deltaw.save(model, tmp_path)
    assert config_of(tmp_path)["peft_type"] == "DELTAW_LLAMA_ADAPTER"
    back = make(family)
    deltaw.load(back, tmp_path)
    assert torch.equal(run(back), run(model))


def test_saved_modules_and_lengths_that_differ_are_ours(tmp_path: Path) -> None:
    model = ours(layers="1")
    deltaw.attach(model, LlamaAdapter(length=6, gate="plain"), targets="all-linear", layers="0")
    saved = make()
    deltaw.attach(saved, LlamaAdapter(gate="plain", modules_to_save=("lm_head",)), targets="all-linear")
    for number, one in enumerate((model, saved)):
        deltaw.save(one, tmp_path / str(number))
        assert config_of(tmp_path / str(number))["peft_type"] == "DELTAW_LLAMA_ADAPTER"


def test_prompts_on_gpt2_are_refused(tmp_path: Path) -> None:
    theirs(tmp_path, "gpt2")
    with pytest.raises(FileError, match="past the output projection, which is another function"):
        deltaw.load(make("gpt2"), tmp_path)


def test_tensors_that_are_none(tmp_path: Path) -> None:
    theirs(tmp_path)
    tensors = {k: v[0] if k.endswith("prompt") else v for k, v in load_file(tmp_path / WEIGHTS).items()}
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(
        FileError, match=r"adaption_prompt is \(5, 32\) and adaption_gate \(1,\), not \[1, K, width\] and \[1\]"
    ):
        deltaw.load(make(), tmp_path)


def test_a_length_that_differs_from_the_config_is_told(tmp_path: Path) -> None:
    expected, model = theirs(tmp_path), make()
    (tmp_path / CONFIG).write_text(json.dumps({**config_of(tmp_path), "adapter_len": 7}))
    assert "5 tokens by its tensors and 7 by the config" in str(deltaw.load(model, tmp_path))
    near(run(model), expected)


def test_such_a_config_is_no_recipe() -> None:
    with pytest.raises(ConfigError, match="name them in layers"):
        parse_config({"peft_type": "ADAPTION_PROMPT", "adapter_len": 5, "adapter_layers": 2})


def test_a_gate_that_is_neither() -> None:
    with pytest.raises(ConfigError, match="gate='sigmoid' is none of tanh, plain"):
        LlamaAdapter(gate="sigmoid")  # type: ignore[arg-type]
