"""Starts from the weight (PiSSA, OLoRA, LoftQ) and from data (EVA): algebra, PEFT's values, files that anyone reads."""

import copy
import math
from collections.abc import Callable
from pathlib import Path

import bitsandbytes
import pytest
import torch
from torch import Tensor, nn

from deltaw.core.attach import adapters, attach, detach, extract, insert
from deltaw.core.errors import BaseMismatchError, ConfigError, TargetError, UseError
from deltaw.core.host import host_of
from deltaw.core.merge import merge
from deltaw.core.method import Site
from deltaw.core.state import delta
from deltaw.formats import directory
from deltaw.formats.peft import to_peft
from deltaw.methods.adalora import AdaLoRA
from deltaw.methods.dora import DoRA
from deltaw.methods.eva import PCA
from deltaw.methods.inits import olora, pissa
from deltaw.methods.lora import LoRA
from deltaw.mixing import exact, to_lora
from deltaw.models.adapters import load, save

HERE = Site("0")


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 7))


def stir(model: nn.Module, size: float = 0.1) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(size * torch.randn_like(parameter))


@pytest.mark.parametrize("scale", [1.0, 0.5, 3.0])
def test_pissa_holds_the_largest_singular_values(scale: float) -> None:
    weight = torch.randn(30, 20)
    a, b = pissa(weight, 4, scale)
    rest = weight - scale * b @ a
    values = torch.linalg.svdvals(weight)
    assert float(rest.square().sum()) == pytest.approx(float(values[4:].square().sum()), rel=1e-5)
    torch.testing.assert_close(a.square().sum(1), b.square().sum(0))  # shared evenly
    torch.testing.assert_close(torch.linalg.svdvals(rest)[:16], values[4:], rtol=1e-4, atol=1e-5)


def test_randomised_pissa_is_near_the_exact_one() -> None:
    spectrum = torch.diag(torch.logspace(1, -3, 60))
    u, v = (torch.linalg.qr(torch.randn(n, 60))[0] for n in (90, 70))
    weight = u @ spectrum @ v.T
    products = [b @ a for a, b in (pissa(weight, 8, 1.0, niter=niter) for niter in (None, 4))]
    assert float((products[0] - products[1]).norm() / products[0].norm()) < 1e-4
    model = nn.Sequential(nn.Linear(70, 90))
    attach(model, LoRA(rank=8, init="pissa", niter=4), targets="0")
    assert adapters(model)[HERE].start.keywords == {"niter": 4}


def test_olora_is_the_qr_decomposition() -> None:
    weight = torch.randn(30, 20)
    a, b = olora(weight, 4, 2.0)
    torch.testing.assert_close(b.T @ b, torch.eye(4), rtol=0, atol=1e-5)
    assert torch.equal(a, a.triu())
    whole = olora(weight, 20, 2.0)
    torch.testing.assert_close(whole[1] @ whole[0], weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("rslora", [False, True])
def test_first_factors_are_those_of_peft(init: str, rslora: bool) -> None:
    """PEFT takes s·B₀A₀ out of the weight; W_res + s·B₀A₀ = W, and trained alike both compute the same."""
    peft = pytest.importorskip("peft")
    model, x = net(), torch.randn(5, 20)
    before = model(x)
    theirs = copy.deepcopy(model)
    config = peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights=init, target_modules=["0", "2"], use_rslora=rslora)
    theirs = peft.get_peft_model(theirs, config)
    attach(model, LoRA(rank=4, alpha=6, init=init, rslora=rslora), targets=["0", "2"])
    assert torch.equal(model(x), before)
    for site, adapter in adapters(model).items():
        layer = theirs.base_model.model.get_submodule(site.path)
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        torch.testing.assert_close(b @ a, adapter.lora_B @ adapter.lora_A, rtol=1e-4, atol=1e-5)
        rest = model.get_submodule(site.path).weight - adapter.scale * adapter.lora_B0 @ adapter.lora_A0
        torch.testing.assert_close(layer.base_layer.weight, rest, rtol=1e-4, atol=1e-5)
        a.data.copy_(adapter.lora_A + 0.1)
        b.data.copy_(adapter.lora_B - 0.1)
        adapter.lora_A.data += 0.1
        adapter.lora_B.data -= 0.1
    live = model(x)
    torch.testing.assert_close(live, theirs(x), rtol=1e-5, atol=1e-5)
    assert float((live - before).detach().abs().max()) > 0.05


