"""Every peft_type we read and write, PEFT as the oracle both ways; what is refused, sentence by sentence."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import peft.tuners.boft.layer as theirs_boft
import pytest
import torch
from families import build, outputs, randomise
from safetensors.torch import load_file, save_file
from test_peft_corners import CONFIG, WEIGHTS, config_of, near, seeded, theirs_equal
from torch import Tensor, nn

import deltaw
from deltaw.core.errors import ConfigError, FileError
from deltaw.core.method import Site, get
from deltaw.core.state import AdapterState, delta
from deltaw.formats import directory
from deltaw.formats.peft import parse_config, to_peft
from deltaw.formats.peft_config import check, method_of
from deltaw.formats.peft_methods import KINDS

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
LLAMA, GPT2 = ["q_proj", "v_proj", "down_proj"], ["c_attn", "c_fc"]
STEPS = {"tinit": 2, "tfinal": 3, "total_step": 10}


class Mixed(nn.Module):
    """A linear layer, convolutions of one to three dimensions, one of them in groups, and an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.one = nn.Embedding(10, 4), nn.Conv1d(4, 6, 3, padding=1)
        self.grouped = nn.Conv2d(6, 6, 3, padding=1, groups=3)
        self.two, self.line = nn.Conv2d(6, 8, 3, padding=1), nn.Linear(8, 5)
        self.three = nn.Conv3d(8, 8, 2, padding=1)

    def forward(self, ids: Tensor) -> Tensor:
        z = torch.tanh(self.one(self.table(ids).mT)).unsqueeze(-1).expand(-1, -1, -1, 3)
        z = torch.tanh(self.two(z + self.grouped(z))).unsqueeze(-1)
        return self.line(self.three(z).mean((2, 3, 4)) + z.mean((2, 3, 4)))


