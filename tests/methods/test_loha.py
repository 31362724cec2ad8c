"""LoHa: the anchors of the papers' formulas, its own backward pass against autograd, and PEFT as oracle."""

import pytest
import torch
import torch.nn.functional as F
from peft import LoHaConfig
from sizes import kept
from torch import nn
from twins import differ, twins

import deltaw
from deltaw.core.errors import ConfigError, TargetError, UseError
from deltaw.core.host import HostSpec, host_of
from deltaw.methods import loha
from deltaw.methods.loha import LoHa
from deltaw.methods.lora import LoRA


def drawn(spec: HostSpec, method: LoHa) -> loha.LoHaAdapter:
    adapter = method.build(spec)
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    return adapter  # type: ignore[return-value]


def count(adapter: nn.Module) -> int:
    return sum(parameter.numel() for parameter in adapter.parameters())


def test_count_and_rank_anchors() -> None:
    assert count(LoHa(rank=4).build(HostSpec((48, 32)))) == 640  # 2r(m + n)
    delta = drawn(HostSpec((64, 64)), LoHa(rank=4)).double().merged(torch.zeros(64, 64, dtype=torch.float64))
    assert torch.linalg.matrix_rank(delta) == 16  # r²


def test_as_many_numbers_as_lora_by_default() -> None:
    spec = HostSpec((48, 32))
    assert count(LoHa().build(spec)) == count(LoRA().build(spec))


def test_start_is_pefts() -> None:
    adapter = LoHa(rank=4).build(HostSpec((480, 320)))
    assert not adapter.hada_w2_b.any()
    for name, inputs in (("hada_w1_a", 4), ("hada_w1_b", 320), ("hada_w2_a", 4)):
        largest = float(getattr(adapter, name).detach().abs().max())
        assert 0.9 < largest * inputs**0.5 <= 1.0, name
    table = LoHa(rank=4).build(HostSpec((16, 400), lookup=True))
    assert 0.9 < float(table.hada_w1_b.detach().abs().max()) <= 1.0  # a column of it is read by itself


def test_the_scale_is_applied_once() -> None:
    adapter = drawn(HostSpec((5, 3)), LoHa(rank=2, alpha=6.0))
    expected = 3.0 * (adapter.hada_w1_a @ adapter.hada_w1_b) * (adapter.hada_w2_a @ adapter.hada_w2_b)
    torch.testing.assert_close(adapter.merged(torch.zeros(5, 3)), expected)


def test_gradients_are_those_of_autograd() -> None:
    factors = [torch.randn(*shape, dtype=torch.float64) for shape in ((6, 2), (2, 5), (6, 2), (2, 5))]
    factors = [t.requires_grad_() for t in factors]
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    g = torch.randn(6, 5, dtype=torch.float64)
    expected = torch.autograd.grad(loha.product(*factors), factors, g)
    for grads in (loha.gradients(g, *factors), torch.autograd.grad(loha.Product.apply(*factors), factors, g)):
        for grad, other in zip(grads, expected, strict=True):
            torch.testing.assert_close(grad, other)
    assert torch.autograd.gradcheck(loha.Linear.apply, (x, *factors))
    torch.testing.assert_close(loha.Linear.apply(x, *factors), F.linear(x, loha.product(*factors)))


def test_no_product_is_kept_for_the_backward_pass() -> None:
    layer, x = nn.Linear(40, 50), torch.randn(3, 40, requires_grad=True)
    host, adapter = host_of(layer), drawn(HostSpec((50, 40)), LoHa(rank=2))
    factors = [tensor.requires_grad_() for tensor in adapter.parameters()]
    assert max(kept(lambda: F.linear(x, loha.product(*factors)))) == 50 * 40  # what plain operations keep
    assert 0 < max(kept(lambda: adapter.branch(host, x))) < 50 * 40
    y = adapter.branch(host, x)
    grads = torch.autograd.grad(y.square().sum(), [x, *factors])
    plain = F.linear(x, adapter.scale * loha.product(*factors))
    for grad, other in zip(grads, torch.autograd.grad(plain.square().sum(), [x, *factors]), strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-4, atol=1e-3)