def test_alpha_of_pissa_makes_the_scale_one() -> None:
    for method in (LoRA(rank=9, init="pissa"), LoRA(rank=9, init="pissa", rslora=True)):
        model = net()
        plan = attach(model, method, targets="0")
        assert plan.targets[0].method.scale == 1.0
    assert LoRA(init="olora").at("", plan.targets[0].spec).alpha == 32.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_exact_at_the_start_and_loses_nothing_after(dtype: torch.dtype) -> None:
    """B·A − B₀·A₀ as two products would round a small change away; as [B − B₀, B₀]·[A; A − A₀] it does not."""
    model, x = nn.Sequential(nn.Linear(64, 48, bias=False)).to(dtype), torch.randn(32, 64).to(dtype)
    before = model(x)
    attach(model, LoRA(rank=8, init="pissa"), targets="0")
    assert torch.equal(model(x), before)
    stir(model, 1e-3)
    adapter = adapters(model)[HERE]
    wanted = x.float() @ delta(extract(model), "0", torch.zeros(48, 64)).T
    ours = adapter.branch(model[0]._deltaw.live[0][1], x).float()
    two = (x @ adapter.lora_A.T.to(dtype)) @ adapter.lora_B.T.to(dtype)
    two = two - (x @ adapter.lora_A0.T.to(dtype)) @ adapter.lora_B0.T.to(dtype)
    error, naive = ((y - wanted).detach().norm() / wanted.norm() for y in (ours, two.float()))
    assert float(error) < 0.02 and float(naive) > 20 * float(error)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_files_hold_a_plain_lora_of_twice_the_rank(init: str, tmp_path: Path) -> None:
    model, x = net(), torch.randn(5, 20)
    attach(model, LoRA(rank=3, alpha=5, init=init, rslora=True), targets="all-linear")
    stir(model)
    live, state = model(x), extract(model)
    assert set(state.tensors[HERE]) == {"lora_A", "lora_B", "lora_A0", "lora_B0"}
    save(model, tmp_path / "saved")
    detach(model)
    for folder in (tmp_path / "saved",):
        load(model, folder)
        assert torch.equal(model(x), live)
        method = extract(model).methods[HERE]
        assert (method.rank, method.init, method.rslora) == (6, "kaiming", False)
        assert method.scale == pytest.approx(5 / math.sqrt(3))
        detach(model)
    config, tensors = to_peft(state)
    assert config["r"] == 6 and config["init_lora_weights"] is True and len(tensors) == 4
    peft = pytest.importorskip("peft")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path / "saved"))
    torch.testing.assert_close(theirs(x), live, rtol=1e-5, atol=1e-5)
    insert(model, state, name="again")
    assert torch.equal(model(x), live)
    merge(model, "again")
    torch.testing.assert_close(model(x), live, rtol=1e-5, atol=1e-5)


def test_what_training_needs_is_kept_where_asked(tmp_path: Path) -> None:
    model, x = net(), torch.randn(5, 20)
    attach(model, LoRA(rank=3, init="pissa"), targets="all-linear")
    stir(model)
    state, live = extract(model), model(x)
    directory.write(state, tmp_path / "part", finished=False)
    again, _ = directory.read(tmp_path / "part")
    assert again.methods == state.methods
    assert all(torch.equal(again.tensors[s][n], t) for s, group in state.tensors.items() for n, t in group.items())
    detach(model)
    load(model, tmp_path / "part")
    assert torch.equal(model(x), live)


def test_twice_the_rank_may_be_more_than_the_weight_has() -> None:
    model, x = nn.Sequential(nn.Linear(20, 7)), torch.randn(5, 20)
    attach(model, LoRA(rank=6, init="pissa"), targets="0")
    stir(model)
    live, state = model(x), extract(model).finished()
    assert state.methods[HERE].rank == 7 and state.methods[HERE].scale == 1.0
    detach(model)
    insert(model, state)
    torch.testing.assert_close(model(x), live, rtol=1e-5, atol=1e-5)


