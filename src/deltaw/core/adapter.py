"""An adapter: trainable tensors beside one slot of a frozen host, called around the host's own forward.

    y  = adapter(host, call, strength, x)      call(x) is the next thing inside: other adapters, then the base
    W' = adapter.merged(W)                     the same change as a weight, where there is one

A parameter is an adapter's because it lives under an Adapter, never because of its name.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltaw.core.host import Host, HostSpec, WeightHost, wide

Call = Callable[..., Any]


class Factors(NamedTuple):
    """W' = W + scale · b @ a, with a: [r, fan_in] and b: [out, r]. The scale is always part of the change.

    Of a stack of E weights a: [E, r, fan_in] and b: [E, out, r].
    """

    a: Tensor
    b: Tensor
    scale: float


class Change(NamedTuple):
    """The forward of an adapter as a host may compute it together with its own: W' = gain ⊙ (W + scale · b @ a)."""

    a: Tensor
    b: Tensor
    scale: float | Tensor
    gain: Tensor | None = None
    """[out], in fp32 or wider; None for ones."""
    dropout: float = 0.0
    """Share of a's input that is dropped now."""


class Adapter(nn.Module):
    """Base of all adapters. Subclasses hold Parameters and override `forward`.

    Parameters are trained. Persistent buffers are frozen and part of the adapter as well (first factors); buffers that
    are not persistent are the memory of training (`Method.after_step`), which ends with it.
    """

    name: str
    """The adapter's name in the model, and its resolved `method`: both set when it is attached."""
    method: Any
    spec: HostSpec
    """The shape it was made for: of an adapter that follows ties, that of its own site."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Go where the model goes, but not below fp32: model.to(bfloat16) must not round the trained tensors."""

        def move(tensor: Tensor) -> Tensor:
            like = fn(tensor.new_empty(0))
            return fn(tensor) if like.dtype in (tensor.dtype, torch.float32, torch.float64) else tensor.to(like.device)

        return super()._apply(move, recurse)

    def memory(self) -> dict[str, Tensor]:
        """The buffers that are not persistent, by name."""
        kept = self.state_dict()
        return {name: buffer for name, buffer in self.named_buffers() if name not in kept}

    def start_from(self, host: Any) -> None:
        """Set initial values that depend on the base (magnitudes, copies). Called by `attach`, not by `insert`."""

    def forward(self, host: Any, call: Call, strength: Tensor | None, *args: Any, **kwargs: Any) -> Any:
        """Around-call. `strength` is None for full strength, else a 0-dim tensor (never 0: then it is not called).

        An adapter without a ΔW has no partial strengths; `use` refuses them before they get here.
        """
        raise NotImplementedError


class WeightAdapter(Adapter):
    """An adapter whose change can be written into the weight: strength w scales ΔW = merged(W) − W."""

    dropout: float = 0.0
    """Share of the branch's inputs that `dropped` sets to zero in training, of methods that have it."""

    def merged(self, weight: Tensor) -> Tensor:
        """Canonical weight with the change, pure; fp32 in and fp32 out (fp64 where the base is that)."""
        raise NotImplementedError

    thin: bool = False
    """True where forward is best done with its `as_change`: hosts may then fuse it with their own, and `branch` is not asked.
    A subclass says so itself."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.thin = cls.__dict__.get("thin", False)

    @property
    def movable(self) -> bool:
        """May its factors become slices of larger tensors (`core.bank.Bank`), by `move_into`?"""
        return False

    def move_into(self, a: Tensor, bt: Tensor) -> None:
        """Keep its factors in a [r, in] and bt [r, out] from now on; their values go along."""
        raise NotImplementedError

    added: int = 0
    """Rows that it brings to a table: its merged weight is so much larger."""

    def beside(self, host: Any) -> "Sequence[tuple[WeightAdapter, Host]]":
        """Further slots of the module that a merge must write with the weight, each with what changes it: a scaled bias."""
        return ()

    def factors(self) -> Factors | None:
        """The change as low-rank factors where it is exactly that, else None."""
        return None

    def as_change(self, host: Any, strength: Tensor | None, alone: bool) -> Change | None:
        """What `thin` ones do, with a [r, in] and b [out, r]; None where `branch` must be asked this time.

        alone: the host makes x Wᵀ at the same time. Otherwise that is done, and it can only add to it: no gain.
        """
        found = self.factors() if self.thin else None
        if found is None or type(self).dropped is not WeightAdapter.dropped:
            return None
        scale = found.scale if strength is None else found.scale * strength
        return Change(found.a, found.b, scale, None, self.dropout if self.drops else 0.0)

    def branch(self, host: Any, x: Tensor) -> Tensor:
        """What full strength adds to the layer's output: op(x, ΔW). Override where W need not be formed."""
        weight = host.weight
        full = wide(weight)
        return host.op(x, (self.merged(full) - full).to(weight.dtype))

    def weighted(self, host: Any, x: Tensor, strength: Tensor) -> Tensor:
        """The branch at another strength, multiplied in fp32 or wider. Override where a smaller tensor can take the factor."""
        change = self.branch(host, x)
        return (strength * wide(change)).to(change.dtype)

    def dropped(self, x: Tensor) -> Tensor:
        """Dropout on the branch's input, in training; ids have none. Thin ones have it from the host, unless they override this."""
        return F.dropout(x, self.dropout) if self.drops and x.is_floating_point() else x

    @property
    def drops(self) -> bool:
        """Is dropout active now?"""
        return bool(self.dropout) and self.training

    def forward(self, host: Any, call: Call, strength: Tensor | None, *args: Any, **kwargs: Any) -> Any:
        return host.adapted(self, call, strength, *args, **kwargs)


def compute_dtype(host: WeightHost | Host, x: Tensor) -> Any:
    """The base's compute dtype: that of the activations, or of the weight where the input is integer ids."""
    return x.dtype if x.dtype.is_floating_point else host.weight.dtype  # type: ignore[union-attr]
