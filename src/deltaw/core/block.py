"""What forward-only methods ask of a transformer block: its sublayers, without saying how a family builds them.

    SublayerHost       attention or feed-forward, from where its output joins the residual stream:  x + [sublayer(x)]
    FeedForwardHost    … of a feed-forward sublayer, whose input is known too
    AttentionHost      self-attention from inside: queries, keys and values of the heads, before they are projected

The kinds are in `deltaw.hosts.block` and `deltaw.hosts.attention`. Their slots are places in the forward, no parameters.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.core.carried import base_class_of
from deltaw.core.host import TURNS, Host, HostSpec


class BlockHost(Host):
    """A view whose slot is a place in the module's forward."""

    module: Any

    @classmethod
    def has(cls, module: nn.Module, slot: str) -> bool:
        return slot in cls.slots

    def fault(self) -> str | None:
        layer: Any = base_class_of(self.module)
        if layer.forward is self.registered.forward:
            return None
        return (
            f"{layer.__name__} brings a forward of its own, where an adapter for {self.registered.__name__} might miss: "
            "register a host for it"
        )


class SublayerHost(BlockHost):
    slots = ("output",)

    @property
    def width(self) -> int:
        """Features of the residual stream."""
        raise NotImplementedError

    @property
    def spec(self) -> HostSpec:
        return HostSpec((self.width, self.width), linear=False)

    def after(self, call: Callable[..., Any], change: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Any:
        """The module's call with `change` applied to the sublayer's output, after dropout, before the residual add."""
        raise NotImplementedError


class FeedForwardHost(SublayerHost):
    def beside(self, call: Callable[..., Any], branch: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Any:
        """The module's call with `branch` of the sublayer's input added to its output, before the residual add."""
        raise NotImplementedError


class AttentionHost(BlockHost):
    """Heads have positions where the family rotates queries; grouped keys and values are repeated for every head."""

    slots = ("heads",)

    @property
    def spec(self) -> HostSpec:
        """[heads, features of the residual stream]"""
        raise NotImplementedError

    @property
    def scaling(self) -> float:
        """Of the scores, 1/√d of a head in most families."""
        raise NotImplementedError

    def keys_values(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """tokens [K, width] → keys and values [1, heads, K, d], by the layer's own modules, without positions."""
        raise NotImplementedError

    def around(self, call: Callable[..., Any], more: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Any:
        """The module's call with more(queries [B, heads, T, d]) → [B, T, heads·d] added before the output projection."""
        raise NotImplementedError


def turn() -> Any:
    """Threads take turns: around all that reads a module's children and then puts functions in their places."""
    return contextlib.nullcontext() if torch.compiler.is_compiling() else TURNS


@contextlib.contextmanager
def shadowed(module: nn.Module, **children: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Run the module with functions in the place of some children; several nest."""
    there = module.__dict__  # an entry here is found before the child itself, which stays where it is
    with turn():
        before = {name: there[name] for name in children if name in there}
        try:
            for name, function in children.items():
                there[name] = function
            yield
        finally:
            for name in children:
                if name in before:
                    there[name] = before[name]
                else:
                    there.pop(name, None)