IDS = torch.randint(0, 10, (3, 7), generator=torch.Generator().manual_seed(3))
Case = tuple[str, Callable[[], Any]]
THEIRS: dict[str, Case] = {
    "loha": ("llama", lambda: peft.LoHaConfig(
        r=4, alpha=6, target_modules=LLAMA, rank_pattern={"v_proj": 3}, alpha_pattern={"layers.0.self_attn.q_proj": 2})),
    "loha-conv": ("mixed", lambda: peft.LoHaConfig(r=3, alpha=5, target_modules=["one", "grouped", "two", "line"])),
    "loha-saved": ("qwen", lambda: peft.LoHaConfig(r=3, target_modules=["q_proj"], modules_to_save=["lm_head"])),
    "lokr": ("llama", lambda: peft.LoKrConfig(r=2, alpha=3, target_modules=LLAMA, rank_pattern={"v_proj": 1})),
    "lokr-both": ("llama", lambda: peft.LoKrConfig(r=1, alpha=2, decompose_both=True, target_modules=LLAMA)),
    "lokr-factor": ("llama", lambda: peft.LoKrConfig(r=3, alpha=2, decompose_factor=8, target_modules=LLAMA)),
    "lokr-full": ("llama", lambda: peft.LoKrConfig(r=99, alpha=30, target_modules=LLAMA)),
    "lokr-lycoris": ("llama", lambda: peft.LoKrConfig(r=2, alpha=3, init_weights="lycoris", target_modules=LLAMA)),
    "lokr-conv": ("mixed", lambda: peft.LoKrConfig(r=1, alpha=5, target_modules=["one", "grouped", "two", "line"])),
    "lokr-conv-full": ("mixed", lambda: peft.LoKrConfig(r=9, alpha=5, target_modules=["two", "line"])),
    "oft": ("llama", lambda: peft.OFTConfig(oft_block_size=8, use_cayley_neumann=False, target_modules=LLAMA)),
    "oft-default": ("llama", lambda: peft.OFTConfig(target_modules=LLAMA)),
    "oft-blocks": ("llama", lambda: peft.OFTConfig(r=4, oft_block_size=0, target_modules=LLAMA)),
    "oft-shared": ("llama", lambda: peft.OFTConfig(oft_block_size=8, block_share=True, target_modules=LLAMA)),
    "coft": ("llama", lambda: peft.OFTConfig(oft_block_size=8, coft=True, eps=0.1, target_modules=LLAMA)),
    "oft-terms": ("llama", lambda: peft.OFTConfig(oft_block_size=8, num_cayley_neumann_terms=3, target_modules=LLAMA)),
    "oft-bias": ("qwen", lambda: peft.OFTConfig(oft_block_size=8, target_modules=LLAMA, bias="oft_only")),
    "boft": ("llama", lambda: peft.BOFTConfig(boft_block_size=8, target_modules=LLAMA, bias="all")),
    "boft-number": ("qwen", lambda: peft.BOFTConfig(boft_block_size=0, boft_block_num=4, target_modules=["q_proj", "v_proj"])),
    "ia3": ("qwen", lambda: peft.IA3Config(target_modules=LLAMA, feedforward_modules=["down_proj"])),
    "ia3-regex": ("llama", lambda: peft.IA3Config(target_modules=r".*(v|down)_proj", feedforward_modules=".*down_.*")),
    "ia3-none": ("gpt2", lambda: peft.IA3Config(target_modules=["c_attn"], feedforward_modules=[])),
    "ia3-gpt2": ("gpt2", lambda: peft.IA3Config(target_modules=[*GPT2, "mlp.c_proj"], feedforward_modules=["mlp.c_proj"])),
    "ia3-conv": ("mixed", lambda: peft.IA3Config(
        target_modules=["two", "three", "grouped", "line"], feedforward_modules=["two", "grouped"])),
    "vera": ("llama", lambda: peft.VeraConfig(r=16, target_modules=LLAMA, projection_prng_key=7)),
    "vera-gpt2": ("gpt2", lambda: peft.VeraConfig(r=8, target_modules=GPT2, bias="vera_only", modules_to_save=["lm_head"])),
    "adalora": ("llama", lambda: peft.AdaLoraConfig(init_r=6, target_r=4, lora_alpha=7, target_modules=LLAMA, **STEPS)),
    "adalora-gpt2": ("gpt2", lambda: peft.AdaLoraConfig(init_r=4, target_modules=GPT2, bias="lora_only", **STEPS)),
    "adalora-conv": ("mixed", lambda: peft.AdaLoraConfig(init_r=4, target_modules=["two", "line"], **STEPS)),
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_extension(monkeypatch: Any) -> None:
    """BOFT of PEFT looks for a CUDA compiler at every layer; here it never finds one."""
    monkeypatch.setattr(theirs_boft, "get_fbd_cuda", lambda: None)


def making(family: str) -> tuple[Callable[[], nn.Module], Callable[[nn.Module], Tensor]]:
    if family == "mixed":
        return seeded(Mixed), torch.no_grad()(lambda model: model(IDS))
    return lambda: build(family), lambda model: outputs(family, model)


def made_by_peft(family: str, config: Any, folder: Path) -> tuple[Any, Any, Tensor]:
    """PEFT adapts, the tensors are moved, PEFT saves."""
    make, run = making(family)
    model = peft.get_peft_model(make(), config).eval()
    randomise(model)
    expected = run(model)
    model.save_pretrained(str(folder))
    assert float((expected - run(make())).abs().max()) > 1e-3
    return make, run, expected


@pytest.mark.parametrize("case", THEIRS)
def test_what_peft_made(case: str, tmp_path: Path) -> None:
    family, config = THEIRS[case]
    make, run, expected = made_by_peft(family, config(), tmp_path / "theirs")
    model = make()
    base = run(model)
    report = deltaw.load(model, tmp_path / "theirs", name="x")
    near(run(model), expected)
    assert (
        report.base == "unknown"
        and not report.left_out
        and case.split("-")[0].removeprefix("c")
        in {method.name for method in deltaw.extract(model, "x").methods.values()}
    )
    deltaw.save(model, tmp_path / "ours", name="x")
    assert config_of(tmp_path / "ours")["peft_type"] == config_of(tmp_path / "theirs")["peft_type"]
    theirs_equal(tmp_path / "ours", make, run, expected).save_pretrained(str(tmp_path / "again"))
    ours, again = (load_file(tmp_path / name / WEIGHTS) for name in ("ours", "again"))
    assert ours.keys() == again.keys()
    if case != "coft":  # which moves what it runs with into its ball
        assert all(torch.equal(ours[key], again[key]) for key in ours)
    back = make()
    assert deltaw.load(back, tmp_path / "ours").base == "match" and torch.equal(run(back), run(model))
    deltaw.detach(model, "x")
    assert torch.equal(run(model), base)


OURS: dict[str, tuple[str, str, dict[str, Any], list[str]]] = {
    "loha": ("llama", "loha", {"rank": 3, "alpha": 5.0, "dropout": 0.1}, LLAMA),
    "loha-default": ("llama", "loha", {}, ["q_proj", "k_proj", "down_proj"]),
    "loha-conv": ("mixed", "loha", {"rank": 2, "alpha": 3.0}, ["one", "grouped", "two", "line"]),
    "lokr": ("llama", "lokr", {"rank": 2, "alpha": 3.0, "decompose_factor": 4}, LLAMA),
    "lokr-default": ("llama", "lokr", {}, ["q_proj", "k_proj", "down_proj"]),
    "lokr-conv": ("mixed", "lokr", {"rank": 1, "decompose_both": True}, ["one", "two", "line"]),
    "oft": ("qwen", "oft", {"block": 8}, LLAMA),
    "oft-default": ("llama", "oft", {}, ["q_proj", "down_proj"]),
    "oft-series": ("llama", "oft", {"block": 4, "terms": 6, "share": True}, LLAMA),
    "coft": ("llama", "oft", {"block": 4, "coft": True, "eps": 0.3}, LLAMA),
    "boft": ("qwen", "boft", {"block": 8, "levels": 1}, LLAMA),
    "ia3": ("qwen", "ia3", {"feedforward": ("down_proj",)}, LLAMA),
    "ia3-gpt2": ("gpt2", "ia3", {"feedforward": (r"h\.1\.mlp\.c_proj",)}, ["c_attn", "mlp.c_proj"]),
    "ia3-conv": ("mixed", "ia3", {"feedforward": ("three", "grouped")}, ["two", "grouped", "three", "line"]),
    "vera": ("llama", "vera", {"rank": 12, "seed": 5}, LLAMA),
    "vera-gpt2": ("gpt2", "vera", {"rank": 12}, GPT2),
    "adalora": ("llama", "adalora", {"rank": 4, "alpha": 6.0}, LLAMA),
    "adalora-default": ("gpt2", "adalora", {}, GPT2),
    "adalora-conv": ("mixed", "adalora", {"rank": 3, "tinit": 4, "tfinal": 2}, ["two", "line"]),
}  # fmt: skip


def attached(family: str, name: str, fields: dict[str, Any], targets: Any) -> nn.Module:
    model = making(family)[0]()
    method: Any = get(name)
    deltaw.attach(model, method(**fields), targets=targets)
    randomise(model)
    return model


def same_state(a: AdapterState, b: AdapterState) -> None:
    assert a.methods == b.methods and a.specs == b.specs and a.tensors.keys() == b.tensors.keys()
    for site, group in a.tensors.items():
        assert group.keys() == b.tensors[site].keys()
        assert all(torch.equal(tensor, b.tensors[site][name]) for name, tensor in group.items()), site


@pytest.mark.parametrize("case", OURS)
def test_what_we_made(case: str, tmp_path: Path) -> None:
    """PEFT loads it without a key too few or too many; we read back the method, its fields and every bit."""
    family, name, fields, targets = OURS[case]
    make, run = making(family)
    model = attached(family, name, fields, targets)
    expected = run(model)
    assert float((expected - run(make())).abs().max()) > 1e-3
    deltaw.save(model, tmp_path / "a")
    assert KINDS[config_of(tmp_path / "a")["peft_type"]].names == (name,)
    theirs_equal(tmp_path / "a", make, run, expected)
    same_state(directory.read(tmp_path / "a")[0], deltaw.extract(model))
    (tmp_path / "a" / "deltaw.json").unlink()  # by PEFT's config alone
    back = make()
    deltaw.load(back, tmp_path / "a")
    near(run(back), expected)
    state = deltaw.extract(back)
    config, tensors = to_peft(state)
    stored = load_file(tmp_path / "a" / WEIGHTS)
    assert tensors.keys() == stored.keys() and all(torch.equal(tensors[key], stored[key]) for key in stored)
    assert config["peft_type"] == config_of(tmp_path / "a")["peft_type"] and state.specs == deltaw.extract(model).specs


@pytest.mark.parametrize(
    ("family", "name", "targets", "word"),
    [
        ("llama", "mora", LLAMA, "DELTAW_MORA"),
        ("llama", "bottleneck", ["mlp"], "DELTAW_BOTTLENECK"),
        ("llama", "llama_adapter", ["self_attn"], "DELTAW_LLAMA_ADAPTER"),
        ("gpt2", "loha", GPT2, "DELTAW_LOHA"),
        ("gpt2", "lokr", GPT2, "DELTAW_LOKR"),
        ("gpt2", "oft", GPT2, "DELTAW_OFT"),
        ("gpt2", "boft", GPT2, "DELTAW_BOFT"),
        ("mixed", "loha", ["three"], "DELTAW_LOHA"),
        ("mixed", "lokr", ["table"], "DELTAW_LOKR"),
        ("mixed", "oft", ["two"], "DELTAW_OFT"),
        ("mixed", "boft", ["two"], "DELTAW_BOFT"),
        ("mixed", "ia3", ["one"], "DELTAW_IA3"),
        ("mixed", "vera", ["two"], "DELTAW_VERA"),
    ],
)
def test_what_peft_cannot_hold(family: str, name: str, targets: list[str], word: str, tmp_path: Path) -> None:
    make, run = making(family)
    model = attached(family, name, {}, targets)
    deltaw.save(model, tmp_path)
    config = config_of(tmp_path)
    assert config["peft_type"] == word and not {"r", "lora_alpha"} & config.keys()
    assert config["target_modules"] == sorted(site.path for site in deltaw.extract(model).methods)
    for load in (peft.PeftConfig.from_pretrained, lambda folder: peft.PeftModel.from_pretrained(make(), folder)):
        with pytest.raises(KeyError, match=word):
            load(str(tmp_path))
    same_state(directory.read(tmp_path)[0], deltaw.extract(model))
    back = make()
    deltaw.load(back, tmp_path)
    assert torch.equal(run(back), run(model))
    (tmp_path / "deltaw.json").unlink()
    with pytest.raises(ConfigError, match=rf"peft_type {word} is deltaw's own layout.*deltaw\.json.*is missing"):
        deltaw.load(make(), tmp_path)


def test_two_methods_in_one_adapter(tmp_path: Path) -> None:
    model = attached("llama", "ia3", {}, ["q_proj"])
    deltaw.attach(model, deltaw.LoRA(rank=2), targets=["v_proj"])
    deltaw.save(model, tmp_path)
    assert config_of(tmp_path)["peft_type"] == "DELTAW_IA3_LORA"
    with pytest.raises(ConfigError, match="IA3 and LORA in one adapter: PEFT has one method for all modules"):
        to_peft(deltaw.extract(model))
    back = build("llama")
    deltaw.load(back, tmp_path)
    assert torch.equal(outputs("llama", back), outputs("llama", model))


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ([("oft", {"block": 8}, ["q_proj"]), ("oft", {"block": 4}, ["v_proj"])], "blocks of 4, 8: PEFT has one size"),
        ([("oft", {"terms": 5}, ["q_proj"]), ("oft", {}, ["v_proj"])], "modules differ in terms"),
        ([("boft", {"levels": 1}, ["q_proj"]), ("boft", {"levels": 2}, ["v_proj"])], "levels × blocks of 1×8, 2×8"),
        ([("lokr", {"decompose_factor": 4}, ["q_proj"]), ("lokr", {}, ["v_proj"])], "differ in decompose_factor"),
        ([("vera", {"rank": 8}, ["q_proj"]), ("vera", {"rank": 9}, ["v_proj"])], "differ in rank"),
        ([("vera", {"rank": 8, "in_features": 99}, ["q_proj"])], "in_features=99: PEFT draws for the largest module, 32"),
        ([("adalora", {"rank": 4, "alpha": 8.0}, ["q_proj"]), ("adalora", {"rank": 4, "alpha": 5.0}, ["v_proj"])], "scales of 1.25, 2"),
        ([("ia3", {}, ["q_proj"]), ("full", {}, [("q_proj", "bias")])], "PEFT trains no biases beside IA3"),
        ([("ia3", {}, ["q_proj"]), ("token_rows", {"tokens": (1, 2)}, ["embed_tokens"])], "PEFT has no token rows beside IA3"),
    ],
)  # fmt: skip
def test_what_one_config_cannot_say(parts: list[Any], words: str, tmp_path: Path) -> None:
    model = build("qwen")
    for name, fields, targets in parts:
        method: Any = get(name)
        if name == "full":
            lora = deltaw.LoRA(rank=2, bias="lora_only")
            deltaw.attach(model, lora, targets=["q_proj"], name="other")
            state, rows = deltaw.extract(model, "other"), deltaw.extract(model)
            bias = {site: state.methods[site] for site in state.methods if site.slot == "bias"}
            state = AdapterState(
                {**rows.methods, **bias}, {**rows.tensors, **{s: state.tensors[s] for s in bias}},
                {**rows.specs, **{s: state.specs[s] for s in bias}}, rows.base,
            )  # fmt: skip
            break
        deltaw.attach(model, method(**fields), targets=targets)
        state = deltaw.extract(model)
    with pytest.raises(ConfigError, match=re.escape(words)):
        to_peft(state)
    directory.write(state, tmp_path)
    assert config_of(tmp_path)["peft_type"] == "DELTAW_" + "_".join(
        sorted({name.upper() for name, _, _ in parts} - {"FULL", "TOKEN_ROWS"})
    )
    same_state(directory.read(tmp_path)[0], state)


