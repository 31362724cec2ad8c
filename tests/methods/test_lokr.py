"""LoKr: the anchors of the published code, the Kronecker product that is never formed, and PEFT as oracle."""

import pytest
import torch
from contract import suite
from contract.hosts import HOSTS
from peft import LoKrConfig
from peft.tuners.lokr.layer import factorization as pefts
from sizes import largest
from torch import Tensor, nn
from twins import differ, twins

import deltaw
from deltaw.core.errors import ConfigError, UseError
from deltaw.core.host import HostSpec, host_of
from deltaw.methods.lokr import LoKr, LoKrAdapter, factorization


def drawn(spec: HostSpec, method: LoKr) -> LoKrAdapter:
    adapter = method.build(spec)
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    return adapter  # type: ignore[return-value]


def shapes(adapter: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in adapter.named_parameters()}


def test_factorization_anchors() -> None:
    found = {size: factorization(size) for size in (128, 250, 360, 512, 1024, 127, 1)}
    assert found == {
        128: (8, 16), 250: (10, 25), 360: (18, 20), 512: (16, 32), 1024: (32, 32), 127: (1, 127), 1: (1, 1),
    }  # fmt: skip
    assert (factorization(128, 4), factorization(360, 8), factorization(250, 4)) == ((4, 32), (8, 45), (2, 125))
    assert factorization(32, 8) == (8, 4)  # LyCORIS: (4, 8)


def test_factorization_is_pefts() -> None:
    for size in range(1, 150):
        for factor in (-1, *range(1, 40)):
            assert factorization(size, factor) == pefts(size, factor), (size, factor)


def test_shapes_and_counts() -> None:
    spec = HostSpec((48, 32))  # (6, 8) and (4, 8)
    low = LoKr(rank=2).build(spec)
    assert shapes(low) == {"lokr_w1": (6, 4), "lokr_w2_a": (8, 2), "lokr_w2_b": (2, 8)}  # 24 + 32 = 56
    assert shapes(LoKr(rank=4).build(spec)) == {"lokr_w1": (6, 4), "lokr_w2": (8, 8)}  # 24 + 64 = 88: 4 ≥ 8/2
    both = LoKr(rank=2, decompose_both=True).build(spec)
    assert shapes(both) == {"lokr_w1_a": (6, 2), "lokr_w1_b": (2, 4)} | {
        k: v for k, v in shapes(low).items() if "2" in k
    }
    assert shapes(LoKr(rank=2, decompose_factor=4).build(spec))["lokr_w1"] == (4, 4)
    conv = HostSpec((8, 6, 3, 3))  # (2, 4) and (2, 3)
    assert shapes(LoKr(rank=1).build(conv)) == {"lokr_w1": (2, 2), "lokr_w2_a": (4, 1), "lokr_w2_b": (1, 27)}
    assert shapes(LoKr(rank=2).build(conv)) == {"lokr_w1": (2, 2), "lokr_w2": (4, 3, 3, 3)}


def test_rank_anchor() -> None:
    delta = drawn(HostSpec((48, 32)), LoKr(rank=2)).double().merged(torch.zeros(48, 32, dtype=torch.float64))
    assert torch.linalg.matrix_rank(delta) == 8  # min(6, 4) · 2


def test_start_is_pefts() -> None:
    adapter = LoKr(rank=4).build(HostSpec((2500, 900)))  # (50, 50) and (30, 30)
    assert not adapter.lokr_w1.any()
    for name, inputs in (("lokr_w2_a", 4), ("lokr_w2_b", 30)):
        assert 0.9 < float(getattr(adapter, name).detach().abs().max()) * inputs**0.5 <= 1.0, name
    both = LoKr(rank=4, decompose_both=True).build(HostSpec((2500, 900)))
    assert not both.lokr_w1_a.any() and both.lokr_w1_b.any()
    conv = LoKr(rank=8).build(HostSpec((81, 100, 3, 3)))
    assert 0.9 < float(conv.lokr_w2.detach().abs().max()) * 90**0.5 <= 1.0


@pytest.mark.parametrize("method", [LoKr(rank=2, alpha=3.0), LoKr(rank=4), LoKr(rank=1, decompose_both=True)])
def test_vectors_and_columns_are_the_kronecker_product(method: LoKr) -> None:
    spec = HostSpec((48, 32))
    adapter = drawn(spec, method).double()
    parts = adapter.parts(adapter.scale, torch.float64)
    delta = adapter.merged(torch.zeros(48, 32, dtype=torch.float64))
    x, ids = torch.randn(2, 5, 32, dtype=torch.float64), torch.arange(32).view(4, 8)
    torch.testing.assert_close(adapter.vectors(x, *parts), x @ delta.T, rtol=0, atol=1e-12)
    torch.testing.assert_close(adapter.columns(ids, *parts), delta.T[ids], rtol=0, atol=1e-12)
    assert adapter.vectors(x[:0], *parts).shape == (0, 5, 48)


def test_no_matrix_of_the_weights_size_on_vectors_and_ids() -> None:
    for layer, x in (
        (nn.Linear(1024, 512), torch.randn(3, 1024, requires_grad=True)),
        (nn.Embedding(1024, 512), torch.arange(4)),
    ):
        host = host_of(layer)
        adapter = drawn(host.spec, LoKr(rank=2))
        assert largest(lambda: adapter.branch(host, x).sum().backward()) < 512 * 1024 // 16  # noqa: B023


