"""Exports: PEFT loads the folder to the logits of the adapter, whatever the method was; what cannot be is refused and said."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import deltaw
from deltaw.core.errors import BaseMismatchError, ConfigError, FileError, MergeError, UseError
from deltaw.core.host import HostSpec
from deltaw.core.method import Method, Site, get
from deltaw.core.state import AdapterState
from deltaw.formats import directory
from deltaw.methods.full import Full
from deltaw.mixing import exact
from deltaw.mixing.through import Conversion, Converted
from deltaw.models.base import outline
from deltaw.ship import convert, engines, readback
from deltaw.ship.acceptance import read_facts, table
from deltaw.ship.check import logits, probe
from deltaw.ship.export import MANIFEST, PROFILES, export
from deltaw.ship.look import base_of
from deltaw.ship.portable import beginning, holes, rank_for

UP = ("lora_B.weight", "lora_up.weight")

PATTERNS: dict[str, Any] = {
    "rank": 4,
    "alpha": 8,
    "rank_pattern": {"v_proj": 6, "5.self_attn.q_proj": 3},
    "alpha_pattern": {"q_proj": 3},
}
EXACT: dict[str, Method] = {
    "patterns": deltaw.LoRA(**PATTERNS),
    "rslora and patterns": deltaw.LoRA(rslora=True, **PATTERNS),
    "pissa": deltaw.LoRA(rank=4, init="pissa"),
    "olora": deltaw.LoRA(rank=4, init="olora", alpha=6),
    "adalora": deltaw.AdaLoRA(rank=4),
    "vera": deltaw.VeRA(rank=5),
    "loha": deltaw.LoHa(rank=2),
    "lokr": deltaw.LoKr(rank=3),
}
CUT: dict[str, Method] = {"dora": deltaw.DoRA(rank=4), "mora": deltaw.MoRA(rank=2), "oft": deltaw.OFT(block=16)}


@pytest.fixture(scope="module")
def tiny() -> nn.Module:
    return deltaw.load_base("tiny", dtype="fp32").model


def trained(
    model: nn.Module, method: Method, folder: Path, targets: Any = ("q_proj", "v_proj"), std: float = 0.05
) -> Path:
    """An adapter that does something, without paying for training."""
    deltaw.attach(model, method, targets=list(targets) if isinstance(targets, tuple) else targets)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(std * torch.randn_like(parameter))
    deltaw.save(model, folder)
    deltaw.detach(model)
    return folder


def ours(model: nn.Module, folder: Path) -> torch.Tensor:
    deltaw.load(model, folder)
    found = logits(model, probe(model))
    deltaw.detach(model)
    return found


def theirs(folder: Path) -> torch.Tensor:
    """PEFT's logits, and that it found just the tensors it wanted."""
    from peft import LoraConfig, PeftConfig, get_peft_model
    from peft.utils import load_peft_weights, set_peft_model_state_dict

    model = deltaw.load_base("tiny", dtype="fp32").model
    config = PeftConfig.from_pretrained(str(folder))
    assert isinstance(config, LoraConfig)
    peft = get_peft_model(model, config)
    result = set_peft_model_state_dict(peft, load_peft_weights(str(folder), device="cpu"))
    assert not result.unexpected_keys and not [key for key in result.missing_keys if "lora_" in key]
    return logits(peft, probe(model))


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