# One by one: what PEFT writes and we do not read


def theirs(folder: Path, config: Any, family: str = "llama") -> Path:
    model = peft.get_peft_model(making(family)[0](), config)
    randomise(model)
    model.save_pretrained(str(folder))
    return folder


def refused(folder: Path, error: type[Exception], words: str, family: str = "llama") -> None:
    make, run = making(family)
    model = make()
    base = run(model)
    with pytest.raises(error, match=words):
        deltaw.load(model, folder)
    assert torch.equal(run(model), base)


@pytest.mark.parametrize(
    ("family", "config", "words"),
    [
        ("mixed", lambda: peft.LoHaConfig(use_effective_conv2d=True, target_modules=["two"]), "hada_t1.*effective_conv.*not supported"),
        ("mixed", lambda: peft.LoKrConfig(r=1, use_effective_conv2d=True, target_modules=["two"]), "lokr_t2.*effective_conv.*support"),
        ("mixed", lambda: peft.LoKrConfig(r=9, target_modules=["one"]), "full lokr_w2 of a Conv1d over the wrong dimensions"),
        ("mixed", lambda: peft.OFTConfig(oft_block_size=6, target_modules=["two"]), "on convolutions computes another function"),
        ("mixed", lambda: peft.OFTConfig(oft_block_size=2, target_modules=["table"]), "OFT of embeddings, which rotates .*not supported"),
        ("mixed", lambda: peft.BOFTConfig(boft_block_size=6, target_modules=["two"]), "boft_s is .1, 8., that of a convolution"),
    ],
)  # fmt: skip
def test_tensors_that_are_refused(family: str, config: Callable[[], Any], words: str, tmp_path: Path) -> None:
    refused(theirs(tmp_path, config(), family), FileError, words, family)