def test_gradients_under_autocast() -> None:
    layer, x = nn.Linear(40, 50), torch.randn(3, 40, requires_grad=True)
    host, adapter = host_of(layer), drawn(HostSpec((50, 40)), LoHa(rank=2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = adapter.branch(host, x)
    grads = torch.autograd.grad(y.float().sum(), [x, *adapter.parameters()])
    exact = torch.autograd.grad(adapter.branch(host, x).sum(), [x, *adapter.parameters()])
    assert y.dtype == torch.bfloat16 and all(grad.dtype == torch.float32 for grad in grads)
    for grad, other in zip(grads, exact, strict=True):
        assert float((grad - other).norm() / other.norm()) < 3e-2


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Linear(37, 53), torch.randn(4, 37)),
        (nn.Conv1d(6, 9, 5, padding=2), torch.randn(2, 6, 11)),
        (nn.Conv2d(3, 8, (3, 2), stride=2, padding=1, dilation=2), torch.randn(2, 3, 9, 8)),
        (nn.Conv2d(6, 10, 3, groups=2), torch.randn(2, 6, 7, 7)),
    ],
    ids=["linear", "conv1d", "conv2d", "conv2d-grouped"],
)
def test_pefts_tensors_give_pefts_outputs(layer: nn.Module, x: torch.Tensor) -> None:
    ours, theirs = twins(layer, LoHa(rank=3, alpha=5.0), LoHaConfig(r=3, alpha=5, target_modules=["0"]))
    assert differ(ours, theirs, x) <= 1e-5
    deltaw.merge(ours)
    assert differ(ours, theirs, x) <= 1e-5


def test_rows_of_an_embedding_without_the_table() -> None:
    layer = nn.Embedding(40, 16, padding_idx=3)
    host, ids = host_of(layer), torch.tensor([[0, 3, 7], [39, 3, 0]])
    adapter = drawn(host.spec, LoHa(rank=2, alpha=5.0))
    change = adapter.merged(torch.zeros(16, 40))
    torch.testing.assert_close(adapter.branch(host, ids), change.T[ids])
    (grad,) = torch.autograd.grad(adapter.branch(host, ids).sum(), [adapter.hada_w1_b])
    assert grad.any(0).nonzero().flatten().tolist() == [0, 7, 39]  # padding learns nothing
    assert torch.autograd.grad(host.act(ids, lambda: change).sum(), [adapter.hada_w1_b])[0].any(0).sum() == 3


def test_factors_are_the_change_where_they_are_smaller() -> None:
    spec = HostSpec((20, 5, 2, 2))
    adapter, method = drawn(spec, LoHa(rank=4, alpha=6.0)), LoHa(rank=4, alpha=6.0)
    a, b, scale = method.factors(adapter.state_dict())  # type: ignore[misc]
    assert a.shape == (16, 20)
    torch.testing.assert_close(scale * (b @ a), adapter.merged(torch.zeros(spec.shape)).flatten(1))
    assert LoHa(rank=5, alpha=6.0).factors(drawn(spec, LoHa(rank=5)).state_dict()) is None


def test_mixing() -> None:
    model = nn.Sequential(nn.Linear(7, 9))
    states = []
    for name, method in (("a", LoHa(rank=2, alpha=3.0)), ("b", LoRA(rank=2))):
        deltaw.attach(model, method, targets="0", name=name)
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter)
        states.append(deltaw.extract(model, name))
    weight = torch.zeros(9, 7)
    torch.testing.assert_close(
        deltaw.core.state.delta(-0.5 * states[0], "0", weight), -0.5 * deltaw.core.state.delta(states[0], "0", weight)
    )
    for mixed in ((0, 0), (0, 1), (1, 0)):
        with pytest.raises(UseError, match="cannot be mixed exactly"):
            states[mixed[0]] + states[mixed[1]]


def test_bad_options_and_shapes() -> None:
    with pytest.raises(ConfigError) as caught:
        LoHa(rank=0, alpha=-1.0, dropout=1.0, modules_to_save="head")  # type: ignore[arg-type]
    assert len(caught.value.faults) == 4
    with pytest.raises(TargetError, match=r"rank 60 is above both dimensions, 32 and 48"):
        deltaw.attach(nn.Sequential(nn.Linear(32, 48)), LoHa(rank=60), targets="0")


def test_modules_to_save_are_trained_in_full() -> None:
    model = nn.Sequential(nn.Linear(7, 9), nn.LayerNorm(9))
    plan = deltaw.attach(model, LoHa(rank=2, modules_to_save=("1",)), targets="0")
    assert plan.trainable == 2 * 2 * (7 + 9) + 2 * 9