@pytest.mark.parametrize("name", EXACT)
def test_portable_is_exact_where_the_algebra_is(name: str, tiny: nn.Module, tmp_path: Path) -> None:
    source = trained(tiny, EXACT[name], tmp_path / "a")
    done = export(source, tmp_path / "b", dtype="fp32")
    wanted, plain = ours(tiny, source), logits(tiny, probe(tiny))
    assert done.error < 1e-6 and {one.how for one in done.modules.values()} == {"exact"} and len(done.modules) == 12
    got = theirs(tmp_path / "b")
    assert apart(got, wanted) < 1e-4 * apart(plain, wanted) + 1e-5 and apart(plain, wanted) > 1e-3
    assert apart(ours(tiny, tmp_path / "b"), wanted) < 1e-4 * apart(plain, wanted) + 1e-5
    config = json.loads((tmp_path / "b/adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == done.rank <= 256 and type(config["lora_alpha"]) is int
    assert config["rank_pattern"] == config["alpha_pattern"] == {} and not config["use_rslora"]
    assert config["target_modules"] == ["k_proj", "q_proj", "v_proj"] and config["init_lora_weights"] is True
    opinions = engines.check(read_facts(tmp_path / "b", base_of(outline("tiny"))))
    assert all(one.takes for one in opinions), table(opinions)


@pytest.mark.parametrize(("dtype", "bound"), [("bf16", 1e-2), ("fp16", 1e-3)])
def test_portable_in_half_precision(dtype: str, bound: float, tiny: nn.Module, tmp_path: Path) -> None:
    source = trained(tiny, EXACT["rslora and patterns"], tmp_path / "a")
    done = export(source, tmp_path / "b", dtype=dtype)
    assert 1e-5 < done.error < bound
    wanted, plain = ours(tiny, source), logits(tiny, probe(tiny))
    assert apart(theirs(tmp_path / "b"), wanted) < 4 * bound * apart(plain, wanted)
    with safe_open(tmp_path / "b/adapter_model.safetensors", framework="pt") as opened:
        assert {str(opened.get_tensor(key).dtype) for key in opened.keys()} == {f"torch.{done.dtype}"}  # noqa: SIM118
        assert sum(opened.get_tensor(key).nbytes for key in opened.keys()) == done.bytes  # noqa: SIM118


@pytest.mark.parametrize("name", CUT)
def test_what_has_no_factors_is_cut_and_the_error_shown(name: str, tiny: nn.Module, tmp_path: Path) -> None:
    source = trained(tiny, CUT[name], tmp_path / "a")
    with pytest.raises(UseError, match=r"has no low-rank factors: give the rank to cut it at \(--rank 64\)"):
        export(source, tmp_path / "b")
    done = export(source, tmp_path / "b", rank=48, dtype="fp32")
    assert done.rank == 48 and {one.how for one in done.modules.values()} <= {"svd", "exact"}
    wanted, plain = ours(tiny, source), logits(tiny, probe(tiny))
    got = theirs(tmp_path / "b")
    assert apart(got, wanted) < max(2 * done.error, 1e-4) * apart(plain, wanted)
    assert all(one.takes for one in engines.check(read_facts(tmp_path / "b", base_of(outline("tiny")))))
    full = export(source, tmp_path / "c", rank=128, dtype="fp32")
    assert full.modules["model.layers.0.self_attn.v_proj"].error < 1e-5  # 128 × 256: nothing to lose
    assert 0.01 < done.error < 1 and full.error < done.error
    manifest = json.loads((tmp_path / "b" / MANIFEST).read_text())
    assert manifest["largest_relative_error"] == done.error and manifest["base"]["name"] == "tiny"
    assert manifest["parents"] == [directory.open_directory(source).digest]
    assert (
        manifest["file"]
        == f"sha256:{hashlib.sha256((tmp_path / 'b/adapter_model.safetensors').read_bytes()).hexdigest()}"
    )
    assert manifest["tensors"] == directory.open_directory(tmp_path / "b").digest


def test_holes_are_filled_with_zeros_and_their_cost_is_told(tiny: nn.Module, tmp_path: Path) -> None:
    source = trained(
        tiny,
        deltaw.LoRA(rank=2),
        tmp_path / "a",
        targets=["model.layers.1.self_attn.q_proj", "model.layers.2.mlp.up_proj"],
    )
    done = export(source, tmp_path / "b")
    assert len(done.modules) == 2 and done.filled == 3 * 6 + 2 * 6 - 2
    attention, gated = 8 * (3 * 256 + 256 + 2 * 128) * 2, 8 * 2 * (256 + 768) * 2
    assert done.filled_bytes == 6 * (attention + gated) - 8 * (512 + 1024) * 2
    bare = export(source, tmp_path / "c", fill=False)
    assert bare.filled == 0 and bare.bytes == done.bytes - done.filled_bytes
    wanted = ours(tiny, source)
    assert (
        apart(ours(tiny, tmp_path / "b"), ours(tiny, tmp_path / "c")) < 1e-5
        and apart(ours(tiny, tmp_path / "b"), wanted) < 0.1
    )
    verdicts = {one.engine: one.verdict for one in engines.check(read_facts(tmp_path / "c", base_of(outline("tiny"))))}
    assert verdicts["sglang"] == "refuses" and verdicts["lorax"] == "computes something else"
    assert all(one.takes for one in engines.check(read_facts(tmp_path / "b", base_of(outline("tiny")))))


def test_a_mix_goes_out_exactly(tiny: nn.Module, tmp_path: Path) -> None:
    """Weights, also negative ones, ranks and alphas of their own: one file with one rank."""
    a = directory.read(trained(tiny, deltaw.LoRA(rank=3, alpha=2, rslora=True), tmp_path / "a"))[0]
    b = directory.read(trained(tiny, deltaw.LoRA(rank=7), tmp_path / "b", targets="attention"))[0]
    directory.write(exact([a, b], [0.7, -0.4]), tmp_path / "mixed")
    done = export(tmp_path / "mixed", tmp_path / "out", dtype="fp32", model="tiny")
    assert done.rank == 16 and done.error < 1e-6
    assert apart(theirs(tmp_path / "out"), ours(tiny, tmp_path / "mixed")) < 1e-3


def test_ranks() -> None:
    assert [rank_for([r], None, None) for r in (1, 8, 9, 33, 257, 400)] == [8, 8, 16, 64, 320, 512]
    assert rank_for([4, 20], None, 64) == 32 and rank_for([40], None, 48) == 48 and rank_for([3], 5, None) == 5
    with pytest.raises(UseError, match="rank 700 is above what any engine takes, 512: cut it, --max-rank 320"):
        rank_for([700], None, None)


def test_max_rank_cuts_by_svd(tiny: nn.Module, tmp_path: Path) -> None:
    """KServe's limit: 64."""
    source = trained(tiny, deltaw.LoRA(rank=80), tmp_path / "a", std=0.02)
    whole = export(source, tmp_path / "b")
    assert whole.rank == 128 and whole.error < 0.01
    done = export(source, tmp_path / "c", max_rank=64)
    assert done.rank == 64 and 0.01 < done.error < 1 and {one.how for one in done.modules.values()} == {"svd"}
    kserve = [engines.check(read_facts(tmp_path / name), ["kserve"])[0].takes for name in ("b", "c")]
    assert kserve == [False, True]


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda m: deltaw.attach(m, deltaw.LoRA(rank=2, modules_to_save=("norm",)), targets=["q_proj"]), "a trained copy of a parameter"),
        (lambda m: deltaw.attach(m, deltaw.TokenRows(tokens=(3, 5)), targets=["embed_tokens"]), "rows of a table of tokens"),
        (lambda m: deltaw.attach(m, deltaw.LoRA(rank=2), targets=["embed_tokens"]), "an embedding"),
    ],
    ids=["a copy", "token rows", "an embedding"],
)  # fmt: skip
def test_what_is_no_lora_is_refused_with_the_way_out(make: Any, reason: str, tiny: nn.Module, tmp_path: Path) -> None:
    make(tiny)
    for parameter in tiny.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1)
    deltaw.save(tiny, tmp_path / "a")
    deltaw.detach(tiny)
    with pytest.raises(
        UseError, match=f"no portable form: write it into the weights instead, with deltaw merge(.|\n)*{reason}"
    ):
        export(tmp_path / "a", tmp_path / "b")
    assert [file.name for file in tmp_path.iterdir()] == ["a"]
    export(tmp_path / "a", tmp_path / "b", "peft")
    assert directory.read(tmp_path / "b")[0].methods.keys() == directory.read(tmp_path / "a")[0].methods.keys()


