"""States outside any model: weighted sums of ΔW, exact; adding factors is something else."""

import re

import pytest
import torch
from torch import Tensor, nn

from core import tiny
from deltaw.core.attach import attach, detach, extract, insert
from deltaw.core.errors import DeltawError, UseError
from deltaw.core.method import Method, Site
from deltaw.core.route import use
from deltaw.core.state import AdapterState, delta
from deltaw.methods.dora import DoRA
from deltaw.methods.full import Full
from deltaw.methods.lora import LoRA
from deltaw.methods.token_rows import TokenRows
from deltaw.mixing import exact

WEIGHT = Site("0")


def stir(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.3 * torch.randn_like(parameter))


def state_of(model: nn.Module, method: Method, targets: str | list[str], name: str = "tmp") -> AdapterState:
    attach(model, method, targets=targets, name=name)
    stir(model)
    state = extract(model, name)
    detach(model, name)
    return state


def test_concatenation_is_exact_and_adding_factors_is_not() -> None:
    """T13: two random r 4 adapters on a 256² weight, weights 1, 1."""
    model = nn.Sequential(nn.Linear(256, 256, bias=False))
    a, b = (state_of(model, LoRA(rank=4, alpha=4), "0") for _ in "ab")
    for state in (a, b):
        for tensor in state.tensors[WEIGHT].values():
            nn.init.normal_(tensor)
    weight = torch.zeros(256, 256)
    wanted = delta(a, "0", weight).double() + delta(b, "0", weight).double()
    mixed = exact([a, b], [1.0, 1.0])
    assert mixed.methods[WEIGHT].rank == 8 and torch.linalg.matrix_rank(delta(mixed, "0", weight)) == 8
    assert (delta(mixed, "0", weight) - wanted).norm() / wanted.norm() < 1e-6
    added = (a.tensors[WEIGHT]["lora_B"] + b.tensors[WEIGHT]["lora_B"]) @ (
        a.tensors[WEIGHT]["lora_A"] + b.tensors[WEIGHT]["lora_A"]
    )
    assert 0.97 < (added - wanted).norm() / wanted.norm() < 1.03  # the cross terms are as large as the wanted ones


def test_the_sum_is_what_the_live_model_computes() -> None:
    """Ranks, alphas, scalings and sites differ; three ways to say 0.7·a + 0.3·b, one result."""
    model, ids = tiny.model("gpt2"), tiny.ids()
    base = model(ids).logits
    a = state_of(model, LoRA(rank=4, alpha=6), ["attention", "wte"])
    b = state_of(model, LoRA(rank=2, alpha=5, rslora=True, rank_pattern={"c_fc": 3}), "all-linear")
    insert(model, a, name="a")
    insert(model, b, name="b")
    with use(model, {"a": 0.7, "b": 0.3}):
        live = model(ids).logits
    detach(model, "a")
    detach(model, "b")
    assert (live - base).abs().max() > 1e-2
    for mixed in (0.7 * a + 0.3 * b, exact([a, b], [0.7, 0.3]), 0.3 * b + a * 0.7):
        insert(model, mixed)
        torch.testing.assert_close(model(ids).logits, live, atol=1e-5, rtol=1e-5)
        detach(model)
    ranks = {str(site): method.rank for site, method in (0.7 * a + 0.3 * b).methods.items()}
    assert ranks["transformer.h.0.attn.c_attn"] == 6 and ranks["transformer.h.1.mlp.c_fc"] == 3
    assert ranks["transformer.wte"] == 4 and len(ranks) == 9


