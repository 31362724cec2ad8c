"""use(): exactly the named adapters act, at their strengths, and nothing else in the model is touched."""

import copy
import re
import statistics
import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from core import tiny
from deltaw.core import route
from deltaw.core.adapter import Adapter
from deltaw.core.attach import attach, detach, extract, insert
from deltaw.core.carried import here
from deltaw.core.errors import UseError
from deltaw.core.host import HostSpec, ParameterHost
from deltaw.core.merge import merge, unmerge
from deltaw.core.method import Method
from deltaw.core.route import live, use
from deltaw.methods.dora import DoRA
from deltaw.methods.full import Full
from deltaw.methods.lora import LoRA


def stir(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.3 * torch.randn_like(parameter))


@pytest.fixture
def model() -> nn.Module:
    """Two layers; `b` sits on the second only."""
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    for name, targets in (("a", ["0", "1"]), ("b", "1"), ("c", ["0", "1"])):
        attach(model, LoRA(rank=2, alpha=3), targets=targets, name=name)
        stir(model)
    use(model, {})
    return model


def test_each_route_is_the_weighted_sum(model: nn.Module) -> None:
    layer, x = model[1], torch.randn(3, 5)

    def output(wanted: dict[str, float] | str) -> Tensor:
        with torch.no_grad(), use(model, wanted):
            return layer(x)

    base, a, b = output({}), output("a"), output("b")
    for w, v in ((0.7, 0.3), (-1.0, 2.0), (1.0, 1.0), (0.0, 1.0)):
        torch.testing.assert_close(output({"a": w, "b": v}), base + w * (a - base) + v * (b - base))
    assert torch.equal(output({"a": 0, "b": 0.0}), base)


def test_leaving_the_block_restores_exactly_what_was_live(model: nn.Module) -> None:
    use(model, {"c": 0.5, "b": 1.0, "a": 2.0})
    before = [here(module).live for module in route.adapted_modules(model)]
    with use(model, "a"):
        with use(model, {"b": 0.1}):
            assert live(model) == pytest.approx({"b": 0.1})
        assert live(model) == {"a": 1.0}
    assert all(here(module).live is tuple_ for module, tuple_ in zip(route.adapted_modules(model), before, strict=True))
    with pytest.raises(ZeroDivisionError), use(model, {}):
        1 / 0  # noqa: B018
    assert live(model) == {"c": 0.5, "b": 1.0, "a": 2.0}


def test_leaving_the_block_after_adapters_came_went_or_were_merged(model: nn.Module) -> None:
    x = torch.randn(3, 6)
    use(model, {"a": 1.0, "b": 0.5})
    with torch.no_grad():
        both = model(x)
        with use(model, {}):
            attach(model, LoRA(rank=2), targets="0", name="d")
            detach(model, "b")
            insert(model, extract(model, "c"), name="e")
        assert live(model) == {"a": 1.0}
        use(model, {"a": 1.0})
        alone = model(x)
        with use(model, {"c": 1.0}):
            merge(model, "a", keep_base=True)
        torch.testing.assert_close(model(x), alone)  # a acts once, from the weights
        assert live(model) == {}
        unmerge(model)
        assert live(model) == {"a": 1.0} and torch.equal(model(x), alone)
    assert not torch.equal(both, alone)


def test_a_plain_call_switches_for_good(model: nn.Module) -> None:
    assert live(model) == {}
    use(model, "b")
    assert live(model) == {"b": 1.0} and route.names(model) == ["a", "c", "b"]


class Echo(Adapter):
    """An adapter that is no ΔW."""

    def forward(self, host: Any, call: Any, strength: Tensor | None, *args: Any, **kwargs: Any) -> Any:
        return 2 * call(*args, **kwargs)


class EchoMethod(Method):
    host = ParameterHost
    name = "echo"

    def build(self, spec: HostSpec) -> Adapter:
        return Echo()