def test_biases_stacks_convolutions_and_loftq_are_refused_too(tmp_path: Path) -> None:
    def state(method: Method, spec: HostSpec, slot: str = "weight", **tensors: torch.Tensor) -> AdapterState:
        return AdapterState({Site("a.b", slot): method}, {Site("a.b", slot): tensors}, {Site("a.b", slot): spec})

    cases = {
        "a trained bias": state(Full(), HostSpec((4,), linear=False), "bias", copy=torch.ones(4)),
        "a stack of experts": state(
            deltaw.LoRA(rank=1, alpha=1.0), HostSpec((4, 3), stack=2), "down_proj", lora_A=torch.ones(2, 1, 3), lora_B=torch.ones(2, 4, 1)
        ),
        "not a linear layer": state(
            deltaw.LoRA(rank=1, alpha=1.0), HostSpec((4, 3, 2, 2)), lora_A=torch.ones(1, 3, 2, 2), lora_B=torch.ones(4, 1, 1, 1)
        ),
        "it makes up for what quantising": state(
            deltaw.LoRA(rank=1, alpha=1.0, init="loftq"), HostSpec((4, 3)), lora_A=torch.ones(1, 3), lora_B=torch.ones(4, 1)
        ),
    }  # fmt: skip
    for number, (reason, one) in enumerate(cases.items()):
        directory.write(one, tmp_path / f"{number}")
        with pytest.raises(UseError, match=reason):
            export(tmp_path / f"{number}", tmp_path / "out", fill=False)


