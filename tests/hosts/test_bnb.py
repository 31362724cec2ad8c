"""bitsandbytes' layers: their values are those of an independent NF4, nothing on them rewrites weights, merges are honest.

Every method on them is in the contract suite.
"""

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
import transformers
from bitsandbytes import functional
from nf4_reference import code_book, dynamic_map, round_trip, scales
from torch import Tensor, nn

import deltaw
from deltaw.core.base import identify, parameters
from deltaw.core.errors import MergeError, TargetError
from deltaw.core.host import host_of
from deltaw.core.merge import current

VALUES = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


def nf4(double: bool = False, n: int = 64, m: int = 48, bias: bool = True) -> nn.Module:
    return bitsandbytes.nn.LinearNF4(n, m, bias, compress_statistics=double).to("cpu")


def int8() -> nn.Module:
    return bitsandbytes.nn.Linear8bitLt(64, 48, has_fp16_weights=False).to("cpu")


def made_from(weight: Tensor, double: bool) -> nn.Module:
    layer = bitsandbytes.nn.LinearNF4(weight.shape[1], weight.shape[0], bias=False, compress_statistics=double)
    layer.weight.data = weight.clone()
    return layer.to("cpu")


def tuned(layer: nn.Module, size: float = 0.1) -> nn.Sequential:
    net = nn.Sequential(layer)
    deltaw.attach(net, deltaw.LoRA(rank=4), targets="0")
    for parameter in net.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=size)
    return net


def test_the_code_book_is_the_published_one() -> None:
    codes = code_book()
    torch.testing.assert_close(codes, torch.tensor(VALUES, dtype=torch.float64), rtol=0, atol=3e-7)
    assert [int((codes < 0).sum()), int((codes == 0).sum()), int((codes > 0).sum())] == [7, 1, 8]
    block = codes.repeat(4).view(1, 64)
    assert torch.equal(round_trip(3 * block), (3 * block).float())
    torch.testing.assert_close(dynamic_map().float(), functional.create_dynamic_map(), rtol=0, atol=1e-7)


def test_error_on_normal_values_is_the_published_one() -> None:
    w = torch.randn(2**15, 64)
    error = round_trip(w) - w
    assert float(error.square().mean()) == pytest.approx(0.00845, rel=0.01)
    assert float(error.norm() / w.norm()) == pytest.approx(0.0919, rel=0.01)
    assert float(error.abs().mean()) == pytest.approx(0.0727, rel=0.01)
    step = w.abs().amax(1, keepdim=True) / 7  # evenly spaced codes, for comparison
    even = (w / step).round() * step - w
    assert float(even.square().mean()) == pytest.approx(0.01159, rel=0.01)
    assert float(even.abs().mean()) == pytest.approx(0.0913, rel=0.01)


def assert_is_the_reference(found: Tensor, w: Tensor, double: bool) -> None:
    """Equal; of doubly quantised scales one in a hundred may be the next code: bitsandbytes takes the nearest one from
    a table, which is off within 2e-5 of the middle between two."""
    expected, step = round_trip(w, double), 0.015 * float((scales(w) - scales(w).mean()).abs().max())
    off = ((found - expected).abs() > 1e-6 + 1e-6 * expected.abs()).view(-1, 64).any(1)  # [blocks]
    assert float(off.float().mean()) <= (0.01 if double else 0)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=step if double else 1e-6)


@pytest.mark.parametrize("double", [False, True])
def test_decoded_values_equal_the_reference(double: bool) -> None:
    w, other = torch.randn(96, 320), torch.randn(96, 320)
    layer = made_from(w, double)
    host = host_of(layer)
    assert host.quantized == ("nf4-double" if double else "nf4")
    assert_is_the_reference(host.weight, w, double)
    assert_is_the_reference(host.rounded(other), other, double)
    rounded = host.rounded(other)
    host.write(other)
    assert torch.equal(host.weight, rounded)
    x = torch.randn(3, 320)
    torch.testing.assert_close(layer(x), host.op(x, host.weight))


def test_int8_values_are_rows_in_127_steps() -> None:
    w, layer = torch.randn(48, 64), int8()
    host = host_of(layer)
    host.write(w)
    largest = w.abs().amax(1, keepdim=True)
    expected = (w / largest * 127).round() * largest / 127
    apart = (host.weight - expected).abs() / largest
    assert float(apart.max()) < 1.01 / 127 and float((apart > 1e-3).float().mean()) < 0.05  # it rounds to fp16 first
    x = torch.randn(3, 64)
    torch.testing.assert_close(layer(x), host.op(x, host.weight) + layer.bias)
    host.write(2 * w)  # after a forward the scales lie elsewhere
    torch.testing.assert_close(layer(x), host.op(x, host.weight) + layer.bias)
    assert float(host.weight.abs().max()) == pytest.approx(2 * float(w.abs().max()), rel=1e-3)


