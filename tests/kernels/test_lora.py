"""The fused linear layer and the gated product: values, gradients of two orders, and what is kept, beside plain formulas."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

import deltaw
from deltaw.kernels.dropout import kept, mask, new_seed
from deltaw.kernels.glu import ACTIVATIONS, glu_down
from deltaw.kernels.lora import lora_add, lora_linear
from deltaw.methods.lora import LoRAAdapter

OUT, IN, R, S = 4, 7, 2, 1.7


def tensors(dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """x, a, b of a graph; W and bias frozen."""
    x, a, b = (torch.randn(*shape, dtype=dtype, requires_grad=True) for shape in ((3, 5, IN), (R, IN), (OUT, R)))
    return x, a, b, torch.randn(OUT, IN, dtype=dtype), torch.randn(OUT, dtype=dtype)


def plain(x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
    return F.linear(x, w, bias) + scale * F.linear(F.linear(x, a), b)


def seeded(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """With the same masks at every call."""

    def run(*inputs: Tensor) -> Tensor:
        torch.manual_seed(7)
        return function(*inputs)

    return run


def explicit(x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, gain: Tensor | None, p: float) -> Tensor:
    """The formula with the mask as a tensor."""
    torch.manual_seed(7)
    ones = mask(x, new_seed(), p) / kept(p) if p else 1.0
    z = F.linear(x, w) + S * F.linear(F.linear(ones * x, a), b)
    y = z if gain is None else gain * z
    return y if bias is None else y + bias


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("gained", [False, True])
@pytest.mark.parametrize("with_bias", [True, False])
def test_the_linear_layer_and_its_gradients(with_bias: bool, gained: bool, p: float) -> None:
    x, a, b, w, bias = tensors()
    given = bias if with_bias else None
    gain = [(1 + torch.randn(OUT, dtype=torch.float64)).requires_grad_()] if gained else []

    def plain(x: Tensor, a: Tensor, b: Tensor, *gain: Tensor) -> Tensor:
        return explicit(x, w, given, a, b, *(gain or (None,)), p)  # type: ignore[arg-type, misc]

    ours = seeded(lambda x, a, b, *gain: lora_linear(x, w, given, (a, b, S, *(gain or (None,)), p)))  # type: ignore[arg-type, misc]
    inputs = (x, a, b, *gain)
    y, expected = ours(*inputs), plain(*inputs)
    torch.testing.assert_close(y, expected)
    g = torch.randn_like(y)
    for one, other in zip(torch.autograd.grad(y, inputs, g), torch.autograd.grad(expected, inputs, g), strict=True):
        torch.testing.assert_close(one, other)
    assert torch.autograd.gradcheck(ours, inputs) and torch.autograd.gradgradcheck(ours, inputs)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_the_change_added_to_something_else(p: float) -> None:
    x, a, b, w, bias = tensors()
    ours = seeded(lambda x, a, b: lora_add(F.linear(x, w, bias), x, (a, b, S, None, p)))
    torch.testing.assert_close(ours(x, a, b), explicit(x, w, bias, a, b, None, p))
    assert torch.autograd.gradcheck(ours, (x, a, b)) and torch.autograd.gradgradcheck(ours, (x, a, b))


def test_a_dropout_mask_has_its_share_and_its_seed() -> None:
    x, seed = torch.ones(1000, 997, dtype=torch.bfloat16), torch.tensor(3)
    for p in (0.05, 0.5):
        y = mask(x, seed, p)
        assert abs(float(y.float().mean()) - kept(p)) < 3e-3 and abs(kept(p) - (1 - p)) < 1e-5
        assert torch.equal(y, mask(x, seed, p)) and not torch.equal(y, mask(x, seed + 1, p))
        columns = y.float().mean(0)  # no stripes
        assert float((columns - columns.mean()).abs().max()) < 5 * (p * (1 - p) / 1000) ** 0.5


def test_dropout_keeps_no_mask_and_is_made_again_under_checkpointing() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(IN, OUT)), torch.randn(6, IN)
    deltaw.attach(model, deltaw.LoRA(rank=R, dropout=0.5), targets="0")
    nn.init.normal_(model[0].adapters["default"]["weight"].lora_B)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        model(x)
    inputs = {t.untyped_storage().data_ptr() for t in (x, *model.parameters())}
    assert sorted(t.numel() for t in kept if t.untyped_storage().data_ptr() not in inputs) == [
        1,
        6 * R,
    ]  # the seed and h
    gradients = []
    for run in (model, lambda x: torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)):
        torch.manual_seed(5)
        run(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        model.zero_grad()
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True)) and gradients[0]
    model.eval()
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize("shape", [(IN,), (3, IN), (2, 3, 4, IN), (0, IN)])
def test_any_number_of_dimensions(shape: tuple[int, ...]) -> None:
    _, a, b, w, bias = tensors()
    x = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    y, expected = lora_linear(x, w, bias, (a, b, S, None, 0.0)), plain(x, w, bias, a, b, S)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(lora_add(F.linear(x, w, bias), x, (a, b, S, None, 0.0)), expected)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), a)[0], torch.autograd.grad(expected.sum(), a)[0])


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_gradients_per_sample() -> None:
    x, a, b, w, bias = (t.detach() for t in tensors())

    def loss(a: Tensor, x: Tensor) -> Tensor:
        return lora_linear(x, w, bias, (a, b, S, None, 0.0)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(a, x)
    for number in range(3):
        torch.testing.assert_close(each[number], torch.func.grad(loss)(a, x[number]))


def test_masters_are_fp32_and_x_is_never_copied() -> None:
    """A bf16 base: gradients come in fp32, and what is kept is x itself and [T, r]."""
    torch.manual_seed(0)
    x = torch.randn(6, IN, dtype=torch.bfloat16, requires_grad=True)
    a, b = (torch.randn(*shape, requires_grad=True) for shape in ((R, IN), (OUT, R)))
    w = torch.randn(OUT, IN, dtype=torch.bfloat16)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        y = lora_linear(x, w, None, (a, b, torch.tensor(S), None, 0.0))
    inputs = {t.untyped_storage().data_ptr() for t in (x, w, a, b)}
    assert y.dtype == torch.bfloat16
    assert [tuple(t.shape) for t in kept if t.untyped_storage().data_ptr() not in inputs] == [(6, R)]
    y.sum().backward()
    wide = plain(x.detach().float(), w.float(), None, a, b, S)
    assert a.grad.dtype == b.grad.dtype == torch.float32 and x.grad.dtype == torch.bfloat16
    for one, other in zip((a.grad, b.grad), torch.autograd.grad(wide.sum(), (a, b)), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2 * float(other.abs().max()))


CHANGES = {"alone": (False, 0.0), "gain": (True, 0.0), "dropout": (False, 0.3)}


@pytest.mark.parametrize("change", [None, *CHANGES])
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_the_gated_product(kind: str, change: str | None) -> None:
    gate, up = (torch.randn(3, 5, IN, dtype=torch.float64, requires_grad=True) for _ in range(2))
    _, a, b, w, bias = tensors()
    gained, p = CHANGES.get(change or "", (False, 0.0))
    gain = torch.randn(OUT, dtype=torch.float64, requires_grad=True) if gained else None

    def dense(gate: Tensor, up: Tensor, *rest: Tensor) -> Tensor:
        product = ACTIVATIONS[kind].forward(gate) * up
        return explicit(product, w, bias, a, b, gain, p) if change else F.linear(product, w, bias)

    def ours(gate: Tensor, up: Tensor, *rest: Tensor) -> Tensor:
        return glu_down(gate, up, w, bias, (a, b, S, gain, p) if change else None, kind)

    ours = seeded(ours)
    given = (gate, up, *((a, b) if change else ()), *((gain,) if gain is not None else ()))
    y, expected = ours(*given), dense(*given)
    torch.testing.assert_close(y, expected)
    g = torch.randn_like(y)
    for one, other in zip(torch.autograd.grad(y, given, g), torch.autograd.grad(expected, given, g), strict=True):
        torch.testing.assert_close(one, other)
    assert torch.autograd.gradcheck(ours, given) and torch.autograd.gradgradcheck(ours, given)


STRENGTHS: list[tuple[str, Callable[[nn.Module], None]]] = [
    ("alone", lambda model: None),
    ("half", lambda model: deltaw.use(model, {"one": 0.5}) and None),
    ("two", lambda model: deltaw.use(model, {"one": 1.0, "two": -0.3}) and None),
]


@pytest.mark.parametrize(("case", "route"), STRENGTHS)
def test_routes_through_the_kernel_are_the_merged_weights(case: str, route: Callable[[nn.Module], None]) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(12, 9)), torch.randn(4, 12)
    weight, bias = model[0].weight.detach().clone(), model[0].bias.detach().clone()
    changes = {}
    for name in ("one", "two"):
        deltaw.attach(model, deltaw.LoRA(rank=3, alpha=5.0), targets="0", name=name)
        for p in model[0].adapters[name].parameters():
            nn.init.normal_(p)
        changes[name] = 5 / 3 * model[0].adapters[name]["weight"].lora_B @ model[0].adapters[name]["weight"].lora_A
    deltaw.use(model, "one")
    route(model)
    strengths = {"alone": (1.0, 0.0), "half": (0.5, 0.0), "two": (1.0, -0.3)}[case]
    whole = weight + strengths[0] * changes["one"] + strengths[1] * changes["two"]
    torch.testing.assert_close(model(x), F.linear(x, whole, bias), rtol=1e-5, atol=1e-5)


def test_a_base_that_is_trained_too_gets_its_gradient() -> None:
    """The kernel holds W frozen: where someone unfreezes it, the plain way is taken."""
    model, x = nn.Sequential(nn.Linear(12, 9)), torch.randn(4, 12)
    deltaw.attach(model, deltaw.LoRA(rank=3), targets="0")
    model[0].weight.requires_grad_(True)
    model(x).sum().backward()
    torch.testing.assert_close(model[0].weight.grad, x.sum(0).expand(9, 12))


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_few_rows_are_computed_in_the_factors_own_dtype(rows: int) -> None:
    """A decoding step in bf16: fewer rows than ranks, so that x is cast and not A and B; only the sum is rounded."""
    torch.manual_seed(0)
    x, w = torch.randn(rows, IN, dtype=torch.bfloat16), torch.randn(OUT, IN, dtype=torch.bfloat16)
    a, b = torch.randn(6, IN), torch.randn(OUT, 6)
    with torch.no_grad():
        base = F.linear(x, w)
        change = S * (x.float() @ a.T @ b.T)
        expected, kept = base.float() + change, base.clone()
        half = {"rtol": 2**-8, "atol": 1e-6}  # what one rounding to bf16 may do
        torch.testing.assert_close(lora_linear(x, w, None, (a, b, S, None, 0.0)).float(), expected, **half)
        torch.testing.assert_close(lora_add(base, x, (a, b, torch.tensor(S), None, 0.0)).float(), expected, **half)
        assert torch.equal(base, kept)
    model = nn.Sequential(nn.Linear(IN, OUT, dtype=torch.bfloat16))
    deltaw.attach(model, deltaw.LoRA(rank=4), targets="0")
    for parameter in model[0].adapters.parameters():
        nn.init.normal_(parameter)
    many = x.repeat(8, 1)
    with torch.no_grad():
        torch.testing.assert_close(model(x), model(many)[:rows], rtol=0.02, atol=0.1)
        with deltaw.use(model, [{"default": 1.0}, *[{}] * (rows - 1)]):
            torch.testing.assert_close(model(x)[0], model(many[:rows])[0])


def test_dora_s_magnitude_is_exact_beside_a_large_bias_in_bf16() -> None:
    """z is not (z + bias) − bias there: the two products are made."""
    torch.manual_seed(0)
    layer, x, g = nn.Linear(32, 24).bfloat16(), torch.randn(512, 32).bfloat16(), torch.randn(512, 24).bfloat16()
    layer.bias.data.normal_(std=300.0)
    slopes = []
    for dtype in (torch.bfloat16, torch.float64):
        model = nn.Sequential(copy.deepcopy(layer).to(dtype))
        torch.manual_seed(1)
        deltaw.attach(model, deltaw.DoRA(rank=2), targets="0")
        before = model(x.to(dtype))
        with deltaw.use(model, {}):
            assert torch.equal(model(x.to(dtype)), before)  # the bits of the base at the start
        before.backward(g.to(dtype))
        slopes.append(model[0].adapters["default"]["weight"].magnitude.grad.double())
    assert float((slopes[0] - slopes[1]).norm() / slopes[1].norm()) < 2e-2


def test_nearly_everything_dropped() -> None:
    x, a, b, w, bias = tensors(torch.float32)
    assert torch.isfinite(lora_linear(x, w, bias, (a, b, S, None, 0.999995))).all() and kept(0.999995) > 0


def test_own_dropout_and_further_arguments_are_not_passed_over() -> None:
    class Own(LoRAAdapter):
        thin = True
        calls = 0

        def dropped(self, x: Tensor) -> Tensor:
            Own.calls += 1
            return super().dropped(x)

    class Scaled(nn.Linear):
        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            return scale * super().forward(x)

    model, x = nn.Sequential(Scaled(12, 9)), torch.randn(4, 12)
    deltaw.attach(model, deltaw.LoRA(rank=3), targets="0")
    torch.testing.assert_close(model[0](x, scale=3.0), 3.0 * F.linear(x, model[0].weight, model[0].bias))
    model[0].adapters["default"]["weight"].__class__ = Own
    model(x)
    assert Own.calls == 1


@pytest.mark.parametrize("bias", [True, False])
def test_a_model_may_change_the_output_in_place(bias: bool) -> None:
    """As Longformer does with its queries."""
    model, x = nn.Sequential(nn.Linear(IN, OUT, bias=bias)), torch.randn(2, 3, IN)
    before = model(x)
    deltaw.attach(model, deltaw.LoRA(rank=2), targets="0")
    y = model(x)
    assert torch.equal(y, before)
    y /= 2
    y.sum().backward()
    torch.testing.assert_close(y.detach(), before / 2)


def test_several_changes_beside_one_product() -> None:
    """torch.func's own batches, in a decoding step: what all of them share is not changed in place."""
    x, w = torch.randn(2, IN, dtype=torch.bfloat16), torch.randn(OUT, IN, dtype=torch.bfloat16)
    a, b = torch.randn(3, R, IN), torch.randn(3, OUT, R)
    with torch.no_grad():
        found = torch.func.vmap(lambda a, b: lora_linear(x, w, None, (a, b, S, None, 0.0)))(a, b)
        for number in range(3):
            alone = lora_linear(x, w, None, (a[number], b[number], S, None, 0.0))
            torch.testing.assert_close(found[number], alone)
