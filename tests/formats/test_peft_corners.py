"""Corners of PEFT's format: names that drag in others, ties, copies, odd module names, layers without a format."""

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from families import GQA, IDS, SMALL, build, outputs, randomise
from peft.utils import set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import deltaw
from deltaw import DoRA, Full, LoRA, TokenRows
from deltaw.core.errors import BaseMismatchError, FileError
from deltaw.formats import directory

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
Make, Run = Callable[[], nn.Module], Callable[[nn.Module], Tensor]


def distilbert() -> nn.Module:
    torch.manual_seed(3)
    config = transformers.DistilBertConfig(vocab_size=64, dim=32, hidden_dim=48, n_layers=2, n_heads=4, num_labels=3)
    return stirred(transformers.DistilBertForSequenceClassification(config))


def masked() -> nn.Module:
    torch.manual_seed(3)
    return stirred(transformers.BertForMaskedLM(transformers.BertConfig(**SMALL)))


def stirred(model: nn.Module) -> nn.Module:
    """Wider weights, so that a change of one layer reaches the output."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


class Nested(nn.Module):
    """One name at three depths."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(8, 8)
        self.enc = nn.ModuleDict({"q": nn.Linear(8, 8)})
        self.vision = nn.ModuleDict({"q": nn.Linear(8, 8)})

    def forward(self, x: Tensor) -> Tensor:
        return self.q(x) + 2 * self.enc["q"](x) + 3 * self.vision["q"](x)


class Odd(nn.Module):
    """Module names that look like parts of PEFT's keys."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("mylora_A", "lora_A", "lora_B", "weight", "bias", "default"):
            setattr(self, name, nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return sum((i + 1) * layer(x) for i, layer in enumerate(self._modules.values()))  # type: ignore[misc]


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.grouped = nn.Conv1d(4, 6, 3, padding=1), nn.Conv2d(6, 6, 3, groups=3, padding=1)
        self.two, self.three = nn.Conv2d(6, 5, (3, 2), stride=2, padding=1), nn.Conv3d(5, 7, 2)
        self.point = nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        z = self.grouped(self.one(x).unsqueeze(-1).expand(-1, -1, -1, 8))
        last = self.three(self.two(z).unsqueeze(2).expand(-1, -1, 3, -1, -1))
        return torch.cat([last.flatten(1), self.point(z).flatten(1)], dim=1)


class WithNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.a(x))


def seeded(make: Make) -> Make:
    def again() -> nn.Module:
        torch.manual_seed(5)
        return make().eval()

    return again


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=IDS).logits


def on(*shape: int) -> Run:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    return torch.no_grad()(lambda model: model(x))


def near(a: Tensor, b: Tensor) -> None:
    assert float((a - b).abs().max()) <= 1e-5


def theirs_equal(folder: Path, make: Make, run: Run, expected: Tensor) -> nn.Module:
    """PEFT loads our folder without a missing or unexpected key, and computes what we compute."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(make(), str(folder)).eval()
    assert not [str(w.message) for w in caught if "missing" in str(w.message)]
    result = set_peft_model_state_dict(model, load_file(folder / WEIGHTS))
    assert not result.unexpected_keys
    near(run(model), expected)
    return model


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / CONFIG).read_text())


def ours(folder: Path, make: Make, run: Run, *parts: tuple[Any, Any], **options: Any) -> Tensor:
    """Attach every (method, targets), move the tensors, save; what comes out."""
    model = make()
    base = run(model)
    for method, targets in parts:
        deltaw.attach(model, method, targets=targets)
    randomise(model)
    deltaw.save(model, folder, **options)
    expected = run(model)
    assert float((expected - base).abs().max()) > 1e-3
    back = make()
    assert deltaw.load(back, folder).base == "match"
    assert torch.equal(run(back), expected)
    return expected


def of_peft(folder: Path, make: Make, run: Run, **options: Any) -> Tensor:
    model = peft.get_peft_model(make(), peft.LoraConfig(**options)).eval()
    randomise(model)
    model.save_pretrained(str(folder))
    expected = run(model)
    assert float((expected - run(make())).abs().max()) > 1e-3
    return expected


# What we write


