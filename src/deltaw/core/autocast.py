"""Autocast, asked and switched off on every device: torch has none on the meta device, and raises there."""

import contextlib
from typing import Any

import torch
from torch import Tensor


def autocasts(x: Tensor) -> bool:
    """Would autocast change the dtype of a product with x?"""
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def exact(x: Tensor) -> Any:
    """A context in which products with x keep the dtype of what they are given."""
    return contextlib.nullcontext() if x.device.type == "meta" else torch.autocast(x.device.type, enabled=False)