@pytest.mark.parametrize(
    "layer", [nn.Embedding(9, 5), nn.Conv2d(4, 6, 3, groups=2)], ids=lambda layer: type(layer).__name__
)
def test_embeddings_and_convolutions_mix_too(layer: nn.Module) -> None:
    model = nn.Sequential(layer)
    x = torch.arange(9) if isinstance(layer, nn.Embedding) else torch.randn(2, 4, 5, 5)
    a, b = state_of(model, LoRA(rank=3, alpha=4), "0"), state_of(model, LoRA(rank=2, alpha=1), "0")
    insert(model, a, name="a")
    insert(model, b, name="b")
    with use(model, {"a": -0.5, "b": 2.0}):
        live = model(x)
    insert(model, -0.5 * a + 2 * b, name="mixed")
    torch.testing.assert_close(model(x), live, atol=1e-5, rtol=1e-5)


def test_trained_copies_mix_where_weights_sum_to_one() -> None:
    model, x = nn.Sequential(nn.LayerNorm(5)), torch.randn(3, 5)
    a, b = state_of(model, Full(), "0"), state_of(model, Full(), "0")
    insert(model, a, name="a")
    insert(model, b, name="b")
    with use(model, {"a": 0.25, "b": 0.75}):
        live = model(x)
    insert(model, exact([a, b], [0.25, 0.75]), name="mixed")
    torch.testing.assert_close(model(x), live)
    with pytest.raises(UseError, match=r"weights of trained copies sum to 1\.2"):
        exact([a, b], [0.7, 0.5])


def test_what_cannot_be_mixed_exactly_is_refused() -> None:
    model = nn.ModuleDict({"0": nn.Linear(6, 5), "1": nn.Embedding(9, 6)})
    lora, dora = state_of(model, LoRA(rank=2), "0"), state_of(model, DoRA(rank=2), "0")
    rows = state_of(model, TokenRows(tokens=(1, 2)), "1")
    full = state_of(model, Full(), "0")
    for pair in ([lora, dora], [dora, dora], [dora, lora], [rows, rows], [lora, full]):
        with pytest.raises(UseError, match="cannot be mixed exactly"):
            exact(pair, [0.5, 0.5])
    with pytest.raises(UseError, match="cannot be mixed exactly"):
        0.5 * dora
    with pytest.raises(UseError, match="2 states and 1 weights: give one weight per state"):
        exact([lora, lora], [1.0])
    with pytest.raises(UseError, match="0 states"):
        exact([], [])
    with pytest.raises(TypeError):
        lora + 1  # type: ignore[operator]


def test_adapters_of_two_bases_are_refused() -> None:
    first, second = nn.Sequential(nn.Linear(6, 5)), nn.Sequential(nn.Linear(6, 5))
    a, b = state_of(first, LoRA(rank=2), "0"), state_of(second, LoRA(rank=2), "0")
    with pytest.raises(
        DeltawError, match=r"adapters of two different bases cannot be mixed: the shapes agree and the values of 0"
    ):
        0.5 * a + 0.5 * b
    same = state_of(first, LoRA(rank=3), "0")
    assert (0.5 * a + 0.5 * same).base == a.base


def test_delta_reads_no_model() -> None:
    model, x = nn.Sequential(nn.Linear(6, 5, bias=False)), torch.randn(3, 6)
    weight = model[0].weight.detach().clone()
    for method in (LoRA(rank=2, alpha=3), DoRA(rank=2, alpha=3), Full()):
        state = state_of(model, method, "0")
        insert(model, state)
        torch.testing.assert_close(model(x), x @ (weight + delta(state, WEIGHT, weight)).T)
        detach(model)
    with pytest.raises(UseError, match=re.escape("the state adapts no '1'")):
        delta(state, "1", weight)
    with pytest.raises(UseError, match=re.escape("the weight is (6, 5), the adapter was made for (5, 6)")):
        delta(state, "0", weight.T)


def test_extract_copies() -> None:
    model = nn.Sequential(nn.Linear(6, 5))
    attach(model, LoRA(rank=2), targets="0")
    state = extract(model)
    kept: dict[str, Tensor] = {name: tensor.clone() for name, tensor in state.tensors[WEIGHT].items()}
    stir(model)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in state.tensors[WEIGHT].items())
    assert state.parameters == 2 * 11 and state.factors(WEIGHT).scale == 2.0
