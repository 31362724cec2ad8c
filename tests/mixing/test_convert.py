"""Every weight method as plain LoRA: exact where there are factors, else the best of a rank, its error told."""

import dataclasses
import re
from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import deltaw
from deltaw.analysis.norms import norms
from deltaw.core.adapter import WeightAdapter
from deltaw.core.attach import attach, detach, extract, insert
from deltaw.core.errors import DeltawError, UseError
from deltaw.core.host import HostSpec, WeightHost, host_of
from deltaw.core.method import Method, Site, get, names
from deltaw.core.state import AdapterState, delta
from deltaw.methods.adalora import AdaLoRA
from deltaw.methods.dora import DoRA
from deltaw.methods.lora import LoRA
from deltaw.methods.token_rows import TokenRows
from deltaw.mixing import to_lora

HERE = Site("0")


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 7))


def trained(model: nn.Module, method: Method, targets: str | list[str] = "0", name: str = "default") -> AdapterState:
    attach(model, method, targets=targets, name=name)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.2 * torch.randn_like(parameter))
    state = extract(model, name)
    detach(model, name)
    return state


@pytest.mark.parametrize(
    "method",
    [LoRA(rank=3, alpha=5), LoRA(rank=3, alpha=5, rslora=True), LoRA(rank=3, init="pissa"), LoRA(rank=3, init="olora"),
     AdaLoRA(rank=5, alpha=8)],
    ids=["lora", "rslora", "pissa", "olora", "adalora"],
)  # fmt: skip
def test_what_has_factors_is_exact(method: Method) -> None:
    model, x = net(), torch.randn(9, 20)
    state = trained(model, method, ["0", "2"])
    insert(model, state)
    live = model(x)
    detach(model)
    plain, report = to_lora(state)
    assert {type(m) for m in plain.methods.values()} == {LoRA} and report.error == 0.0
    for site, spec in state.specs.items():
        wanted, got = (delta(s, site, torch.zeros(spec.shape)) for s in (state, plain))
        assert float((wanted - got).norm() / wanted.norm()) < 1e-6
        assert plain.tensors[site].keys() == {"lora_A", "lora_B"}
    insert(model, plain)
    torch.testing.assert_close(model(x), live, rtol=1e-5, atol=1e-5)


def test_ranks_of_exact_conversions() -> None:
    assert to_lora(trained(net(), LoRA(rank=3, init="pissa")))[0].methods[HERE].rank == 6
    state = trained(net(), AdaLoRA(rank=5))
    group = dict(state.tensors[HERE])
    group["lora_E"] = torch.tensor([[0.0], [0.3], [0.0], [-0.1], [0.0]])
    pruned = dataclasses.replace(state, tensors={HERE: group})
    plain, report = to_lora(pruned)
    assert plain.methods[HERE].rank == report.sites[HERE].rank == 2 and report.sites[HERE].how == "exact"
    torch.testing.assert_close(delta(plain, HERE, torch.zeros(30, 20)), delta(pruned, HERE, torch.zeros(30, 20)))
    nothing = dataclasses.replace(state, tensors={HERE: {**group, "lora_E": torch.zeros(5, 1)}})
    plain, _ = to_lora(nothing)
    assert plain.methods[HERE].rank == 1 and not delta(plain, HERE, torch.zeros(30, 20)).any()


@pytest.mark.parametrize("method", [LoRA(rank=8, alpha=5), AdaLoRA(rank=8), LoRA(rank=8, init="olora")])
def test_a_lower_rank_keeps_all_but_the_discarded_energy(method: Method) -> None:
    state = trained(net(), method)
    wanted = delta(state, HERE, torch.zeros(30, 20))
    plain, report = to_lora(state, rank=3)
    got = delta(plain, HERE, torch.zeros(30, 20))
    values = torch.linalg.svdvals(wanted)
    discarded = float((values[3:].square().sum() / values.square().sum()).sqrt())
    assert report.sites[HERE].how == "svd" and plain.methods[HERE].rank == 3
    assert report.sites[HERE].error == pytest.approx(discarded, rel=1e-4)
    assert float((wanted - got).norm() / wanted.norm()) == pytest.approx(discarded, rel=1e-4)


def test_a_change_that_depends_on_the_weight() -> None:
    model, x = net(), torch.randn(9, 20)
    weight = model[0].weight.detach().clone()
    state = trained(model, DoRA(rank=2))
    with pytest.raises(UseError, match=r"0: the change of dora has no low-rank factors: give the rank to cut it at"):
        to_lora(state, model)
    with pytest.raises(UseError, match=r"0: the change of dora depends on the base's weight: give the model"):
        to_lora(state, rank=4)
    wanted = delta(state, HERE, weight)
    for weights in (model, {"0": weight}, lambda path: {"0": weight}[path]):
        plain, report = to_lora(state, weights, rank=20)
        assert report.error < 1e-5
        torch.testing.assert_close(delta(plain, HERE, weight), wanted, rtol=1e-4, atol=1e-5)
    cut, report = to_lora(state, model, rank=4)
    error = float((delta(cut, HERE, torch.zeros(30, 20)) - wanted).norm() / wanted.norm())
    assert error == pytest.approx(report.error, rel=1e-3) and 0.01 < error < 1
    insert(model, state)
    live = model(x)
    plain, _ = to_lora(state, model, rank=20)  # the base's own weight, whatever is attached to it
    detach(model)
    insert(model, plain)
    torch.testing.assert_close(model(x), live, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "make",
    [lambda: nn.Embedding(11, 6), lambda: nn.Conv2d(3, 5, (3, 2)), lambda: Conv1D(9, 6)],
    ids=["embedding", "conv2d", "Conv1D"],
)
@pytest.mark.parametrize("method", [AdaLoRA(rank=3), DoRA(rank=3)])
def test_every_layout(make: Callable[[], nn.Module], method: Method) -> None:
    layer = make()
    model = nn.Sequential(layer)
    x = (
        torch.arange(11)
        if isinstance(layer, nn.Embedding)
        else torch.randn(2, *((3, 7, 6) if layer.weight.ndim > 2 else (6,)))
    )
    state = trained(model, method)
    insert(model, state)
    live = model(x)
    detach(model)
    plain, report = to_lora(state, model, rank=18)
    assert report.error < 1e-5
    insert(model, plain)
    torch.testing.assert_close(model(x), live, rtol=1e-4, atol=1e-4)


