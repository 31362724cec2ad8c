"""Layers that a module calls with the same x may be computed at once, when the first of them is called.

    with Together(groups, compute):          around the module's own forward, in its own thread
        q = self.q_proj(x)                   compute((q_proj, k_proj, v_proj), x): the outputs of all three
        k, v = self.k_proj(x), self.v_proj(x)        what is ready; with another x they compute as ever

The module's forward stays as it is, and calls its layers, with their hooks. Who makes groups: `fusion.siblings`.
"""

import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

from torch import Tensor, nn

Group = Sequence[nn.Module]
"""Layers in the order in which they are called."""


class _Now(threading.local):
    call: "Together | None" = None


_now = _Now()


class Together:
    """One call of a module, as long as it lasts."""

    def __init__(self, groups: Sequence[Group], compute: Callable[[Group, Tensor], Sequence[Tensor] | None]):
        """compute: the output of every layer of a group, or None where each must go by itself this time."""
        self.groups, self.compute = {group[0]: group for group in groups}, compute
        self.ready: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        """Layer → x and its output there."""

    def __enter__(self) -> Self:
        self.around, _now.call = _now.call, self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        _now.call = self.around
        self.ready.clear()

    def output(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """The layer's output where it is ready, or becomes so with those called after it; None: let it compute."""
        if len(args) != 1 or kwargs:
            return None
        x = args[0]
        if layer in self.ready:
            seen, y = self.ready.pop(layer)
            if seen is x:
                return y
        group = self.groups.get(layer)
        outputs = None if group is None else self.compute(group, x)
        if group is None or outputs is None:
            return None
        self.ready.update(zip(group[1:], ((x, y) for y in outputs[1:]), strict=True))
        return outputs[0]


def now() -> Together | None:
    """The call that this thread is in."""
    return _now.call