def test_why_oft_on_a_convolution_is_refused() -> None:
    """PEFT adds rotated patches where they overlap; what it merges is another function, the one we would compute."""
    model: Any = peft.get_peft_model(
        nn.Sequential(nn.Conv2d(4, 6, 3)), peft.OFTConfig(oft_block_size=6, target_modules=["0"])
    )
    randomise(model)
    x = torch.randn(2, 4, 7, 7, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        live = model(x)
        assert float((live - model.merge_and_unload()(x)).abs().max()) > 0.1


def test_why_lokr_with_a_full_factor_on_conv1d_is_refused() -> None:
    """LyCORIS and PEFT's own Conv2d have C ⊗ D over channels; PEFT's Conv1d reshapes another product."""
    model: Any = peft.get_peft_model(nn.Sequential(nn.Conv1d(4, 6, 3)), peft.LoKrConfig(r=9, target_modules=["0"]))
    randomise(model)
    layer = model.base_model.model[0]
    right = layer.scaling["default"] * torch.kron(layer.lokr_w1["default"].unsqueeze(-1), layer.lokr_w2["default"])
    assert right.shape == layer.get_delta_weight("default").shape
    assert float((right - layer.get_delta_weight("default")).detach().abs().max()) > 1e-2


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"peft_type": "OFT", "oft_block_size": 8, "num_cayley_neumann_terms": 2}, "series of less than 3 terms"),
        ({"peft_type": "OFT", "r": 4}, "oft_block_size is missing: PEFT before 0.14 wrote another OFT"),
        ({"peft_type": "OFT", "r": 4, "oft_block_size": 8}, "r=4 and oft_block_size=8: exactly one of them"),
        ({"peft_type": "OFT", "oft_block_size": 8, "coft": "yes"}, "coft='yes' is not true or false"),
        ({"peft_type": "OFT", "oft_block_size": 8, "bias": "lora_only"}, "bias='lora_only' is not none, all or oft_only"),
        ({"peft_type": "BOFT", "boft_block_size": 8, "boft_block_num": 4}, "exactly one of them must be above 0"),
        ({"peft_type": "VERA", "save_projection": False}, "save_projection=false: nothing in the file says how large"),
        ({"peft_type": "ADALORA", "use_dora": True}, "use_dora: AdaLoRA has none"),
        ({"peft_type": "ADALORA", "layer_replication": [[0, 1]]}, "layer replication .* is not supported yet"),
        ({"peft_type": "ADALORA", "rank_pattern": {"q": 3}}, "rank_pattern=.* is not a table"),
        ({"peft_type": "LOKR", "decompose_factor": 0}, "decompose_factor=0 is not -1 or a whole number"),
        ({"peft_type": "LOHA", "alpha": 0}, "alpha=0 is not a positive number"),
        ({"peft_type": "LOHA", "lora_alpha": 4}, "lora_alpha=4 is unknown here"),
        ({"peft_type": "IA3", "brand_new": 1}, "brand_new=1 is unknown here and may change"),
        ({"peft_type": "VERRA"}, "peft_type VERRA is not supported yet; did you mean 'VERA'"),
    ],
)  # fmt: skip
def test_options_that_are_refused(config: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check(config)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"peft_type": "LOHA", "use_effective_conv2d": True}, "use_effective_conv2d. cannot be taken over"),
        ({"peft_type": "LOKR", "module_dropout": 0.1}, "dropout of whole modules"),
        ({"peft_type": "LOHA", "rank_pattern": {"q_proj": 2}}, "rank_pattern cannot be taken over from a config: loha"),
        ({"peft_type": "OFT", "r": 4, "oft_block_size": 0}, "r counts blocks per layer"),
        ({"peft_type": "OFT", "oft_block_size": 8, "module_dropout": 0.1}, "dropout of whole blocks"),
        ({"peft_type": "BOFT", "boft_block_size": 0, "boft_block_num": 4}, "boft_block_num counts blocks per layer"),
        ({"peft_type": "VERA", "d_initial": 0}, "d_initial=0 gives b and d no gradient"),
        ({"peft_type": "IA3"}, "no feedforward_modules: PEFT would take its default"),
        ({"peft_type": "ADALORA", "rank_pattern": {"q.lora_E": [True]}}, "what earlier pruning left"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_from_a_config(config: dict[str, Any], words: str) -> None:
    method_of(config)
    with pytest.raises(ConfigError, match=words):
        parse_config({**config, "target_modules": ["q_proj"]})


def test_a_config_of_another_method_than_the_tensors(tmp_path: Path) -> None:
    folder = theirs(tmp_path, peft.LoKrConfig(r=2, target_modules=LLAMA))
    config = config_of(folder)
    (folder / CONFIG).write_text(json.dumps({**config, "peft_type": "LOHA", "decompose_factor": None}))
    refused(folder, FileError, "q_proj.lokr_w1' is a tensor of LoKr, and the config says LoHa")
    tensors = {key: tensor for key, tensor in load_file(folder / WEIGHTS).items() if not key.endswith("w1")}
    save_file(tensors, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(config))
    refused(folder, FileError, "missing lokr_w1; the config says LoKr")


def test_another_vera_than_the_seed_draws(tmp_path: Path) -> None:
    folder = theirs(tmp_path, peft.VeraConfig(r=8, target_modules=LLAMA))
    config, tensors = config_of(folder), load_file(folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps({**config, "projection_prng_key": 3}))
    refused(folder, FileError, "vera_A and vera_B are not those of projection_prng_key=3")
    (folder / CONFIG).write_text(json.dumps(config))
    save_file({k: v.clone() for k, v in tensors.items() if k != "base_model.vera_A"}, folder / WEIGHTS)
    refused(folder, FileError, "base_model.vera_A is not in the file")


def test_ia3_whose_config_and_tensors_disagree(tmp_path: Path) -> None:
    folder = theirs(tmp_path, peft.IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]))
    config = config_of(folder)
    (folder / CONFIG).write_text(json.dumps({**config, "feedforward_modules": None}))
    deltaw.load(build("llama"), folder)  # PEFT takes its table; the shapes say it too
    (folder / CONFIG).write_text(json.dumps({**config, "feedforward_modules": ["q_proj"]}))
    refused(folder, FileError, r"ia3_l is \(1, 48\), for inputs, and feedforward_modules says outputs")


