"""OFT: what stays (angles between rows), the two signs of Cayley, COFT's ball, PEFT's tensors."""

import math
from typing import Any

import peft
import pytest
import torch
from contract.hosts import HOSTS, Net
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import deltaw
from deltaw.core.errors import ConfigError, TargetError
from deltaw.core.host import HostSpec, host_of
from deltaw.core.method import from_dict
from deltaw.methods.oft import OFT, OFTAdapter, cayley, skew, turned

SPEC = HostSpec((48, 32))


def stirred(method: OFT, spec: HostSpec = SPEC, size: float = 0.3) -> OFTAdapter:
    adapter: Any = method.build(spec)
    nn.init.normal_(adapter.oft_R, std=size)
    return adapter


def dense(adapter: OFTAdapter) -> Tensor:
    """R as a whole matrix."""
    return torch.block_diag(*(torch.eye(adapter.block, dtype=adapter.oft_R.dtype) + adapter.change()))


@torch.no_grad()
def test_angles_between_rows_stay() -> None:
    adapter = stirred(OFT(block=8)).double()
    weight, r = torch.randn(48, 32, dtype=torch.float64), dense(adapter)
    merged = adapter.merged(weight)
    torch.testing.assert_close(merged, weight @ r.T, rtol=0, atol=1e-12)
    torch.testing.assert_close(r @ r.T, torch.eye(32, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(merged @ merged.T, weight @ weight.T, rtol=0, atol=1e-11)
    assert float((merged - weight).abs().max()) > 0.1


@torch.no_grad()
def test_signs_of_cayley() -> None:
    q = skew(torch.randn(3, 28, dtype=torch.float64), 8)
    eye = torch.eye(8, dtype=torch.float64)
    ours, theirs = eye + cayley(q), (eye - q) @ torch.linalg.inv(eye + q)
    torch.testing.assert_close(ours, (eye + q) @ torch.linalg.inv(eye - q))
    torch.testing.assert_close(theirs, ours.mT)
    torch.testing.assert_close(theirs, eye + cayley(-q))


@pytest.mark.parametrize("terms", [4, 5, 8])
@torch.no_grad()
def test_error_of_the_series(terms: int) -> None:
    """Its spectral norm is ‖Q‖^(terms − 1), and R is off orthogonal by about twice as much."""
    q = skew(torch.randn(1, 28, dtype=torch.float64), 8)[0]
    q = 0.3 * q / torch.linalg.matrix_norm(q, 2)
    error = torch.linalg.matrix_norm(cayley(q) - cayley(q, terms), 2)
    torch.testing.assert_close(error, torch.tensor(0.3 ** (terms - 1), dtype=torch.float64))


def test_nothing_is_subtracted_from_one() -> None:
    """R − I is formed as such: exactly 0 at the start, and exact where it is far below the rounding of 1."""
    adapter: Any = OFT(block=8).build(SPEC)
    assert torch.equal(adapter.change(), torch.zeros(4, 8, 8))
    nn.init.constant_(adapter.oft_R, 1e-12)
    torch.testing.assert_close(adapter.change(), 2 * skew(adapter.oft_R, 8), rtol=1e-6, atol=1e-20)


@pytest.mark.parametrize(("method", "count"), [(OFT(block=8), 112), (OFT(block=8, share=True), 28), (OFT(), 496)])
def test_counts(method: OFT, count: int) -> None:
    """n(b − 1)/2 at n = 32; the default block is 32."""
    assert sum(p.numel() for p in method.build(SPEC).parameters()) == count


@pytest.mark.parametrize(("inputs", "block"), [(768, 32), (100, 25), (37, 37), (74, 2), (2, 2)])
def test_default_block_fits(inputs: int, block: int) -> None:
    assert OFT().at("", HostSpec((5, inputs))).block == block


@pytest.mark.parametrize("share", [False, True])
@torch.no_grad()
def test_coft_stays_in_its_ball(share: bool) -> None:
    method = OFT(block=8, coft=True, eps=0.5, share=share)
    adapter, free = stirred(method, size=2.0), stirred(OFT(block=8, share=share))
    radius = 0.5 / math.sqrt(1 if share else 4)
    eye = torch.eye(8)

    def norms(adapter: OFTAdapter) -> Tensor:  # back from R to Q: Q = (R − I)(R + I)⁻¹
        change = adapter.change()
        return (change @ torch.linalg.inv(change + 2 * eye)).flatten(1).norm(dim=1)

    torch.testing.assert_close(norms(adapter), torch.full((4,), radius))
    nn.init.normal_(adapter.oft_R, std=1e-3)  # inside the ball nothing is touched
    free.oft_R.copy_(adapter.oft_R)
    assert torch.equal(adapter.change(), free.change())


def test_coft_trains_and_writes_nothing_while_computing() -> None:
    net = HOSTS["linear"].net()
    x, y = HOSTS["linear"].inputs(), torch.randn(2, 5, 48)
    deltaw.attach(net, OFT(block=8, coft=True, eps=0.2), targets="layer")
    (raw,) = (p for p in net.parameters() if p.requires_grad)
    optimizer, losses = torch.optim.SGD([raw], lr=1.0), []
    for _ in range(60):
        optimizer.zero_grad()
        before = raw.detach().clone()
        loss = (net(x) - y).square().mean()
        loss.backward()
        assert torch.equal(raw, before)
        losses.append(float(loss.detach()))
        optimizer.step()
    assert losses[-1] < losses[0] and losses[-1] <= min(losses) + 1e-3
    assert float(raw.detach().norm(dim=1).max()) * math.sqrt(2) > 0.2 / math.sqrt(4)  # the bound was really met


def test_gradient_is_right() -> None:
    layer = nn.Linear(8, 3).double()
    adapter, host = stirred(OFT(block=4), HostSpec((3, 8))).double(), host_of(layer)
    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)

    def branch(x: Tensor, raw: Tensor) -> Tensor:
        return torch.func.functional_call(adapter, {"oft_R": raw}, (host, lambda x: 0 * x[..., :3], None, x))

    assert torch.autograd.gradcheck(branch, (x, adapter.oft_R))


class Largest(TorchDispatchMode):
    """The size of the largest tensor that anything makes."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        views = isinstance(out, Tensor) and out._base is not None
        if isinstance(out, Tensor) and not views and "detach" not in str(func) and "aten.t." not in str(func):
            self.numel = max(self.numel, out.numel())
        return out


@pytest.mark.parametrize("strength", [None, 0.5])
@torch.no_grad()
def test_no_product_of_the_weights_size(strength: float | None) -> None:
    layer = nn.Linear(256, 512)
    adapter, host = stirred(OFT(block=16), HostSpec((512, 256))), host_of(layer)
    factor = None if strength is None else torch.tensor(strength)
    with Largest() as seen:
        adapter(host, layer.forward, factor, torch.randn(3, 256))
    assert 3 * 512 <= seen.numel <= 256 * 16


def theirs(net: Net, **options: Any) -> Any:
    torch.manual_seed(3)
    model = peft.get_peft_model(net, peft.OFTConfig(target_modules=["layer"], **options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2)
    return model


OPTIONS = {
    "series": ({"use_cayley_neumann": True}, OFT(block=8, terms=5), 1),
    "series-of-4": ({"use_cayley_neumann": True, "num_cayley_neumann_terms": 3}, OFT(block=8, terms=4), 1),
    "exact": ({"use_cayley_neumann": False}, OFT(block=8), -1),
    "coft": ({"use_cayley_neumann": False, "coft": True, "eps": 0.4}, OFT(block=8, coft=True, eps=0.4), -1),
    "share": ({"use_cayley_neumann": False, "block_share": True}, OFT(block=8, share=True), -1),
    "share-coft": (
        {"block_share": True, "coft": True, "eps": 0.4}, OFT(block=8, share=True, coft=True, eps=0.4, terms=5), 1
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", OPTIONS)
@torch.no_grad()
def test_same_tensors_same_outputs_as_peft(case: str) -> None:
    """Of the exact form PEFT's Q is ours times −1; of the series the very same tensors."""
    options, method, sign = OPTIONS[case]
    net, x = HOSTS["linear"].net(), HOSTS["linear"].inputs()
    base = net(x)
    deltaw.attach(net, method, targets="layer")
    ours: Any = net.layer.adapters["default"]["weight"]
    other = HOSTS["linear"].net()
    other.load_state_dict({k: v for k, v in net.state_dict().items() if ".adapters." not in k})
    model = theirs(other, oft_block_size=8, **options)
    tensor = model.base_model.model.layer.oft_R["default"].weight
    assert tensor.shape == ours.oft_R.shape
    ours.oft_R.copy_(sign * tensor)
    expected = model(x)
    assert float((expected - base).abs().max()) > 0.1
    torch.testing.assert_close(net(x), expected, rtol=0, atol=1e-5)
    if case == "exact":  # the sign is a choice that shows
        ours.oft_R.copy_(tensor)
        assert float((net(x) - expected).abs().max()) > 0.1


@torch.no_grad()
def test_convolutions_are_what_peft_merges() -> None:
    """PEFT's live forward rotates patches and adds their overlaps up, which no weight computes: not followed."""
    net, x = Net(nn.Conv2d(4, 6, 3)), torch.randn(2, 4, 7, 7)
    deltaw.attach(net, OFT(block=6, terms=5), targets="layer")
    ours: Any = net.layer.adapters["default"]["weight"]
    other = Net(nn.Conv2d(4, 6, 3))
    other.load_state_dict({k: v for k, v in net.state_dict().items() if ".adapters." not in k})
    model = theirs(other, oft_block_size=6)
    ours.oft_R.copy_(model.base_model.model.layer.oft_R["default"].weight)
    assert float((net(x) - model(x)).abs().max()) > 0.1
    merged = model.merge_and_unload()
    torch.testing.assert_close(net(x), merged(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"block": 1}, "block=1 is not a whole number of at least 2"),
        ({"block": 8.0}, r"block=8\.0 is not a whole number"),
        ({"terms": 3}, "terms=3 is not a whole number of at least 4"),
        ({"eps": 0}, "eps=0 is not a positive number"),
        ({"eps": True}, "eps=True is not a positive number"),
        ({"coft": "yes"}, "coft='yes' is neither true nor false"),
        ({"share": 1}, "share=1 is neither true nor false"),
    ],
)
def test_impossible_fields(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        OFT(**fields)


@pytest.mark.parametrize(
    ("layer", "block", "words"),
    [
        (nn.Linear(32, 48), 7, r"block=7 does not divide its 32 inputs: use 2, 4, 8, or leave it out"),
        (nn.Linear(32, 48), 64, r"block=64 does not divide its 32 inputs"),
        (nn.Linear(1, 48), None, "a layer with one input has nothing to rotate"),
        (nn.Embedding(32, 8), None, "its inputs are ids"),
    ],
)
def test_layers_that_do_not_fit(layer: nn.Module, block: int | None, words: str) -> None:
    with pytest.raises(TargetError, match=words):
        deltaw.attach(Net(layer), OFT(block=block), targets="layer")


def test_record_of_a_resolved_method() -> None:
    method = OFT(coft=True).at("", SPEC)
    assert method.to_dict() == {"method": "oft", "version": 1, "block": 32, "coft": True}
    assert from_dict(method.to_dict()) == method


def test_blocks_turn_their_own_inputs() -> None:
    x, blocks = torch.randn(2, 3, 6), torch.randn(3, 2, 2)
    torch.testing.assert_close(turned(x, blocks), x @ torch.block_diag(*blocks))
