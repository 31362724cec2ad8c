"""The acceptance rules, one by one: a file that passes every engine, and edits of it that trip just the rules expected.

The verdicts are those of the versions that the tables name; among them the known defects: rsLoRA served √r too weak, an α
that cannot be parsed, patterns and unknown keys passed over in silence, kinds of modules dropped for one missing layer.
"""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig

import deltaw
from deltaw.core.errors import FileError, UseError
from deltaw.models.base import outline
from deltaw.ship import engines
from deltaw.ship.acceptance import Base, Facts, read_facts, table
from deltaw.ship.export import export
from deltaw.ship.look import base_of
from deltaw.ship.rules import KNOWN

VLLM, LORAX, GGUF = ("vllm", "kserve"), ("lorax", "tgi"), ("llama.cpp", "ollama")
AT = "base_model.model.model.layers."
LLAMA = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "architectures": ["LlamaForCausalLM"],
}  # fmt: skip


@dataclass
class Folder:
    """A folder to be edited."""

    config: dict
    tensors: dict[str, Tensor]
    files: dict[str, str]

    def write(self, folder: Path) -> Path:
        folder.mkdir()
        for name, text in self.files.items():
            (folder / name).write_text(text)
        if self.config:
            (folder / "adapter_config.json").write_text(json.dumps(self.config))
        if self.tensors:
            save_file(
                {key: t.contiguous().clone() for key, t in self.tensors.items()}, folder / "adapter_model.safetensors"
            )
        return folder


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "llama"
    LlamaConfig(**LLAMA).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def base(llama: Path) -> Base:
    return base_of(outline(str(llama)))


@pytest.fixture(scope="session")
def written(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A portable export."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**LLAMA))
    deltaw.attach(model, deltaw.LoRA(rank=8, alpha=4), targets="all-linear")
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.1)
    folder = tmp_path_factory.mktemp("adapter")
    deltaw.save(model, folder / "source")
    export(folder / "source", folder / "portable", model=str(llama))
    return folder / "portable"


@pytest.fixture
def good(written: Path) -> Folder:
    from safetensors.torch import load_file

    config = json.loads((written / "adapter_config.json").read_text())
    return Folder(config, load_file(written / "adapter_model.safetensors"), {})


def tripped(facts: Facts) -> dict[str, set[str]]:
    """Engine → rules that say it does not take the file as it is."""
    return {
        one.engine: {found.rule for found in one.findings if found.effect != "needs"} for one in engines.check(facts)
    }


# Edits


def option(**changes: object) -> Callable[[Folder], None]:
    return lambda f: f.config.update(changes)


def without(*keys: str) -> Callable[[Folder], None]:
    def edit(f: Folder) -> None:
        for key in keys:
            del f.config[key]

    return edit


def drop(*parts: str) -> Callable[[Folder], None]:
    """All tensors with one of these in their key."""

    def edit(f: Folder) -> None:
        f.tensors = {key: t for key, t in f.tensors.items() if not any(part in key for part in parts)}

    return edit


def add(*shapes: tuple[str, tuple[int, ...]]) -> Callable[[Folder], None]:
    return lambda f: f.tensors.update({key: torch.ones(shape) for key, shape in shapes})


def rename(old: str, new: str) -> Callable[[Folder], None]:
    def edit(f: Folder) -> None:
        f.tensors = {key.replace(old, new): t for key, t in f.tensors.items()}

    return edit


def ranked(rank: int, *names: str) -> Callable[[Folder], None]:
    """Factors of another rank at some modules, cut or padded with zeros."""

    def edit(f: Folder) -> None:
        for key, tensor in f.tensors.items():
            if not names or any(f".{name}." in key for name in names):
                dim, size = (0, (rank, tensor.shape[1])) if "lora_A" in key else (1, (tensor.shape[0], rank))
                changed, most = tensor.new_zeros(size), min(rank, tensor.shape[dim])
                changed.narrow(dim, 0, most).copy_(tensor.narrow(dim, 0, most))
                f.tensors[key] = changed

    return edit


def both(*edits: Callable[[Folder], None]) -> Callable[[Folder], None]:
    def edit(f: Folder) -> None:
        for one in edits:
            one(f)

    return edit


def spoil(f: Folder) -> None:
    next(iter(f.tensors.values()))[0, 0] = torch.nan


def shorter(f: Folder) -> None:
    key = f"{AT}0.self_attn.o_proj.lora_B.weight"
    f.tensors[key] = f.tensors[key][:-8]


def everywhere(*rules: str) -> dict[str, set[str]]:
    return {engine: set(rules) for engine in engines.ENGINES}