# Corners


def test_adalora_after_pruning(tmp_path: Path) -> None:
    """Every module keeps its own triplets, one of them none at all; the scale stays that of the initial rank."""
    config = peft.AdaLoraConfig(init_r=6, target_r=4, lora_alpha=7, target_modules=["q_proj", "v_proj"], **STEPS)
    model: Any = peft.get_peft_model(build("llama"), config).eval()
    randomise(model)
    left = {
        f"model.layers.{i}.self_attn.{n}.lora_E": [k in kept for k in range(6)]
        for i, n, kept in ((0, "q_proj", {0, 3, 4}), (0, "v_proj", {5}), (1, "v_proj", set()))
    }
    for name, parameter in model.named_parameters():
        key = name.removeprefix("base_model.model.").removesuffix(".default")
        if key in left:
            parameter.data[[not keep for keep in left[key]]] = 0.0
    expected = outputs("llama", model)
    model.peft_config["default"].rank_pattern = dict(left)
    model.save_pretrained(str(tmp_path / "theirs"))
    back = build("llama")
    report = deltaw.load(back, tmp_path / "theirs")
    near(outputs("llama", back), expected)
    assert any("layers.1.self_attn.v_proj: pruned to rank 0" in note for note in report.notes)
    ranks = [getattr(method, "rank", 0) for _, method in sorted(deltaw.extract(back).methods.items())]
    assert ranks == [3, 1, 6, 1]  # q_proj and v_proj of two layers
    deltaw.save(back, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(build("llama"), str(tmp_path / "ours")).eval()
    near(outputs("llama", again), expected)
    assert config_of(tmp_path / "ours")["lora_alpha"] == 7 and config_of(tmp_path / "ours")["init_r"] == 6


def test_boft_with_several_factors_as_pefts_extension_computes_it(monkeypatch: Any, tmp_path: Path) -> None:
    """PEFT has more than one factor only with its CUDA extension; a block-diagonal matrix in its place shows the rest."""

    class Plain:
        @staticmethod
        def apply(blocks: Tensor) -> Tensor:
            return torch.stack([torch.block_diag(*level) for level in blocks])

    monkeypatch.setattr(theirs_boft, "get_fbd_cuda", lambda: True)
    monkeypatch.setattr(theirs_boft, "FastBlockDiag", Plain)
    config = peft.BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=3, target_modules=LLAMA)
    make, run, expected = made_by_peft("llama", config, tmp_path / "theirs")
    model = make()
    deltaw.load(model, tmp_path / "theirs")
    near(run(model), expected)
    deltaw.save(model, tmp_path / "ours")
    theirs_equal(tmp_path / "ours", make, run, expected)


