"""BOFT: how far its rotations reach, real butterflies against whole matrices, PEFT's tensors and its single factor."""

import math
import warnings
from typing import Any

import peft
import pytest
import torch
from contract.hosts import HOSTS, Net
from peft.tuners.boft.layer import BOFTLayer
from torch import Tensor, nn

import deltaw
from deltaw.core.errors import ConfigError, TargetError
from deltaw.core.host import HostSpec, host_of
from deltaw.methods.boft import BOFT, BOFTAdapter
from deltaw.methods.oft import OFT, skew


def stirred(inputs: int = 32, outputs: int = 48, **fields: Any) -> BOFTAdapter:
    adapter: Any = BOFT(**fields).build(HostSpec((outputs, inputs)))
    nn.init.normal_(adapter.boft_R, std=0.4)
    nn.init.normal_(adapter.boft_s, mean=1.0, std=0.2)
    return adapter.double()


def whole(adapter: BOFTAdapter, inputs: int) -> Tensor:
    """R as a matrix: what the adapter does to the rows of the identity."""
    eye = torch.eye(inputs, dtype=torch.float64)
    return eye + adapter.rotated(eye)


def reference(adapter: BOFTAdapter, inputs: int) -> Tensor:
    """R from permutation matrices and inverses, with the permutations of PEFT's layer."""
    levels, blocks, _ = adapter.boft_R.shape
    eye, r = torch.eye(adapter.block, dtype=torch.float64), torch.eye(inputs, dtype=torch.float64)
    for level in range(levels):
        order = BOFTLayer.block_butterfly_perm(None, inputs, blocks // 2**level, adapter.block // 2, levels - 1)
        p = torch.eye(inputs, dtype=torch.float64)[order]
        q = skew(adapter.boft_R[level], adapter.block)
        r = p @ torch.block_diag(*((eye + q) @ torch.linalg.inv(eye - q))) @ p.T @ r
    return r


@pytest.mark.parametrize(("inputs", "block", "levels"), [(32, 8, 1), (32, 8, 2), (32, 8, 3), (64, 4, 5), (24, 6, 2)])
@torch.no_grad()
def test_product_of_whole_matrices(inputs: int, block: int, levels: int) -> None:
    adapter = stirred(inputs, block=block, levels=levels)
    r, weight = reference(adapter, inputs), torch.randn(48, inputs, dtype=torch.float64)
    torch.testing.assert_close(whole(adapter, inputs), r, rtol=0, atol=1e-12)
    torch.testing.assert_close(r @ r.T, torch.eye(inputs, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(adapter.merged(weight), adapter.boft_s * (weight @ r.T), rtol=0, atol=1e-12)
    layer, x = nn.Linear(inputs, 48).double(), torch.randn(5, inputs, dtype=torch.float64)
    y = adapter(host_of(layer), layer.forward, None, x)
    expected = (x @ r @ layer.weight.T) * adapter.boft_s.flatten() + layer.bias  # the bias is not scaled
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("inputs", "shares"), [(32, [0.25, 0.5, 1.0]), (64, [0.125, 0.25, 0.5, 1.0])])
@torch.no_grad()
def test_every_level_doubles_the_reach(inputs: int, shares: list[float]) -> None:
    assert len(shares) == math.log2(inputs / 8) + 1
    for levels, share in enumerate(shares, 1):
        r = whole(stirred(inputs, block=8, levels=levels), inputs)
        assert float((r.abs() > 1e-12).double().mean()) == share


@torch.no_grad()
def test_rows_keep_their_angles() -> None:
    adapter, weight = stirred(block=8, levels=3), torch.randn(48, 32, dtype=torch.float64)
    merged = adapter.merged(weight) / adapter.boft_s
    torch.testing.assert_close(merged @ merged.T, weight @ weight.T, rtol=0, atol=1e-11)


@torch.no_grad()
def test_one_level_is_oft() -> None:
    adapter, weight = stirred(block=8, levels=1), torch.randn(48, 32, dtype=torch.float64)
    nn.init.ones_(adapter.boft_s)
    other: Any = OFT(block=8).build(HostSpec((48, 32))).double()
    other.oft_R.copy_(adapter.boft_R[0])
    torch.testing.assert_close(adapter.merged(weight), other.merged(weight), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("fields", "count"),
    [({"block": 8, "levels": 2}, 224 + 48), ({}, 224 + 48), ({"block": 8, "levels": 1}, 112 + 48)],
)
def test_counts(fields: dict[str, Any], count: int) -> None:
    """levels · n(b − 1)/2 + m at m = 48, n = 32."""
    assert sum(p.numel() for p in BOFT(**fields).build(HostSpec((48, 32))).parameters()) == count


@pytest.mark.parametrize(
    ("inputs", "fields", "block", "levels"),
    [
        (32, {}, 8, 2),
        (12, {}, 6, 2),
        (27, {}, 3, 1),
        (37, {}, 37, 1),
        (32, {"levels": 4}, 4, 4),
        (32, {"block": 16}, 16, 2),
        (32, {"block": 32}, 32, 1),
        (27, {"block": 9}, 9, 1),
    ],
)
def test_defaults_fit(inputs: int, fields: dict[str, Any], block: int, levels: int) -> None:
    spec = HostSpec((5, inputs))
    method = BOFT(**fields).at("", spec)
    assert (method.block, method.levels) == (block, levels) and method.unfit(spec) is None


@torch.no_grad()
def test_same_tensors_same_outputs_as_peft() -> None:
    """PEFT's X is b×b and its Cayley the inverse: our Q is ½(Xᵀ − X). Two levels asked for, and it silently has one."""
    net, x = HOSTS["linear"].net(), HOSTS["linear"].inputs()
    base = net(x)
    deltaw.attach(net, BOFT(block=8, levels=1), targets="layer")
    ours: Any = net.layer.adapters["default"]["weight"]
    other = HOSTS["linear"].net()
    other.load_state_dict({k: v for k, v in net.state_dict().items() if ".adapters." not in k})
    config = peft.BOFTConfig(target_modules=["layer"], boft_block_size=8, boft_n_butterfly_factor=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the extension that is not there
        model = peft.get_peft_model(other, config).eval()
    layer = model.base_model.model.layer
    square, scale = layer.boft_R["default"], layer.boft_s["default"]
    assert square.shape == (1, 4, 8, 8)  # one factor
    square.normal_(std=0.3)
    scale.normal_(mean=1.0, std=0.3)
    row, column = torch.triu_indices(8, 8, 1)
    ours.boft_R.copy_((0.5 * (square.mT - square))[..., row, column])
    ours.boft_s.copy_(scale)
    expected = model(x)
    assert float((expected - base).abs().max()) > 0.1
    torch.testing.assert_close(net(x), expected, rtol=0, atol=1e-5)
    again = skew(-ours.boft_R, 8)  # and back: PEFT takes ½(X − Xᵀ) of what is skew already
    torch.testing.assert_close(again, 0.5 * (square - square.mT), rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"block": 1}, "block=1 is not a whole number of at least 2"),
        ({"levels": 0}, "levels=0 is not a whole number of at least 1"),
        ({"levels": True}, "levels=True is not a whole number"),
        ({"block": 5, "levels": 2}, "block=5 is odd: with several levels a block is made of two halves"),
    ],
)
def test_impossible_fields(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        BOFT(**fields)


@pytest.mark.parametrize(
    ("inputs", "fields", "words"),
    [
        (32, {"block": 6}, "block=6 does not divide its 32 inputs: use 2, 4, 8"),
        (
            32,
            {"block": 8, "levels": 4},
            "needs inputs divisible by 64, and it has 32: at most levels=3 with this block",
        ),
        (48, {"levels": 5}, r"levels=5 needs inputs divisible by 32, and it has 48: use fewer"),
        (1, {}, "a layer with one input has nothing to rotate"),
    ],
)
def test_layers_that_do_not_fit(inputs: int, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(TargetError, match=words):
        deltaw.attach(Net(nn.Linear(inputs, 4)), BOFT(**fields), targets="layer")
