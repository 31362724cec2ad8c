"""Kernels in Triton for what is bound by memory on a CUDA device; each has a plain twin, which runs everywhere else.

    product        p = act(gate) ⊙ up, one pass instead of two                                  plain: kernels/glu.py
    product_back   dgate = dp ⊙ up ⊙ act'(gate), dup = dp ⊙ act(gate), one pass instead of five
    grouped        y[b] += w_b · (x[b] a_kᵀ) bt_k, k the adapter of row b, fp32 factors read once  plain: kernels/grouped.py

A kernel is used on a device and dtype once it gave there, on a small input, what its plain twin gives (`trusted`);
where it does not, or cannot be compiled, the plain twin runs and says so in the log. Tests run them in Triton's interpreter
(tests/kernels/test_twins.py). The products of a low-rank change are in kernels/thin.py.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)
tl: Any = None  # triton.language, once a kernel is compiled: Triton looks it up here
ON: Callable[[Tensor], bool] = lambda x: x.is_cuda  # noqa: E731
HELPERS = ("_act",)
VARIES = ("low", "high", "dropped", "scale")  # numbers that a kernel is not compiled anew for
BLOCK = 1024
DTYPES = {torch.float32, torch.bfloat16, torch.float16}  # they compute in fp32


def _act(x, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """act(x) and act'(x) in fp32."""
    if KIND == "silu":
        s = tl.sigmoid(x)
        return x * s, s * (1 + x * (1 - s))
    if KIND == "gelu":
        cdf = 0.5 * (1 + tl.erf(x * 0.7071067811865476))
        return x * cdf, cdf + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    s = tl.sigmoid(2 * 0.7978845608028654 * (x + 0.044715 * x * x * x))  # (1 + tanh) / 2
    return x * s, s + x * 2 * s * (1 - s) * 0.7978845608028654 * (1 + 0.134145 * x * x)