def test_a_bf16_base_is_decoded_in_fp32() -> None:
    w = torch.randn(48, 64).bfloat16()
    host = host_of(made_from(w, double=False))
    assert host.weight.dtype == torch.float32
    torch.testing.assert_close(host.weight, round_trip(w.float()), rtol=1e-6, atol=1e-6)
    x = torch.randn(3, 64).bfloat16()
    torch.testing.assert_close(host.module(x), host.op(x, host.weight))


@pytest.mark.parametrize("double", [False, True])
def test_a_layer_packed_for_the_cpu_is_read_and_unpacked(double: bool) -> None:
    """bitsandbytes lays a weight out anew at its first evaluation; then no gradient passes. Attaching undoes it."""
    layer = nf4(double, 128, 64)
    host, before = host_of(layer), host_of(layer).weight
    layer.weight.data, layer.weight.quant_state = functional._convert_weight_packed_for_cpu(
        layer.weight.data, layer.weight.quant_state
    )
    layer.support_avx512bf16_for_cpu = True
    packed = host.weight
    assert tuple(layer.weight.shape) == (64, 64) and host.quantized == ("nf4-double" if double else "nf4")
    torch.testing.assert_close(packed, before, rtol=2**-8, atol=0)  # scales in bf16
    net, x = nn.Sequential(layer), torch.randn(5, 128)
    deltaw.attach(net, deltaw.LoRA(rank=2), targets="0")
    assert tuple(layer.weight.shape) == (64 * 128 // 2, 1) and torch.equal(host_of(layer).weight, packed)
    for mode in (False, True):
        torch.testing.assert_close(net.train(mode)(x), nn.functional.linear(x, packed, layer.bias))
    x.requires_grad_(True)
    net(x).sum().backward()
    torch.testing.assert_close(x.grad, packed.sum(0).expand_as(x))
    deltaw.detach(net)
    assert layer.support_avx512bf16_for_cpu is True


def test_every_layer_of_the_model_is_kept_steady() -> None:
    """A layer without an adapter between two that have one must let gradients through as well."""
    net = nn.Sequential(nf4(n=64, m=64), nf4(n=64, m=64), nf4(n=64, m=64))
    for layer in net:
        layer.support_avx512bf16_for_cpu = True
    deltaw.attach(net, deltaw.LoRA(rank=2), targets=["0", "2"])
    with torch.no_grad():
        net.eval()(torch.randn(2, 64))
    net.train()(torch.randn(2, 64)).square().sum().backward()
    assert all(bool(p.grad.any()) for n, p in net.named_parameters() if n.endswith("lora_B"))
    deltaw.detach(net)
    assert all(layer.support_avx512bf16_for_cpu for layer in net)


@pytest.mark.parametrize("make", [nf4, lambda: nf4(True), int8])
def test_merge_writes_what_its_report_says(make: object) -> None:
    net = tuned(make())
    host = host_of(net[0])
    before = host.weight.clone()
    change = net[0].adapters["default"]["weight"].merged(before) - before
    report = deltaw.merge(net, keep_base=True)
    torch.testing.assert_close(current(host), host.rounded(before + change.detach()))
    assert report.change == pytest.approx(float((current(host) - before).norm() / before.norm()), rel=1e-5)
    other = copy.deepcopy(net)
    deltaw.unmerge(other)
    assert torch.equal(host_of(other[0]).weight, before) and torch.equal(other[0].weight.data, host.parameter.data)
    assert not torch.equal(current(host), before)


@pytest.mark.parametrize(("make", "size"), [(nf4, 0.0), (lambda: nf4(True, 640), 0.0), (int8, 0.0), (int8, 1e-3)])
def test_a_change_of_nothing_is_refused(make: object, size: float) -> None:
    """Double quantisation would round its scales anew; in 8 bits a small change is none."""
    net = tuned(make(), size)
    before = net[0].weight.clone()
    with pytest.raises(MergeError, match="would change no weight at all"):
        deltaw.merge(net)
    assert torch.equal(net[0].weight, before)


def test_not_finite_in_eight_bits() -> None:
    net = tuned(int8(), 200.0)
    with pytest.raises(MergeError, match="not finite in int8"):
        deltaw.merge(net)


def test_biases_train_and_weights_cannot() -> None:
    net = nn.Sequential(nf4())
    deltaw.attach(net, deltaw.LoRA(rank=2, bias="lora_only"), targets="0")
    x = torch.randn(2, 5, 64, requires_grad=True)
    (3 * net(x)).sum().backward()
    bias = net[0].adapters["default"]["bias"].copy
    torch.testing.assert_close(bias.grad, torch.full((48,), 30.0))
    deltaw.detach(net)
    for method, targets in ((deltaw.Full(), "0"), (deltaw.LoRA(modules_to_save=("0",)), "1")):
        with pytest.raises(
            TargetError, match=r"its weight is quantised \(torch.uint8\), a trained copy needs the values"
        ):
            deltaw.attach(nn.Sequential(nf4(), nn.Linear(48, 2)), method, targets=targets)


def test_layers_that_are_not_quantised_yet_are_refused() -> None:
    layers = {
        "not quantised yet": bitsandbytes.nn.LinearNF4(64, 48),
        "has_fp16_weights=True": bitsandbytes.nn.Linear8bitLt(64, 48, has_fp16_weights=True),
    }
    for reason, layer in layers.items():
        with pytest.raises(TargetError, match=reason):
            deltaw.attach(nn.Sequential(layer), deltaw.LoRA(rank=2), targets="0")


def test_a_subclass_with_another_forward_is_refused() -> None:
    class Doubled(bitsandbytes.nn.LinearNF4):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    layer = Doubled(64, 48).to("cpu")
    with pytest.raises(TargetError, match="computes something else"):
        deltaw.attach(nn.Sequential(layer), deltaw.LoRA(rank=2), targets="0")


def test_parameters_count_as_values_and_one_base_is_one_identity() -> None:
    plain = nn.Sequential(nn.Embedding(9, 64), nn.Linear(64, 48), nn.LayerNorm(48))
    coarse = nn.Sequential(plain[0], made_from(plain[1].weight.data, False), plain[2])
    coarse[1].bias = plain[1].bias
    assert parameters(coarse) == parameters(plain)
    assert deltaw.attach(coarse, deltaw.LoRA(rank=2), targets="1").base_parameters == parameters(plain)
    one, two = identify(coarse), identify(plain)
    assert (one.quantized, two.quantized) == ("nf4", None) and one.comparable(two)
    assert one.difference(two) is None and two.difference(one) is None
    assert type(one).from_dict(one.to_dict()) == one and "quantized" not in two.to_dict()
    with torch.no_grad():
        plain[0].weight.add_(1.0)
    assert "the values of 0.weight do not" in str(one.difference(identify(plain)))


def test_hosts_need_no_bitsandbytes_until_there_is_a_layer() -> None:
    code = (
        "import sys; sys.modules['bitsandbytes'] = None\n"
        "import deltaw, torch; net = torch.nn.Sequential(torch.nn.Linear(4, 4))\n"
        "deltaw.attach(net, deltaw.LoRA(rank=2), targets='0'); net(torch.ones(1, 4))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("options", [{"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, {"load_in_8bit": True}])