def test_wrong_use(tiny: nn.Module, tmp_path: Path) -> None:
    source = trained(tiny, deltaw.LoRA(rank=2), tmp_path / "a")
    for options, words in (
        ({"profile": "portabel"}, "no profile 'portabel'; did you mean 'portable'"),
        ({"rank": 0}, "rank=0 must be at least 1"),
        ({"rank": 8, "max_rank": 4}, "rank=8 is above max_rank=4"),
        ({"dtype": "fp8"}, "dtype='fp8' is none of bf16, fp16, fp32"),
        ({"profile": "peft", "dtype": "bf16"}, "are for the profile portable"),
    ):
        with pytest.raises(UseError, match=words):
            export(source, tmp_path / "b", **options)
    with pytest.raises(UseError, match="is not an empty folder"):
        export(source, source)
    with pytest.raises(FileError, match="no adapter folder"):
        export(tmp_path / "none", tmp_path / "b")
    trained(tiny, deltaw.LoRA(rank=2), tmp_path / "zero", std=0.0)
    with pytest.raises(UseError, match="zero everywhere"):
        export(tmp_path / "zero", tmp_path / "b")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a", "zero"]


def test_without_a_base_what_is_missing_is_not_known(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12))
    source = trained(model, deltaw.LoRA(rank=2), tmp_path / "a", targets="all-linear")
    with pytest.raises(UseError, match=r"not on this machine; .*give the base with --model.*--no-fill"):
        export(source, tmp_path / "b")
    done = export(source, tmp_path / "b", fill=False)
    assert done.rank == 8 and any("were not looked at" in remark for remark in done.remarks)


def test_a_base_of_other_shapes_or_values(tiny: nn.Module, tmp_path: Path) -> None:
    from transformers import LlamaConfig

    source = trained(tiny, deltaw.DoRA(rank=2), tmp_path / "a")
    LlamaConfig(hidden_size=64, num_hidden_layers=6, num_attention_heads=4, intermediate_size=96).save_pretrained(
        tmp_path / "small"
    )
    with pytest.raises(BaseMismatchError, match="not for this base"):
        export(source, tmp_path / "b", model=str(tmp_path / "small"), rank=8)
    LlamaConfig(num_hidden_layers=2).save_pretrained(tmp_path / "short")
    with pytest.raises(UseError, match="does not fit this base"):
        export(source, tmp_path / "b", model=str(tmp_path / "short"), rank=8)
    other = deltaw.load_base("tiny", dtype="fp32")
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter.mul_(1.5)
    other.model.save_pretrained(tmp_path / "other")
    other.tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(BaseMismatchError, match="another base"):
        export(source, tmp_path / "b", model=str(tmp_path / "other"), rank=8)
    export(source, tmp_path / "b", model=str(tmp_path / "other"), rank=8, allow_base_mismatch=True)


def test_paths_of_the_inner_model_become_those_of_the_base(tiny: nn.Module, tmp_path: Path) -> None:
    """Engines that look at the last names only load such a file and do nothing."""
    source = trained(tiny.model, deltaw.LoRA(rank=8), tmp_path / "a")
    base = base_of(outline("tiny"))
    before = engines.check(read_facts(source, base), ["vllm"])[0]
    assert before.verdict == "computes something else" and "without a word" in before.findings[0].why
    done = export(source, tmp_path / "b", model="tiny", dtype="fp32")
    assert any("its paths begin with 'model.' in this base" in remark for remark in done.remarks)
    assert engines.check(read_facts(tmp_path / "b", base), ["vllm"])[0].takes
    deltaw.load(tiny.model, source)
    wanted = logits(tiny, probe(tiny))
    deltaw.detach(tiny.model)
    assert apart(ours(tiny, tmp_path / "b"), wanted) < 1e-4


