"""One weight of a base from its files: the same as that of the loaded model, whatever the layer; wrong bases are refused."""

import json
from pathlib import Path

import pytest
import torch
import transformers

import deltaw
from deltaw.core.base import by_path
from deltaw.core.errors import BaseMismatchError, FileError
from deltaw.core.host import HostSpec, host_of
from deltaw.core.method import Site
from deltaw.core.state import AdapterState
from deltaw.methods.full import Full
from deltaw.methods.lora import LoRA
from deltaw.models.base import load_base
from deltaw.models.weights import BaseWeights

GPT2 = {"vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}


def tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_bytes((Path(deltaw.__file__).parent / "models/tiny" / name).read_bytes())


def gpt2(folder: Path, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2))
    model.save_pretrained(folder, max_shard_size="8KB")
    return model


def everything(model: torch.nn.Module) -> AdapterState:
    deltaw.attach(model, LoRA(rank=2), targets=["c_attn", "c_fc", "wte", "lm_head"], name="a")
    deltaw.attach(model, Full(), targets=["ln_f"], name="b")
    states = [deltaw.extract(model, name) for name in ("a", "b")]
    for name in ("a", "b"):
        deltaw.detach(model, name)
    parts = ({**getattr(states[0], n), **getattr(states[1], n)} for n in ("methods", "tensors", "specs"))
    return AdapterState(*parts, base=states[0].base)


def test_sharded_transposed_tied_and_without_the_bodys_prefix(tmp_path: Path) -> None:
    """GPT-2: Conv1D stores transposes, the head is the table, and old files leave out `transformer.`."""
    model = gpt2(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    assert index.exists() and len(list(tmp_path.glob("*.safetensors"))) > 1
    state = everything(model)
    for bare in (False, True):
        if bare:
            _strip(tmp_path)
        weights, there = BaseWeights(str(tmp_path), state), by_path(model)
        assert not weights.remarks
        for site, method in state.methods.items():
            host = host_of(there[site.path], site.slot, method.host)
            torch.testing.assert_close(weights(site), host.weight.detach(), rtol=0, atol=0)
            assert weights.specs[site] == host.spec and weights(site).shape == host.spec.whole


def _strip(folder: Path) -> None:
    """The same files as `gpt2` on the hub names them: without the prefix of the body."""
    from safetensors.torch import load_file, save_file

    index = json.loads((folder / "model.safetensors.index.json").read_text())
    for file in folder.glob("*.safetensors"):
        save_file({k.removeprefix("transformer."): v for k, v in load_file(file).items()}, file)
    index["weight_map"] = {k.removeprefix("transformer."): v for k, v in index["weight_map"].items()}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_another_base_is_refused(tmp_path: Path) -> None:
    state = everything(gpt2(tmp_path / "one"))
    gpt2(tmp_path / "two", seed=1)
    with pytest.raises(BaseMismatchError, match="another base: the shapes agree and the values of"):
        BaseWeights(str(tmp_path / "two"), state)
    allowed = BaseWeights(str(tmp_path / "two"), state, allow_base_mismatch=True)
    assert "another base, allowed" in allowed.remarks[0]
    stranger = AdapterState(state.methods, state.tensors, state.specs)
    assert "does not say" in BaseWeights(str(tmp_path / "two"), stranger).remarks[0]


def test_what_does_not_fit_is_said(tmp_path: Path) -> None:
    gpt2(tmp_path)
    group = {"lora_A": torch.zeros(2, 5), "lora_B": torch.zeros(48, 2)}
    method = LoRA(rank=2, alpha=2.0)
    sites = [Site("transformer.h.0.attn.c_atn"), Site("transformer.h.0.attn.c_attn"), Site("transformer.ln_f")]
    state = AdapterState(dict.fromkeys(sites, method), dict.fromkeys(sites, group), {})
    with pytest.raises(FileError) as caught:
        BaseWeights(str(tmp_path), state)
    assert len(caught.value.faults) == 3
    said = str(caught.value)
    assert (
        "did you mean 'transformer.h.0.attn.c_attn'" in said
        and "expected (2, 16)" in said
        and "cannot carry lora" in said
    )


def test_experts_that_files_hold_one_by_one_are_loaded_whole(tmp_path: Path) -> None:
    config = transformers.MixtralConfig(
        vocab_size=4096, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=2,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config)
    model.save_pretrained(tmp_path)
    tokenizer(tmp_path)
    deltaw.attach(model, LoRA(rank=2), targets=["experts"], name="a")
    state = deltaw.extract(model, "a")
    deltaw.detach(model, "a")
    weights = BaseWeights(str(tmp_path), state)
    assert "loaded whole" in weights.remarks[0]
    for site in state.methods:
        host = host_of(model.get_submodule(site.path), site.slot)
        torch.testing.assert_close(weights(site), host.weight.detach(), rtol=0, atol=0)


def test_damaged_files_are_said(tmp_path: Path) -> None:
    model = gpt2(tmp_path)
    state = everything(model)
    file = next(tmp_path.glob("*00001*.safetensors"))
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(FileError, match="fetch the base again"):
        for site in state.methods:
            BaseWeights(str(tmp_path), AdapterState(state.methods, state.tensors, state.specs))(site)


def test_the_bundled_base() -> None:
    base = load_base("tiny", dtype="bf16")
    deltaw.attach(base.model, LoRA(rank=2), targets=["q_proj", "lm_head"], name="a")
    state = deltaw.extract(base.model, "a")
    deltaw.detach(base.model, "a")
    weights = BaseWeights("tiny", state)
    assert not weights.remarks
    for site in state.methods:
        assert torch.equal(weights(site), base.model.get_submodule(site.path).weight.cpu())


def test_a_head_that_the_base_does_not_have_is_seen_without_it(tmp_path: Path) -> None:
    from deltaw.analysis import describe

    state, head = everything(gpt2(tmp_path)), Site("score")
    more = AdapterState(
        {**state.methods, head: Full()}, {**state.tensors, head: {"copy": torch.ones(3, 16)}},
        {**state.specs, head: HostSpec((3, 16), linear=False)}, state.base,
    )  # fmt: skip
    weights = BaseWeights(str(tmp_path), more)
    assert weights(head) is None and "has no score" in weights.remarks[0]
    *_, record = describe(more, weights)
    assert record["site"] == "score" and record["norm"] is None and record["of_base"] is None
    alone = AdapterState({head: Full()}, {head: {"copy": torch.ones(3, 16)}}, {})
    with pytest.raises(FileError, match="nothing of what the adapter changes: score"):
        BaseWeights(str(tmp_path), alone)


def test_an_adapter_beside_a_block_has_no_weight(tmp_path: Path) -> None:
    from deltaw.analysis import describe

    model = gpt2(tmp_path)
    deltaw.attach(model, deltaw.Bottleneck(), targets="all-linear", name="b")
    state = deltaw.extract(model, "b")
    deltaw.detach(model, "b")
    weights = BaseWeights(str(tmp_path), state)
    assert {weights(site) for site in state.methods} == {None}
    assert {record["unknown"] for record in describe(state, weights)} == {"no ΔW of its shape"}
