"""Small adapters on a plain module: written by deltaw, by hand as PEFT writes them, and mixed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import deltaw
from deltaw import LoRA
from deltaw.formats import directory
from deltaw.library.store import Library

Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """make("a", seed, alpha=…, meta={…}) → the folder of a LoRA on a network of two layers."""

    def one(name: str, seed: int = 0, meta: dict[str, Any] | None = None, **fields: Any) -> Path:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
        deltaw.attach(model, LoRA(**{"rank": 2, **fields}), targets=["0", "2"])
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator))
        deltaw.save(model, tmp_path / name, meta=meta)
        return tmp_path / name

    return one


@pytest.fixture
def mix(tmp_path: Path) -> Make:
    """mix("m", {folder: weight}) → the folder of their exact mix, with its parents."""

    def one(name: str, parts: dict[Path, float]) -> Path:
        stored = [directory.open_directory(folder) for folder in parts]
        mixed = deltaw.mixing.exact([each.state for each in stored], list(parts.values()))
        meta = {"parents": [each.digest for each in stored], "weights": list(parts.values())}
        directory.write(type(mixed)(mixed.methods, mixed.tensors, mixed.specs, mixed.base, meta), tmp_path / name)
        return tmp_path / name

    return one


@pytest.fixture
def library(tmp_path: Path) -> Library:
    return Library(tmp_path / "library")