def test_boft_that_silently_became_one_factor(tmp_path: Path) -> None:
    config = peft.BOFTConfig(boft_block_size=8, boft_n_butterfly_factor=2, target_modules=LLAMA)
    make, run, expected = made_by_peft("llama", config, tmp_path)
    model = make()
    report = deltaw.load(model, tmp_path)
    near(run(model), expected)
    assert any("of 1 butterfly factor by its tensors and 2 by the config" in note for note in report.notes)


def test_blocks_that_pefts_rule_makes_unlike(tmp_path: Path) -> None:
    """PEFT takes the nearest divisor where the size does not divide a layer's inputs: 20 → 16 of 32, 24 of 48."""
    model = build("llama")
    for block, targets in ((16, ["q_proj"]), (24, ["down_proj"])):
        method: Any = get("oft")
        deltaw.attach(model, method(block=block), targets=targets)
    randomise(model)
    expected = outputs("llama", model)
    deltaw.save(model, tmp_path)
    assert config_of(tmp_path)["peft_type"] == "OFT"
    theirs_equal(tmp_path, lambda: build("llama"), lambda m: outputs("llama", m), expected)


def test_a_series_from_before_it_changed_is_noted() -> None:
    old = {"peft_type": "OFT", "oft_block_size": 8, "use_cayley_neumann": True, "peft_version": "0.17.1"}
    assert any("before PEFT 0.18" in note for note in check(old)) and not check({**old, "peft_version": "0.18.0"})
    assert not check({**old, "use_cayley_neumann": False})


