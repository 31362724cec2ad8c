"""Does a layer compute what its host says? Its own forward beside op(x, W) + b, on a small random input."""

from typing import Any

import torch
from torch import Tensor


def departs(host: Any) -> str | None:
    """Why the layer is not op(x, W) + b, or None where it is, to the rounding of its dtype."""
    module, name = host.module, type(host.module).__name__
    if host.parameter.device.type == "meta":
        return None
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        x = host.probe().to(host.parameter.device)
        x = x.to(host.weight.dtype) if x.is_floating_point() else x
        ours, bias = host.op(x, host.weight), getattr(module, "bias", None)
        if bias is not None:
            ours = ours + bias.view(-1, *([1] * (-1 - host.out_dim)))
        try:
            theirs = module(x)
        except Exception as error:  # OPT's positions: an embedding by its class, called with a mask
            return f"{name} is not called with x alone ({type(error).__name__}: {error})"
    if not isinstance(theirs, Tensor) or ours.shape != theirs.shape:
        return f"{name} does not return x·Wᵀ + b"
    near = 1e-2 * float(theirs.float().abs().max()) + 1e-6
    close = torch.allclose(ours.float(), theirs.float(), rtol=1e-2, atol=near)
    return None if close else f"{name} computes something else than x·Wᵀ + b, an adapter could not be merged"
