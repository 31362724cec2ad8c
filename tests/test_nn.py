"""deltaw.nn, and the five notes it grew from: their snippets in corrected form, and each original's fault on show.

T-numbers are those of the table of exact values the project was specified with. The original snippets are retyped as
short as the fault allows.
"""

import copy
import dataclasses
import io
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import deltaw
from deltaw.core.errors import DeltawError
from deltaw.core.host import HostSpec
from deltaw.core.state import delta
from deltaw.methods.lora import LoRA
from deltaw.nn import LoRAAttention, LoRALinear


def trainable(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def factors(layer: nn.Module) -> tuple[nn.Parameter, nn.Parameter]:
    adapter = layer.adapters["default"]["weight"]
    return adapter.lora_A, adapter.lora_B


def stir(module: nn.Module) -> None:
    for parameter in module.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)


# ---- the layers


def test_a_linear_layer_like_any_other() -> None:
    layer, x = LoRALinear(32, 48, rank=4, alpha=8), torch.randn(5, 32)
    assert isinstance(layer, LoRALinear) and isinstance(layer, nn.Linear)
    assert [name for name, p in layer.named_parameters() if not p.requires_grad] == ["weight", "bias"]
    stir(layer)
    a, b = factors(layer)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias) + 8 / 4 * (x @ a.T @ b.T))
    tuned = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), tuned)
    again = pickle.loads(pickle.dumps(layer))
    assert isinstance(again, LoRALinear) and torch.equal(again(x), tuned)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), tuned)
    assert LoRALinear(32, 48, 4, 8, bias=False).bias is None
    assert LoRALinear(32, 48, 4, 8, dropout=0.5, rslora=True).adapters["default"]["weight"].scale == 4.0
    deltaw.merge(layer)
    assert type(layer) is LoRALinear and list(layer.state_dict()) == ["weight", "bias"]
    torch.testing.assert_close(layer(x), tuned)


@pytest.mark.parametrize("bias", [True, False])
def test_around_a_given_layer(bias: bool) -> None:
    linear, x = nn.Linear(32, 48, bias=bias).eval(), torch.randn(5, 32)
    layer = LoRALinear.from_linear(linear, rank=4, alpha=8)
    assert layer.weight is linear.weight and layer.bias is linear.bias and not linear.weight.requires_grad
    assert torch.equal(layer(x), linear(x)) and not layer.training
    assert (layer.in_features, layer.out_features) == (32, 48)
    stir(layer)
    assert not torch.equal(layer(x), linear(x))  # the given layer stays the base
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), layer(x))


def test_layers_in_a_model_are_adapters_like_all_others() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = LoRALinear(6, 5, rank=2, alpha=4), nn.Linear(5, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x))

    net, x = Net(), torch.randn(3, 6)
    stir(net.first)
    state, tuned = deltaw.extract(net), net(x)
    assert [site.path for site in state.methods] == ["first"]
    with deltaw.use(net, {}):
        assert not torch.equal(net(x), tuned)
    deltaw.attach(net, LoRA(rank=2), targets="second", name="more")
    assert trainable(net) == 2 * (5 + 4)
    deltaw.detach(net, "more")
    deltaw.detach(net)
    assert type(net.first) is LoRALinear and all(p.requires_grad for p in net.parameters())
    deltaw.insert(net, state)
    assert torch.equal(net(x), tuned)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", [1, 4])
def test_attention_is_attention(heads: int, causal: bool) -> None:
    """Against torch's own, with the tuned projections written out; scores are divided by √head_dim."""
    layer, x = LoRAAttention(24, rank=3, num_heads=heads, targets="qkvo", alpha=6, causal=causal), torch.randn(2, 7, 24)
    stir(layer)
    merged = copy.deepcopy(layer)
    deltaw.merge(merged)
    reference = nn.MultiheadAttention(24, heads, batch_first=True)
    with torch.no_grad():
        reference.in_proj_weight.copy_(torch.cat([getattr(merged, n).weight for n in "qkv"]))
        reference.in_proj_bias.copy_(torch.cat([getattr(merged, n).bias for n in "qkv"]))
        reference.out_proj.load_state_dict(merged.o.state_dict())
        mask = nn.Transformer.generate_square_subsequent_mask(7) if causal else None
        wanted = reference(x, x, x, attn_mask=mask, is_causal=causal, need_weights=False)[0]
    torch.testing.assert_close(layer(x), wanted, atol=1e-5, rtol=1e-4)
    again = pickle.loads(pickle.dumps(copy.deepcopy(layer)))
    assert isinstance(again, LoRAAttention) and torch.equal(again(x), layer(x))