def _product(gate, up, p, n, KIND: tl.constexpr, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    x, y = tl.load(gate + i, mask=i < n, other=0.0).to(tl.float32), tl.load(up + i, mask=i < n, other=0.0)
    opened, _slope = _act(x, KIND)
    opened = opened.to(p.dtype.element_ty).to(tl.float32)  # rounded as the plain twin rounds
    tl.store(p + i, (opened * y.to(tl.float32)).to(p.dtype.element_ty), mask=i < n)


def _product_back(dp, gate, up, dgate, dup, n, KIND: tl.constexpr, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    g, x = (
        tl.load(dp + i, mask=i < n, other=0.0).to(tl.float32),
        tl.load(gate + i, mask=i < n, other=0.0).to(tl.float32),
    )
    y = tl.load(up + i, mask=i < n, other=0.0).to(tl.float32)
    opened, slope = _act(x, KIND)
    tl.store(dgate + i, (g * y * slope).to(dgate.dtype.element_ty), mask=i < n)
    tl.store(dup + i, (g * opened).to(dup.dtype.element_ty), mask=i < n)


def _shrink(x, a, h, steps, n, inputs, ranks, R: tl.constexpr, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """h[row, t] = x[row, t] a_kᵀ, one program for each token; row = k·n + j."""
    token = tl.program_id(0)
    k = token // (steps * n)
    r, total = tl.arange(0, R), tl.zeros([R], dtype=tl.float32)
    for start in range(0, inputs, SIZE):
        i = start + tl.arange(0, SIZE)
        row = tl.load(x + token * inputs + i, mask=i < inputs, other=0.0).to(tl.float32)
        there = (r[:, None] < ranks) & (i[None, :] < inputs)
        part = tl.load(a + (k * ranks + r[:, None]) * inputs + i[None, :], mask=there, other=0.0)
        total += tl.sum(part * row[None, :], axis=1)
    tl.store(h + token * ranks + r, total, mask=r < ranks)


def _expand(y, h, bt, weights, steps, n, outputs, ranks, R: tl.constexpr, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """y[row, t] += w_row · h[row, t] bt_k, one program for each token and block of outputs."""
    token, o = tl.program_id(0), tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    k, r = token // (steps * n), tl.arange(0, R)
    left = tl.load(h + token * ranks + r, mask=r < ranks, other=0.0) * tl.load(weights + token // steps)
    there = (r[:, None] < ranks) & (o[None, :] < outputs)
    part = tl.load(bt + (k * ranks + r[:, None]) * outputs + o[None, :], mask=there, other=0.0)
    before = tl.load(y + token * outputs + o, mask=o < outputs, other=0.0).to(tl.float32)
    change = tl.sum(part * left[:, None], axis=0).to(y.dtype.element_ty).to(tl.float32)
    tl.store(y + token * outputs + o, (before + change).to(y.dtype.element_ty), mask=o < outputs)


@functools.cache
def compiled(kernel: Any) -> Any:
    """A function of a file with HELPERS, the functions that its kernels call, as a Triton kernel."""
    import triton
    import triton.language

    module: Any = sys.modules[kernel.__module__]
    module.tl = triton.language
    for name in module.HELPERS:
        if not hasattr(getattr(module, name), "fn"):
            setattr(module, name, triton.jit(getattr(module, name)))
    return triton.jit(kernel, do_not_specialize=VARIES)


def _blocks(n: int, size: int) -> int:
    return -(-n // size)


def product(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    """act(gate) ⊙ up. kind: a key of `kernels.glu.ACTIVATIONS`."""
    gate, up = gate.contiguous(), up.contiguous()
    p = torch.empty_like(gate)
    compiled(_product)[(_blocks(p.numel(), BLOCK),)](gate, up, p, p.numel(), kind, BLOCK)
    return p


def product_back(dp: Tensor, gate: Tensor, up: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up."""
    dp, gate, up = dp.contiguous(), gate.contiguous(), up.contiguous()
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    compiled(_product_back)[(_blocks(dp.numel(), BLOCK),)](dp, gate, up, dgate, dup, dp.numel(), kind, BLOCK)
    return dgate, dup


def grouped(y: Tensor, x: Tensor, a: Tensor, bt: Tensor, weights: Tensor) -> Tensor:
    """In place: y [K · n, T, out], x [K · n, T, in], a [K, r, in] and bt [K, r, out] in fp32, weights [K, n] in fp32."""
    x, count, n = x.contiguous(), len(a), weights.shape[1]
    steps, ranks, size = x.numel() // (count * n * x.shape[-1]), a.shape[1], 128
    power = 1 << (ranks - 1).bit_length()
    h = torch.empty(count * n * steps, ranks, dtype=torch.float32, device=x.device)
    tokens, inputs, outputs = len(h), a.shape[2], bt.shape[2]
    compiled(_shrink)[(tokens,)](x, a, h, steps, n, inputs, ranks, power, size)
    compiled(_expand)[(tokens, _blocks(outputs, size))](y, h, bt, weights, steps, n, outputs, ranks, power, size)
    return y


def usable(x: Tensor) -> bool:
    """Is x where these can run? In a compiled graph the compiler fuses by itself; other kinds of tensors, and those that
    torch.func transforms, have no memory to give."""
    if not ON(x) or x.dtype not in DTYPES or type(x) not in (Tensor, torch.nn.Parameter):
        return False
    return not (torch._C._are_functorch_transforms_active() or torch.compiler.is_compiling()) and _there()


@functools.cache
def _there() -> bool:
    return importlib.util.find_spec("triton") is not None


_TRUST: dict[Any, bool] = {}


def trusted(key: Any, pair: Callable[[], tuple[Any, Any]]) -> bool:
    """Does a kernel give what its plain twin does? `pair` makes both; asked once for each key: (name, device, dtype, …)."""
    if key not in _TRUST:
        try:
            torch.testing.assert_close(*pair(), rtol=2e-2, atol=2e-2)
            _TRUST[key] = True
        except Exception as error:  # whatever a compiler may raise: the plain twin is there
            log.warning("the Triton kernel %s is not used: %s", key, f"{type(error).__name__}: {error}".splitlines()[0])
            _TRUST[key] = False
    return _TRUST[key]


def sample(shape: tuple[int, ...], phase: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Numbers to try a kernel on, without drawing any: on the device and of the dtype of `like`."""
    values = (1.7 * torch.arange(math.prod(shape), device=like.device) + phase).sin()
    return values.view(shape).to(dtype or like.dtype)