def at(**rules: str | tuple[str, ...]) -> dict[str, set[str]]:
    """vllm=, sglang=, lorax=, llama=, ollama=, gguf= → engine → rules; vllm stands for kserve too, lorax for tgi."""
    groups = {
        "vllm": VLLM,
        "sglang": ("sglang",),
        "lorax": LORAX,
        "llama": ("llama.cpp",),
        "ollama": ("ollama",),
        "gguf": GGUF,
    }
    found: dict[str, set[str]] = {engine: set() for engine in engines.ENGINES}
    for group, names in rules.items():
        for engine in groups.get(group, (group,)):
            found[engine] |= {names} if isinstance(names, str) else set(names)
    return found


LAST, LONE, HEAD = "base_model.model.lm_head", f"{AT}0.mlp.experts", "base_model.model.classifier"
EMBED = "base_model.model.model.embed_tokens.lora_embedding_"
CLASSIFIER = both(option(modules_to_save=["classifier"]), add((f"{HEAD}.weight", (3, 32)), (f"{HEAD}.bias", (3,))))
BESIDE = {"sglang": ("saved", "keys"), "lorax": ("saved", "keys"), "gguf": "keys"}

CASES: dict[str, tuple[Callable[[Folder], None], dict[str, set[str]]]] = {
    "no config": (lambda f: f.config.clear(), everywhere("config")),
    "no weights, or shards": (
        both(lambda f: f.tensors.clear(), lambda f: f.files.update({"adapter_model-00001-of-00002.safetensors": ""})),
        everywhere("weights"),
    ),
    "no factors": (
        both(lambda f: f.tensors.clear(), add(("model.layers.0.mlp.up_proj.lora_A.weight", (8, 32)))),
        everywhere("nothing", "keys"),
    ),
    "an unknown key": (option(use_foo=True), everywhere("options")),
    "an unknown key without a value": (option(use_foo=False, foo=None), at()),
    "no targets": (without("target_modules"), at(vllm="required", sglang="required")),
    "no alpha": (without("lora_alpha"), at(vllm="required", sglang="required", llama="required")),
    "a rank of zero": (option(rank_pattern={"q_proj": 0}), at(vllm="ranks")),
    "another peft_type": (option(peft_type="ADALORA"), everywhere("type")),
    "a saved head": (option(modules_to_save=["lm_head"]), at(vllm="saved", sglang="saved", lorax="saved")),
    "a classifier": (CLASSIFIER, at(**BESIDE)),
    "two classifiers": (
        both(CLASSIFIER, add(("base_model.model.score.weight", (3, 32)))), at(vllm="head", **BESIDE)
    ),
    "a deep classifier": (both(CLASSIFIER, add((f"{HEAD}.weight", (3, 4, 32)))), at(vllm="head", **BESIDE)),
    "DoRA": (option(use_dora=True), at(vllm="dora", sglang="dora", lorax="dora")),
    "magnitudes": (add((f"{AT}0.self_attn.q_proj.lora_magnitude_vector", (32,))), everywhere("keys")),
    "a bias on B": (option(lora_bias=True), at(vllm="lora_bias")),
    "trained biases": (option(bias="lora_only"), at(vllm="bias", sglang="bias", lorax="bias")),
    "activated LoRA": (option(alora_invocation_tokens=[1, 2]), at(vllm="alora")),
    "layer replication": (option(layer_replication=[[0, 2]]), at(vllm="replication")),
    "BD-LoRA": (option(use_bdlora={"nblocks": 2}), at(vllm="bdlora")),
    "QA-LoRA": (option(use_qalora=True), at(vllm="qalora")),
    "PiSSA by name": (option(init_lora_weights="pissa"), at(vllm="init")),
    "a gaussian start": (option(init_lora_weights="gaussian"), at()),
    "Arrow": (option(arrow_config={"top_k": 2}), at(vllm="arrow")),
    "KaSA": (option(kasa_config={"beta": 1}), at(vllm="kasa")),
    "a copy of the base's embedding": (add(("base_model.model.model.embed_tokens.base_layer.weight", (64, 32))), at(ollama="keys")),
    "a norm": (add((f"{AT}0.input_layernorm.weight", (32,))), at(vllm="keys", sglang="keys", lorax="keys", ollama="keys")),
    "half a pair": (
        drop(f"{AT}0.self_attn.o_proj.lora_B"), {**everywhere("pair"), "lorax": {"pair"}, "tgi": {"pair"}}
    ),
    "keys with the adapter's name": (rename("lora_A.weight", "lora_A.default.weight"), everywhere("keys", "pair")),
    "NaN": (spoil, everywhere("nonfinite")),
    "an expression": (option(target_modules=r".*\.q_proj"), at(sglang="targets")),
    "all-linear": (option(target_modules="all-linear"), at()),
    "rank 128": (both(ranked(128), option(r=128, lora_alpha=128)), at(kserve="rank", ollama="flat")),
    "rank 528": (both(ranked(528), option(r=528, lora_alpha=528)), at(vllm="rank", ollama="flat")),
    "rank 4": (both(ranked(4), option(r=4, lora_alpha=4)), at(lorax="padding")),
    "rank 4, one kind": (both(ranked(4), option(r=4, lora_alpha=4), drop("self_attn", "gate", "up")), at()),
    "rsLoRA": (option(use_rslora=True), at(sglang="scale", gguf="scale")),
    "alpha_pattern": (option(alpha_pattern={"o_proj": 16}), at(sglang="scale", lorax="scale", gguf="scale")),
    "rank_pattern": (
        both(ranked(16, "o_proj"), option(rank_pattern={"o_proj": 16})), at(sglang="scale", lorax="scale")
    ),
    "a rank and alpha of its own": (
        both(ranked(16, "o_proj"), option(rank_pattern={"o_proj": 16}, alpha_pattern={"o_proj": 16})), at(gguf="scale")
    ),
    "unlike ranks of q, k, v": (
        both(ranked(4, "k_proj"), option(rank_pattern={"k_proj": 4}, alpha_pattern={"k_proj": 4})),
        at(sglang="group-ranks", gguf="scale"),
    ),
    "unlike ranks of layers": (
        both(ranked(32, "0.self_attn.o_proj"), option(rank_pattern={"0.self_attn.o_proj": 32}, alpha_pattern={"0.self_attn.o_proj": 32})),
        at(lorax="stacked", gguf="scale"),
    ),
    "a whole alpha with a point": (option(lora_alpha=8.0), at(ollama="alpha")),
    "a broken alpha": (option(lora_alpha=22.6), at(ollama="alpha")),
    "q alone": (drop("k_proj", "v_proj"), at(sglang="q-without-v")),
    "q and v": (drop("k_proj"), at()),
    "k and v": (drop("q_proj"), at(sglang="alone")),
    "up alone": (drop("gate_proj"), at(sglang="alone")),
    "gate alone": (drop("up_proj"), at()),
    "the first layer left out": (drop("layers.0."), at(lorax="layers")),
    "o_proj in one layer": (drop("layers.0.self_attn.o_proj"), at(lorax="layers")),
    "an embedding": (
        add((f"{EMBED}A", (8, 64)), (f"{EMBED}B", (32, 8))), at(sglang="embedding", lorax="embedding", ollama="names")
    ),
    "a head": (add((f"{LAST}.lora_A.weight", (8, 32)), (f"{LAST}.lora_B.weight", (64, 8))), at(ollama="names")),
    "a missing expert": (
        add(*((f"{LONE}.{n}.down_proj.lora_{x}.weight", s) for n in (0, 2) for x, s in (("A", (8, 48)), ("B", (32, 8))))),
        at(vllm="experts"),
    ),
}  # fmt: skip
ON_ITS_BASE: dict[str, tuple[Callable[[Folder], None], dict[str, object], dict[str, set[str]]]] = {
    "complete": (lambda f: None, {}, at()),
    "a classifier": (CLASSIFIER, {}, at(vllm="causal", **BESIDE)),
    "a wrong beginning": (rename("model.model.layers", "model.layers"), {}, at(vllm="places", sglang="places", lorax="places")),
    "a name the base lacks": (
        rename("o_proj", "out_proj"), {},
        at(vllm=("names", "places"), sglang="places", lorax="places", llama="names", ollama="names"),
    ),
    "other shapes": (shorter, {}, everywhere("shapes")),
    "the last layer left out": (drop("layers.1."), {}, at(lorax="layers")),
    "an embedding of another vocabulary": (
        add((f"{EMBED}A", (8, 70)), (f"{EMBED}B", (32, 8))), {},
        at(vllm="vocabulary", sglang="embedding", lorax=("embedding", "places"), ollama="names"),
    ),
    "new tokens": (lambda f: f.files.update({"added_tokens.json": '{"<x>": 64}'}), {}, at(sglang="tokens")),
    "known tokens": (lambda f: f.files.update({"added_tokens.json": '{"<x>": 63}'}), {}, at()),
    "a tied head": (
        add((f"{LAST}.lora_A.weight", (8, 32)), (f"{LAST}.lora_B.weight", (64, 8))), {"tie_word_embeddings": True},
        at(llama="head", ollama="names"),
    ),
    "another architecture": (lambda f: None, {"architectures": ["Qwen2ForCausalLM"]}, at(ollama="base")),
    "experts that the base has more of": (
        add(*((f"{LONE}.{n}.down_proj.lora_{x}.weight", s) for n in (0, 1) for x, s in (("A", (8, 48)), ("B", (32, 8))))),
        {"num_experts": 3}, at(vllm=("experts", "places"), sglang="places", lorax="places"),
    ),
}  # fmt: skip