def test_attention_over_another_sequence() -> None:
    layer, q, kv = LoRAAttention(8, rank=2, num_heads=2), torch.randn(1, 3, 8), torch.randn(1, 5, 8)
    assert layer(q, kv).shape == (1, 3, 8)
    assert torch.equal(layer(q, kv), layer(q, kv, kv)) and not torch.equal(layer(q, kv), layer(q, kv, 2 * kv))


@pytest.mark.parametrize("arguments", [{"targets": "qx"}, {"targets": ""}, {"num_heads": 5}, {"rank": 0}])
def test_attention_that_cannot_be(arguments: dict[str, Any]) -> None:
    with pytest.raises(DeltawError):
        LoRAAttention(**{"embed_dim": 24, "rank": 2, **arguments})


# ---- the numbers


def test_t1_count() -> None:
    for m, n, r in ((48, 32, 4), (12, 7, 1), (5, 9, 5)):
        assert trainable(LoRALinear(n, m, rank=r, alpha=1)) == r * (m + n)
    assert trainable(LoRALinear(32, 48, rank=4, alpha=8)) == 320


def test_t5_count_of_the_example() -> None:
    layer = LoRALinear(1024, 1024, rank=8, alpha=16)
    assert trainable(layer) == 16_384 and layer.adapters["default"]["weight"].scale == 2.0


@pytest.mark.parametrize(
    ("m", "n", "r"), [(768, 768, 384), (1024, 1024, 512), (1024, 3072, 768), (4096, 4096, 2048), (12288, 12288, 6144)]
)
def test_t6_break_even_rank(m: int, n: int, r: int) -> None:
    """At r = mn/(m+n) the factors hold as many numbers as the matrix."""
    spec = HostSpec((m, n))
    with torch.device("meta"):
        counts = [trainable(LoRA(rank=rank).build(spec)) for rank in (r, r + 1)]
        assert counts[0] == spec.numel < counts[1]
        wide = HostSpec((4096, 11008))  # not a whole number: 2985.22
        assert trainable(LoRA(rank=2985).build(wide)) < wide.numel < trainable(LoRA(rank=2986).build(wide))


def test_t7_scale() -> None:
    pairs = {(8, 16): 2, (16, 32): 2, (32, 64): 2, (16, 16): 1, (16, 64): 4, (4, 32): 8, (64, 16): 0.25, (8, 8): 1}
    for (rank, alpha), scale in pairs.items():
        assert LoRA(rank=rank, alpha=alpha).scale == scale
        assert LoRA(rank=rank, alpha=alpha * math.sqrt(rank)).scale == pytest.approx(
            LoRA(rank=rank, alpha=alpha, rslora=True).scale
        )
    assert LoRA(rank=32, alpha=64, rslora=True).scale == pytest.approx(11.3137085)
    assert LoRA(rank=8, alpha=128).scale == 16  # the notes' unscaled α 16 at r 8


@pytest.mark.parametrize(("n", "bound", "std"), [(1024, 0.03125, 0.0180422), (768, 0.0360844, 0.0208333)])
def test_t8_start_of_a(n: int, bound: float, std: float) -> None:
    a, b = (factor.detach() for factor in factors(LoRALinear(n, n, rank=64, alpha=64)))
    assert float(a.abs().max()) == pytest.approx(bound, rel=1e-3) and float(a.abs().max()) <= bound * (1 + 1e-6)
    assert float(a.std()) == pytest.approx(std, rel=0.02) and not b.any()
    for init, other in (("gaussian", 1 / 64), ("normal", 0.02)):
        a, _ = factors(LoRALinear(n, n, 64, 64, init=init))
        assert float(a.detach().std()) == pytest.approx(other, rel=0.02)


def test_t10_gradients() -> None:
    """∂B = s·gᵀ(xAᵀ), ∂A = s·(gB)ᵀx, ∂x = gW + s·(gB)A, none for W; at step 0 only B moves."""
    layer = LoRALinear(7, 5, rank=3, alpha=4.5).double()
    a, b = factors(layer)
    for step in (0, 1):
        if step:
            stir(layer)
        x, g, s = torch.randn(6, 7, dtype=torch.float64, requires_grad=True), torch.randn(6, 5).double(), 1.5
        for parameter in (a, b):
            parameter.grad = None
        layer(x).backward(g)
        wanted = {
            "B": (b.grad, s * g.T @ (x @ a.T)),
            "A": (a.grad, s * (g @ b).T @ x),
            "x": (x.grad, g @ layer.weight + s * (g @ b) @ a),
        }
        for found, formula in wanted.values():
            torch.testing.assert_close(found, formula.detach(), atol=1e-12, rtol=0)
        assert layer.weight.grad is None and layer.bias.grad is None
        assert bool(a.grad.any()) == bool(step) and b.grad.any()


