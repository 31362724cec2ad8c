"""IA3: rows and bias, or columns; the merge reaches the bias; PEFT's tensors."""

from typing import Any

import peft
import pytest
import torch
from contract import suite
from contract.hosts import HOSTS, Net
from core import tiny
from torch import nn

import deltaw
from deltaw.core.errors import ConfigError, MergeError, TargetError
from deltaw.core.host import HostSpec
from deltaw.core.targets import plan
from deltaw.methods.full import Full
from deltaw.methods.ia3 import IA3, IA3Adapter

INPUTS = [
    "linear", "linear-no-bias", "linear-one-output", "conv1d-of-gpt2", "conv1d", "conv2d-circular", "conv2d-grouped",
    "conv2d-depthwise",
]  # fmt: skip


@pytest.mark.parametrize("check", [*suite.EVERY_CONFIG, *suite.ONE_CONFIG], ids=lambda check: check.__name__)
@pytest.mark.parametrize("host", INPUTS)
def test_scaled_inputs_pass_the_suite(host: str, check: suite.Check) -> None:
    check(IA3(side="input"), HOSTS[host])


def scales(net: Any) -> nn.Parameter:
    return net.layer.adapters["default"]["weight"].ia3_l


def stirred(net: Any, method: IA3) -> Any:
    deltaw.attach(net, method, targets="layer")
    with torch.no_grad():
        scales(net).normal_(mean=1.0)
    return net


@torch.no_grad()
def test_outputs_are_rows_and_bias() -> None:
    net = stirred(HOSTS["linear"].net(), IA3())
    weight, bias, l = net.layer.weight.clone(), net.layer.bias.clone(), scales(net).detach()
    assert l.shape == (48, 1)
    report = deltaw.merge(net)
    assert (report.weights, report.changed) == (2, 2)
    assert torch.equal(net.layer.weight, l * weight) and torch.equal(net.layer.bias, l.flatten() * bias)


@torch.no_grad()
def test_inputs_are_columns_and_no_bias() -> None:
    net = stirred(HOSTS["linear"].net(), IA3(side="input"))
    weight, bias, l = net.layer.weight.clone(), net.layer.bias.clone(), scales(net).detach()
    assert l.shape == (1, 32)
    assert deltaw.merge(net).weights == 1
    assert torch.equal(net.layer.weight, l * weight) and torch.equal(net.layer.bias, bias)


@torch.no_grad()
def test_a_scale_of_zero_can_be_taken_back() -> None:
    """Division could not: the base is kept."""
    net, x = stirred(HOSTS["linear"].net(), IA3()), HOSTS["linear"].inputs()
    scales(net)[:7] = 0
    bits = {name: value.clone() for name, value in net.state_dict().items()}
    live = net(x)
    deltaw.merge(net, keep_base=True)
    assert torch.equal(net.layer.bias[:7], torch.zeros(7)) and torch.equal(net(x)[..., :7], torch.zeros(2, 5, 7))
    deltaw.unmerge(net)
    assert all(torch.equal(value, bits[name]) for name, value in net.state_dict().items())
    assert torch.equal(net(x), live)


@torch.no_grad()
def test_a_trained_copy_of_the_bias_beside_it() -> None:
    net, x = stirred(HOSTS["linear"].net(), IA3()), HOSTS["linear"].inputs()
    deltaw.attach(net, Full(), targets="layer", name="copy")
    net.layer.adapters["copy"]["bias"].copy.normal_()
    with deltaw.use(net, {"default": 1.0, "copy": 1.0}):
        both = net(x)
    with pytest.raises(MergeError, match="the change of 'copy' depends on this weight"):
        deltaw.merge(net)
    deltaw.merge(net, keep_base=True)
    deltaw.merge(net, "copy", keep_base=True)
    torch.testing.assert_close(net(x), both, rtol=0, atol=1e-5)


