"""The shape of a slot as adapters see it, [out, in, *kernel]: all that a method needs to build one."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class HostSpec:
    """What a Method must know to build an adapter: shapes only, no live model."""

    shape: tuple[int, ...]
    """Canonical shape of the slot: [out, in, *kernel] where the layer is linear in it, else the parameter's own."""
    stack: int | None = None
    """Number of weights of this shape side by side in the slot (experts), where it is a stack of them."""
    groups: int = 1
    """Groups of a convolution; `in` counts the channels of one group."""
    lookup: bool = False
    """True where the input is integer ids (embedding): then A starts at zero and B is random."""
    linear: bool = True
    """True where the layer's output is linear in this slot, so that a ΔW can be added to it."""

    @property
    def out_features(self) -> int:
        return self.shape[0]

    @property
    def fan_in(self) -> int:
        """Inputs that one output reads: in × kernel size."""
        return self.numel // self.shape[0]

    @property
    def whole(self) -> tuple[int, ...]:
        """Shape of the canonical weight, with the stack in front where there is one."""
        return self.shape if self.stack is None else (self.stack, *self.shape)

    @property
    def numel(self) -> int:
        """Numbers in one weight."""
        return math.prod(self.shape)