def test_t11_order_of_the_factors() -> None:
    """B·A has ΔW's shape also for r = 1 and 48×32; A·B at r = 1 is one number, which would broadcast unseen."""
    for m, n, r in ((48, 32, 4), (6, 6, 1), (48, 32, 1)):
        layer = LoRALinear(n, m, rank=r, alpha=3.0)
        stir(layer)
        state, weight = deltaw.extract(layer), layer.weight.detach()
        a, b = (factor.detach() for factor in factors(layer))
        torch.testing.assert_close(delta(state, "", weight), 3.0 / r * b @ a, atol=1e-6, rtol=1e-5)
        swapped = {site: {"lora_A": b, "lora_B": a} for site in state.methods}
        with pytest.raises(DeltawError, match="expected"):
            deltaw.insert(LoRALinear(n, m, r, 3.0), dataclasses.replace(state, tensors=swapped), name="swapped")


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.SGD])
def test_t12_reparametrisation_invariance(optimizer: type[torch.optim.Optimizer]) -> None:
    """(α, A₀, lr_A, lr_B) → (α/(pq), p·A₀, p·lr_A, q·lr_B) trains the same under Adam (ε → 0); SGD takes p², q²."""
    adam, x, target = optimizer is torch.optim.Adam, torch.randn(16, 7).double(), torch.randn(16, 5).double()
    start = LoRALinear(7, 5, rank=3, alpha=6).double()

    def losses(p: float, q: float) -> list[float]:
        layer = LoRALinear.from_linear(nn.Linear(7, 5), rank=3, alpha=6 / (p * q)).double()
        layer.load_state_dict(start.state_dict())
        a, b = factors(layer)
        a.data.mul_(p)
        power, options = (1, {"eps": 1e-30}) if adam else (2, {})
        groups = [{"params": [a], "lr": 0.01 * p**power}, {"params": [b], "lr": 0.01 * q**power}]
        steps, found = optimizer(groups, **options), []
        for _ in range(20):
            loss = F.mse_loss(layer(x), target)
            steps.zero_grad()
            loss.backward()
            steps.step()
            found.append(float(loss.detach()))
        return found

    plain = losses(1, 1)
    assert plain[-1] < 0.99 * plain[0]
    for p, q in ((4.0, 1.0), (0.5, 8.0)):
        assert losses(p, q) == pytest.approx(plain, rel=1e-9)


def test_t13_mixing_is_not_adding_factors() -> None:
    layer = LoRALinear(64, 48, rank=4, alpha=4)
    stir(layer)
    one = deltaw.extract(layer)
    stir(layer)
    two, weight = deltaw.extract(layer), layer.weight.detach()
    total = delta(one, "", weight) + delta(two, "", weight)
    assert (delta(one + two, "", weight) - total).norm() / total.norm() < 1e-5


def test_t14_attention_counts() -> None:
    with torch.device("meta"):
        assert trainable(LoRAAttention(1024, rank=4, num_heads=16)) == 24_576
        assert trainable(LoRAAttention(1024, rank=4, num_heads=16, targets="qkvo")) == 32_768
        assert trainable(LoRAAttention(1024, rank=4, targets="v")) == 8_192


# T15 (the branch beside a whole block) is in test_plugins.py, T27 (a forward without α/r) in contract/test_contract.py


# ---- 000: four faults in one class


class Original000(nn.Module):
    """W + α·A·B with both factors random and a "frozen" weight that is a Parameter like any other."""

    def __init__(self, in_features: int, out_features: int, r: int, alpha: float):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(out_features, in_features))
        self.A = nn.Parameter(torch.randn(out_features, r) * 0.01)
        self.B = nn.Parameter(torch.randn(r, in_features) * 0.01)
        self.alpha = alpha

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight + self.alpha * (self.A @ self.B)).T


def test_000_as_printed_and_ours() -> None:
    """T5, T9: trains 65 times too much, moves the output before the first step, scales by 16 instead of 2."""
    theirs, ours = Original000(1024, 1024, r=8, alpha=16), LoRALinear(1024, 1024, rank=8, alpha=16)
    assert trainable(theirs) == 1_064_960 and trainable(ours) == 16_384
    assert theirs.weight.requires_grad and not ours.weight.requires_grad
    sizes = [float((16 * (m.A @ m.B)).norm().detach()) for m in (Original000(1024, 1024, 8, 16) for _ in range(8))]
    assert np.sqrt(np.mean(np.square(sizes))) == pytest.approx(4.6341, rel=0.02)
    assert np.sqrt(np.mean(np.square(sizes))) / 8 == pytest.approx(0.5793, rel=0.02)  # with the /r it forgets
    x = torch.randn(2048, 1024)
    assert float(theirs(x).detach().std()) == pytest.approx(0.1448, rel=0.03)
    assert torch.equal(ours(x), F.linear(x, ours.weight, ours.bias))  # step 0: exactly the base
    factor = theirs(x).detach().norm() / (x @ (theirs.A @ theirs.B).T).detach().norm()
    assert float(factor) == pytest.approx(16, rel=1e-4) and ours.adapters["default"]["weight"].scale == 2


