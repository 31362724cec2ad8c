"""Run by test_twins in a process of its own, with TRITON_INTERPRET=1: the kernels beside their plain twins, on the CPU.

Without that variable the same runs on a CUDA device: `python tests/kernels/in_triton.py`.
"""

import math
import os

import torch
import torch.nn.functional as F

import deltaw
from deltaw.kernels import dropout, glu, thin, twins
from deltaw.kernels.grouped import grouped
from deltaw.kernels.lora import lora_linear

torch.set_default_device("cpu" if os.environ.get("TRITON_INTERPRET") else "cuda")


def products(dtype: torch.dtype, kind: str) -> None:
    act = glu.ACTIVATIONS[kind]
    g, gate, up = (torch.randn(7, 301, dtype=dtype) * 3 for _ in range(3))
    near = {"rtol": 1e-5, "atol": 5e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(twins.product(gate, up, kind), act.forward(gate) * up, **near)
    wide = [t.float() for t in (g, gate, up)]
    expected = act.backward(wide[0] * wide[2], wide[1]), wide[0] * act.forward(wide[1])
    for ours, plain in zip(twins.product_back(g, gate, up, kind), expected, strict=True):
        torch.testing.assert_close(ours, plain.to(dtype), **near)


def groups(dtype: torch.dtype, count: int, n: int, steps: int, ranks: int, inputs: int, outputs: int) -> None:
    x, y = torch.randn(count * n, steps, inputs).to(dtype), torch.randn(count * n, steps, outputs).to(dtype)
    a, bt, weights = torch.randn(count, ranks, inputs), torch.randn(count, ranks, outputs), torch.randn(count, n)
    rows = torch.arange(count * n).view(count, n)
    twins.ON = lambda x: False
    plain = grouped(y.clone(), x, a, bt, rows, weights, None, True)
    twins.ON = lambda x: True
    ours = grouped(y.clone(), x, a, bt, rows, weights, None, True)
    assert twins._TRUST[("grouped", x.device, dtype)]
    scale = math.sqrt(inputs * ranks)
    near = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(ours / scale, plain / scale, rtol=near, atol=near)


def whole_layer() -> None:
    """The gated product with a LoRA, forward and backward, as training calls it."""
    gate, up = (torch.randn(3, 5, 24, requires_grad=True) for _ in range(2))
    a, b, w = torch.randn(2, 24, requires_grad=True), torch.randn(9, 2, requires_grad=True), torch.randn(9, 24)
    found = []
    for on in (True, False):
        twins.ON = lambda x, on=on: on
        y = glu.glu_down(gate, up, w, None, (a, b, 1.5, None, 0.0), "silu")
        found.append([y.detach(), *torch.autograd.grad(y.square().sum(), (gate, up, a, b))])
    assert twins._TRUST[("product", "silu", gate.device, gate.dtype)]
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)


def low_rank(dtype: torch.dtype, rows: int, inputs: int, outputs: int, ranks: int, p: float, dora: bool) -> None:
    """A layer with a LoRA, forward and backward, with dropout and a gain: what training calls."""
    torch.manual_seed(1)
    x = torch.randn(2, rows, inputs, dtype=dtype, requires_grad=True)
    w, bias = torch.randn(outputs, inputs, dtype=dtype) / math.sqrt(inputs), torch.randn(outputs, dtype=dtype)
    a = (torch.randn(ranks, inputs) / math.sqrt(inputs)).requires_grad_()
    b = (torch.randn(outputs, ranks) / math.sqrt(ranks)).requires_grad_()
    gain = (1 + 0.3 * torch.randn(outputs)).requires_grad_() if dora else None
    wanted = [t for t in (x, a, b, gain) if t is not None]
    g, found = torch.randn(2, rows, outputs, dtype=dtype), []
    for on in (True, False):
        twins.ON = lambda x: True
        if not on:  # the plain twin, with the same mask
            thin.usable = lambda *given: False
        torch.manual_seed(2)
        y = lora_linear(x, w, bias, (a, b, 1.5, gain, p))
        found.append([y.detach(), *torch.autograd.grad(y, wanted, g)])
    thin.usable = USABLE
    assert thin._trusted(x, thin._power(ranks))
    near = 2e-5 if dtype == torch.float32 else 2e-2
    for ours, plain in zip(*found, strict=True):
        size = plain.float().abs().max()
        torch.testing.assert_close(ours / size, plain / size, rtol=near, atol=near)


