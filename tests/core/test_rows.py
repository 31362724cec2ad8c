"""A route for every row of a batch: what the contract suite does not ask."""

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn

import deltaw
from deltaw.core.attach import attach, detach, insert, trainable
from deltaw.core.carried import here
from deltaw.core.errors import FileError, UseError
from deltaw.core.merge import merge
from deltaw.core.route import live, use
from deltaw.hosts.linear import LinearHost
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


def served(*ranks: int) -> nn.Module:
    """Frozen adapters of several ranks on both layers, ready for a bank."""
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    for number, rank in enumerate(ranks):
        attach(model, LoRA(rank=rank, alpha=3), targets="all-linear", name=f"a{number}")
        stir(model)
    return model.requires_grad_(False)


def each(model: nn.Module, routes: list[Any], x: torch.Tensor) -> torch.Tensor:
    """Every row by itself."""
    found = []
    for number, route in enumerate(routes):
        with use(model, route):
            found.append(model(x)[number])
    return torch.stack(found)


@torch.no_grad()
def test_a_bank_holds_the_parameters_themselves() -> None:
    """Nothing is copied: values, names and files stay, later changes are seen, and a model that moves makes a new one."""
    model = served(2, 3, 2)
    x, before = torch.randn(4, 5, 6), {name: p.clone() for name, p in model.named_parameters()}
    routes: list[Any] = ["a1", {"a0": 0.5, "a2": -1.0}, {}, "a1"]
    expected = each(model, routes, x)
    with use(model, routes):
        torch.testing.assert_close(model(x), expected)
        bank = here(model[0]).bank
        assert bank is not None and bank.holds([model[0].adapters[n]["weight"] for n in ("a0", "a1", "a2")])
        model[0].adapters["a1"]["weight"].lora_B.data.mul_(2.0)
        changed = model(x)
        assert float((changed - expected)[0].abs().max()) > 1e-3
        torch.testing.assert_close(changed[2], expected[2])
    model[0].adapters["a1"]["weight"].lora_B.data.div_(2.0)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    twin = copy.deepcopy(model)
    with use(twin, routes):
        torch.testing.assert_close(twin(x), expected)
    with use(model, routes):
        model[0].adapters["a1"]["weight"].lora_B.data = before["0.adapters.a1.weight.lora_B"].clone()  # out of the bank
        torch.testing.assert_close(model(x), expected)
        model.double()
        torch.testing.assert_close(model(x.double()).float(), expected)
    model.float()
    detach(model, "a1")
    assert here(model[0]).bank is None  # nothing holds what is gone
    with use(model, ["a0", {}, "a2", {}]):
        assert model(x).shape == (4, 5, 4)
    insert(twin, (saved := deltaw.extract(twin, "a0")), name="again")
    assert all(t.is_contiguous() or t.ndim == 2 for group in saved.tensors.values() for t in group.values())


@torch.no_grad()
@pytest.mark.parametrize("ranks", [(2, 2, 2), (1, 2, 3), (1, 1, 4)])
@pytest.mark.parametrize("steps", [1, 7])
def test_ranks_and_lengths(ranks: tuple[int, ...], steps: int) -> None:
    model, x = served(*ranks), torch.randn(6, steps, 6)
    routes: list[Any] = ["a0", "a1", "a2", {"a0": 0.5, "a1": 0.25, "a2": -2.0}, {}, "a1"]
    expected = each(model, routes, x)
    with use(model, routes):
        torch.testing.assert_close(model(x), expected)
    half = model.bfloat16()
    with use(half, routes):
        torch.testing.assert_close(half(x.bfloat16()).float(), expected, rtol=0.05, atol=0.1)


@torch.no_grad()
def test_where_a_bank_does_not_pay() -> None:
    """Ranks or rows that are too unlike are computed one adapter after the other, and give the same."""
    for ranks in ((1, 1, 1, 1, 1, 4), (2, 2, 2, 2, 2, 2)):
        model, x = served(*ranks), torch.randn(24, 1, 6)
        routes: list[Any] = [f"a{n}" for n in range(5)] + ["a5"] * 19
        expected = each(model, routes, x)
        with use(model, routes):
            torch.testing.assert_close(model(x), expected)
    trained = served(2, 2)
    for parameter in trained[0].adapters.parameters():
        parameter.requires_grad_(True)
    with use(trained, ["a0", "a1"]):
        assert here(trained[0]).bank is None and here(trained[1]).bank is not None