def test_000_in_corrected_form() -> None:
    q = nn.Linear(1024, 1024)
    q_lora = LoRALinear.from_linear(q, rank=8, alpha=16)
    x = torch.randn(2, 10, 1024)
    assert q_lora(x).shape == (2, 10, 1024) and torch.equal(q_lora(x), q(x))


# ---- 001 and 002: forward without α/r


def test_001_forward_and_merge_disagree() -> None:
    """Training and unmerged inference W·x + (B·A)·x, merged W + B·A·α/r: with its own r 32, α 64 twice the change."""
    r, alpha, x = 32, 64, torch.randn(9, 48)
    w, a, b = torch.randn(40, 48), torch.randn(r, 48), torch.randn(40, r)
    forward, merged = x @ w.T + x @ a.T @ b.T, x @ (w + b @ a * alpha / r).T
    torch.testing.assert_close(merged - x @ w.T, 2 * (forward - x @ w.T), rtol=1e-4, atol=1e-2)
    layer = LoRALinear(48, 40, rank=r, alpha=alpha)
    stir(layer)
    tuned = layer(x)
    deltaw.merge(layer)
    torch.testing.assert_close(layer(x), tuned, rtol=1e-4, atol=1e-4)


def test_001_in_corrected_form() -> None:
    """Its NumPy start with the factor named, dynamic mounting, a mix, a merge."""
    d_in, d_out, r, alpha = 32, 48, 4, 8
    generator = np.random.default_rng(0)
    lora_a = generator.uniform(-1, 1, (r, d_in)) / np.sqrt(d_in)
    lora_b = np.zeros((d_out, r))
    assert not (alpha / r * lora_b @ lora_a).any()
    model, x = nn.Sequential(nn.Linear(d_in, d_out)), torch.randn(5, d_in)
    base = model(x)
    for name in ("math", "poetry"):
        deltaw.attach(model, LoRA(rank=r, alpha=alpha), targets="0", name=name)
        stir(model)
    outputs = {}
    for name in ("math", "poetry"):
        with deltaw.use(model, name):
            outputs[name] = model(x)
    with deltaw.use(model, {"math": 1.0, "poetry": 1.0}):
        both = model(x)
        torch.testing.assert_close(both, outputs["math"] + outputs["poetry"] - base)
    deltaw.detach(model, "math")
    deltaw.merge(model, "poetry")
    assert type(model[0]) is nn.Linear
    torch.testing.assert_close(model(x), outputs["poetry"])


def test_002_shapes_do_not_multiply() -> None:
    """A d×r, B r×k and y = Wx + BAx: B·A needs k = d, and is then r×r beside a d×d weight."""
    d, k, r = 48, 32, 4
    w, a, b = torch.randn(d, k), torch.randn(d, r), torch.randn(r, k)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        b @ a
    assert (b.new_zeros(r, d) @ a).shape == (r, r) != w.shape
    assert (a @ b).shape == w.shape  # only A·B·x exists with these letters
    layer = LoRALinear(k, d, rank=16, alpha=32)  # its own configuration: α/r = 2, which its formula never uses
    assert [tuple(f.shape) for f in factors(layer)] == [(16, k), (d, 16)]
    assert layer.adapters["default"]["weight"].scale == 2


# ---- 003: "W + A×B" with A r×d_in, B d_out×r


