"""MoRA: the anchors of the authors' code, and the paper's definition written out as a dense reference."""

import copy
import math
from pathlib import Path

import pytest
import torch
from contract import suite
from contract.hosts import HOSTS
from sizes import largest
from torch import Tensor, nn

import deltaw
from deltaw.core.errors import ConfigError, TargetError, UseError
from deltaw.core.host import HostSpec, host_of
from deltaw.methods.mora import MoRA, MoRAAdapter


def drawn(spec: HostSpec, method: MoRA) -> MoRAAdapter:
    adapter = method.build(spec)
    nn.init.normal_(adapter.mora_M)
    return adapter  # type: ignore[return-value]


def reference(matrix: Tensor, out: int, inputs: int, kind: int) -> Tensor:
    """ΔW [out, inputs] number by number: y[o] = Σ over one group of M·(turned inputs), inputs and outputs continued."""
    side = matrix.shape[0]
    groups = math.ceil(inputs / side)
    rows = torch.zeros(side if kind == 1 else groups * side, inputs, dtype=matrix.dtype)
    for t in range(groups):
        turn = torch.eye(side, dtype=matrix.dtype)
        if kind == 6:
            for i in range(side // 2):
                angle, j = t * 10000.0 ** (-2 * i / side), i + side // 2
                turn[i, i] = turn[j, j] = math.cos(angle)
                turn[i, j], turn[j, i] = -math.sin(angle), math.sin(angle)
        block = matrix @ turn
        first = 0 if kind == 1 else t * side
        for j in range(side):
            rows[first : first + side, (t * side + j) % inputs] += block[:, j]
    return torch.stack([rows[o % rows.shape[0]] for o in range(out)])


@pytest.mark.parametrize(
    ("out", "inputs", "rank", "kind", "side"),
    [
        (4096, 4096, 8, 1, 256), (4096, 4096, 8, 6, 256), (768, 768, 8, 1, 111), (768, 768, 8, 6, 110),
        (64, 64, 4, 1, 23), (64, 64, 4, 6, 22), (48, 32, 4, 1, 18), (48, 32, 4, 6, 18),
    ],
)  # fmt: skip
def test_size_anchors(out: int, inputs: int, rank: int, kind: int, side: int) -> None:
    with torch.device("meta"):
        adapter = MoRA(rank=rank, type=kind).build(HostSpec((out, inputs)))  # type: ignore[arg-type]
    assert adapter.mora_M.shape == (side, side)


def test_count_anchor() -> None:
    for kind in (1, 6):
        adapter = MoRA(rank=4, type=kind).build(HostSpec((48, 32)))  # type: ignore[arg-type]
        assert [p.numel() for p in adapter.parameters()] == [324] and not adapter.mora_M.any()


SHAPES = [(48, 32, 4), (64, 64, 4), (128, 48, 2), (50, 70, 3), (200, 20, 2)]


@pytest.mark.parametrize("kind", [1, 6])
@pytest.mark.parametrize(("out", "inputs", "rank"), [*SHAPES, (20, 200, 2), (36, 36, 1), (300, 4, 1), (4, 300, 1)])
def test_merge_and_forward_are_the_definition(out: int, inputs: int, rank: int, kind: int) -> None:
    adapter = drawn(HostSpec((out, inputs)), MoRA(rank=rank, type=kind)).double()  # type: ignore[arg-type]
    expected = reference(adapter.mora_M.detach(), out, inputs, kind)
    delta = adapter.merged(torch.zeros(out, inputs, dtype=torch.float64))
    x = torch.randn(2, 3, inputs, dtype=torch.float64)
    torch.testing.assert_close(delta, expected, rtol=0, atol=1e-5)  # angles are fp32
    y = adapter.vectors(x, *adapter.parts(1.0, torch.float64))
    torch.testing.assert_close(y, x @ delta.T, rtol=0, atol=1e-12)
    torch.testing.assert_close(y, x @ expected.T, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("out", "inputs", "rank"), SHAPES)
def test_rank_anchors(out: int, inputs: int, rank: int) -> None:
    zero = torch.zeros(out, inputs, dtype=torch.float64)
    rotated = drawn(HostSpec((out, inputs)), MoRA(rank=rank)).double()
    assert torch.linalg.matrix_rank(rotated.merged(zero)) == min(out, inputs)
    shared = drawn(HostSpec((out, inputs)), MoRA(rank=rank, type=1)).double()
    assert torch.linalg.matrix_rank(shared.merged(zero)) == min(shared.mora_M.shape[0], out, inputs)


def test_the_tables_of_angles_are_no_memory_of_training_and_go_along(tmp_path: Path) -> None:
    spec, x = HostSpec((20, 24)), torch.randn(3, 24)
    adapter = drawn(spec, MoRA(rank=4))
    assert not adapter.memory() and not list(adapter.buffers()) and list(adapter.state_dict()) == ["mora_M"]
    with torch.device("meta"):
        empty: MoRAAdapter = MoRA(rank=4).build(spec)  # type: ignore[assignment]
    assert empty.cos.device.type == "meta"
    empty.to_empty(device="cpu").load_state_dict(adapter.state_dict())  # the tables come back by themselves
    torch.save(adapter, tmp_path / "whole")
    twins = [empty, torch.load(tmp_path / "whole", weights_only=False), copy.deepcopy(adapter).bfloat16()]
    for twin in twins:
        assert torch.equal(twin.vectors(x, twin.mora_M), adapter.vectors(x, adapter.mora_M))
        assert twin.cos.dtype == torch.float32
    y = torch.compile(adapter.vectors, fullgraph=True, backend="aot_eager")(x, adapter.mora_M)
    torch.testing.assert_close(y, adapter.vectors(x, adapter.mora_M))


@pytest.mark.parametrize("kind", [1, 6])
def test_no_matrix_of_the_weights_size_on_vectors(kind: int) -> None:
    host = host_of(nn.Linear(512, 768))
    adapter = drawn(host.spec, MoRA(rank=1, type=kind))  # type: ignore[arg-type]
    x = torch.randn(3, 512, requires_grad=True)
    assert largest(lambda: adapter.branch(host, x).sum().backward()) < 512 * 768 // 16


@pytest.mark.parametrize("host", ["linear", "linear-no-bias", "conv1d-of-gpt2", "conv2d"])
@pytest.mark.parametrize("rank", [None, 1, 5])
def test_type_1_keeps_the_invariants(host: str, rank: int | None) -> None:
    for check in (*suite.EVERY_CONFIG, *suite.ONE_CONFIG):
        if check is not suite.compiled_is_equal or rank == 5:
            check(MoRA(rank=rank, type=1), HOSTS[host])


def test_default_rank_fits_the_layer() -> None:
    for shape in ((48, 32), (1, 64), (5, 3), (896, 128)):
        spec = HostSpec(shape)
        rank = MoRA().at("", spec).rank
        assert rank is not None and MoRA(rank=rank).unfit(spec) is None
        assert rank == 16 or MoRA(rank=rank + 1).unfit(spec) is not None
    assert MoRA().at("", HostSpec((896, 896))).rank == 16


def test_mixing_adds_the_matrices() -> None:
    model = nn.Sequential(nn.Linear(32, 48))

    def state(method: MoRA) -> deltaw.AdapterState:
        deltaw.attach(model, method, targets="0")
        nn.init.normal_(next(p for p in model.parameters() if p.requires_grad))
        found = deltaw.extract(model)
        deltaw.detach(model)
        return found

    a, b, weight = state(MoRA(rank=4)), state(MoRA(rank=4)), torch.zeros(48, 32)
    change = [deltaw.core.state.delta(s, "0", weight) for s in (a, b, 0.5 * a + -2.0 * b)]
    torch.testing.assert_close(change[2], 0.5 * change[0] - 2.0 * change[1])
    for other in (MoRA(rank=5), MoRA(rank=4, type=1)):
        with pytest.raises(UseError, match="cannot be mixed exactly"):
            a + state(other)


def test_bad_options_and_shapes() -> None:
    with pytest.raises(ConfigError, match=r"type=2 is neither 1 nor 6"):
        MoRA(type=2)  # type: ignore[arg-type]
    with pytest.raises(TargetError, match=r"rank 32 makes .* of 50×50, .* at most rank 19 is of use"):
        deltaw.attach(nn.Sequential(nn.Linear(32, 48)), MoRA(rank=32), targets="0")
    with pytest.raises(TargetError, match="use another method for this layer"):
        deltaw.attach(nn.Sequential(nn.Linear(1, 1)), MoRA(), targets="0")
    with pytest.raises(TargetError, match=r"ids of tokens are no neighbours: use LoRA"):
        deltaw.attach(nn.Sequential(nn.Embedding(9, 4)), MoRA(), targets="0")
