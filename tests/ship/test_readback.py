"""Reading back what was written: equal files pass, and whatever would load to another change is found."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import nn

import deltaw
from deltaw.core.errors import FileError
from deltaw.core.method import Method, Site
from deltaw.core.state import AdapterState
from deltaw.formats import directory
from deltaw.methods.adalora import AdaLoRA
from deltaw.methods.dora import DoRA
from deltaw.methods.lora import LoRA
from deltaw.ship.readback import must_be


def state_of(method: Method) -> AdapterState:
    model = nn.Sequential(nn.Linear(12, 9), nn.Linear(9, 5))
    deltaw.attach(model, method, targets="all-linear")
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    return deltaw.extract(model)


@pytest.mark.parametrize(
    "method",
    [LoRA(rank=3, alpha=5.0, rslora=True, bias="all"), LoRA(rank=3, init="pissa"), AdaLoRA(rank=4), DoRA(rank=2)],
    ids=["lora", "pissa", "adalora", "dora"],
)
def test_what_was_written_is_what_is_there(method: Method, tmp_path: Path) -> None:
    state = state_of(method)
    directory.write(state, tmp_path / "a")
    assert must_be(state, tmp_path / "a") < 1e-6


def test_another_change_is_found(tmp_path: Path) -> None:
    state, site = state_of(LoRA(rank=3)), Site("0")
    directory.write(state, tmp_path / "a")
    group = state.tensors[site]
    for name, factor in (("lora_B", 1.001), ("lora_A", 0.0)):
        other = dataclasses.replace(state, tensors={**state.tensors, site: {**group, name: factor * group[name]}})
        with pytest.raises(FileError, match=r"reads as another one, nothing is kept of it: 0: ΔW differs by"):
            must_be(other, tmp_path / "a")
    turned = dataclasses.replace(  # the same ΔW from other factors is the same adapter
        state, tensors={**state.tensors, site: {"lora_A": 2 * group["lora_A"], "lora_B": group["lora_B"] / 2}}
    )
    assert must_be(turned, tmp_path / "a") < 1e-6
    fewer = dataclasses.replace(state, methods={site: state.methods[site]}, tensors={site: group})
    with pytest.raises(FileError, match="1: it is in the file only"):
        must_be(fewer, tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({**config, "use_rslora": True}))
    with pytest.raises(FileError, match="0: scale"):
        must_be(state, tmp_path / "a")
    dora = state_of(DoRA(rank=2))
    directory.write(dora, tmp_path / "b")
    longer = {**dora.tensors[site], "magnitude": 1.01 * dora.tensors[site]["magnitude"]}
    with pytest.raises(FileError, match="0: ΔW differs by"):
        must_be(dataclasses.replace(dora, tensors={**dora.tensors, site: longer}), tmp_path / "b")