def test_a_portable_export_passes_everywhere(written: Path, base: Base) -> None:
    for facts in (read_facts(written), read_facts(written, base)):
        assert all(one.takes for one in engines.check(facts)), table(engines.check(facts))


@pytest.mark.parametrize("name", CASES)
def test_an_edit_trips_just_its_rules(name: str, good: Folder, tmp_path: Path) -> None:
    edit, expected = CASES[name]
    edit(good)
    assert tripped(read_facts(good.write(tmp_path / "a"))) == expected


@pytest.mark.parametrize("name", ON_ITS_BASE)
def test_an_edit_trips_just_its_rules_where_the_base_is_known(
    name: str, good: Folder, base: Base, tmp_path: Path
) -> None:
    edit, config, expected = ON_ITS_BASE[name]
    edit(good)
    other = Base({**base.config, **config}, base.linear)
    assert tripped(read_facts(good.write(tmp_path / "a"), other)) == expected


def test_a_pickle_is_for_some(good: Folder, tmp_path: Path) -> None:
    tensors, good.tensors = good.tensors, {}
    folder = good.write(tmp_path / "a")
    torch.save(tensors, folder / "adapter_model.bin")
    with pytest.raises(FileError, match="allow_pickle"):
        read_facts(folder)
    assert tripped(read_facts(folder, allow_pickle=True)) == at(tgi="pickle")