def test_a_saved_module_whose_name_ends_like_another(tmp_path: Path) -> None:
    """PEFT's modules_to_save "classifier" also takes pre_classifier, and would miss its tensors."""
    method = LoRA(rank=2, modules_to_save=("classifier",))
    expected = ours(tmp_path / "a", distilbert, logits, (method, ["q_lin"]))
    theirs_equal(tmp_path / "a", distilbert, logits, expected)
    assert config_of(tmp_path / "a")["modules_to_save"] is None and config_of(tmp_path / "a")["task_type"] is None
    both = LoRA(rank=2, modules_to_save=("classifier", "pre_classifier"))
    expected = ours(tmp_path / "b", distilbert, logits, (both, ["q_lin"]))
    theirs_equal(tmp_path / "b", distilbert, logits, expected)
    assert config_of(tmp_path / "b")["task_type"] == "SEQ_CLS"


def test_a_task_whose_class_wants_a_head(tmp_path: Path) -> None:
    expected = ours(tmp_path / "a", distilbert, logits, (LoRA(rank=2), ["q_lin"]), meta={"task_type": "SEQ_CLS"})
    theirs_equal(tmp_path / "a", distilbert, logits, expected)
    expected = ours(tmp_path / "b", distilbert, logits, (LoRA(rank=2), ["classifier"]), meta={"task_type": "SEQ_CLS"})
    theirs_equal(tmp_path / "b", distilbert, logits, expected)


