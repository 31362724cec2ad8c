"""Layers that share an x, computed together: values and gradients of two orders beside each by itself."""

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from deltaw.kernels.lora import lora_linear
from deltaw.kernels.siblings import Layer, siblings

IN, SIZES, SCALES = 7, ((4, 2), (5, 3), (3, 1)), (1.7, 0.5, -1.0)
"""out and rank of each layer: none is another's."""


def layers(
    dtype: torch.dtype = torch.float64, masters: torch.dtype = torch.float64, gained: Sequence[int] = ()
) -> list[Layer]:
    """gained: numbers of those that have a gain."""
    torch.manual_seed(0)
    return [
        Layer(
            torch.randn(out, IN, dtype=dtype), torch.randn(out, dtype=dtype) if number else None,
            torch.randn(r, IN, dtype=masters, requires_grad=True), torch.randn(out, r, dtype=masters, requires_grad=True),
            scale, (1 + torch.randn(out, dtype=masters)).requires_grad_() if number in gained else None,
        )
        for number, ((out, r), scale) in enumerate(zip(SIZES, SCALES, strict=True))
    ]  # fmt: skip


def plain(x: Tensor, layers: Sequence[Layer]) -> tuple[Tensor, ...]:
    found = []
    for w, bias, a, b, scale, gain in layers:
        z = F.linear(x, w) + scale * F.linear(F.linear(x, a), b)
        z = z if gain is None else gain * z
        found.append(z if bias is None else z + bias)
    return tuple(found)


def factors(layers: Sequence[Layer]) -> list[Tensor]:
    return [factor for layer in layers for factor in (layer.a, layer.b, layer.gain) if factor is not None]


def replaced(given: Sequence[Layer], new: Sequence[Tensor]) -> list[Layer]:
    left = iter(new)
    return [
        layer._replace(a=next(left), b=next(left), gain=None if layer.gain is None else next(left)) for layer in given
    ]


@pytest.mark.parametrize("gained", [(), (0, 1, 2), (1,)])
def test_values_and_gradients_of_two_orders(gained: Sequence[int]) -> None:
    given, x = layers(gained=gained), torch.randn(3, 5, IN, dtype=torch.float64, requires_grad=True)
    inputs = (x, *factors(given))
    ours, theirs = siblings(x, given), plain(x, given)
    torch.testing.assert_close(ours, theirs)
    weights = [torch.randn_like(y) for y in ours]
    one, other = (torch.autograd.grad(ys, inputs, weights) for ys in (ours, theirs))
    torch.testing.assert_close(one, other)

    def function(x: Tensor, *new: Tensor) -> tuple[Tensor, ...]:
        return siblings(x, replaced(given, new))

    assert torch.autograd.gradcheck(function, inputs) and torch.autograd.gradgradcheck(function, inputs)


VIEWS = {
    "transposed": lambda: torch.randn(5, 3, IN).transpose(0, 1), "every second": lambda: torch.randn(3, 5, 2 * IN)[..., ::2],
    "expanded": lambda: torch.randn(3, 1, IN).expand(3, 5, IN), "empty": lambda: torch.randn(3, 0, IN),
}  # fmt: skip


@pytest.mark.parametrize("view", VIEWS)
def test_an_x_that_is_a_view(view: str) -> None:
    given, x = layers(), VIEWS[view]().double().requires_grad_()
    ours, theirs = siblings(x, given), plain(x, given)
    torch.testing.assert_close(ours, theirs)
    weights = [torch.randn_like(y) for y in ours]
    one, other = (torch.autograd.grad(ys, (x, *factors(given)), weights) for ys in (ours, theirs))
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("used", [[0], [2], [0, 2], [1, 2]])
def test_an_output_that_nobody_uses_has_no_gradient(used: list[int]) -> None:
    given, x = layers(gained=(0, 2)), torch.randn(6, IN, dtype=torch.float64, requires_grad=True)
    found = [
        torch.autograd.grad(sum(ys[n].square().sum() for n in used), (x, *factors(given)), allow_unused=True)  # type: ignore[arg-type]
        for ys in (siblings(x, given), plain(x, given))
    ]
    for one, other in zip(*found, strict=True):
        assert (one is None) == (other is None)
        torch.testing.assert_close(one, other)


