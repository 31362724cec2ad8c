"""A route for every row of a batch: what the contract suite does not ask."""

from typing import Any

import pytest
import torch
from torch import nn

import deltaw
from deltaw.core.attach import attach, detach
from deltaw.core.errors import UseError
from deltaw.core.merge import merge
from deltaw.core.route import live, use
from deltaw.methods.full import Full
from deltaw.methods.lora import LoRA

X = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0))


def stir(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.3 * torch.randn_like(parameter))


@pytest.fixture
def model() -> nn.Module:
    """Two layers; `b` sits on the second only."""
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    for name, targets in (("a", ["0", "1"]), ("b", "1")):
        attach(model, LoRA(rank=2, alpha=3), targets=targets, name=name)
        stir(model)
    use(model, "a")
    return model


ROUTES: list[Any] = [{"a": 0.5, "b": 1.0}, "b", {}]


def test_leaving_the_block_restores_what_was_live(model: nn.Module) -> None:
    before = model(X)
    with use(model, ROUTES):
        mixed = model(X)
        for number, route in enumerate(ROUTES):
            with use(model, route):
                torch.testing.assert_close(model(X)[number], mixed[number])
        assert torch.equal(model(X), mixed)
    assert torch.equal(model(X), before) and live(model) == {"a": 1.0}


def test_gradients_come_from_an_adapter_s_own_rows(model: nn.Module) -> None:
    for parameter in model[1].adapters.parameters():
        parameter.requires_grad_(True)
    x = X.clone().requires_grad_(True)
    with use(model, ["b", {}, {}]):
        model(x)[1:].sum().backward()
    assert all(not p.grad.any() for p in model[1].adapters["b"].parameters())
    with use(model, ["b", {}, {}]):
        model(x)[:1].sum().backward()
    ours = [p.grad.clone() for p in model[1].adapters["b"].parameters()]
    for p in model[1].adapters["b"].parameters():
        p.grad = None
    with use(model, "b"):
        model(X[:1]).sum().backward()
    for mine, parameter in zip(ours, model[1].adapters["b"].parameters(), strict=True):
        torch.testing.assert_close(mine, parameter.grad)


def test_an_adapter_that_goes_takes_its_rows_along(model: nn.Module) -> None:
    with use(model, ROUTES):
        detach(model, "b")
        y = model(X)
        with use(model, {}):
            assert torch.equal(y[1:], model(X)[1:])


def test_bf16_and_one_graph(model: nn.Module) -> None:
    model.bfloat16()
    with torch.no_grad(), use(model, ROUTES):
        y = model(X.bfloat16())
        assert y.dtype == torch.bfloat16
        torch.compiler.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(X.bfloat16()), y)


@pytest.mark.parametrize(
    ("routes", "words"),
    [
        ([], "no route: give one for every row of the batch"),
        (["a", 3], "3 is no route"),
        (["a", {"c": 1.0}], "no adapter 'c'"),
        ([{"a": float("nan")}, {}], "strength nan of 'a' is not a finite number"),
        ([{"a": [1.0]}, {}], r"strength \[1.0\] of 'a' is not a finite number"),
        (["whole", {}], r"'whole' cannot act in single rows of a batch: FullAdapter acts on the layer and not beside it"),
    ],
)  # fmt: skip
def test_routes_that_cannot_be(model: nn.Module, routes: Any, words: str) -> None:
    attach(model, Full(), targets="1", name="whole")
    use(model, "a")
    before = model(X)
    with pytest.raises(UseError, match=words):
        use(model, routes)
    assert torch.equal(model(X), before)


def test_nothing_is_merged_meanwhile(model: nn.Module) -> None:
    weight = model[1].weight.detach().clone()
    with use(model, ROUTES), pytest.raises(UseError, match="leave that `use` first"):
        merge(model, "b", keep_base=True)
    assert torch.equal(model[1].weight, weight)


def test_prompts_of_different_adapters_share_a_batch(tmp_path: Any) -> None:
    """Answers are those that each prompt gets by itself, in whatever order and batches they are made."""
    base = deltaw.load_base("tiny", dtype="fp32")
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        attach(base.model, LoRA(rank=4), targets="all-linear", name=name)
        stir(base.model)
    use(base.model, {})
    prompts = ["The captain said", "A", "It was a dark night and the old house stood alone", "River and mill", "Yes"]
    routes: list[Any] = ["one", {}, {"two": 0.5}, {"one": 0.5, "two": 0.5}, "two"]
    together = deltaw.generate(base.model, base.tokenizer, prompts, routes=routes, max_new_tokens=8, batch_size=3)
    alone = []
    for prompt, route in zip(prompts, routes, strict=True):
        with use(base.model, route):
            alone += deltaw.generate(base.model, base.tokenizer, [prompt], max_new_tokens=8)
    assert together == alone and len(set(together)) > 1 and live(base.model) == {}
    with pytest.raises(UseError, match="2 routes for 5 prompts"):
        deltaw.generate(base.model, base.tokenizer, prompts, routes=["one", {}])
    with use(base.model, routes), pytest.raises(UseError, match="leave that `use` first"):
        deltaw.generate(base.model, base.tokenizer, prompts)