def test_mixing_and_factors_count_the_first_factors() -> None:
    model, weight = nn.Sequential(nn.Linear(20, 30)), torch.zeros(30, 20)
    states = []
    for method in (LoRA(rank=3, init="pissa"), LoRA(rank=2, alpha=3)):
        attach(model, method, targets="0")
        stir(model)
        states.append(extract(model))
        detach(model)
    changes = [delta(state, "0", weight) for state in states]
    for state, change in zip(states, changes, strict=True):
        a, b, scale = state.factors(HERE)
        torch.testing.assert_close(scale * b @ a, change, rtol=1e-5, atol=1e-6)
    mixed = exact(states, [0.7, -0.4])
    torch.testing.assert_close(delta(mixed, "0", weight), 0.7 * changes[0] - 0.4 * changes[1], rtol=1e-5, atol=1e-6)
    assert mixed.methods[HERE].rank == 8


def test_dora_and_impossible_starts_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"init='pissa' starts with a change beside W"):
        DoRA(init="pissa")
    with pytest.raises(ConfigError, match=r"niter=-1 is not a whole number"):
        LoRA(init="pissa", niter=-1)
    with pytest.raises(ConfigError, match=r"rho=0\.5 is not a number of at least 1"):
        LoRA(init="eva", rho=0.5)
    with pytest.raises(TargetError, match=r"rank 8 with init: pissa is more than the weight has: at most 7"):
        attach(net(), LoRA(rank=8, init="pissa"), targets="2")


# LoftQ