@pytest.mark.parametrize(
    ("targets", "written"),
    [([r"^q$"], "q"), (["enc.q"], ["enc.q"]), ([r"^q$", "vision.q"], r"q|vision\.q"), (["q"], ["q"])],
)
def test_a_suffix_that_would_hit_others_is_anchored(targets: list[str], written: Any, tmp_path: Path) -> None:
    expected = ours(tmp_path, seeded(Nested), on(3, 8), (LoRA(rank=2), targets))
    model = theirs_equal(tmp_path, seeded(Nested), on(3, 8), expected)
    adapted = [path for path, module in model.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
    assert config_of(tmp_path)["target_modules"] == written
    assert {path.removeprefix("base_model.model.") for path in adapted} == {
        site.path for site in directory.read(tmp_path)[0].methods
    }


def test_ranks_and_alphas_of_nested_names(tmp_path: Path) -> None:
    parts = (LoRA(rank=2, alpha=2), ["enc.q"]), (LoRA(rank=4, alpha=3), [r"^q$"]), (LoRA(rank=2, alpha=7), ["vision.q"])
    expected = ours(tmp_path, seeded(Nested), on(3, 8), *parts)
    theirs_equal(tmp_path, seeded(Nested), on(3, 8), expected)


def test_modules_that_disagree_on_rslora(tmp_path: Path) -> None:
    parts = (
        (LoRA(rank=3, alpha=5, rslora=True), ["q_proj"]),
        (LoRA(rank=3, alpha=5), ["v_proj"]),
        (LoRA(rank=5, alpha=2), ["model.layers.1.mlp.up_proj"]),
    )
    expected = ours(tmp_path, lambda: build("llama"), logits, *parts)
    theirs_equal(tmp_path, lambda: build("llama"), logits, expected)
    assert config_of(tmp_path)["use_rslora"] is False


def test_short_names_and_what_serving_reads(tmp_path: Path) -> None:
    ours(tmp_path / "a", lambda: build("gpt2"), logits, (LoRA(rank=2), "all-linear"))
    config = config_of(tmp_path / "a")
    assert config["target_modules"] == ["c_attn", "c_fc", "c_proj"] and config["fan_in_fan_out"] is True
    assert config["task_type"] == "CAUSAL_LM" and (config["r"], config["lora_alpha"]) == (2, 4)
    assert type(config["lora_alpha"]) is int and config["rank_pattern"] == config["alpha_pattern"] == {}
    state, _ = directory.read(tmp_path / "a")
    directory.write(state, tmp_path / "b")  # without a model, full paths are always right
    assert "transformer.h.0.attn.c_attn" in config_of(tmp_path / "b")["target_modules"]
    model = peft.PeftModel.from_pretrained(build("gpt2"), str(tmp_path / "b")).eval()
    theirs_equal(tmp_path / "a", lambda: build("gpt2"), logits, logits(model))


@pytest.mark.parametrize("method", [LoRA(rank=3, alpha=5.0), DoRA(rank=3, alpha=5.0)], ids=lambda m: m.name)
def test_convolutions_of_every_dimension(method: Any, tmp_path: Path) -> None:
    expected = ours(tmp_path, seeded(Convolutions), on(2, 4, 8), (method, ["one", "two", "three", "point"]))
    model = theirs_equal(tmp_path, seeded(Convolutions), on(2, 4, 8), expected)
    model.save_pretrained(str(tmp_path / "back"))
    back = seeded(Convolutions)()
    deltaw.load(back, tmp_path / "back")
    near(on(2, 4, 8)(back), expected)


@pytest.mark.parametrize(
    ("family", "targets", "saved"),
    [
        ("llama", ["q_proj"], ("input_layernorm", "norm")),
        ("gpt2", ["c_attn"], ("ln_f", "ln_1")),
        ("bert", ["query"], ("LayerNorm", "pooler", "classifier")),
        ("clip", ["q_proj"], ("layer_norm1", "text_projection")),
    ],
)
def test_norms_and_containers_saved(family: str, targets: list[str], saved: tuple[str, ...], tmp_path: Path) -> None:
    make, run = lambda: build(family), lambda model: outputs(family, model)
    expected = ours(tmp_path / "ours", make, run, (LoRA(rank=2, modules_to_save=saved), targets))
    theirs_equal(tmp_path / "ours", make, run, expected).save_pretrained(str(tmp_path / "theirs"))
    back = make()
    deltaw.load(back, tmp_path / "theirs")
    near(run(back), expected)


def test_only_saved_modules_or_token_rows(tmp_path: Path) -> None:
    expected = ours(tmp_path / "a", lambda: build("llama"), logits, (Full(), ["lm_head"]))
    theirs_equal(tmp_path / "a", lambda: build("llama"), logits, expected)
    expected = ours(tmp_path / "b", lambda: build("gemma"), logits, (TokenRows(tokens=(4,)), ["embed_tokens"]))
    theirs_equal(tmp_path / "b", lambda: build("gemma"), logits, expected)


def test_a_norm_with_buffers(tmp_path: Path) -> None:
    """PEFT wraps whole modules, running statistics too: we write the trained tensors without an entry."""
    expected = ours(tmp_path / "a", seeded(WithNorm), on(5, 8), (LoRA(rank=2, modules_to_save=("norm",)), ["a"]))
    theirs_equal(tmp_path / "a", seeded(WithNorm), on(5, 8), expected)
    of_peft(tmp_path / "b", seeded(WithNorm), on(5, 8), r=2, target_modules=["a"], modules_to_save=["norm"])
    with pytest.raises(FileError, match="running_mean"):
        deltaw.load(seeded(WithNorm)(), tmp_path / "b")


def test_two_adapters_of_one_model_are_two_files(tmp_path: Path) -> None:
    model, expected = build("llama"), {}
    for name, method in (("a", LoRA(rank=2, modules_to_save=("lm_head",))), ("b", LoRA(rank=2, bias="all"))):
        deltaw.attach(model, method, targets=["q_proj"], name=name)
        randomise(model)
        expected[name] = logits(model)
    for name in expected:
        deltaw.save(model, tmp_path / name, name=name)
        theirs_equal(tmp_path / name, lambda: build("llama"), logits, expected[name])


# Layers and methods without a format in PEFT


@pytest.mark.parametrize(
    "parts",
    [
        ((LoRA(rank=3), ["grouped", "point"]),),
        ((LoRA(rank=3), ["one"]), (DoRA(rank=3), ["two"])),
    ],
    ids=["grouped", "lora-and-dora"],
)
def test_written_in_our_own_layout(parts: Any, tmp_path: Path) -> None:
    ours(tmp_path / "a", seeded(Convolutions), on(2, 4, 8), *parts)
    assert "library_name: deltaw" in (tmp_path / "a/README.md").read_text()
    with pytest.raises(KeyError, match=r"DELTAW_(DORA_)?LORA"):
        peft.PeftModel.from_pretrained(seeded(Convolutions)(), str(tmp_path / "a"))


def test_the_model_itself_as_a_layer(tmp_path: Path) -> None:
    ours(tmp_path, seeded(lambda: nn.Linear(8, 8)), on(3, 8), (LoRA(rank=2), [""]))


def test_grouped_convolution_of_peft_is_refused_by_name(tmp_path: Path) -> None:
    of_peft(tmp_path, seeded(Convolutions), on(2, 4, 8), r=3, target_modules=["grouped"])
    with pytest.raises(FileError, match="grouped convolution is not supported yet"):
        deltaw.load(seeded(Convolutions)(), tmp_path)


# What PEFT writes


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("gemma", {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}),
        ("gemma", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
        ("gemma", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
        ("gemma", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
        ("gemma", {"target_modules": ["q_proj"], "trainable_token_indices": [3, 7, 20]}),
        ("gpt2", {"target_modules": ["c_attn"], "trainable_token_indices": {"wte": [5, 1]}}),
        ("t5", {"target_modules": ["q"], "trainable_token_indices": [3, 7]}),
        ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [3, 7]}),
        (
            "bert",
            {"target_modules": ["query"], "bias": "all", "modules_to_save": ["classifier"], "task_type": "SEQ_CLS"},
        ),
        ("llama", {"target_modules": r".*layers\.1\..*(q|up)_proj"}),
        ("qwen", {"target_modules": "all-linear", "bias": "all", "rank_pattern": {"^model.layers.0.mlp.up_proj": 2}}),
        ("llama", {"target_modules": ["lm_head"], "use_dora": True}),
    ],
)
def test_features_of_peft_both_ways(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    make, run = lambda: build(family), lambda model: outputs(family, model)
    expected = of_peft(tmp_path / "theirs", make, run, r=4, lora_alpha=6, **options)
    model = make()
    base = run(model)
    deltaw.load(model, tmp_path / "theirs")
    near(run(model), expected)
    deltaw.save(model, tmp_path / "ours")
    theirs_equal(tmp_path / "ours", make, run, expected)
    deltaw.detach(model)
    assert torch.equal(run(model), base)


def test_tied_biases(tmp_path: Path) -> None:
    options = {"r": 2, "target_modules": ["query"], "bias": "all"}
    expected = of_peft(tmp_path / "a", masked, logits, **options)
    model = masked()
    deltaw.load(model, tmp_path / "a")
    near(logits(model), expected)
    expected = ours(tmp_path / "b", masked, logits, (LoRA(rank=2, bias="all"), ["query"]))
    theirs_equal(tmp_path / "b", masked, logits, expected)


@pytest.mark.parametrize(
    "names", [["mylora_A"], ["lora_A"], ["weight"], ["bias"], ["default"], ["lora_A", "lora_B", "weight"]]
)
def test_module_names_like_parts_of_keys(names: list[str], tmp_path: Path) -> None:
    expected = of_peft(tmp_path / "a", seeded(Odd), on(3, 8), r=2, target_modules=names)
    model = seeded(Odd)()
    deltaw.load(model, tmp_path / "a")
    near(on(3, 8)(model), expected)
    if names == ["mylora_A"]:
        expected = of_peft(tmp_path / "b", seeded(Odd), on(3, 8), r=2, target_modules=["bias"], modules_to_save=names)
        model = seeded(Odd)()
        deltaw.load(model, tmp_path / "b")
        near(on(3, 8)(model), expected)


def test_copies_of_the_base(tmp_path: Path) -> None:
    """Files that target an embedding carry the base's own: skipped where equal, a mismatch where not."""
    of_peft(tmp_path, lambda: build("llama"), logits, r=4, target_modules=["embed_tokens"])
    assert "base_model.model.model.embed_tokens.base_layer.weight" in load_file(tmp_path / WEIGHTS)
    report = deltaw.load(build("llama"), tmp_path)
    assert report.base == "unknown" and any("PEFT's copy" in note for note in report.notes)
    assert deltaw.load(build("llama").bfloat16(), tmp_path).base == "unknown"  # equal after rounding
    model = build("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[5].add_(1)
    with pytest.raises(BaseMismatchError, match=r"model\.embed_tokens\.weight, which differs in its values"):
        deltaw.load(model, tmp_path)
    assert deltaw.load(model, tmp_path, allow_base_mismatch=True).base == "mismatch"
    longer = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**GQA, "vocab_size": 70}))
    with pytest.raises(BaseMismatchError, match="differs in shape, 64×32 and 70×32 here"):
        deltaw.load(longer, tmp_path)