def without_dropout(dtype: torch.dtype) -> None:
    """The kernels take every element where nothing is dropped."""
    x, y, h = (torch.randn(37, n).to(dtype) for n in (150, 150, 5))
    w, near = torch.randn(5, 150) / math.sqrt(150), 1e-5 if dtype == torch.float32 else 2e-2
    cast = (1.5 * w).to(dtype)
    for ours, plain in (
        (thin.down(x, w, 1.5), x @ cast.T),
        (thin.add(y.clone(), h, w, 1.5), y + h @ cast),
        (thin.outer(h, x), (h.T @ x).float()),
    ):
        torch.testing.assert_close(ours / plain.abs().max(), plain / plain.abs().max(), rtol=near, atol=near)


def dropped() -> None:
    """The mask is the same for the same seed, another for another one, and has the share of ones that it says."""
    x = torch.zeros(400, 500)
    first, again, other = (
        dropout.mask(x, torch.tensor(seed, device="cpu"), 0.3) for seed in (5 << 40, 5 << 40, 6 << 40)
    )
    assert thin.draws(x) and torch.equal(first, again)
    assert abs(float(first.mean()) - 0.7) < 0.004 and abs(float((first == other).float().mean()) - 0.58) < 0.004
    for shift in (1, 2, 500):  # neighbours in a row and below each other tell nothing of one another
        flat = first.flatten()
        assert abs(float((flat[shift:] * flat[:-shift]).mean()) - 0.49) < 0.004
    low = [dropout.mask(x, torch.tensor(seed, device="cpu"), 0.5).flatten() for seed in range(8)]
    alike = torch.stack(low) @ torch.stack(low).T / x.numel()
    assert (alike - torch.eye(8) * 0.25 - 0.25).abs().max() < 0.005


def served() -> None:
    """Rows of a batch with adapters of their own."""
    model, x = torch.nn.Sequential(torch.nn.Linear(6, 5)), torch.randn(2, 1, 6)
    for name in ("a", "b"):
        deltaw.attach(model, deltaw.LoRA(rank=3), targets="0", name=name)
        torch.nn.init.normal_(model[0].adapters[name]["weight"].lora_B)
    model.requires_grad_(False)
    found = []
    for on in (True, False):
        twins.ON = lambda x, on=on: on
        with torch.no_grad(), deltaw.use(model, ["a", {"b": 0.5}]):
            found.append(model(x))
    torch.testing.assert_close(*found)


def distrusted() -> None:
    """A kernel that gives something else is not used, and that is said."""
    twins.ON, twins._TRUST = lambda x: True, {}
    right, twins.product = twins.product, lambda gate, up, kind: gate
    gate, up, w = torch.randn(2, 8), torch.randn(2, 8), torch.randn(3, 8)
    try:
        torch.testing.assert_close(glu.glu_down(gate, up, w, None, None, "silu"), F.linear(F.silu(gate) * up, w))
    finally:
        twins.product = right
    assert {("product", "silu", gate.device, gate.dtype): False} == twins._TRUST


def failing() -> None:
    """An error without a word, a dtype they do not compute in, an output that is not contiguous."""
    twins._TRUST = {}

    def pair() -> None:
        raise AssertionError

    assert not twins.trusted("nothing", pair) and not twins.usable(torch.zeros(1, dtype=torch.float64))
    x, a, bt = torch.randn(2, 1, 6), torch.randn(2, 3, 6), torch.randn(2, 3, 5)
    rows, weights = torch.arange(2).view(2, 1), torch.ones(2, 1)
    y = torch.zeros(2, 5, 1).mT
    strided, plain = torch.zeros(5, 1, 2).permute(2, 1, 0), y.contiguous()
    twins.ON = lambda x: True
    grouped(strided, x, a, bt, rows, weights, 1.0, True)
    twins.ON = lambda x: False
    torch.testing.assert_close(strided, grouped(plain, x, a, bt, rows, weights, 1.0, True), rtol=1e-4, atol=1e-4)


if __name__ == "__main__":
    torch.manual_seed(0)
    USABLE, thin.FEWEST_ROWS, twins.ON = thin.usable, 1, lambda x: True
    dropped()
    # the interpreter multiplies matrices of bf16 as if their bits were integers
    for dtype in (torch.float32, torch.float16 if os.environ.get("TRITON_INTERPRET") else torch.bfloat16):
        for sizes in (
            (40, 130, 70, 4, 0.2, False),
            (35, 64, 140, 20, 0.25, False),
            (33, 50, 60, 16, 0.1, True),
            (20, 70, 80, 40, 0.1, False),
        ):
            low_rank(dtype, *sizes)
    for dtype in (torch.float32, torch.bfloat16):
        for kind in glu.ACTIVATIONS:
            products(dtype, kind)
        for sizes in ((1, 1, 1, 4, 16, 16), (3, 2, 1, 5, 130, 257), (2, 1, 4, 8, 64, 96)):
            groups(dtype, *sizes)
    whole_layer()
    served()
    distrusted()
    failing()
    print("all kernels are their twins")