def quantised(weight: Tensor) -> nn.Sequential:
    layer = bitsandbytes.nn.LinearNF4(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = weight.clone()
    return nn.Sequential(layer.to("cpu"))


@pytest.mark.parametrize("alpha", [2.0, 8.0, 30.0])
def test_loftq_is_the_best_approximation_of_what_rounding_took(alpha: float) -> None:
    """Whatever α is: factors not divided by √s, as published, are off by s − 1 times the change. The base stays."""
    weight = torch.randn(48, 128) / 11
    model = quantised(weight)
    codes, decoded = model[0].weight.detach().clone(), host_of(model[0]).weight
    attach(model, LoRA(rank=8, alpha=alpha, init="loftq"), targets="0", weights={HERE: weight}.__getitem__)
    change = delta(extract(model), "0", torch.zeros_like(weight))
    rest = weight - decoded - change
    tail = torch.linalg.svdvals(weight - decoded)[8:].square().sum().sqrt()
    assert float(rest.norm()) == pytest.approx(float(tail), rel=1e-4) and tail < 0.9 * (weight - decoded).norm()
    x = torch.randn(5, 128)
    torch.testing.assert_close(model(x), x @ (decoded + change).T, rtol=1e-4, atol=1e-5)
    assert torch.equal(model[0].weight, codes)
    a, b = pissa(weight - decoded, 8, 1.0)
    assert (weight - decoded - alpha / 8 * b @ a).norm() >= rest.norm() * (1 - 1e-6)


def test_a_mix_with_loftq_remains_one_of_the_quantised_base() -> None:
    weight = torch.randn(48, 128) / 11
    model, states = quantised(weight), []
    for init in ("loftq", "kaiming"):
        attach(model, LoRA(rank=4, init=init), targets="0", weights=lambda _: weight)
        stir(model, 0.01)
        states.append(extract(model))
        detach(model)
    assert [state.methods[HERE].corrects for state in states] == [True, False]
    assert exact(states, [1.0, 0.5]).methods[HERE].corrects and not exact(states[1:], [2.0]).methods[HERE].corrects


def test_what_is_made_of_a_loftq_adapter_stays_on_its_base(tmp_path: Path) -> None:
    """Cut by SVD, mixed in either order: refused on the unquantised base; adapters of two quantisations do not mix."""
    weight, states = torch.randn(48, 128) / 11, {}
    plain = nn.Sequential(nn.Linear(128, 48, bias=False))
    plain[0].weight.data.copy_(weight)
    int8 = nn.Sequential(bitsandbytes.nn.Linear8bitLt(128, 48, bias=False, has_fp16_weights=False))
    int8[0].weight.data = weight.clone()
    for name, model, init in (
        ("nf4", quantised(weight), "loftq"),
        ("int8", int8.to("cpu"), "loftq"),
        ("plain", plain, "kaiming"),
    ):
        attach(model, LoRA(rank=4, init=init), targets="0", weights=lambda _: weight)
        stir(model, 0.01)
        states[name] = extract(model)
        detach(model)
    made = [
        to_lora(states["nf4"], rank=2)[0],
        *(exact([states[a], states[b]], [0.5, 1.0]) for a, b in (("nf4", "plain"), ("plain", "nf4"))),
    ]
    for number, state in enumerate(made):
        assert state.base is not None and state.base.quantized == "nf4-double"
        directory.write(state, tmp_path / str(number))
        with pytest.raises(BaseMismatchError, match="its base is in nf4-double, this one is unquantised"):
            load(plain, tmp_path / str(number))
        load(quantised(weight), tmp_path / str(number))
    with pytest.raises(UseError, match="make up for rounding to int8 and nf4-double cannot be mixed"):
        exact([states["nf4"], states["int8"]], [1.0, 1.0])


def test_loftq_where_it_cannot_be() -> None:
    weight = torch.randn(48, 128)
    with pytest.raises(UseError, match=r"^0: init: loftq makes up for rounding, and this layer is not quantised"):
        attach(net(), LoRA(init="loftq", rank=2), targets="0", weights=lambda _: weight)
    model = quantised(weight)
    with pytest.raises(
        UseError, match=r"init: loftq needs the weights before they were quantised: attach\(…, weights="
    ):
        attach(model, LoRA(init="loftq"), targets="0")
    with pytest.raises(UseError, match=r"the weight given is \(128, 48\), the layer's is \(48, 128\)"):
        attach(model, LoRA(init="loftq"), targets="0", weights=lambda _: weight.T)
    with pytest.raises(TargetError, match=r"rank 49 with init: loftq is more than the weight has: at most 48"):
        attach(model, LoRA(init="loftq", rank=49), targets="0", weights=lambda _: weight)
    with pytest.raises(ConfigError, match=r"init='loftq' starts with a change beside W"):
        DoRA(init="loftq")
    assert not list(model.named_modules())[1:][1:]  # nothing was attached


# EVA


def test_eva_looks_at_the_base_and_not_at_what_else_is_live() -> None:
    x = torch.randn(64, 20)
    model, first = net(), []
    for name in ("alone", "beside"):
        attach(model, LoRA(rank=2, init="eva"), targets="2", name=name, batches=[x])
        first.append(adapters(model, name)[Site("2")].lora_A.detach().clone())
        if name == "alone":
            attach(model, LoRA(rank=4), targets="0", name="other")
            for parameter in adapters(model, "other")[HERE].parameters():
                nn.init.normal_(parameter, std=3.0)
    torch.testing.assert_close(*first)


class Siblings(nn.Module):
    """q, k and v read one tensor, o another, of less variance in fewer directions."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(24, 12) for _ in range(3))
        self.o = nn.Linear(12, 24)

    def forward(self, hidden: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.o(torch.tanh(self.q(hidden) * self.k(hidden) + self.v(hidden)))


def rows(count: int, size: int = 24, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.diag(torch.logspace(1, -1.5, size))
    return (
        torch.randn(count, size, generator=generator)
        @ spread
        @ torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(9)))[0]
        + 2.0
    )


def test_incremental_pca_is_the_pca_of_all_rows() -> None:
    x = rows(200)
    pca = PCA(24)
    for part in x.split([40, 100, 3, 57]):
        pca.update(part)
    centred = x - x.mean(0)
    _, s, vt = torch.linalg.svd(centred, full_matrices=False)
    torch.testing.assert_close(pca.values, s, rtol=1e-4, atol=1e-4)
    assert float((pca.vectors * vt).sum(1).abs().min()) > 0.999
    torch.testing.assert_close(pca.shares, s.square() / s.square().sum(), rtol=1e-4, atol=1e-6)
    few = PCA(4)
    for part in x.split(50):
        few.update(part)
    torch.testing.assert_close(few.values, s[:4], rtol=0.02, atol=0.02)
    assert float((few.vectors * vt[:4]).sum(1).abs().min()) > 0.99
    assert few.total == pytest.approx(float(s.square().sum()), rel=1e-4)


def test_eva_shares_out_the_ranks() -> None:
    model, x = Siblings(), rows(256).view(8, 32, 24)
    before = model(x)
    plan = attach(model, LoRA(rank=4, alpha=6, init="eva"), targets="all-linear", batches=list(x.split(2)))
    assert torch.equal(model(x), before)
    ranks = {t.site.path: t.method.rank for t in plan.targets}
    assert sum(ranks.values()) == 16 and len(set(ranks.values())) > 1 and max(ranks.values()) <= 8
    assert {t.method.scale for t in plan.targets} == {1.5}
    assert plan.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    there = adapters(model)
    for site, adapter in there.items():
        a = adapter.lora_A
        assert a.shape[0] == ranks[site.path] and not adapter.lora_B.any()
        torch.testing.assert_close(a @ a.T, torch.eye(len(a)), rtol=0, atol=1e-4)
    q, k = (there[Site(name)].lora_A for name in "qk")
    least = min(len(q), len(k))
    assert torch.equal(q[:least], k[:least])  # one PCA for those that read one tensor
    centred = x.flatten(0, 1) - x.flatten(0, 1).mean(0)
    main = torch.linalg.svd(centred, full_matrices=False)[2][0]
    assert abs(float(main @ q[0])) > 0.99
    stir(model)
    state, live = extract(model), model(x)
    detach(model)
    insert(model, state)
    assert torch.equal(model(x), live)


@pytest.mark.parametrize("method", [LoRA, DoRA])
def test_padding_is_left_out_and_the_model_is_left_as_it_was(method: Callable[..., LoRA]) -> None:
    x, mask = rows(64).view(2, 32, 24), torch.ones(2, 32)
    padded, mask = torch.cat([x, 100 * torch.randn(2, 8, 24)], 1), torch.cat([mask, torch.zeros(2, 8)], 1)
    first = []
    for batch in ({"hidden": x}, {"hidden": padded, "attention_mask": mask}):
        torch.manual_seed(0)
        model = Siblings().train()
        attach(model, method(rank=2, init="eva"), targets="q", batches=[batch])
        assert model.training and not any(module._forward_pre_hooks for module in model.modules())
        first.append(adapters(model)[Site("q")].lora_A.detach())
    torch.testing.assert_close(first[0], first[1], rtol=1e-4, atol=1e-4)


def test_it_looks_no_longer_than_it_must() -> None:
    seen = 0

    def batches():  # type: ignore[no-untyped-def]
        nonlocal seen
        for part in rows(4000).split(200):
            seen += 1
            yield part

    attach(Siblings(), LoRA(rank=2, init="eva"), targets="all-linear", batches=batches())
    assert 2 <= seen < 20


def test_eva_directions_are_those_of_peft() -> None:
    peft = pytest.importorskip("peft")
    x = rows(600)
    model = Siblings()
    theirs = peft.get_peft_model(
        copy.deepcopy(model),
        peft.LoraConfig(r=3, init_lora_weights="eva", target_modules=["q", "o"], eva_config=peft.EvaConfig(rho=2)),
    )
    loaded = [{"hidden": part} for part in x.split(200)]
    state = peft.get_eva_state_dict(
        theirs, loaded, forward_fn=lambda m, batch: m(**batch), prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=None, show_progress_bar=False,
    )  # fmt: skip
    attach(model, LoRA(rank=3, init="eva"), targets=["q", "o"], batches=loaded)
    for path, adapter in ((site.path, a) for site, a in adapters(model).items()):
        wanted = next(a for name, a in state.items() if name.endswith(path))
        assert len(adapter.lora_A) == len(wanted)
        assert float((adapter.lora_A * wanted).sum(1).abs().min()) > 0.98  # PEFT's SVD is a randomised one


def test_eva_says_what_it_lacks() -> None:
    with pytest.raises(UseError, match=r"init: eva starts from the model's activations: attach\(model"):
        attach(Siblings(), LoRA(init="eva"), targets="all-linear")
    with pytest.raises(UseError, match=r"needs more rows than ranks"):
        attach(Siblings(), LoRA(rank=8, init="eva"), targets="all-linear", batches=[rows(3)])
    with pytest.raises(UseError, match=r"needs more rows than ranks"):
        attach(Siblings(), LoRA(rank=8, init="eva"), targets="all-linear", batches=[])
    model = Siblings()
    model.unused = nn.Linear(3, 3)
    with pytest.raises(UseError, match=r"unused did not run"):
        attach(model, LoRA(rank=2, init="eva"), targets=["q", "unused"], batches=[rows(9)])
    assert not any(module._forward_pre_hooks for module in model.modules())
    for layer in (nn.Embedding(5, 4), nn.Conv1d(3, 4, 2)):
        with pytest.raises(TargetError, match=r"reads ids or patches"):
            attach(nn.Sequential(layer), LoRA(init="eva"), targets="0", batches=[])


def test_methods_without_a_start_from_data_ask_for_none() -> None:
    def never():  # type: ignore[no-untyped-def]
        raise AssertionError("looked at")
        yield

    attach(net(), AdaLoRA(), targets="all-linear", batches=never())
    attach(net(), LoRA(), targets="all-linear", batches=never())