def test_003_broadcasts_at_rank_one() -> None:
    """A·B is r×r: an error for most r, but at r = 1 one constant that is added to every weight without a word."""
    w = torch.randn(6, 6)
    a, b = torch.randn(1, 6), torch.randn(6, 1)
    wrong, right = (w + a @ b) - w, b @ a
    assert (a @ b).shape == (1, 1) and float(wrong.std()) < 1e-6 < float(right.std())
    with pytest.raises(RuntimeError):
        torch.randn(1024, 1024) + torch.randn(16, 1024) @ torch.randn(1024, 16)
    layer = LoRALinear(6, 6, rank=1, alpha=1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(w)
        for factor, value in zip(factors(layer), (a, b), strict=True):
            factor.copy_(value)
    deltaw.merge(layer)
    torch.testing.assert_close(layer.weight, nn.Parameter(w + right, requires_grad=True))


def test_003_in_corrected_form() -> None:
    """Its training walk: freeze, attach to q and v, forward = y_base + y_lora, real labels, only A and B move."""
    attention, x, label = (
        LoRAAttention(16, rank=8, targets="qv", alpha=16),
        torch.randn(4, 5, 16),
        torch.randn(4, 5, 16),
    )
    frozen = {name: p.detach().clone() for name, p in attention.named_parameters() if not p.requires_grad}
    y_base = F.linear(x, attention.q.weight, attention.q.bias)
    assert torch.equal(attention.q(x), y_base)
    optimizer = torch.optim.Adam([p for p in attention.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(60):
        loss = F.mse_loss(attention(x), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    assert all(torch.equal(p, frozen[name]) for name, p in attention.named_parameters() if name in frozen)
    a, b = factors(attention.q)
    torch.testing.assert_close(attention.q(x) - y_base, 2 * (x @ a.T @ b.T), atol=1e-5, rtol=1e-4)


# ---- 004: two classes that do not run, and an output matrix that trains


def test_004_does_not_run() -> None:
    with pytest.raises(SyntaxError):
        compile("B = torch.zeros.(out_features, r)", "004", "exec")

    def freeze() -> None:
        for paramedics in nn.Linear(2, 2).parameters():  # noqa: B007
            param.requires_grad = False  # noqa: F821

    with pytest.raises(NameError):
        freeze()


class Original004(nn.Module):
    """Its attention with the typo mended: q, k, v are frozen, W_O is not; scores are divided by √embed_dim."""

    def __init__(self, embed_dim: int, r: int):
        super().__init__()
        self.W = nn.ModuleDict({name: nn.Linear(embed_dim, embed_dim) for name in "QKVO"})
        for name in "QKV":
            self.W[name].requires_grad_(False)
        self.A = nn.ParameterDict({name: torch.randn(r, embed_dim) * 0.02 for name in "QKV"})
        self.B = nn.ParameterDict({name: torch.zeros(embed_dim, r) for name in "QKV"})


def test_004_trains_its_output_matrix() -> None:
    """T14: 1,049,600 of 1,074,176 trainable numbers are W_O's, 97.71 %; meant were 24,576."""
    with torch.device("meta"):
        theirs, ours = Original004(1024, 4), LoRAAttention(1024, rank=4)
    assert trainable(theirs) == 1_074_176 and trainable(theirs.W["O"]) == 1_049_600
    assert trainable(theirs.W["O"]) / trainable(theirs) == pytest.approx(0.9771, abs=5e-5)
    assert trainable(ours) == 24_576 and not any(
        p.requires_grad for n, p in ours.named_parameters() if "adapters" not in n
    )


def test_004_softens_its_scores() -> None:
    """Dividing by √embed_dim instead of √head_dim: with 16 heads the logits are 4 times too small."""
    layer, x = LoRAAttention(64, rank=2, num_heads=16), torch.randn(2, 9, 64)
    q, k, v = (getattr(layer, name)(x).unflatten(-1, (16, 4)).transpose(1, 2) for name in "qkv")

    def output(divisor: float) -> Tensor:
        weights = torch.softmax(q @ k.transpose(-2, -1) / divisor, dim=-1)
        return layer.o((weights @ v).transpose(1, 2).flatten(2))

    torch.testing.assert_close(layer(x), output(math.sqrt(64) / 4))
    assert (layer(x) - output(math.sqrt(64))).abs().max() > 1e-2


def test_004_linear_trains_its_bias() -> None:
    """9,216 numbers where 8,192 are LoRA's; ours trains the bias only when asked, as a named part of the adapter."""
    model = nn.Sequential(nn.Linear(1024, 1024))
    assert deltaw.attach(model, LoRA(rank=4, bias="lora_only"), targets="0").trainable == 9_216
    assert trainable(LoRALinear(1024, 1024, rank=4, alpha=4)) == 8_192
    assert {str(site) for site in deltaw.extract(model).methods} == {"0", "0:bias"}


def test_004_in_corrected_form() -> None:
    attention = LoRAAttention(embed_dim=64, rank=4, num_heads=4, targets="qkv", causal=True)
    query = torch.randn(2, 9, 64)
    assert attention(query, query, query).shape == (2, 9, 64)
    later = query.clone()
    later[:, 5:] = 0  # a causal mask: the past does not see it
    assert torch.equal(attention(query)[:, :5], attention(later)[:, :5])
