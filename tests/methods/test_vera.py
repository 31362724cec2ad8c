"""VeRA: PEFT's very matrices, one copy for all layers, in no file, wherever the model goes."""

import copy
import gc
import io
import pickle
from typing import Any

import peft
import pytest
import torch
from core import tiny
from torch import nn

import deltaw
from deltaw.core.errors import ConfigError, TargetError
from deltaw.core.host import HostSpec
from deltaw.core.method import Site
from deltaw.core.targets import plan
from deltaw.methods import vera
from deltaw.methods.lora import LoRA
from deltaw.methods.vera import VeRA, VeRAAdapter, projections


@pytest.fixture(autouse=True)
def nobody_holds_matrices() -> None:
    gc.collect()
    assert not vera._ALIVE


def layers() -> nn.Module:
    """No two of one size, and the largest inputs and outputs are not of one layer."""
    return nn.Sequential(nn.Linear(8, 20), nn.Linear(20, 12), nn.Linear(12, 30))


def adapters(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, VeRAAdapter)]


def stirred(model: Any, method: VeRA, targets: Any = "all-linear") -> Any:
    deltaw.attach(model, method, targets=targets)
    with torch.no_grad():
        for adapter in adapters(model):
            adapter.vera_lambda_b.normal_()
            adapter.vera_lambda_d.normal_()
    return model


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@torch.no_grad()
def test_same_tensors_same_outputs_as_peft(family: str) -> None:
    model, other, ids = tiny.model(family), tiny.model(family), tiny.ids()
    targets = {"llama": ["q_proj", "k_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"]}[family]
    base = model(ids).logits
    stirred(model, VeRA(rank=24, seed=5), targets)
    config = peft.VeraConfig(
        r=24, target_modules=targets, projection_prng_key=5, d_initial=0.3, fan_in_fan_out=family == "gpt2"
    )
    peer = peft.get_peft_model(other, config).eval()
    state, drawn = peer.state_dict(), adapters(model)[0].shared
    assert torch.equal(drawn.a, state["base_model.vera_A.default"])
    assert torch.equal(drawn.b, state["base_model.vera_B.default"])
    for site, adapter in deltaw.core.attach.adapters(model).items():
        theirs = peer.base_model.model.get_submodule(site.path)
        assert theirs.vera_lambda_b["default"].shape == adapter.vera_lambda_b.shape
        assert torch.equal(theirs.vera_lambda_d["default"], torch.full((24,), 0.3))
        theirs.vera_lambda_b["default"].copy_(adapter.vera_lambda_b)
        theirs.vera_lambda_d["default"].copy_(adapter.vera_lambda_d)
    expected = peer(ids).logits
    assert float((expected - base).abs().max()) > 1e-2
    torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-5)


def test_start() -> None:
    adapter: Any = VeRA(rank=6, d_initial=0.3).build(HostSpec((48, 32)))
    assert torch.equal(adapter.vera_lambda_b, torch.zeros(48)) and torch.equal(
        adapter.vera_lambda_d, torch.full((6,), 0.3)
    )
    assert [name for name, _ in adapter.named_parameters()] == ["vera_lambda_b", "vera_lambda_d"]
    assert list(adapter.buffers()) == [] and sorted(adapter.state_dict()) == ["vera_lambda_b", "vera_lambda_d"]
    bound = (6 / 32) ** 0.5, (6 / 6) ** 0.5
    for matrix, most in zip((adapter.shared.a, adapter.shared.b), bound, strict=True):
        assert 0.9 * most < float(matrix.abs().max()) <= most


def test_counts_of_known_models() -> None:
    """24 matrices of 768 at r = 1024; q and v of Llama-3.2-3B at r = 256. Planning draws nothing."""
    with torch.device("meta"):
        roberta = nn.ModuleDict({f"{n}": nn.ModuleDict({k: nn.Linear(768, 768) for k in "qv"}) for n in range(12)})
        llama = nn.ModuleDict(
            {f"{n}": nn.ModuleDict({"q": nn.Linear(3072, 3072), "v": nn.Linear(3072, 1024)}) for n in range(28)}
        )
    state = torch.get_rng_state()
    assert plan(roberta, VeRA(rank=1024), ["q", "v"]).trainable == 43_008
    assert plan(llama, VeRA(), ["q", "v"]).trainable == 129_024
    assert torch.equal(torch.get_rng_state(), state)
    assert sum(p.numel() for p in VeRA(rank=4).build(HostSpec((48, 32))).parameters()) == 52
    assert not [key for key in vera._ALIVE if key[-1].type != "meta"]


def test_planning_on_meta_draws_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def drawn(*_: Any, **__: Any) -> None:
        raise AssertionError("matrices drawn")

    monkeypatch.setattr(torch, "Generator", drawn)
    planned = plan(layers(), VeRA(rank=6), "all-linear")
    sizes = {(t.method.in_features, t.method.out_features) for t in planned.targets}  # type: ignore[attr-defined]
    assert sizes == {(20, 30)} and len(planned) == 3


