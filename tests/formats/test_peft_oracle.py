"""PEFT as the oracle, both ways: what we write it loads, what it writes we load, no key missing, logits equal."""

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from families import FAMILIES, build, outputs, randomise
from peft.utils import set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn

import deltaw
from deltaw import DoRA, LoRA, TokenRows
from deltaw.core.state import AdapterState

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

CASES: dict[str, tuple[str, Any, dict[str, Any]]] = {
    **{f"{family}-all-linear": (family, LoRA(rank=4, alpha=6), {"targets": "all-linear"}) for family in FAMILIES},
    "llama-attention": ("llama", LoRA(rank=3, alpha=5), {"targets": "attention"}),
    "llama-one-layer": ("llama", LoRA(rank=3), {"targets": ["q_proj", "v_proj"], "layers": "1"}),
    "llama-patterns": (
        "llama", LoRA(rank=4, alpha=6, rank_pattern={"q_proj": 2, "down_proj": 7}, alpha_pattern={"v_proj": 5}), {"targets": "all-linear"},
    ),
    "llama-rslora": ("llama", LoRA(rank=4, alpha=6, rslora=True), {"targets": "all-linear"}),
    "llama-dora": ("llama", DoRA(rank=4, alpha=6), {"targets": "all-linear"}),
    "gpt2-dora": ("gpt2", DoRA(rank=4, alpha=6), {"targets": "all-linear"}),
    "qwen-bias-all": ("qwen", LoRA(rank=4, bias="all"), {"targets": ["q_proj"]}),
    "qwen-bias-adapted": ("qwen", LoRA(rank=4, bias="lora_only"), {"targets": ["q_proj"]}),
    "gpt2-bias-all": ("gpt2", LoRA(rank=4, bias="all"), {"targets": ["c_attn"]}),
    "bert-classifier": ("bert", LoRA(rank=4, modules_to_save=("classifier",)), {"targets": ["query", "value"]}),
    "llama-head-saved": ("llama", LoRA(rank=4, modules_to_save=("lm_head",)), {"targets": ["q_proj"]}),
    "llama-embedding": ("llama", LoRA(rank=4, alpha=6), {"targets": ["embed_tokens", "q_proj"]}),
    "gemma-embedding": ("gemma", LoRA(rank=4, alpha=6), {"targets": ["embed_tokens", "q_proj"]}),
    "llama-head": ("llama", LoRA(rank=4, alpha=6), {"targets": ["lm_head", "q_proj"]}),
    "clip-conv": ("clip", LoRA(rank=4, alpha=6), {"targets": ["patch_embedding", "q_proj"]}),
    "clip-conv-dora": ("clip", DoRA(rank=4, alpha=6), {"targets": ["patch_embedding", "q_proj"]}),
    "llama-embedding-dora": ("llama", DoRA(rank=4, alpha=6), {"targets": ["embed_tokens", "q_proj"]}),
}  # fmt: skip