def test_beginnings() -> None:
    known = [f"model.language_model.layers.{n}.q_proj" for n in range(2)] + [
        f"model.visual.blocks.{n}.q_proj" for n in range(2)
    ]
    assert beginning(["layers.0.q_proj"], known) == ("", "model.language_model.")
    assert beginning(["base.layers.1.q_proj"], known) == ("base.", "model.language_model.")
    assert beginning(["model.layers.1.q_proj"], known) == ("model.", "model.language_model.")
    assert beginning(known, known) == ("", "")
    for lost in (["q_proj"], ["layers.0.q_proj", "layers.7.q_proj"], ["layers.0.k_proj"]):
        with pytest.raises(UseError, match="no linear layer there"):
            beginning(lost, known)


def test_holes() -> None:
    names = ("a.q_proj", "a.k_proj", "a.v_proj", "a.o_proj", "f.gate_proj", "f.up_proj")
    linear = {f"m.{n}.{name}": (4, 4) for n in range(2) for name in names}
    assert holes(["m.0.a.o_proj"], linear) == ["m.1.a.o_proj"]
    assert holes(["m.0.f.up_proj", "m.1.f.up_proj"], linear) == ["m.0.f.gate_proj", "m.1.f.gate_proj"]
    assert holes(list(linear), linear) == []


@pytest.mark.parametrize("dora", [False, True])
def test_what_peft_wrote_computes_the_same_after_the_export(dora: bool, tmp_path: Path) -> None:
    """rsLoRA and patterns are folded, DoRA is cut: PEFT on the exported folder against PEFT on its own."""
    from peft import LoraConfig, get_peft_model

    model = deltaw.load_base("tiny", dtype="fp32").model
    plain = logits(model, probe(model))
    config = LoraConfig(
        r=4, lora_alpha=8, use_rslora=True, use_dora=dora, rank_pattern={"v_proj": 6}, alpha_pattern={"q_proj": 3},
        target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM",
    )  # fmt: skip
    peft = get_peft_model(model, config)
    for key, parameter in peft.named_parameters():
        if "lora_B" in key:
            parameter.data.normal_(std=0.05)
    wanted = logits(peft, probe(model))
    peft.save_pretrained(tmp_path / "a")
    done = export(tmp_path / "a", tmp_path / "b", model="tiny", dtype="fp32", rank=96 if dora else None)
    assert any("layers, shapes" in remark for remark in done.remarks) is False and (done.error > 1e-4) is dora
    effect = apart(plain, wanted)
    assert apart(theirs(tmp_path / "b"), wanted) < max(1e-4, 2 * done.error) * effect + 1e-5 and effect > 0.1


SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
FAMILIES: dict[str, Any] = {
    "Qwen2": {**SMALL, "intermediate_size": 48}, "Gemma2": {**SMALL, "intermediate_size": 48, "head_dim": 8},
    "Qwen3": {**SMALL, "intermediate_size": 48, "head_dim": 8},
    "GPT2": {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0},
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str, tmp_path: Path) -> None:
    """Biases, tied heads, transposed layers: PEFT's logits, and the honest exception of Ollama's two architectures."""
    import transformers
    from peft import PeftModel

    kind = getattr(transformers, f"{family}LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM")
    torch.manual_seed(0)
    model = kind(getattr(transformers, f"{family}Config")(**FAMILIES[family])).eval()
    model.save_pretrained(tmp_path / "base")
    method = deltaw.LoRA(rank=4, alpha=8, rslora=True, rank_pattern={".*proj": 3}, alpha_pattern={".*attn.*": 3})
    source = trained(model, method, tmp_path / "a", targets="all-linear", std=0.2)
    done = export(source, tmp_path / "b", model=str(tmp_path / "base"), dtype="fp32")
    plain, wanted = logits(model, probe(model)), ours(model, source)
    got = logits(PeftModel.from_pretrained(model, str(tmp_path / "b")).eval(), probe(model))
    assert done.error < 1e-6 and apart(got, wanted) < 1e-4 * apart(plain, wanted) + 1e-6 < 1e-3 * apart(plain, wanted)
    refused = {
        one.engine
        for one in engines.check(read_facts(tmp_path / "b", base_of(outline(str(tmp_path / "base")))))
        if not one.takes
    }
    assert refused == (set() if family == "Gemma2" else {"ollama"})