LAYERS: dict[str, tuple[nn.Module, Tensor]] = {
    "linear": (nn.Linear(32, 48), torch.randn(4, 32)),
    "conv2d": (nn.Conv2d(6, 8, (3, 2), stride=2, padding=1), torch.randn(2, 6, 9, 8)),
    "conv2d-1x1": (nn.Conv2d(32, 48, 1), torch.randn(2, 32, 3, 3)),
    "conv1d": (nn.Conv1d(6, 8, 5, padding=2), torch.randn(2, 6, 11)),
}


@pytest.mark.parametrize(
    ("layer", "options"),
    [
        ("linear", {"r": 2}),
        ("linear", {"r": 4}),
        ("linear", {"r": 1, "decompose_both": True}),
        ("linear", {"r": 2, "decompose_factor": 4}),
        ("linear", {"r": 2, "decompose_factor": 16}),
        ("conv2d", {"r": 1}),
        ("conv2d", {"r": 2}),
        ("conv2d-1x1", {"r": 2, "decompose_both": True}),
        ("conv1d", {"r": 1}),
    ],
    ids=str,
)
def test_pefts_tensors_give_pefts_outputs(layer: str, options: dict) -> None:
    module, x = LAYERS[layer]
    rest = {k: v for k, v in options.items() if k != "r"}
    method = LoKr(rank=options["r"], alpha=5.0, **rest)
    ours, theirs = twins(module, method, LoKrConfig(alpha=5, target_modules=["0"], **options))
    assert differ(ours, theirs, x) <= 1e-5
    deltaw.merge(ours)
    assert differ(ours, theirs, x) <= 1e-5


def test_pefts_conv1d_with_a_full_factor_is_another_product() -> None:
    """PEFT's Conv2d with a kernel of width 1 computes from the same tensors what our Conv1d does; its Conv1d does not."""
    module, x = LAYERS["conv1d"]
    ours, theirs = twins(module, LoKr(rank=2, alpha=5.0), LoKrConfig(r=2, alpha=5, target_modules=["0"]))
    assert differ(ours, theirs, x) > 0.1
    wide = nn.Conv2d(6, 8, (5, 1), padding=(2, 0))
    wide.weight.data.copy_(module.weight.unsqueeze(-1))
    wide.bias.data.copy_(module.bias)
    _, flat = twins(wide, LoKr(rank=2, alpha=5.0), LoKrConfig(r=2, alpha=5, target_modules=["0"]))
    tensors = {path: p for path, p in theirs.named_parameters() if path.endswith(".default")}
    with torch.no_grad():
        for path, p in flat.named_parameters():
            if path in tensors:
                p.copy_(tensors[path].view_as(p))
        torch.testing.assert_close(ours(x), flat(x.unsqueeze(-1)).squeeze(-1), rtol=1e-4, atol=1e-4)


OPTIONS = {
    "both": LoKr(rank=1, alpha=3.0, decompose_both=True),
    "factor 2": LoKr(rank=2, alpha=3.0, decompose_factor=2),
    "factor above the root": LoKr(rank=2, alpha=3.0, decompose_factor=16),
}


@pytest.mark.parametrize("host", ["linear", "conv1d-of-gpt2", "embedding", "conv1d", "conv2d-grouped"])
@pytest.mark.parametrize("option", OPTIONS)
def test_options_keep_the_invariants(option: str, host: str) -> None:
    for check in (*suite.EVERY_CONFIG, suite.gradients_reach_the_adapter_only, suite.extract_and_insert_are_exact):
        check(OPTIONS[option], HOSTS[host])


@pytest.mark.parametrize("shape", [(48, 32), (32, 48), (9, 6, 5)])
def test_factors_are_the_change_where_they_are_smaller(shape: tuple[int, ...]) -> None:
    spec = HostSpec(shape)
    for method in (LoKr(rank=1, alpha=3.0), LoKr(rank=1, alpha=3.0, decompose_both=True)):
        adapter = drawn(spec, method)
        a, b, scale = method.factors(adapter.state_dict())  # type: ignore[misc]
        assert a.shape[0] < min(spec.shape[0], spec.fan_in)
        torch.testing.assert_close(scale * (b @ a), adapter.merged(torch.zeros(shape)).flatten(1))


def test_no_factors_where_the_change_is_smaller() -> None:
    method = LoKr(rank=16, alpha=3.0)
    assert method.factors(drawn(HostSpec((48, 32)), method).state_dict()) is None


def test_mixing() -> None:
    for method in (LoKr(rank=2), LoKr(rank=2, decompose_both=True)):
        model = nn.Sequential(nn.Linear(32, 48))
        deltaw.attach(model, method, targets="0")
        for parameter in model.parameters():
            nn.init.normal_(parameter)
        state, weight = deltaw.extract(model), torch.zeros(48, 32)
        half = deltaw.core.state.delta(-0.5 * state, "0", weight)
        torch.testing.assert_close(half, -0.5 * deltaw.core.state.delta(state, "0", weight))
        assert half.any()
        with pytest.raises(UseError, match="cannot be mixed exactly"):
            state + state


def test_bad_options() -> None:
    for wrong in ({"decompose_factor": 0}, {"decompose_factor": -2}, {"decompose_factor": 2.0}, {"decompose_both": 1}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            LoKr(**wrong)