def test_what_the_config_says_beyond_the_tensors_is_reported(tmp_path: Path) -> None:
    of_peft(tmp_path, lambda: build("llama"), logits, r=4, target_modules=["q_proj", "v_proj"])
    config = config_of(tmp_path)
    config |= {
        "target_modules": ["q_proj", "typo"],
        "rank_pattern": {"dead": 2},
        "r": 8,
        "base_model_name_or_path": "x/y",
    }
    (tmp_path / CONFIG).write_text(json.dumps(config))
    report = deltaw.load(build("llama"), tmp_path)
    text = str(report)
    assert report.base_name == "x/y" and "'typo', for which the file holds no tensor" in text
    assert "v_proj and 1 more, which target_modules does not select" in text and "'dead'" in text
    assert "of rank 4 by its tensors and 8 by the config" in text
    (tmp_path / CONFIG).write_text(json.dumps({**config, "target_modules": "no_.*"}))
    assert "target_modules names 'no_.*'" in str(deltaw.load(build("llama"), tmp_path))


def test_older_forms_of_keys(tmp_path: Path) -> None:
    expected = of_peft(
        tmp_path,
        lambda: build("bert"),
        logits,
        r=4,
        target_modules=["query"],
        use_dora=True,
        modules_to_save=["classifier"],
    )
    tensors = load_file(tmp_path / WEIGHTS)

    def older(key: str) -> str:
        for part in ("lora_A", "lora_B", "lora_magnitude_vector"):
            key = key.replace(f".{part}", f".{part}.default")
        return key.replace("classifier.", "classifier.modules_to_save.default.").replace(
            "model.bert", "model._orig_mod.bert"
        )

    renamed = {older(key): tensor.clone() for key, tensor in tensors.items()}
    renamed["base_model.model.classifier.original_module.weight"] = torch.zeros(3, 32)
    save_file(renamed, tmp_path / WEIGHTS)
    model = build("bert")
    report = deltaw.load(model, tmp_path)
    near(logits(model), expected)
    assert any("_orig_mod" in note for note in report.notes) and any(
        "classifier.weight: PEFT's copy" in n for n in report.notes
    )


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("base_model.model.model.norm.lora_A.second.weight", "several adapters"),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_B.bias", "lora_bias"),
        ("base_model.model.model.layers.0.mlp.experts.base_layer.lora_A.weight", "target_parameters"),
        (
            "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta",
            "trainable_token_indices names None",
        ),
        ("base_model.model.model.norm.lora_magnitude_vector", "the config says LoRA"),
    ],
)
def test_keys_that_cannot_be_read(key: str, words: str, tmp_path: Path) -> None:
    of_peft(tmp_path, lambda: build("llama"), logits, r=4, target_modules=["q_proj"])
    tensors = {k.replace("lora_A.", "lora_A.first."): v.clone() for k, v in load_file(tmp_path / WEIGHTS).items()}
    save_file({**tensors, key: torch.ones(4, 32)}, tmp_path / WEIGHTS)
    with pytest.raises(FileError, match=words):
        deltaw.load(build("llama"), tmp_path)