def test_the_largest_layers_decide() -> None:
    specs = {Site("a"): HostSpec((5, 3, 2, 2)), Site("b"): HostSpec((9, 4))}
    method = VeRA().over(specs)
    assert (method.in_features, method.out_features) == (12, 9)
    assert VeRA(in_features=50).over(specs).in_features == 50
    assert LoRA(rank=3).over(specs) == LoRA(rank=3)


@torch.no_grad()
def test_one_copy_for_all_layers_wherever_they_go() -> None:
    model, x = layers(), torch.randn(3, 8)
    stirred(model, VeRA(rank=6))
    live = model(x)

    def places(model: nn.Module) -> set[int]:
        return {adapter.shared.a.data_ptr() for adapter in adapters(model)}

    first = places(model)
    assert len(first) == 1
    others = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    file = io.BytesIO()
    torch.save(model, file)
    assert file.tell() < 20_000  # not the matrices
    others.append(torch.load(io.BytesIO(file.getvalue()), weights_only=False))
    for other in others:
        assert places(other) == first and torch.equal(other(x), live)
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert places(half) == first and adapters(half)[0].shared.a.dtype == torch.float32
    there = copy.deepcopy(model).to("meta")
    assert {adapter.shared.a.device.type for adapter in adapters(there)} == {"meta"}
    back = there.to_empty(device="cpu")
    back.load_state_dict(model.state_dict())
    assert places(back) == first and torch.equal(back(x), live)
    del model, others, half, there, back, other
    gc.collect()
    assert not vera._ALIVE  # nobody needs them any more


@torch.no_grad()
def test_a_pickle_alone_draws_them_again() -> None:
    model, x = stirred(layers(), VeRA(rank=6, seed=3)), torch.randn(3, 8)
    live, text = model(x), pickle.dumps(model)
    del model
    gc.collect()
    assert not vera._ALIVE
    assert torch.equal(pickle.loads(text)(x), live)


@torch.no_grad()
def test_an_adapter_stays_what_it_is_beside_larger_layers() -> None:
    model, x = layers(), torch.randn(3, 8)
    stirred(model, VeRA(rank=6), targets="0")
    live = model[0](x)
    small = adapters(model)[0].shared
    deltaw.attach(model, VeRA(rank=6), targets=["1", "2"])  # the same adapter, grown
    assert torch.equal(model[0](x), live)
    assert adapters(model)[0].shared is small and adapters(model)[1].shared is adapters(model)[2].shared is not small
    state = deltaw.extract(model)
    deltaw.detach(model)
    deltaw.insert(model, state, name="again")
    assert torch.equal(model[0](x), live)


def test_drawn_in_inference_they_can_be_trained_with() -> None:
    with torch.inference_mode():
        held = projections(0, 6, 20, 30)
    model = layers()
    deltaw.attach(model, VeRA(rank=6), targets="all-linear")
    assert adapters(model)[0].shared is held
    model(torch.randn(3, 8)).sum().backward()
    assert all(float(adapter.vera_lambda_b.grad.abs().max()) > 0 for adapter in adapters(model))


@torch.no_grad()
def test_factors_are_the_change() -> None:
    adapter: Any = VeRA(rank=6).build(HostSpec((5, 3, 2, 2)))
    adapter.vera_lambda_b.normal_()
    a, b, scale = adapter.factors()
    weight = torch.randn(5, 3, 2, 2)
    assert a.shape == (6, 12) and b.shape == (5, 6) and scale == 1.0
    torch.testing.assert_close(adapter.merged(weight), weight + (b @ a).view(5, 3, 2, 2))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"rank": 0}, "rank=0 is not a whole number of at least 1"),
        ({"rank": None}, "rank=None is not a whole number"),
        ({"in_features": 2.5}, r"in_features=2\.5 is not a whole number"),
        ({"seed": -1}, "seed=-1 is not a whole number of at least 0"),
        ({"d_initial": 0.0}, r"d_initial=0\.0 is not a number other than 0"),
        ({"dropout": 1.0}, r"dropout=1\.0 is not in \[0, 1\)"),
    ],
)
def test_impossible_fields(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        VeRA(**fields)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"in_features": 12}, "1 .*: in_features=12 is below its 20: give at least that"),
        ({"out_features": 29}, "2 .*: out_features=29 is below its 30"),
    ],
)
def test_matrices_smaller_than_a_layer(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(TargetError, match=words):
        deltaw.attach(layers(), VeRA(**fields), targets="all-linear")


@torch.no_grad()
def test_a_rank_above_both_sizes_of_a_layer() -> None:
    model, x = stirred(layers(), VeRA(rank=50)), torch.randn(3, 8)
    live = model(x)
    deltaw.merge(model)
    torch.testing.assert_close(model(x), live, rtol=1e-5, atol=1e-5)
