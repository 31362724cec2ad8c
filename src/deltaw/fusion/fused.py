"""Faster forms of a model's blocks, for the time of a training, by the classes of their modules.

    with fused(model) as n:         gated MLPs by `fusion.mlp`, other modules whose layers share an x by `fusion.siblings`
        train(model)

Attach first. Numbers stay what they were, to rounding; what does not fit at the moment of a call runs the class's own forward.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from deltaw.core.base import unwrapped
from deltaw.fusion import mlp, siblings


@contextlib.contextmanager
def fused(model: nn.Module) -> Iterator[int]:
    """Swap the class of every block of `model` that allows it, and back at the end; gives the number of MLPs."""
    found: list[nn.Module] = []
    count = 0
    try:
        for module in list(unwrapped(model).modules()):
            if hasattr(type(module), "unfused"):
                continue  # in the block of another `fused`
            if (parts := mlp.parts_of(module)) is not None:
                _swap(module, mlp.FusedMLP, mlp.KEY, parts)
                count += 1
            elif siblings.candidates(module):
                _swap(module, siblings.FusedSiblings, siblings.KEY, {})
            else:
                continue
            found.append(module)
        yield count
    finally:
        for module in found:
            module.__class__ = type(module).unfused  # type: ignore[attr-defined]
            for key in (mlp.KEY, siblings.KEY):
                module.__dict__.pop(key, None)


_CLASSES: dict[tuple[type, type[nn.Module]], type[nn.Module]] = {}


def _swap(module: nn.Module, mixin: type, key: str, value: Any) -> None:
    own = type(module)
    if (mixin, own) not in _CLASSES:
        facts = {"unfused": own, "__module__": own.__module__}
        _CLASSES[mixin, own] = type(f"Fused{own.__name__}", (mixin, own), facts)
    module.__dict__[key] = value
    module.__class__ = _CLASSES[mixin, own]