@torch.no_grad()
def test_a_route_that_comes_again_is_as_it_was_and_sees_what_changed() -> None:
    model, x = served(2, 2), torch.randn(2, 3, 6)
    routes: list[Any] = [{"a0": 0.5}, "a1"]
    with use(model, routes):
        first, live_then = model(x), here(model[0]).live
    with use(model, routes):
        assert here(model[0]).live is live_then and torch.equal(model(x), first)  # nothing was planned anew
        with use(model, ["a1", {}]):
            assert not torch.allclose(model(x), first)
        assert here(model[0]).batch.live is live_then and torch.equal(model(x), first)
    layer = model[0].adapters["a0"]["weight"]
    layer.scale *= 3.0
    expected = each(model, routes, x)
    for _ in range(2):
        with use(model, routes):
            torch.testing.assert_close(model(x), expected)
    model.double()
    for _ in range(2):
        with use(model, routes):
            torch.testing.assert_close(model(x.double()).float(), expected)
    assert here(model[0]).batch is None or here(model[0]).batch.bank.a.dtype == torch.float64
    with pytest.raises(UseError, match="strength True of 'a0'"):
        use(model, [{"a0": True}, "a1"])
    detach(model, "a0")
    with pytest.raises(UseError, match="no adapter 'a0'"):
        use(model, routes)
    assert not here(copy.deepcopy(model)[1]).routed


def test_rows_in_inference_mode_leave_parameters_that_train() -> None:
    model, x = served(2, 2), torch.randn(2, 3, 6)
    with torch.inference_mode(), use(model, ["a0", "a1"]):
        y = model(x)
    trainable(model, "a0")
    use(model, "a0")
    model(x)[0].sum().backward()
    assert model[0].adapters["a0"]["weight"].lora_B.grad is not None
    torch.testing.assert_close(y[0], model(x)[0])


@torch.no_grad()
def test_what_was_detached_is_kept_by_nobody() -> None:
    model, x = served(2, 2), torch.randn(2, 3, 6)
    with use(model, ["a0", "a1"]):
        model(x)
    gone = weakref.ref(model[0].adapters["a1"]["weight"]), weakref.ref(here(model[0]).bank)
    detach(model, "a1")
    gc.collect()
    assert [one() for one in gone] == [None, None] and not here(model[0]).routed


class Remembers(nn.Linear):
    """Gives the tensor that it keeps."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.last = super().forward(x)
        return self.last


class Doubles(LinearHost):
    """A host of another package, whose rows are not those of nn.Linear."""

    def low_rank(self, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return 2 * super().low_rank(x, a, b)


@torch.no_grad()
def test_a_bank_writes_into_no_tensor_of_the_layer_and_speaks_for_no_other_host() -> None:
    model, x = nn.Sequential(Remembers(6, 5)), torch.randn(2, 3, 6)
    for name in ("a", "b"):
        attach(model, LoRA(rank=2), targets="0", name=name)
        stir(model)
    model.requires_grad_(False)
    with use(model, {}):
        base = model(x)
    with use(model, ["a", "b"]):
        y = model(x)
        assert here(model[0]).batch is not None and torch.equal(model[0].last, base) and not torch.allclose(y, base)
    assert LinearHost.grouped is not None and Doubles.grouped is None


def test_one_module_under_two_names_takes_an_adapter_once() -> None:
    apart = nn.ModuleDict({"enc": nn.Linear(6, 5), "dec": nn.Linear(6, 5)})
    attach(apart, LoRA(rank=2), targets=["enc", "dec"])
    shared = nn.Linear(6, 5)
    with pytest.raises(FileError, match="it is the same module as enc"):
        insert(nn.ModuleDict({"enc": shared, "dec": shared}), deltaw.extract(apart))
