"""Layers that a module calls with the same x may be computed at once, when the first of them is called.

    with Together(groups, compute):          around the module's own forward, in its own thread
        q = self.q_proj(x)                   compute((q_proj, k_proj, v_proj), x): the outputs of all three
        k, v = self.k_proj(x), self.v_proj(x)        what is ready; with another x they compute as ever

The module's forward stays as it is, and calls its layers, with their hooks. What is ready is taken only if nothing changed
since: x, gradients, autocast, what is live. Who makes groups: `fusion.siblings`.
"""

import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from deltaw.core.autocast import autocasts
from deltaw.core.carried import Live, here

Group = Sequence[nn.Module]
"""Layers in the order in which they are called."""


class _Now(threading.local):
    call: "Together | None" = None


_now = _Now()


class _Ready(NamedTuple):
    """An output, and what must still be so when its layer is called."""

    x: Tensor
    output: Tensor
    live: tuple[Live, ...]
    as_of: tuple[int, bool, bool]


class Together:
    """One call of a module, as long as it lasts."""

    def __init__(self, groups: Sequence[Group], compute: Callable[[Group, Tensor], Sequence[Tensor] | None]):
        """compute: the output of every layer of a group, or None where each must go by itself this time."""
        self.groups, self.compute = {group[0]: group for group in groups}, compute
        self.ready: dict[nn.Module, _Ready] = {}

    def __enter__(self) -> Self:
        self.around, self.savers, _now.call = _now.call, _savers(), self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        _now.call = self.around
        self.ready.clear()

    def output(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """The layer's output where it is ready, or becomes so with those called after it; None: let it compute."""
        ready, group = self.ready.pop(layer, None), self.groups.get(layer)
        if (ready is None and group is None) or len(args) != 1 or kwargs or args[0].is_inference():
            return None
        if _savers() != self.savers:
            return None  # a checkpoint inside the module: what it computes again must save the same tensors
        x = args[0]
        if ready is not None and ready.x is x and ready.live is here(layer).live and ready.as_of == _circumstances(x):
            return ready.output
        if group is None or any(one._forward_pre_hooks or "forward" in one.__dict__ for one in group[1:]):
            return None  # what runs before a later layer may change it
        outputs = self.compute(group, x)
        if outputs is None:
            return None
        for one, y in zip(group[1:], outputs[1:], strict=True):
            self.ready[one] = _Ready(x, y, here(one).live, _circumstances(x))
        return outputs[0]


def _circumstances(x: Tensor) -> tuple[int, bool, bool]:
    return x._version, torch.is_grad_enabled(), autocasts(x)


def _savers() -> Any:
    """The innermost hooks of saved tensors, by which a checkpoint is known."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False)


def now() -> Together | None:
    """The call that this thread is in."""
    return _now.call