def needs(folder: Path) -> dict[str, dict[str, str]]:
    return {
        one.engine: {found.rule: found.why for found in one.findings if found.effect == "needs"}
        for one in engines.check(read_facts(folder))
    }


def test_what_engines_must_be_started_with(good: Folder, tmp_path: Path) -> None:
    at_16 = needs(good.write(tmp_path / "a"))
    assert at_16["vllm"] == {} and at_16["kserve"] == {}
    assert "--max-lora-rank 8 --lora-target-modules down_proj gate_proj" in at_16["sglang"]["start"]
    assert "more than 1 GPU pads its rank of 8" in at_16["lorax"]["parallel"]
    both(ranked(48), option(r=48, lora_alpha=48, base_model_name_or_path=None))(good)
    at_48 = needs(good.write(tmp_path / "b"))
    assert at_48["vllm"]["start"] == "rank 48: start it with --max-lora-rank 64" and at_48["kserve"] == {}
    assert "more than 6 GPUs" in at_48["tgi"]["parallel"] and "names no base" in at_48["llama.cpp"]["base"]
    good.config["target_parameters"] = ["mlp.experts.down_proj"]
    add((f"{LONE}.lora_A.weight", (96, 48)), (f"{LONE}.lora_B.weight", (32, 96)))(good)
    stacked = read_facts(good.write(tmp_path / "c"))
    assert "is_3d_lora_weight" in needs(tmp_path / "c")["vllm"]["stacks"] and stacked.rank == 48


def test_every_rule_is_tested() -> None:
    expected = [case[-1] for case in (*CASES.values(), *ON_ITS_BASE.values())]
    seen = {engine: set().union(*(one[engine] for one in expected)) for engine in engines.ENGINES}
    seen["tgi"] |= {"pickle"}
    for name, engine in engines.ENGINES.items():
        assert {rule.name for rule in engine.rules if rule.effect != "needs"} == seen[name], name
        assert len({rule.name for rule in engine.rules}) == len(engine.rules)
    assert {rule.name for engine in engines.ENGINES.values() for rule in engine.rules if rule.effect == "needs"} == {
        "start", "parallel", "base", "stacks", "towers"  # the last one in test_image_text_ship
    }  # fmt: skip


def test_a_key_that_no_rule_knows_is_no_silent_yes(good: Folder, tmp_path: Path) -> None:
    option(use_foo=True)(good)
    (one,) = engines.check(read_facts(good.write(tmp_path / "a")), ["vllm"])
    assert one.verdict == "unknown" and not one.takes
    assert "unknown: key the rules do not know: use_foo" in table([one])
    option(use_dora=True)(good)
    (one,) = engines.check(read_facts(good.write(tmp_path / "b")), ["vllm"])
    assert one.verdict == "refuses"


