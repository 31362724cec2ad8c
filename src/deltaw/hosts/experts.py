"""Mixture-of-experts stacks of transformers (Mixtral, Qwen-MoE, DeepSeek, OLMoE, gpt-oss, …): E experts in two weights.

    gate_up_proj   [E, 2·inner, hidden]      up_proj in models without a gate       h_e = act(gate) · up
    down_proj      [E, hidden, inner]        gpt-oss and Aria store transposes      y_e = W_e h_e (+ bias_e)

Each is one slot with `stack` = E. The activation stands between the two inside one forward, out of reach of a call
around it. So while the module runs, a `Product` stands in the place of an adapted parameter: it is W + L·R, never
formed, and whatever multiplies by it multiplies by W, and by L and R one after the other. The module's own code runs,
be it the loop over experts (eager), batched_mm or grouped_mm, on the rows of x that it made itself; neither its config
nor the table of implementations is touched. An implementation that does something else with its weights is refused.

The classes are known by what dispatches their forward, an `ExpertsInterface` of transformers, not by their names.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltaw.core.adapter import Call, WeightAdapter
from deltaw.core.carried import base_class_of
from deltaw.core.errors import UseError
from deltaw.core.host import HostSpec, WeightHost, register

INTERFACE = "transformers.integrations.moe.ExpertsInterface"
KNOWN = {torch.float64, torch.float32, torch.bfloat16, torch.float16}


def dispatched(layer: type) -> bool:
    """Is the class's own forward the one that transformers' `use_experts_implementation` gave it?"""
    cells = getattr(layer.__dict__.get("forward"), "__closure__", None) or ()
    kinds = [type(cell.cell_contents) for cell in cells]
    return any(f"{kind.__module__}.{kind.__qualname__}" == INTERFACE for kind in kinds)


@register(dispatched)
class ExpertsHost(WeightHost):
    slots = ("gate_up_proj", "up_proj", "down_proj")
    module: Any

    @classmethod
    def has(cls, module: nn.Module, slot: str) -> bool:
        return super().has(module, slot) and slot in cls.slots and module._parameters[slot].ndim == 3  # type: ignore[union-attr]

    @property
    def spec(self) -> HostSpec:
        stack, *shape = self.weight.shape
        return HostSpec(tuple(shape), stack=stack)

    @property
    def weight(self) -> Tensor:
        return self._canonical(self.parameter)  # [E, out, in]

    def write(self, weight: Tensor) -> None:
        super().write(self._canonical(weight))

    def _canonical(self, weight: Tensor) -> Tensor:
        return weight.mT if self.module.is_transposed else weight  # its own inverse

    def adapted(self, adapter: WeightAdapter, call: Call, strength: Tensor | None, *args: Any, **kwargs: Any) -> Any:
        factors = adapter.factors()
        assert factors is not None, "methods that sit on stacks have factors"
        a, b, scale = factors  # [E, r, in], [E, out, r]

        def change(current: Any, base: Tensor) -> Product:
            right, left = a.to(base.dtype), ((scale if strength is None else scale * strength) * b).to(base.dtype)
            if self.module.is_transposed:
                left, right = right.mT, left.mT
            whole = current if isinstance(current, Product) else Product(current)
            return Product(whole.weight, (*whole.terms, (left, right, adapter.dropped)))

        with self.replaced(change):
            return call(*args, **kwargs)

    def fault(self) -> str | None:
        module, layer = self.module, base_class_of(self.module)
        if self.parameter.dtype not in KNOWN:
            return f"its experts are stored as {self.parameter.dtype}: load the base without quantisation"
        if module._is_expert_parallel:
            return "its experts are spread over several devices: attach before that"
        if not dispatched(layer):
            return f"{layer.__name__} brings a forward of its own, which may not run its experts as its base class does"
        return None


Term = tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]


class Product:
    """W + Σ L·R, in the layout that the module stores, as an operand: x·(W + L·R) = x·W + (x·L)·R.

    weight: [E, p, q] or [p, q]; of each term left: [E, p, r], right: [E, r, q], and what drops parts of its input.
    """

    def __init__(self, weight: Tensor, terms: tuple[Term, ...] = ()):
        self.weight, self.terms = weight, terms

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Product":
        return Product(
            change(self.weight), tuple((change(left), change(right), drop) for left, right, drop in self.terms)
        )

    def __getitem__(self, expert: Any) -> "Product":
        return self._each(lambda stack: stack[expert])

    def float(self) -> "Product":
        return self._each(lambda stack: stack.float())

    def transpose(self, one: int, other: int) -> "Product":
        terms = tuple((r.transpose(one, other), l.transpose(one, other), drop) for l, r, drop in self.terms)
        return Product(self.weight.transpose(one, other), terms)

    def __add__(self, change: Tensor) -> "Product":  # a trained copy of the same weight
        return Product(self.weight + change, self.terms)

    def to(self, dtype: torch.dtype) -> "Product":
        return self._each(lambda stack: stack.to(dtype))

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.weight.device

    @property
    def shape(self) -> torch.Size:
        return self.weight.shape

    def data_ptr(self) -> int:
        return self.weight.data_ptr()

    def __getattr__(self, name: str) -> Any:
        raise UseError(_unknown(name))

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if len(args) != 2:
            raise UseError(_unknown(function))
        if function is torch.bmm and isinstance(args[0], cls):  # (W + L·R)·x
            product, x = args
            y = torch.bmm(product.weight, x)
            for left, right, drop in product.terms:
                y = y + torch.bmm(left, torch.bmm(right, drop(x)))
            return y
        x, product = args
        if not isinstance(product, cls) or isinstance(x, cls):
            raise UseError(_unknown(function))
        y = function(x, product.weight, **kwargs)
        for left, right, drop in product.terms:
            if function is F.linear:  # by the transpose
                first, second = right, left
            elif function is torch.bmm or function is torch.matmul or function is torch.Tensor.matmul:
                first, second = left, right
            elif "offs" in kwargs:  # grouped_mm and what stands for it
                first, second = _aligned(left, right)
            else:
                raise UseError(_unknown(function))
            y = y + function(function(drop(x), first, **kwargs), second, **kwargs)
        return y


def _aligned(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """grouped_mm wants rows of whole 16 bytes: zeros up to the next rank that has them."""
    short = -left.shape[-1] % (16 // left.element_size())
    return (F.pad(left, (0, short)), F.pad(right, (0, 0, 0, short))) if short else (left, right)


def _unknown(what: Any) -> str:
    return (
        f"this experts implementation does more with its weights than multiply by them ({getattr(what, '__name__', what)}): "
        "adapters on experts run with eager, batched_mm and grouped_mm, set by model.set_experts_implementation(…)"
    )
