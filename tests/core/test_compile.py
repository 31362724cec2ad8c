"""Adapters under torch.compile: what compiles anew, and what does not."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

import deltaw
from deltaw.core.route import use


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    for name in ("a", "b"):
        deltaw.attach(model, deltaw.LoRA(rank=2), targets="all-linear", name=name)
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter)
    return model


def test_each_live_set_compiles_once_and_strengths_not_at_all(model: nn.Module) -> None:
    torch.compiler.reset()
    counter, x = CompileCounter(), torch.randn(3, 6)
    compiled = torch.compile(model, backend=counter, fullgraph=True)

    def run(route: dict[str, float]) -> int:
        use(model, route)
        torch.testing.assert_close(compiled(x), model(x))
        return int(counter.frame_count)

    with torch.no_grad():
        assert [run({"a": 1.0}), run({"b": 1.0}), run({}), run({"a": 0.5})] == [1, 2, 3, 4]
        assert [run(r) for r in ({"a": 1.0}, {"b": 1.0}, {}, {"a": 0.25}, {"a": -2.0}, {"a": 1.0})] == [4] * 6


def test_a_whole_step_is_one_graph(model: nn.Module) -> None:
    torch.compiler.reset()
    counter, x = CompileCounter(), torch.randn(3, 6)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    losses = []
    for _ in range(4):
        loss = compiled(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert counter.frame_count == 1 and losses == sorted(losses, reverse=True) and losses[0] > losses[-1]


@pytest.mark.parametrize("method", [deltaw.LoRA(rank=2, dropout=0.5), deltaw.DoRA(rank=2)])
def test_dropout_and_gains_end_no_graph(method: deltaw.LoRA) -> None:
    torch.compiler.reset()
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 5)), torch.randn(3, 6)
    deltaw.attach(model, method, targets="0")
    nn.init.normal_(model[0].adapters["default"]["weight"].lora_B)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    found = []
    for run in (model, compiled):
        torch.manual_seed(1)
        y = run(x)
        y.square().sum().backward()
        found.append([y.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
        model.zero_grad()
    for eager, graph in zip(*found, strict=True):
        torch.testing.assert_close(eager, graph)
