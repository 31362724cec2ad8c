"""Gated MLPs (Llama, Mistral, Qwen, Gemma, …) that keep two tensors of [T, inner] for the backward pass instead of four.

    y = down(act(gate(x)) ⊙ up(x)), its second half by `kernels.glu`, gate and up together by `kernels.siblings`

An MLP is known by its structure: two linear layers [inner, width], one [width, inner], an activation, and a forward that
equals the formula, to the bit, on a random input. gate and up are called as modules, whatever they carry; down must be
a plain linear layer with at most one adapter on it that hosts can fuse (`WeightAdapter.as_change`). Where that is not so
at the moment of a call (two live adapters, hooks, autocast), the class's own forward runs.
"""

import contextlib
import copy
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from deltaw.core.carried import base_class_of, carried
from deltaw.core.host import host_of
from deltaw.core.together import Together
from deltaw.fusion.siblings import together
from deltaw.kernels.glu import ACTIVATIONS, glu_down

KEY = "_deltaw_fused"


class Parts(NamedTuple):
    """Names of an MLP's first two layers, the view of its last, and its activation."""

    gate: str
    up: str
    down: Any
    kind: str


class FusedMLP:
    """Mixin in front of an MLP's class."""

    unfused: ClassVar[type[nn.Module]]

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down, kind = self.__dict__[KEY]
        simple = down.simple() if torch.is_grad_enabled() else None
        if (
            simple is None
            or down.module._forward_hooks
            or down.module._forward_pre_hooks
            or down.module._backward_hooks
        ):
            return super().forward(x)  # type: ignore[misc, no-any-return]
        weight, bias, change = simple
        first, second = getattr(self, gate), getattr(self, up)
        with contextlib.nullcontext() if torch.compiler.is_compiling() else Together([(first, second)], together):
            opened, beside = first(x), second(x)
        return glu_down(opened, beside, weight, bias, change, kind)


def parts_of(module: nn.Module) -> Parts | None:
    """The parts of a gated MLP, or None for anything else."""
    children = dict(module.named_children())
    linear = {name: child for name, child in children.items() if issubclass(base_class_of(child), nn.Linear)}
    others = [child for name, child in children.items() if name not in linear]
    if len(linear) != 3 or len(others) != 1 or carried(module) or module._parameters or "forward" in module.__dict__:
        return None
    shapes: dict[str, tuple[int, int]] = {n: (c.out_features, c.in_features) for n, c in linear.items()}  # type: ignore[misc]
    for down, (width, inner) in shapes.items():
        first, second = (name for name in shapes if name != down)
        if shapes[first] == shapes[second] == (inner, width):
            kind = _kind(others[0])
            for gate, up in ((first, second), (second, first)) if kind else ():
                parts = Parts(gate, up, host_of(linear[down]), str(kind))
                if _equal(module, parts, width):
                    return parts
    return None


@torch.no_grad()
def _kind(act: nn.Module) -> str | None:
    x = torch.linspace(-4, 4, 101)
    if any(True for _ in act.parameters()):
        return None
    return next((kind for kind, known in ACTIVATIONS.items() if torch.equal(act(x), known.forward(x))), None)


@torch.enable_grad()  # as in training: a decoding step may be computed in another way
def _equal(module: nn.Module, parts: Parts, width: int) -> bool:
    """Does the module compute what the fused form does? Both on a small random input, in its own dtype."""
    if parts.down.module.weight.device.type == "meta":
        return _alike(module, parts)
    training = module.training
    module.eval()
    try:
        simple = parts.down.simple()
        if simple is None:
            return False
        generator = torch.Generator().manual_seed(0)
        weight, bias, change = simple
        x = torch.randn(2, width, generator=generator).to(weight)
        gate, up = (module.get_submodule(name)(x) for name in (parts.gate, parts.up))
        return torch.equal(glu_down(gate, up, weight, bias, change, parts.kind), module(x))
    finally:
        module.train(training)


def _alike(module: nn.Module, parts: Parts) -> bool:
    """Is a small one of its kind, with numbers in it, such an MLP? An outline has shapes and no weights to try."""
    small = copy.copy(module)
    shapes = {parts.gate: (8, 24), parts.up: (8, 24)}
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        small._modules = {
            name: nn.Linear(*shapes.get(name, (24, 8)), bias=child.bias is not None).requires_grad_(False)
            if issubclass(base_class_of(child), nn.Linear)
            else child
            for name, child in module.named_children()
        }
    return parts_of(small) is not None