def methods_with_a_change() -> list[str]:
    spec, found = HostSpec((24, 16)), []
    for name in names():
        method = get(name)
        if method.__module__.startswith("deltaw.") and method.host is WeightHost and not method.follows_ties:
            assert isinstance(method().build(spec), WeightAdapter)
            found.append(name)
    return found


@pytest.mark.parametrize("name", methods_with_a_change())
def test_every_registered_method_converts(name: str) -> None:
    """At full rank nothing is lost, whatever the method."""
    model, x = nn.Sequential(nn.Linear(16, 24)), torch.randn(9, 16)
    state = trained(model, get(name)())
    insert(model, state)
    live, host = model(x), host_of(model[0])
    plain, report = to_lora(state, model, rank=16)
    assert report.error < 1e-4
    torch.testing.assert_close(delta(plain, HERE, host.weight), delta(state, HERE, host.weight), rtol=1e-3, atol=1e-4)
    detach(model)
    insert(model, plain)
    torch.testing.assert_close(model(x), live, rtol=1e-3, atol=1e-3)


def test_copies_and_rows_stay_what_they_are() -> None:
    model = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 5))
    attach(model, AdaLoRA(rank=2), targets="1")
    attach(model, TokenRows(tokens=(3, 5)), targets="0")
    state = extract(model)
    plain, report = to_lora(state)
    assert isinstance(plain.methods[Site("0")], TokenRows) and report.sites[Site("0")].how == "kept"
    assert type(plain.methods[Site("1")]) is LoRA
    biased = trained(net(), LoRA(rank=2, bias="lora_only"))
    plain, report = to_lora(biased, rank=1)
    assert {site.slot: report.sites[site].how for site in plain.methods} == {"weight": "svd", "bias": "kept"}


def test_the_report_is_a_table_and_faults_come_together() -> None:
    state = trained(net(), DoRA(rank=2), ["0", "2"])
    with pytest.raises(DeltawError) as error:
        to_lora(state)
    assert len(re.findall("give the rank", str(error.value))) == 2
    with pytest.raises(UseError, match=r"rank=0 is not a whole number"):
        to_lora(state, rank=0)
    with pytest.raises(UseError, match=r"0: `weights` gives None, not its weight"):
        to_lora(state, {}, rank=2)
    _, report = deltaw.to_lora(state, net(), rank=4)
    assert "relative error" in str(report) and len(str(report).splitlines()) == 3


def test_files_that_do_not_tell_the_shape_of_the_layer() -> None:
    """PEFT's OFT knows the inputs only: the model tells the rest, and without it there is a sentence."""
    model, x = nn.Sequential(nn.Linear(16, 24)), torch.randn(9, 16)
    state = trained(model, get("oft")(block=4))
    without = dataclasses.replace(state, specs={})
    plain, report = to_lora(without, model, rank=16)
    assert report.error < 1e-4
    insert(model, plain, name="plain")
    insert(model, state, name="oft")
    outputs = []
    for name in ("plain", "oft"):
        with deltaw.use(model, name):
            outputs.append(model(x))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-3, atol=1e-3)
    with pytest.raises(UseError, match=r"0: the files of this oft do not tell the layer's shape: give the model"):
        to_lora(without, rank=16)


@pytest.mark.parametrize("rank", [None, 1, 2])
def test_stacks_of_experts_are_cut_expert_by_expert(rank: int | None) -> None:
    spec, site = HostSpec((6, 5), stack=3), Site("experts", "down_proj")
    method = LoRA(rank=3, alpha=2.0)
    tensors = {"lora_A": torch.randn(3, 3, 5), "lora_B": torch.randn(3, 6, 3)}
    state = AdapterState({site: method}, {site: tensors}, {site: spec})
    made, report = to_lora(state, rank=rank)
    whole, cut = (delta(s, site, torch.zeros(3, 6, 5)) for s in (state, made))
    if rank is None:
        torch.testing.assert_close(cut, whole)
        return
    values = torch.linalg.svdvals(whole)
    lost = float(values[:, rank:].square().sum().sqrt())
    assert float((whole - cut).norm()) == pytest.approx(lost, rel=1e-4)
    assert report.sites[site].error == pytest.approx(lost / float(whole.norm()), rel=1e-4)
    assert made.methods[site].rank == rank


def test_vera_is_exact_and_has_a_norm() -> None:
    """Its factors are drawn and not saved: the shape of the layer is enough to have them again."""
    model = nn.Sequential(nn.Linear(8, 6))
    attach(model, get("vera")(rank=3), targets="0")
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    state, before = extract(model), torch.get_rng_state()
    change = delta(state, "0", torch.zeros(6, 8))
    made, report = to_lora(state)
    assert [one.how for one in report.sites.values()] == ["exact"] and torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(delta(made, "0", torch.zeros(6, 8)), change, rtol=1e-5, atol=1e-6)
    assert norms(state)[Site("0")] == pytest.approx(float(change.norm()), rel=1e-5)