def test_a_scaled_bias(tmp_path: Path) -> None:
    """IA³ scales the layer's bias too: no engine takes a bias, PEFT does."""
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    from deltaw.models.base import TINY

    base = tmp_path / "qwen"
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=4096,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=48,
        )
    ).eval()
    for key, parameter in model.named_parameters():
        if key.endswith("bias"):
            parameter.data.normal_()
    model.save_pretrained(base)
    AutoTokenizer.from_pretrained(TINY).save_pretrained(base)
    source = trained(model, deltaw.IA3(), tmp_path / "a", targets=["k_proj", "v_proj"])
    with pytest.raises(UseError, match="a trained bias, which engines refuse or leave out"):
        export(source, tmp_path / "b", rank=8, model=str(base))
    done = export(source, tmp_path / "b", "peft", rank=16, model=str(base))
    assert done.error < 1e-5 and any("rank 16 was asked for" in remark for remark in done.remarks)
    assert apart(ours(model, tmp_path / "b"), ours(model, source)) < 1e-4
    verdicts = {
        one.engine: one.verdict for one in engines.check(read_facts(tmp_path / "b", base_of(outline(str(base)))))
    }
    assert verdicts["vllm"] == verdicts["ollama"] == "refuses" and verdicts["sglang"] == "computes something else"


@pytest.mark.parametrize(
    ("size", "error", "words"),
    [
        (1e6, UseError, "too large for this dtype.*it overflows fp16"),
        (1e-8, MergeError, "try --dtype fp32: a.q_proj: read back it differs by"),
    ],
)
def test_what_half_precision_cannot_hold(size: float, error: type[Exception], words: str, tmp_path: Path) -> None:
    site, method = Site("a.q_proj"), deltaw.LoRA(rank=2, alpha=2.0)
    tensors = {"lora_A": torch.randn(2, 6), "lora_B": size * torch.randn(8, 2)}
    directory.write(AdapterState({site: method}, {site: tensors}, {site: HostSpec((8, 6))}), tmp_path / "a")
    with pytest.raises(error, match=words):
        export(tmp_path / "a", tmp_path / "b", fill=False, dtype="fp16")
    assert not (tmp_path / "b").exists()
    assert export(tmp_path / "a", tmp_path / "b", fill=False).error < 1e-2  # bf16 has the range of fp32


def test_a_quantised_base_is_said(tiny: nn.Module, tmp_path: Path) -> None:
    state = directory.read(trained(tiny, deltaw.LoRA(rank=2), tmp_path / "a"))[0]
    assert state.base is not None
    directory.write(dataclasses.replace(state, base=dataclasses.replace(state.base, quantized="nf4")), tmp_path / "q")
    assert any("trained on the base in nf4" in remark for remark in export(tmp_path / "q", tmp_path / "b").remarks)


# The profile peft


def test_peft_keeps_patterns(tiny: nn.Module, tmp_path: Path) -> None:
    source = trained(tiny, EXACT["rslora and patterns"], tmp_path / "a")
    done = export(source, tmp_path / "b", "peft")
    config = json.loads((tmp_path / "b/adapter_config.json").read_text())
    assert config["use_rslora"] and config["rank_pattern"] and done.error < 1e-7 and done.rank is None
    assert config["target_modules"] == ["q_proj", "v_proj"]
    assert apart(theirs(tmp_path / "b"), ours(tiny, source)) < 1e-4
    verdicts = {one.engine: one.verdict for one in engines.check(read_facts(tmp_path / "b"))}
    assert verdicts["vllm"] == "takes it" and verdicts["llama.cpp"] == verdicts["lorax"] == "computes something else"
    assert verdicts["sglang"] == "refuses"  # unlike ranks of q and v


def test_peft_keeps_dora_and_loses_nothing(tiny: nn.Module, tmp_path: Path) -> None:
    source = trained(tiny, deltaw.DoRA(rank=4), tmp_path / "a")
    done = export(source, tmp_path / "b", "peft")
    assert {one.how for one in done.modules.values()} == {"kept"} and done.error < 1e-6
    assert json.loads((tmp_path / "b/adapter_config.json").read_text())["use_dora"]
    assert apart(theirs(tmp_path / "b"), ours(tiny, source)) < 1e-4


@pytest.mark.parametrize("name", ["adalora", "loha", "lokr", "oft", "vera", "ia3"])
def test_peft_reads_back_every_kind(name: str, tiny: nn.Module, tmp_path: Path) -> None:
    done = export(trained(tiny, get(name)(), tmp_path / "a"), tmp_path / "b", "peft")
    assert done.error < 1e-5 and len(done.modules) >= 12