def test_entries_that_peft_would_wrap_twice(tmp_path: Path) -> None:
    """modules_to_save goes by the end of a name: `head` wraps `aux_head` too, and what is inside needs no entry."""

    class Net(nn.Module):
        def __init__(self, holder: type[nn.Module]) -> None:
            super().__init__()
            self.fc, self.head = nn.Linear(4, 4), nn.Linear(4, 2)
            self.aux_head = holder()
            self.aux_head.add_module("out", nn.Linear(4, 2))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.fc(x)) + self.aux_head.get_submodule("out")(self.fc(x))

    for number, holder in enumerate((nn.Sequential, nn.ModuleDict)):
        model = Net(holder)
        base, x, folder = copy.deepcopy(model), torch.randn(3, 4), tmp_path / str(number)
        deltaw.attach(model, deltaw.LoRA(rank=2, modules_to_save=("head", "aux_head")), targets="fc")
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(0.1 * torch.randn_like(p))
        deltaw.save(model, folder)
        config = json.loads((folder / "adapter_config.json").read_text())
        assert "aux_head.out" not in (config["modules_to_save"] or []) or holder is nn.ModuleDict
        ours = copy.deepcopy(base)
        deltaw.load(ours, folder)
        assert torch.equal(ours(x), model(x))
        assert torch.allclose(peft.PeftModel.from_pretrained(base, folder)(x), model(x), atol=1e-6)