def test_only_what_is_trained_gets_a_gradient() -> None:
    given, x = (
        layers(gained=(2,)),
        torch.randn(6, IN, dtype=torch.float64),
    )  # x without one, as behind a frozen embedding
    frozen = given[1].a.requires_grad_(False)
    sum(y.sum() for y in siblings(x, given)).backward()  # type: ignore[union-attr]
    assert x.grad is None and frozen.grad is None
    grads = [factor.grad for factor in factors(given) if factor is not frozen]
    for ours, factor in zip(grads, [f for f in factors(given) if f is not frozen], strict=True):
        factor.grad = None
        assert ours is not None
    sum(y.sum() for y in plain(x, given)).backward()  # type: ignore[union-attr]
    torch.testing.assert_close(grads, [factor.grad for factor in factors(given) if factor is not frozen])


def test_a_strength_is_a_tensor() -> None:
    given, x = layers(), torch.randn(6, IN, dtype=torch.float64, requires_grad=True)
    tensors = [layer._replace(scale=torch.tensor(layer.scale)) for layer in given]
    torch.testing.assert_close(siblings(x, tensors), siblings(x, given))
    sum(y.sum() for y in siblings(x, tensors)).backward()  # type: ignore[union-attr]
    assert x.grad is not None and all(factor.grad is not None for factor in factors(given))


def test_gradients_by_sample() -> None:
    given, x = layers(), torch.randn(4, 2, IN, dtype=torch.float64)

    def loss(new: tuple[Tensor, ...], x: Tensor) -> Tensor:
        return torch.stack([y.square().sum() for y in siblings(x, replaced(given, new))]).sum()

    new = tuple(factor.detach() for factor in factors(given))
    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(new, x)
    for number in range(len(x)):
        one = torch.func.grad(loss)(new, x[number])
        torch.testing.assert_close([tensor[number] for tensor in each], list(one))


@pytest.mark.parametrize("gained", [(), (0,)])
def test_no_further_from_the_truth_in_bf16_than_each_by_itself(gained: Sequence[int]) -> None:
    given, x = (
        layers(torch.bfloat16, torch.float32, gained),
        torch.randn(64, IN, dtype=torch.bfloat16, requires_grad=True),
    )
    apart = [lora_linear(x, w, bias, (a, b, scale, gain, 0.0)) for w, bias, a, b, scale, gain in given]
    ours, weights = siblings(x, given), [torch.randn_like(y) for y in apart]
    inputs = (x, *factors(given))
    exact_x = x.detach().double().requires_grad_()
    exact = [
        Layer(w.double(), None if bias is None else bias.double(), a.detach().double().requires_grad_(),
              b.detach().double().requires_grad_(), scale, None if gain is None else gain.detach().double().requires_grad_())
        for w, bias, a, b, scale, gain in given
    ]  # fmt: skip
    true = torch.autograd.grad(plain(exact_x, exact), (exact_x, *factors(exact)), [w.double() for w in weights])
    for mine, theirs, right in zip(
        torch.autograd.grad(ours, inputs, weights), torch.autograd.grad(apart, inputs, weights), true, strict=True
    ):
        off, before = ((one.double() - right).norm() / right.norm() for one in (mine, theirs))
        assert mine.dtype == theirs.dtype and off < max(1.1 * before, 4e-3), (off, before)


def test_x_is_kept_once_and_nothing_of_its_size_beside_it() -> None:
    given, x = layers(), torch.randn(64, IN, dtype=torch.float64, requires_grad=True)
    known = {t.data_ptr() for t in (x, *(t for layer in given for t in layer if isinstance(t, Tensor)))}
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        siblings(x, given)
    assert [t.shape for t in kept if t.data_ptr() not in known] == [(64, sum(r for _, r in SIZES))]
    assert sum(t.data_ptr() == x.data_ptr() for t in kept) == 1
    gained, before = layers(gained=(1,)), len(kept)
    known |= {t.data_ptr() for layer in gained for t in layer if isinstance(t, Tensor)}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        siblings(x, gained)
    assert [t.shape for t in kept[before:] if t.data_ptr() not in known][1:] == [(64, SIZES[1][0])]  # z
