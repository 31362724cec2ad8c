"""PEFT's target_parameters on stacks of experts, PEFT as the oracle both ways."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as t
from families import IDS, randomise
from safetensors.torch import load_file, save_file
from test_peft_corners import CONFIG, WEIGHTS, config_of, near
from torch import nn

import deltaw
from deltaw import LoRA
from deltaw.core.errors import ConfigError, FileError
from deltaw.core.host import HostSpec
from deltaw.core.method import Site
from deltaw.formats.peft import parse_config
from deltaw.formats.peft_experts import flatten, sites, unflatten

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3,
    "num_key_value_heads": 1, "head_dim": 8, "num_experts_per_tok": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {"num_local_experts": 5}),
    "qwen3-moe": ("Qwen3Moe", {"moe_intermediate_size": 16, "num_experts": 6}),
    "gpt-oss": (
        "GptOss",
        {"num_local_experts": 5, "sliding_window": 8, "max_position_embeddings": 64},
    ),  # stores transposes
}
GATE, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
SHAPES = {"mixtral": (5, 80, 24, 40), "qwen3-moe": (6, 32, 24, 16), "gpt-oss": (5, 80, 24, 40)}


def build(family: str) -> Any:
    torch.manual_seed(7)
    name, sizes = MODELS[family]
    model = getattr(t, f"{name}ForCausalLM")(getattr(t, f"{name}Config")(**{**SIZES, **sizes})).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3)
    model.set_experts_implementation("eager")
    return model


@torch.no_grad()
def run(model: Any) -> torch.Tensor:
    return model(IDS).logits


THEIRS: dict[str, dict[str, Any]] = {
    "both": {"r": 3, "lora_alpha": 5, "target_parameters": [GATE, DOWN]},
    "gate": {"r": 2, "lora_alpha": 5, "target_parameters": [GATE]},
    "down": {"r": 4, "lora_alpha": 3, "target_parameters": [f"layers.1.{DOWN}"], "use_rslora": True},
    "patterns": {
        "r": 3, "target_parameters": [DOWN, GATE], "rank_pattern": {"down_proj": 2},
        "alpha_pattern": {r"layers\.0\.mlp\.experts\.gate_up_proj": 7},
    },
    "beside": {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj"], "target_parameters": [GATE, DOWN]},
    "weight": {"r": 3, "lora_alpha": 5, "target_parameters": ["self_attn.q_proj.weight", GATE]},
}  # fmt: skip


@pytest.mark.parametrize("case", THEIRS)
@pytest.mark.parametrize("family", MODELS)
def test_what_peft_made(family: str, case: str, tmp_path: Path) -> None:
    theirs = peft.get_peft_model(build(family), peft.LoraConfig(**{"target_modules": [], **THEIRS[case]}))
    randomise(theirs)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    expected, model = run(theirs), build(family)
    base = run(model)
    assert float((expected - base).abs().max()) > 1e-2
    report = deltaw.load(model, tmp_path / "theirs")
    near(run(model), expected)
    assert not [note for note in report.notes if "target" in note]
    state = deltaw.extract(model)
    numbers = [parameter.numel() for name, parameter in theirs.named_parameters() if "lora_" in name]
    assert state.parameters == sum(numbers)
    stacks = {site: spec for site, spec in state.specs.items() if site.slot != "weight"}
    experts, up, hidden, inner = SHAPES[family]
    shapes = {
        "gate_up_proj": HostSpec((up, hidden), stack=experts),
        "down_proj": HostSpec((hidden, inner), stack=experts),
    }
    assert stacks and all(shapes[site.slot] == spec for site, spec in stacks.items())
    deltaw.save(model, tmp_path / "ours")
    a, b = (load_file(tmp_path / x / WEIGHTS) for x in ("theirs", "ours"))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    again = peft.PeftModel.from_pretrained(build(family), str(tmp_path / "ours"))
    near(run(again), expected)
    deltaw.detach(model)
    assert torch.equal(run(model), base)


@pytest.mark.parametrize("targets", [["experts"], ["experts", "self_attn"], [r".*layers\.1\.mlp\.experts"]])
@pytest.mark.parametrize("family", MODELS)
def test_what_we_made(family: str, targets: list[Any], tmp_path: Path) -> None:
    """PEFT loads it without a key too few or too many, and so do we by its config alone."""
    model = build(family)
    chosen = ["experts", "attention"] if "self_attn" in targets else targets
    method = LoRA(rank=3, alpha=5.0, dropout=0.1, rank_pattern={"experts": 2})
    deltaw.attach(model, method, targets=chosen)
    randomise(model)
    expected = run(model)
    deltaw.save(model, tmp_path)
    config = config_of(tmp_path)
    assert config["peft_type"] == "LORA" and config["lora_dropout"] == 0.0
    layers = {site.path for site in deltaw.extract(model).methods if site.slot != "weight"}
    assert config["target_parameters"] == sorted(f"{p}.{s}" for p in layers for s in ("gate_up_proj", "down_proj"))
    wrapped = peft.PeftModel.from_pretrained(build(family), str(tmp_path))
    near(run(wrapped), expected)
    assert set(peft.get_peft_model_state_dict(wrapped)) == set(load_file(tmp_path / WEIGHTS))
    back = build(family)
    deltaw.load(back, tmp_path)
    assert torch.equal(run(back), expected)
    assert deltaw.extract(back).methods == deltaw.extract(model).methods
    (tmp_path / "deltaw.json").unlink()
    by_config = build(family)
    assert not [note for note in deltaw.load(by_config, tmp_path).notes if "target" in note]
    near(run(by_config), expected)


def test_the_two_orders() -> None:
    """Row e·r + i of A, column i·E + e of B."""
    a, b = torch.arange(6.0).view(6, 1), torch.arange(6.0).view(1, 6)
    whole = unflatten(a, b, rank=2)
    assert not isinstance(whole, str)
    assert whole[0][:, :, 0].tolist() == [[0, 1], [2, 3], [4, 5]] and whole[1][:, 0].tolist() == [
        [0, 3],
        [1, 4],
        [2, 5],
    ]
    assert all(torch.equal(x, y) for x, y in zip(flatten(*whole), (a, b), strict=True))


def test_which_parameter_a_path_is() -> None:
    config = {"target_parameters": ["e.down_proj", "e.gate_up_proj"]}
    found, faults = sites(config, ["m.e", "m.e.base_layer", "m.q"])
    assert (
        found == {"m.e.base_layer": Site("m.e", "gate_up_proj"), "m.e": Site("m.e", "down_proj"), "m.q": Site("m.q")}
        and not faults
    )
    assert sites(config, ["m.e"]) == (
        {},
        ["m.e: the file adapts 1 of its parameters, target_parameters names gate_up_proj, down_proj"],
    )
    assert sites({}, ["m.e", "m.e.base_layer"])[1] == [
        "m.e: the file adapts 2 of its parameters, target_parameters names none"
    ]
    assert sites({"target_parameters": ["e.other"]}, ["e"])[1] == [
        "e: target_parameters names other; only stacks of experts are supported"
    ]


def made(folder: Path, **options: Any) -> Path:
    theirs = peft.get_peft_model(build("mixtral"), peft.LoraConfig(target_modules=[], r=3, **options))
    randomise(theirs)
    theirs.save_pretrained(str(folder))
    return folder


def edited(folder: Path, **options: Any) -> None:
    (folder / CONFIG).write_text(json.dumps({**config_of(folder), **options}))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"target_parameters": [GATE]}, r"adapts 2 of its parameters, target_parameters names gate_up_proj"),
        ({"target_parameters": None}, r"adapts 2 of its parameters, target_parameters names none"),
        ({"target_parameters": [GATE, DOWN, "experts.bias"]}, r"target_parameters names bias; only stacks of experts"),
        ({"r": 4}, r"A is \(15, 24\) and B is \(80, 15\): not the factors of a stack of experts at rank 4"),
        ({"r": 5}, r"lora_A is \(3, 5, 24\), expected \(5, 5, 24\)"),
        ({"use_dora": True}, r"missing magnitude"),
    ],
)  # fmt: skip
def test_a_config_that_does_not_fit_its_tensors(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    folder, model = made(tmp_path, target_parameters=[GATE, DOWN]), build("mixtral")
    edited(folder, **change)
    base = run(model)
    with pytest.raises(FileError, match=words):
        deltaw.load(model, folder)
    assert torch.equal(run(model), base)


def test_a_parameter_without_tensors_is_told(tmp_path: Path) -> None:
    folder = made(tmp_path, target_parameters=[GATE, DOWN])
    tensors = load_file(folder / WEIGHTS)
    save_file({k: v for k, v in tensors.items() if "layers.1" not in k}, folder / WEIGHTS)
    edited(folder, target_parameters=[f"layers.{n}.{p}" for n in (0, 1) for p in (GATE, DOWN)])
    report = deltaw.load(build("mixtral"), folder)
    assert any(
        "target_parameters names 'layers.1.mlp.experts.gate_up_proj', 'layers.1." in note for note in report.notes
    )


def test_such_a_config_is_no_recipe() -> None:
    with pytest.raises(ConfigError, match="name their modules in targets"):
        parse_config({"peft_type": "LORA", "target_modules": [], "target_parameters": [GATE]})


def test_other_methods_have_no_parameters() -> None:
    for kind in ("LOHA", "ADALORA", "OFT"):
        with pytest.raises(ConfigError, match="target_parameters"):
            parse_config({"peft_type": kind, "target_modules": ["q"], "target_parameters": [GATE]})
