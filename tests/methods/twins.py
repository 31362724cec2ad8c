"""The same tensors in PEFT's module and in ours."""

import copy
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn

from deltaw.core.attach import adapters, attach
from deltaw.core.method import Method


def twins(layer: nn.Module, method: Method, config: Any) -> tuple[nn.Module, nn.Module]:
    """`layer` adapted by `method`, and by PEFT with `config`, both holding the same random tensors."""
    ours = nn.Sequential(copy.deepcopy(layer))
    theirs = get_peft_model(nn.Sequential(copy.deepcopy(layer)), config)
    attach(ours, method, targets="0")
    (adapter,) = adapters(ours).values()
    given = {path.split(".")[-2]: p for path, p in theirs.named_parameters() if path.endswith(".default")}
    trained = dict(adapter.named_parameters())
    assert given.keys() == trained.keys() and all(given[k].shape == trained[k].shape for k in given)
    with torch.no_grad():
        for name, tensor in trained.items():
            tensor.normal_()
            given[name].copy_(tensor)
    return ours, theirs


@torch.no_grad()
def differ(ours: nn.Module, theirs: nn.Module, x: Tensor) -> float:
    """Largest difference of the outputs, as a share of the largest value."""
    a, b = ours(x), theirs(x)
    assert a.shape == b.shape
    return float((a - b).abs().max() / b.abs().max().clamp_min(1.0))