def test_a_quantised_conv1d_is_a_linear_layer_with_the_transpose(options: dict[str, Any], tmp_path: Path) -> None:
    """transformers quantises GPT-2's Conv1D to a layer that holds [out, in]: adapters go to and fro between the two."""
    config = transformers.GPT2Config(vocab_size=64, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    plain = transformers.GPT2LMHeadModel(config).eval()
    plain.save_pretrained(tmp_path / "base")
    kind = transformers.BitsAndBytesConfig(**options)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", dtype=torch.float32, quantization_config=kind, device_map={"": "cpu"}
    ).eval()
    ids = torch.randint(0, 64, (2, 9))
    assert float((model(ids).logits - plain(ids).logits).abs().max()) < 0.3 * float(plain(ids).logits.abs().max())
    deltaw.attach(model, deltaw.LoRA(rank=4, alpha=9.0), targets="all-linear")
    for path, module in plain.named_modules():
        if isinstance(module, transformers.pytorch_utils.Conv1D):
            ours, theirs = host_of(model.get_submodule(path)).weight, host_of(module).weight
            assert ours.shape == theirs.shape and float((ours - theirs).norm() / theirs.norm()) < 0.15
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)
    deltaw.save(model, tmp_path / "adapter")
    assert deltaw.load(plain, tmp_path / "adapter").base == "match"
    with torch.no_grad():
        decoded = copy.deepcopy(plain)
        for path, module in model.named_modules():
            if (host := host_of(module)) is not None and host.quantized:
                host_of(decoded.get_submodule(path)).write(host.weight)
        near = {"rtol": 1e-3, "atol": 1e-4} if "load_in_4bit" in options else {"rtol": 0.05, "atol": 0.03}
        torch.testing.assert_close(decoded(ids).logits, model(ids).logits, **near)  # int8 rounds activations too