def trained(family: str, method: Any, options: dict[str, Any], folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Attach, move the tensors, save; the base's output and the adapted one."""
    model = build(family)
    base = outputs(family, model)
    deltaw.attach(model, method, **options)
    assert torch.equal(outputs(family, model), base)
    randomise(model)
    deltaw.save(model, folder)
    return base, outputs(family, model)


@pytest.mark.parametrize("case", CASES)
def test_both_ways(case: str, tmp_path: Path) -> None:
    family, method, options = CASES[case]
    base, ours = trained(family, method, options, tmp_path / "ours")
    assert float((ours - base).abs().max()) > 1e-3

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        theirs = peft.PeftModel.from_pretrained(build(family), str(tmp_path / "ours"))
    assert not [str(w.message) for w in caught if "missing" in str(w.message)]
    result = set_peft_model_state_dict(theirs, load_file(tmp_path / "ours" / "adapter_model.safetensors"))
    adapter_keys = set(peft.get_peft_model_state_dict(theirs, save_embedding_layers=False))
    assert not result.unexpected_keys
    assert adapter_keys == set(load_file(tmp_path / "ours" / "adapter_model.safetensors"))
    assert float((outputs(family, theirs.eval()) - ours).abs().max()) <= 1e-5

    theirs.save_pretrained(str(tmp_path / "theirs"))
    again = build(family)
    report = deltaw.load(again, tmp_path / "theirs")
    assert report.base == "unknown"
    assert float((outputs(family, again) - ours).abs().max()) <= 1e-5
    mine = build(family)
    assert deltaw.load(mine, tmp_path / "ours").base == "match"
    assert torch.equal(outputs(family, mine), ours)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("init", [True, "gaussian"])
def test_adapters_that_peft_made(rslora: bool, init: Any, tmp_path: Path) -> None:
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj", "up_proj"], use_rslora=rslora, init_lora_weights=init,
        rank_pattern={"layers.0.self_attn.q_proj": 2}, alpha_pattern={"up_proj": 3}, bias="lora_only", task_type="CAUSAL_LM",
    )  # fmt: skip
    theirs = peft.get_peft_model(build("qwen"), config).eval()
    randomise(theirs)
    expected = outputs("qwen", theirs)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    model = build("qwen")
    deltaw.load(model, tmp_path / "theirs")
    assert float((outputs("qwen", model) - expected).abs().max()) <= 1e-5
    merged = theirs.merge_and_unload()
    deltaw.merge(model)
    assert float((outputs("qwen", model) - outputs("qwen", merged)).abs().max()) <= 1e-4


@pytest.mark.parametrize("family", ["llama", "gemma"])  # untied and tied
def test_trainable_tokens(family: str, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [3, 7, 20]})
    theirs = peft.get_peft_model(build(family), config).eval()
    randomise(theirs)
    expected, base = outputs(family, theirs), outputs(family, build(family))
    theirs.save_pretrained(str(tmp_path / "theirs"))
    model = build(family)
    deltaw.load(model, tmp_path / "theirs")
    assert float((outputs(family, model) - expected).abs().max()) <= 1e-5 < float((expected - base).abs().max())
    deltaw.save(model, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(build(family), str(tmp_path / "ours")).eval()
    assert float((outputs(family, again) - expected).abs().max()) <= 1e-5


def test_token_rows_attached_by_us(tmp_path: Path) -> None:
    model = build("llama")
    base = outputs("llama", model)
    deltaw.attach(model, LoRA(rank=4), targets=["q_proj"])
    deltaw.attach(model, TokenRows(tokens=(3, 7)), targets=["embed_tokens"])
    assert torch.equal(outputs("llama", model), base)
    randomise(model)
    deltaw.save(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(build("llama"), str(tmp_path / "ours")).eval()
    assert float((outputs("llama", theirs) - outputs("llama", model)).abs().max()) <= 1e-5


def test_serialisation_is_stable_and_exact(tmp_path: Path) -> None:
    trained("llama", LoRA(rank=4, modules_to_save=("lm_head",)), {"targets": "all-linear"}, tmp_path / "a")
    model = build("llama")
    deltaw.load(model, tmp_path / "a")
    deltaw.save(model, tmp_path / "b")
    a, b = (load_file(tmp_path / x / "adapter_model.safetensors") for x in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert (tmp_path / "a/adapter_model.safetensors").read_bytes() == (
        tmp_path / "b/adapter_model.safetensors"
    ).read_bytes()
    assert (tmp_path / "a/adapter_config.json").read_bytes() == (tmp_path / "b/adapter_config.json").read_bytes()
    first: AdapterState = deltaw.extract(model)
    assert first.parameters == sum(t.numel() for t in a.values())


def test_any_method_saves_natively(tmp_path: Path) -> None:
    """Grouped convolutions and lone trained modules have no format in PEFT: our own layout holds them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.Flatten(), nn.Linear(8, 3))
    x = torch.randn(2, 4, 3, 3)
    deltaw.attach(model, LoRA(rank=2), targets=["0"])
    deltaw.attach(model, deltaw.Full(), targets=["2"])
    randomise(model)
    expected = model(x)
    deltaw.save(model, tmp_path / "native")
    assert json.loads((tmp_path / "native/adapter_config.json").read_text())["peft_type"] == "DELTAW_LORA"
    deltaw.detach(model)
    deltaw.load(model, tmp_path / "native")
    assert torch.equal(model(x), expected)