def test_peft_has_no_mora_and_gets_a_lora(tiny: nn.Module, tmp_path: Path) -> None:
    source = trained(tiny, deltaw.MoRA(rank=2), tmp_path / "a")
    with pytest.raises(UseError, match="no low-rank factors"):
        export(source, tmp_path / "b", "peft")
    done = export(source, tmp_path / "b", "peft", rank=16)
    assert any("plain LoRA" in remark and "no format for 'mora'" in remark for remark in done.remarks)
    assert {one.rank for one in done.modules.values()} == {16} and done.error > 0.01
    with pytest.raises((UseError, ConfigError)):
        export(
            trained(tiny, deltaw.Bottleneck(), tmp_path / "bn", targets="all-linear"), tmp_path / "c", "peft", rank=4
        )


# Reading back


def test_what_is_not_the_adapter_never_appears(
    tiny: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = trained(tiny, deltaw.LoRA(rank=2), tmp_path / "a")
    monkeypatch.setattr(readback, "TOLERANCE", {torch.bfloat16: 1e-7})
    with pytest.raises(MergeError, match=r"read back it differs by .* of its size, more than 1e-07"):
        export(source, tmp_path / "b")
    write = directory.write

    def halved(state: AdapterState, *rest: Any, **more: Any) -> None:
        tensors = {
            site: {n: t / 2 if n == "lora_B" else t for n, t in group.items()} for site, group in state.tensors.items()
        }
        write(dataclasses.replace(state, tensors=tensors), *rest, **more)

    def halved_file(tensors: dict[str, torch.Tensor], file: Path, metadata: dict[str, str]) -> None:
        save_file({k: t / 2 if k.endswith(UP) else t for k, t in tensors.items()}, file, metadata)

    monkeypatch.setattr(directory, "write", halved)
    monkeypatch.setattr(convert, "save_file", halved_file)
    assert PROFILES.keys() == {"portable", "peft", "kohya", "diffusers"}
    for profile in PROFILES.keys() - {"diffusers"}:  # has no form for a language model, and writes as kohya does
        with pytest.raises(MergeError, match=r"read back.* differs by 0\.5"):
            export(source, tmp_path / "b", profile)
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


def test_lost_and_added_modules_are_found(tiny: nn.Module, tmp_path: Path) -> None:
    state = directory.read(trained(tiny, deltaw.LoRA(rank=2), tmp_path / "a"))[0]
    first = next(iter(state.methods))
    less = dataclasses.replace(state, methods={s: m for s, m in state.methods.items() if s != first})
    kept = Conversion({site: Converted("kept", 2, 0.0) for site in state.methods})
    with pytest.raises(MergeError, match=f"{first}: it was not written"):
        readback.errors(state, less, kept)
    others = Conversion({site: one for site, one in kept.sites.items() if site != first})
    with pytest.raises(MergeError, match=f"{first}: the adapter has nothing there"):
        readback.errors(less, state, others)
    assert set(readback.errors(state, state, kept).values()) == {0.0}


def test_an_interrupt_leaves_nothing(tiny: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = trained(tiny, deltaw.LoRA(rank=2), tmp_path / "a")

    def stop(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(readback, "errors", stop)
    with pytest.raises(KeyboardInterrupt):
        export(source, tmp_path / "b")
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


def test_the_template_goes_along(tiny: nn.Module, tmp_path: Path) -> None:
    source = trained(tiny, deltaw.LoRA(rank=2), tmp_path / "a")
    (source / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    export(source, tmp_path / "b")
    assert (tmp_path / "b/chat_template.jinja").read_text() == "{{ messages[0]['content'] }}"
    assert deltaw.load(tiny, tmp_path / "b").base == "match"
    deltaw.detach(tiny)


@pytest.mark.shared
def test_a_strangers_adapter(shared: Path, tmp_path: Path) -> None:
    from transformers import GPT2Config

    GPT2Config(n_layer=6).save_pretrained(tmp_path / "distilgpt2")
    source = shared / "adapters/niket-sharma__LLMs-from-groundup/lora_adapters"
    done = export(source, tmp_path / "b", model=str(tmp_path / "distilgpt2"))
    assert done.rank == 8 and done.filled == 0 and done.error < 1e-2
    config = json.loads((tmp_path / "b/adapter_config.json").read_text())
    assert config["fan_in_fan_out"] and config["lora_alpha"] == 8
    with pytest.raises(UseError, match="a trained copy of a parameter"):
        export(shared / "adapters/Tashu014__lora-imdb-distilbert", tmp_path / "c")