def test_a_shape_that_the_file_does_not_tell(tmp_path: Path) -> None:
    """LoHa's factors flatten a kernel: the layer's shape comes with the weight, and is checked then."""
    folder = theirs(tmp_path / "a", peft.LoHaConfig(r=3, target_modules=["two", "line"]), "mixed")
    state, _ = directory.read(folder)
    assert not state.specs
    model = seeded(Mixed)()
    weight = model.two.weight.detach()
    factors = state.tensors[Site("two")]
    change = delta(state, "two", weight)
    w1, w2 = (factors[f"hada_w{i}_a"] @ factors[f"hada_w{i}_b"] for i in "12")
    assert torch.allclose(change, (8 / 3 * w1 * w2).view(weight.shape), atol=1e-6)
    with pytest.raises(deltaw.DeltawError, match="hada_w1_a is"):
        delta(state, "two", weight[:5])
    directory.write(state, tmp_path / "b")  # and back without a model
    again = directory.read(tmp_path / "b")[0]
    same_state(again, dataclasses.replace(state, base=again.base))


def test_legacy_names_in_keys(tmp_path: Path) -> None:
    for number, config in enumerate(
        (peft.OFTConfig(oft_block_size=8, target_modules=LLAMA), peft.LoHaConfig(target_modules=LLAMA))
    ):
        folder = theirs(tmp_path / str(number), config)
        expected, tensors = directory.read(folder)[0], load_file(folder / WEIGHTS)
        renamed = {
            re.sub(r"(oft_R|hada_w\d_\w)", r"\1.default", key): tensor.clone() for key, tensor in tensors.items()
        }
        assert renamed.keys() != tensors.keys()
        save_file(renamed, folder / WEIGHTS)
        same_state(directory.read(folder)[0], expected)