def test_no_key_of_peft_or_ours_is_unknown() -> None:
    from peft import LoraConfig

    assert {field.name for field in dataclasses.fields(LoraConfig)} <= KNOWN


def test_verdict_and_table(good: Folder, tmp_path: Path) -> None:
    option(use_rslora=True)(good)
    opinions = engines.check(read_facts(good.write(tmp_path / "a")), ["vllm", "sglang"])
    assert [one.verdict for one in opinions] == ["takes it", "computes something else"]
    text = table(opinions)
    assert "use_rslora is not read: it scales" in text and "by 1 instead of 2.828" in text
    with pytest.raises(UseError, match=r"no engine 'vlm'; did you mean 'vllm'"):
        engines.check(read_facts(tmp_path / "a"), ["vlm"])


def test_a_folder_that_cannot_be_read_is_a_sentence(good: Folder, tmp_path: Path) -> None:
    with pytest.raises(FileError, match="no adapter folder"):
        read_facts(tmp_path / "none")
    (tmp_path / "run/adapter").mkdir(parents=True)
    (tmp_path / "run/adapter/adapter_config.json").write_text("{}")
    with pytest.raises(FileError, match=r"run holds no adapter in PEFT's form, .*; there is one in .*run/adapter"):
        read_facts(tmp_path / "run")
    good.config |= {"rank_pattern": "q_proj", "modules_to_save": "lm_head", "alpha_pattern": {"(": 3}}
    with pytest.raises(
        FileError, match=r"is not PEFT's \(3 faults\)(.|\n)*modules_to_save='lm_head' is not a list of names"
    ):
        read_facts(good.write(tmp_path / "a"))
    good.config = {"peft_type": "LORA", "r": "8", "lora_alpha": "16", "init_lora_weights": 3, "added": 1}
    odd = read_facts(good.write(tmp_path / "b"))
    assert tripped(odd)["ollama"] == {"alpha", "options"}
    assert tripped(odd)["vllm"] == {"required", "ranks", "options"}
    (tmp_path / "b/adapter_config.json").write_text("[]")
    with pytest.raises(FileError, match="expected an object"):
        read_facts(tmp_path / "b")
    (tmp_path / "a/adapter_config.json").write_text("{}")
    (tmp_path / "a/adapter_model.safetensors").write_bytes(b"cut short")
    with pytest.raises(FileError, match="is not a safetensors file"):
        read_facts(tmp_path / "a")


DISTILBERT = {"refuses": {*VLLM, *GGUF}, "computes something else": {"sglang", *LORAX}}
HEADED = {"refuses": set(GGUF), "computes something else": {"sglang", *LORAX}, "takes it": set(VLLM)}
PLAIN = {"refuses": {"ollama"}, "takes it": {*VLLM, "sglang", *LORAX, "llama.cpp"}}
REAL: dict[str, dict[str, set[str]]] = {
    "Tashu014__lora-imdb-distilbert": DISTILBERT,  # saves pre_classifier as well
    "dayanidhi04__emotion-classification-distilbert-lora": DISTILBERT,
    "Hareshjethani__BERT-GPT2-Multitask-Finetuning": HEADED,
    "anirudh-ak__peft-gpt2/model/lora_model": HEADED,
    "stathopoan__Apply-Lightweight-Fine-Tuning-to-a-Foundation-LLM-Model/lora_model": HEADED,
    "niket-sharma__LLMs-from-groundup/lora_adapters": PLAIN,
    "yoonyerin__be-great": {
        "refuses": {"ollama", "tgi"},
        "takes it": {*VLLM, "sglang", "lorax", "llama.cpp"},
    },  # a pickle
}


@pytest.mark.shared
@pytest.mark.parametrize("folder", REAL)
def test_real_adapters(folder: str, shared: Path) -> None:
    found: dict[str, set[str]] = {}
    for one in engines.check(read_facts(shared / "adapters" / folder, allow_pickle=True)):
        found.setdefault(one.verdict, set()).add(one.engine)
    assert found == REAL[folder]


@pytest.mark.shared
def test_every_config_of_the_corpus_is_judged(shared: Path) -> None:
    """103 configs of nearly every method of PEFT: none breaks a rule, and none but LoRA goes to an engine that asks for it."""
    files = sorted((shared / "adapters/peft_method_comparison_configs").rglob("adapter_config.json"))
    assert len(files) == 103
    for file in files:
        facts = read_facts(file.parent)
        opinions = {one.engine: one for one in engines.check(facts)}
        assert all("weights" in {found.rule for found in one.findings} for one in opinions.values())
        foreign = "type" in {found.rule for found in opinions["sglang"].findings}
        assert foreign == (facts.config["peft_type"] != "LORA")
