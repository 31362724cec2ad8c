"""The optimizer of a run: AdamW over the adapter's tensors, grouped by their learning rates.

rate of a tensor = train.learning_rate, or that of its part × train.rates (by the module's path) × Method.rates (by the
                   tensor's name)
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from deltaw.config.schema import TrainConfig
from deltaw.core.attach import adapters
from deltaw.core.errors import TargetError, UseError, did_you_mean


def groups(
    model: nn.Module, name: str, config: TrainConfig, peaks: Callable[[str], float] | None = None
) -> list[dict[str, Any]]:
    """Parameter groups of adapter `name`, one for each learning rate. TargetError for rates that hit no module.

    peaks: path of a module → its peak learning rate, where that is not the same for all.
    """
    found: dict[float, list[nn.Parameter]] = {}
    hit: set[str] = set()
    paths = []
    for site, adapter in adapters(model, name).items():
        paths.append(site.path)
        pattern = next((p for p in config.rates if re.fullmatch(p, site.path)), None)
        hit |= {pattern} if pattern is not None else set()
        factors: Mapping[str, float] = adapter.method.rates()
        peak = config.learning_rate if peaks is None else peaks(site.path)
        for tensor, parameter in adapter.named_parameters():
            if parameter.requires_grad:
                factor = (1.0 if pattern is None else config.rates[pattern]) * factors.get(tensor, 1.0)
                found.setdefault(peak * factor, []).append(parameter)
    dead = [p for p in config.rates if p not in hit]
    if dead:
        raise TargetError(
            f"train.rates: {dead[0]!r} matches the whole path of no adapted module{did_you_mean(dead[0], paths)}"
        )
    return [{"params": parameters, "lr": rate} for rate, parameters in found.items()]


def build(given: list[dict[str, Any]], config: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer of the configuration over parameter groups."""
    options = {"lr": config.learning_rate, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": config.weight_decay}
    if config.optimizer == "adamw":
        fused = all(parameter.device.type in ("cuda", "cpu") for group in given for parameter in group["params"])
        return torch.optim.AdamW(given, fused=fused, **options)
    try:
        import bitsandbytes
    except ImportError:
        raise UseError(f"train.optimizer: {config.optimizer} needs bitsandbytes: pip install 'deltaw[quant]'") from None
    kind = bitsandbytes.optim.PagedAdamW8bit if config.optimizer.startswith("paged") else bitsandbytes.optim.AdamW8bit
    return kind(given, **options)