@torch.no_grad()
def test_two_parts_of_one_adapter_on_one_bias() -> None:
    net, x = Net(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 5))), torch.randn(3, 4)
    deltaw.attach(net, IA3(), targets="layer.0")
    deltaw.attach(net, deltaw.LoRA(rank=2, bias="all"), targets="layer.1")
    for parameter in net.parameters():
        if parameter.requires_grad:
            parameter.normal_()
    live = net.layer(x)
    with pytest.raises(MergeError, match=r"layer\.0\.bias: two parts of this adapter change it: merge with keep_base"):
        deltaw.merge(net)
    deltaw.merge(net, keep_base=True)
    torch.testing.assert_close(net.layer(x), live, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_inner_outputs_are_the_next_layers_inputs() -> None:
    """In a gated FFN, act(gate)·(l ⊙ up) into down is the same as down with scaled inputs."""
    model, other, ids = tiny.model("llama"), tiny.model("llama"), tiny.ids()
    base = model(ids).logits
    deltaw.attach(model, IA3(), targets="up_proj")
    deltaw.attach(other, IA3(feedforward=("down_proj",)), targets="down_proj")
    for one, two in zip(_all(model), _all(other), strict=True):
        one.ia3_l.normal_(mean=1.0)
        two.ia3_l.copy_(one.ia3_l.T)
    assert float((model(ids).logits - base).abs().max()) > 1e-3
    torch.testing.assert_close(model(ids).logits, other(ids).logits, rtol=0, atol=1e-5)


def _all(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, IA3Adapter)]


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
@torch.no_grad()
def test_same_tensors_same_outputs_as_peft(family: str) -> None:
    """Biases of BERT and GPT-2 included, and again when both are merged."""
    model, other, ids = tiny.model(family), tiny.model(family), tiny.ids()
    for one, two in zip(model.parameters(), other.parameters(), strict=True):  # biases start at zero there
        one.add_(0.1 * torch.randn_like(one))
        two.copy_(one)
    outputs, inputs = {
        "llama": (["k_proj", "v_proj"], ["down_proj"]),
        "gpt2": (["c_attn"], ["mlp.c_proj"]),
        "bert": (["key", "value"], ["output.dense"]),
    }[family]
    base = model(ids).logits
    deltaw.attach(model, IA3(feedforward=tuple(inputs)), targets=[*outputs, *inputs])
    config = peft.IA3Config(
        target_modules=[*outputs, *inputs], feedforward_modules=inputs, fan_in_fan_out=family == "gpt2"
    )
    peer = peft.get_peft_model(other, config).eval()
    for site, adapter in deltaw.core.attach.adapters(model).items():
        theirs = peer.base_model.model.get_submodule(site.path).ia3_l["default"]
        assert theirs.shape == adapter.ia3_l.shape
        theirs.normal_(mean=1.0, std=0.3)
        adapter.ia3_l.copy_(theirs)
    expected = peer(input_ids=ids).logits
    assert float((expected - base).abs().max()) > 1e-2
    torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-5)
    deltaw.merge(model)
    torch.testing.assert_close(model(ids).logits, peer.merge_and_unload()(input_ids=ids).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("groups", [1, 2])
@torch.no_grad()
def test_convolutions_as_peft_has_them(side: Any, groups: int) -> None:
    net, x = Net(nn.Conv2d(6, 10, 3, groups=groups)), torch.randn(2, 6, 7, 7)
    other = Net(nn.Conv2d(6, 10, 3, groups=groups))
    other.load_state_dict(net.state_dict())
    stirred(net, IA3(side=side))
    config = peft.IA3Config(target_modules=["layer"], feedforward_modules=["layer"] if side == "input" else [])
    peer = peft.get_peft_model(other, config).eval()
    theirs = peer.base_model.model.layer.ia3_l["default"]
    theirs.copy_(scales(net).view(theirs.shape))  # [1, C, 1, 1] there, on both sides
    torch.testing.assert_close(net(x), peer(x), rtol=0, atol=1e-5)
    merged = peer.merge_and_unload().layer
    deltaw.merge(net)
    torch.testing.assert_close(net.layer.weight, merged.weight)
    torch.testing.assert_close(net.layer.bias, merged.bias)


def test_counts() -> None:
    spec = HostSpec((48, 32))
    for side, count in (("output", 48), ("input", 32)):
        method: Any = IA3(side=side)  # type: ignore[arg-type]
        assert sum(p.numel() for p in method.build(spec).parameters()) == count


def test_feedforward_names_the_scaled_inputs() -> None:
    planned = plan(tiny.model("llama"), IA3(feedforward=("mlp.down_proj",)), ["k_proj", "v_proj", "down_proj"])
    sides = {target.site.path.rpartition(".")[2]: target.method.side for target in planned.targets}  # type: ignore[attr-defined]
    assert sides == {"k_proj": "output", "v_proj": "output", "down_proj": "input"}
    assert planned.trainable == 2 * (16 + 16 + 48)  # d_k + d_v + d_ff per layer
    assert all(target.method.feedforward == () for target in planned.targets)  # type: ignore[attr-defined]


def test_patterns_that_match_nothing() -> None:
    with pytest.raises(
        TargetError, match=r"feedforward 'down_prj' matches no adapted module; did you mean 'down_proj'"
    ):
        deltaw.attach(tiny.model("llama"), IA3(feedforward=("down_prj",)), targets=["k_proj", "down_proj"])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"side": "both"}, "side='both' is neither output nor input"),
        ({"feedforward": "down_proj"}, r"feedforward='down_proj' must be a list of names: \['down_proj'\]"),
        ({"feedforward": ("(",)}, "feedforward: .* is not a valid regular expression"),
    ],
)
def test_impossible_fields(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        IA3(**fields)


def test_ids_cannot_be_scaled() -> None:
    with pytest.raises(TargetError, match="its inputs are ids, there is nothing to scale"):
        deltaw.attach(Net(nn.Embedding(8, 4)), IA3(side="input"), targets="layer")
