"""What a piece of torch code takes: bytes of the storages that are alive, and the work of its operators; on the meta device too.

    with Meter(model) as meter:     meter.alive, meter.peak: bytes of what was made since, not of the model's own tensors
        …                           meter.work: [(floating-point operations, bytes read and written)] of its operators

Attention has a kernel on every device but this one, where it would be written out: `attention` puts the kernels' shapes there.
"""

import contextlib
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

aten: Any = torch.ops.aten
ALONE = threading.Lock()
SHAPES: dict[Any, list[Any] | None] = {}
"""Size, stride and dtype of what an operator gives, by what it is given; None for what has to be asked every time."""


class Meter(TorchDispatchMode):
    """Bytes of the storages that are alive, of those made while it is on, and not of the model's own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self.work: list[tuple[int, int]] = []
        there = (t.untyped_storage() for t in (*model.parameters(), *model.buffers()))
        self._known: dict[int, Any] = {storage._cdata: storage for storage in there}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, given = _together(func, args, kwargs or {})
        if func is aten._local_scalar_dense.default and args[0].device.type == "meta":
            # models ask whether all positions are in order, and all images have their places: they are, they have
            return True if args[0].dtype == torch.bool else 1
        out = _result(func, args, given)
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        for tensor in made:
            self._see(tensor)
        if not func.is_view and made:
            read = [t for t in tree_leaves((args, given)) if isinstance(t, Tensor)]
            moved = sum(t.numel() * t.element_size() for t in (*read, *made))
            count = flop_registry.get(func._overloadpacket)
            self.work.append((int(count(*args, **given, out_val=out)) if count else 0, moved))
        return out

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()

        def gone(_: Any) -> None:
            self.alive -= size
            self._known.pop(key, None)

        self._known[key] = weakref.ref(storage, gone)
        self.alive += size
        self.peak = max(self.peak, self.alive)


def _together(func: Any, args: Any, kwargs: Any) -> Any:
    """Tensors with numbers (of a batch) lose them where they meet one without, and not before; which places a mask chooses is
    found with them."""
    if func is aten._to_copy.default and "meta" in (args[0].device.type, getattr(kwargs.get("device"), "type", "")):
        kwargs = {**kwargs, "device": args[0].device}
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.ndim]
    if len({t.device for t in tensors}) < 2 or not any(t.device.type == "meta" for t in tensors):
        return args, kwargs
    if func is aten.index.Tensor:
        args = args[0], [place for index in args[1] for place in _places(index)]
    return tree_map_only(Tensor, lambda t: t.to("meta") if t.ndim else t, (args, kwargs))


def _places(index: Any) -> Any:
    chosen = isinstance(index, Tensor) and index.dtype == torch.bool and index.device.type != "meta"
    return index.nonzero().unbind(1) if chosen else (index,)


def _result(func: Any, args: Any, kwargs: Any) -> Any:
    """func(*args, **kwargs); on tensors without numbers the same question is answered once, which takes torch 0.3 ms."""
    if func.is_view or func._schema.is_mutable:
        return func(*args, **kwargs)
    leaves = tree_leaves((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if not tensors or any(t.device.type != "meta" for t in tensors):
        return func(*args, **kwargs)
    if func is aten._grouped_mm.default and args[0].dtype != torch.bfloat16:
        return _grouped(*args[:2], kwargs.get("offs", args[2] if len(args) > 2 else None))
    key = func, tuple(map(_asked, leaves)), tuple(kwargs)
    known = SHAPES.get(key)
    if known is not None:
        made = tuple(map(_made, known))
        return made[0] if len(made) == 1 else made
    out = func(*args, **kwargs)
    if key not in SHAPES:
        SHAPES[key] = _described(out, tensors)
    return out


def _grouped(a: Tensor, b: Tensor, ends: Tensor | None) -> Tensor:
    """What products of stacked experts give in other dtypes than bf16, the only one that they have here: rows of each expert in
    a [T, K] or b [K, T], or in both, [M, T] and [T, N], which gives [E, M, N]."""
    stacks = [len(ends)] if ends is not None and a.ndim == b.ndim == 2 else list(a.shape[:-2]) if b.ndim == 3 else []
    return a.new_empty([*stacks, a.shape[-2], b.shape[-1]])


def _asked(given: Any) -> Any:
    """A tensor's size, stride and dtype; of all else its class too, for 1, 1.0 and True are equal."""
    return (given.shape, given.stride(), given.dtype) if isinstance(given, Tensor) else (type(given), given)


def _described(out: Any, given: list[Tensor]) -> list[Any] | None:
    """What makes up a result of one tensor, or a tuple of some, that shares memory neither with itself nor with what was given."""
    made = [out] if isinstance(out, Tensor) else list(out) if type(out) is tuple and len(out) > 1 else []
    if not made or not all(isinstance(t, Tensor) and t.device.type == "meta" for t in made):
        return None
    taken = {t.untyped_storage()._cdata for t in given}
    own = {t.untyped_storage()._cdata for t in made}
    found = [(t.shape, t.stride(), t.dtype) for t in made]
    sizes = [[t.untyped_storage().nbytes() for t in some] for some in (made, map(_made, found))]
    return found if sizes[0] == sizes[1] and len(own) == len(made) and not taken & own else None


def _made(one: Any) -> Tensor:
    shape, stride, dtype = one
    return torch.empty_strided(shape, stride, dtype=dtype, device="meta")


@contextlib.contextmanager
def attention(device: str) -> Iterator[None]:
    """Outlines attend as `device` does; tensors with numbers in them, of other threads, as ever."""
    own = F.scaled_dot_product_attention

    def attend(
        q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        if q.device.type != "meta":
            return own(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        shared = enable_gqa and device == "cuda" and (attn_mask is not None or q.dtype == torch.float32)
        if shared or device not in ("cpu", "cuda") or (device == "cpu" and dropout_p):  # no kernel has all that
            return own(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill(attn_mask, 0.0)
        if device == "cpu":
            kernel = aten._scaled_dot_product_flash_attention_for_cpu
            return kernel(q, k, v, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]  # type: ignore[no-any-return]
        if attn_mask is None and q.dtype != torch.float32:
            return aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, scale=scale)[0]  # type: ignore[no-any-return]
        kernel = aten._scaled_dot_product_efficient_attention
        return kernel(q, k, v, attn_mask, True, dropout_p, is_causal, scale=scale)[0]  # type: ignore[no-any-return]

    # a mode of torch would not hold in the backward pass, where checkpoints run
    with ALONE:
        own = F.scaled_dot_product_attention
        F.scaled_dot_product_attention = attend
        try:
            yield
        finally:
            F.scaled_dot_product_attention = own