@pytest.mark.parametrize(
    ("wanted", "sentence"),
    [
        ({"a": 1.0, "bb": 1.0}, "no adapter 'bb'; did you mean 'b'? (attached: a, c, b, echo)"),
        ({"ecko": 1.0}, "no adapter 'ecko'; did you mean 'echo'? (attached: a, c, b, echo)"),
        ({"a": float("nan")}, "strength nan of 'a' is not a finite number"),
        ({"a": "1"}, "strength '1' of 'a' is not a finite number"),
        ({"a": True}, "strength True of 'a' is not a finite number"),
        ({"echo": 0.5}, "'echo' has parts without a ΔW (Echo): its strength is 0 or 1, not 0.5"),
    ],
    ids=str,
)
def test_routes_that_cannot_be(model: nn.Module, wanted: Any, sentence: str) -> None:
    attach(model, EchoMethod(), targets="1", name="echo")
    use(model, {"a": 0.5})
    with pytest.raises(UseError, match=re.escape(sentence)):
        use(model, wanted)
    assert live(model) == {"a": 0.5}
    with use(model, {"echo": 1, "a": 0.5}):
        assert live(model) == {"echo": 1.0, "a": 0.5}


def test_a_merged_adapter_and_a_bare_model(model: nn.Module) -> None:
    merge(model, "a", keep_base=True)
    with pytest.raises(UseError, match="'a' is merged into the weights: unmerge the model before routing it"):
        use(model, {"a": 1.0})
    use(model, {"b": 1.0, "a": 0.0})
    with pytest.raises(UseError, match=r"no adapter 'a' \(no adapter is attached to this model\)"):
        use(nn.Linear(2, 2), "a")


def test_nothing_else_is_touched(model: nn.Module) -> None:
    model.train()
    flags = {path: p.requires_grad for path, p in model.named_parameters()}
    values = {path: p.detach().clone() for path, p in model.named_parameters()}
    modes, versions = [m.training for m in model.modules()], [p._version for p in model.parameters()]
    with use(model, {"a": 0.3, "b": 1.0}):
        model(torch.randn(3, 6))
    assert {path: p.requires_grad for path, p in model.named_parameters()} == flags
    assert all(torch.equal(p, values[path]) for path, p in model.named_parameters())
    assert [m.training for m in model.modules()] == modes
    assert [p._version for p in model.parameters()] == versions


def test_one_model_does_not_route_another() -> None:
    first, x = tiny.model("llama"), tiny.ids()
    attach(first, LoRA(rank=2), targets="attention", name="a")
    stir(first)
    second = copy.deepcopy(first)
    tuned = first(x).logits
    with use(second, {}):
        assert torch.equal(first(x).logits, tuned) and not torch.equal(second(x).logits, tuned)


def test_order_of_methods_does_not_matter() -> None:
    """DoRA and trained copies act beside the base as it was, whatever else is live: sums, in any order."""
    layer, x = nn.Linear(6, 5), torch.randn(3, 6)
    model = nn.Sequential(layer)
    methods: list[Method] = [LoRA(rank=2), DoRA(rank=2), Full(), DoRA(rank=3)]
    for number, method in enumerate(methods):
        attach(model, method, targets="0", name=str(number))
        stir(model)

    @torch.no_grad()
    def output(*names: str) -> Tensor:
        with use(model, dict.fromkeys(names, 1.0)):
            return model(x)

    total = output() + sum(output(name) - output() for name in "0123")
    for order in ("0123", "3210", "2031"):
        torch.testing.assert_close(output(*order), total, atol=1e-5, rtol=1e-5)


def test_switching_560_layers_is_cheap() -> None:
    """Issue: at most 1 ms. The bound leaves room for a busy machine; a walk over the parameters would break it."""
    model = nn.ModuleList(nn.Linear(2, 2) for _ in range(560))
    for name in ("a", "b"):
        attach(model, LoRA(rank=1), targets=r"\d+", name=name)
    times = []
    for number in range(41):
        began = time.perf_counter()
        use(model, "ab"[number % 2])
        times.append(time.perf_counter() - began)
    assert statistics.median(times) < 5e-3
