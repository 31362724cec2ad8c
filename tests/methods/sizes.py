"""What a computation keeps for its backward pass, and the largest tensor it makes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def kept(compute: Callable[[], Tensor]) -> list[int]:
    """Sizes of the tensors kept for the backward pass."""
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        compute()
    return sizes


def largest(compute: Callable[[], Any]) -> int:
    """The largest new tensor that any operation returns, backward pass included where `compute` runs one."""

    class Watch(TorchDispatchMode):
        most = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else [out]:
                if isinstance(tensor, Tensor) and not func.is_view:
                    Watch.most = max(Watch.most, tensor.numel())
            return out

    with Watch():
        compute()
    return Watch.most