def test_a_base_with_peft_s_own_names_is_stored_natively(tmp_path: Path) -> None:
    model = nn.ModuleDict({"y": nn.ModuleDict({"base_layer": nn.Linear(4, 4)})})
    deltaw.attach(model, deltaw.LoRA(rank=2), targets="base_layer")
    state = deltaw.extract(model)
    deltaw.save(model, tmp_path)
    assert config_of(tmp_path)["peft_type"] == "DELTAW_LORA"
    deltaw.detach(model)
    deltaw.load(model, tmp_path)
    (site,) = state.methods
    assert torch.equal(deltaw.extract(model).tensors[site]["lora_A"], state.tensors[site]["lora_A"])


@pytest.mark.parametrize("keys", [12, 13])
def test_the_configs_of_2023(keys: int, tmp_path: Path) -> None:
    """PEFT 0.1 to 0.3: 13 keys with enable_lora (null on whole layers) and merge_weights, 12 without the first."""
    config = {
        "base_model_name_or_path": "gpt2", "bias": "none", "enable_lora": None, "fan_in_fan_out": True, "inference_mode": True,
        "lora_alpha": 6, "lora_dropout": 0.1, "merge_weights": False, "modules_to_save": None, "peft_type": "LORA", "r": 2,
        "target_modules": ["c_attn"], "task_type": "CAUSAL_LM",
    }  # fmt: skip
    config = {key: value for key, value in config.items() if keys == 13 or key != "enable_lora"}
    assert len(config) == keys
    tensors = {}
    for number in range(2):
        path = f"base_model.model.transformer.h.{number}.attn.c_attn"
        tensors |= {f"{path}.lora_A.weight": torch.randn(2, 32), f"{path}.lora_B.weight": torch.randn(96, 2)}
    (tmp_path / CONFIG).write_text(json.dumps(config))
    save_file(tensors, tmp_path / WEIGHTS)
    model = build("gpt2")
    plain = outputs("gpt2", model)
    assert not [note for note in deltaw.load(model, tmp_path).notes if "unknown" in note]
    theirs = peft.PeftModel.from_pretrained(build("gpt2"), str(tmp_path)).eval()
    assert float((outputs("gpt2", model) - outputs("gpt2", theirs)).abs().max()) <= 1e-5
    assert float((outputs("gpt2", model) - plain).abs().max()) > 1e-2


def test_parts_of_a_fused_layer_in_a_live_model(tmp_path: Path) -> None:
    """PEFT 0.1's adapter of q and v in GPT-2's fused layer: k's rows stay as they were; saved again it is a plain LoRA."""
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 6,
        "target_modules": ["c_attn"],
        "enable_lora": [True, False, True],
    }
    a, b = torch.randn(4, 32), torch.randn(64, 2, 1)
    path = "base_model.model.transformer.h.0.attn.c_attn"
    (tmp_path / CONFIG).write_text(json.dumps({**config, "merge_weights": False, "fan_in_fan_out": True}))
    save_file({f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b}, tmp_path / WEIGHTS)
    model = build("gpt2")
    layer, x = model.get_submodule("transformer.h.0.attn.c_attn"), torch.randn(3, 32)
    before = layer(x)
    deltaw.load(model, tmp_path)
    q, k, v = (layer(x) - before).chunk(3, dim=-1)
    assert torch.allclose(q, 3 * x @ a[:2].T @ b[:32, :, 0].T, atol=1e-4)
    assert torch.allclose(v, 3 * x @ a[2:].T @ b[32:, :, 0].T, atol=1e-4) and float(k.abs().max()) <= 1e-5
    deltaw.save(model, tmp_path / "plain")
    again = peft.PeftModel.from_pretrained(build("gpt2"), str(tmp_path / "plain")).eval()
    assert float((outputs("gpt2", again) - outputs("gpt2", model)).abs().max()) <= 1e-4