def test_an_edited_config_is_noticed(tmp_path: Path) -> None:
    for name, fields, change, words in (
        ("loha", {"rank": 3}, {"alpha": 30}, "scale 10 by adapter_config.json, 1 by deltaw.json"),
        ("oft", {"block": 8}, {"use_cayley_neumann": True}, "terms 5 by adapter_config.json, None by deltaw.json"),
        ("ia3", {}, {"target_modules": ["k_proj"]}, None),
    ):
        folder = tmp_path / name
        deltaw.save(attached("llama", name, fields, ["q_proj"]), folder)
        (folder / CONFIG).write_text(json.dumps(config_of(folder) | change))
        if words is None:
            assert any("does not select" in note for note in deltaw.load(build("llama"), folder).notes)
        else:
            refused(folder, FileError, words)


def test_saved_modules_and_biases_beside_a_method(tmp_path: Path) -> None:
    model = attached("qwen", "oft", {"block": 8}, ["q_proj"])
    deltaw.attach(model, deltaw.Full(), targets=["lm_head"])
    randomise(model)
    expected = outputs("qwen", model)
    deltaw.save(model, tmp_path)
    assert config_of(tmp_path)["modules_to_save"] == ["lm_head"]
    theirs_equal(tmp_path, lambda: build("qwen"), lambda m: outputs("qwen", m), expected)
