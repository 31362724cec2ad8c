"""Which base is this? Told apart by values, not by shapes; the same through dtypes and merges."""

import copy
import json
from pathlib import Path

import pytest
import torch
import vlm
from torch import nn

from core import tiny
from deltaw.core.attach import adapters, attach, extract
from deltaw.core.base import BaseIdentity, identify
from deltaw.core.merge import merge, unmerge
from deltaw.core.parts import find
from deltaw.methods.full import Full
from deltaw.methods.lora import LoRA


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5", "clip"])
def test_the_same_base_matches_itself_in_any_float_dtype(family: str) -> None:
    model = tiny.model(family)
    one = identify(model)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        other = identify(tiny.model(family).to(dtype))
        assert one.difference(other) is None and other.difference(one) is None
    back = identify(tiny.model(family).bfloat16().float())  # a bf16 checkpoint loaded in fp32 is what it was saved as
    assert identify(tiny.model(family).bfloat16()).difference(back) is None


@pytest.mark.parametrize("family", vlm.FAMILIES)
def test_a_part_of_few_tensors_tells_bases_apart(family: str) -> None:
    """A projector that was trained alone, a tower or a language model that is another one."""
    before = identify(vlm.model(family))
    for part in ("projector", "vision", "language"):
        model = vlm.model(family)
        parts = find(model)
        assert parts is not None
        with torch.no_grad():
            for path, parameter in model.named_parameters():
                if parts.of(path) == part:
                    parameter.mul_(1.5)
        assert "values of" in str(identify(model).difference(before)), part


def test_values_below_what_fp16_can_hold_are_no_difference() -> None:
    model = nn.Sequential(nn.Linear(16, 16))
    with torch.no_grad():
        model[0].weight.copy_(torch.logspace(-1, -9, 256).view(16, 16))
    one = identify(model)
    for dtype in (torch.float16, torch.bfloat16):
        assert one.difference(identify(copy.deepcopy(model).to(dtype))) is None


def test_equal_shapes_and_other_values_are_another_base() -> None:
    model, other = tiny.model("llama"), tiny.model("llama")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    difference = identify(model).difference(identify(other))
    assert difference is not None and difference.startswith("the shapes agree and the values of")
    assert identify(model).difference(identify(other.bfloat16())) is not None


def test_other_shapes_and_other_families() -> None:
    llama = identify(tiny.model("llama"))
    assert "they share no parameter name (LlamaForCausalLM" in str(llama.difference(identify(tiny.model("gpt2"))))
    small, large = nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 5))
    assert "0.bias is 4 there and 5 here, 0.weight is 4×4 there and 5×4 here" in str(
        identify(small).difference(identify(large))
    )


def test_unknown_where_nothing_can_be_compared() -> None:
    nothing = BaseIdentity("x", "Y", {})
    assert not nothing.comparable(identify(nn.Linear(2, 2))) and nothing.difference(identify(nn.Linear(2, 2))) is None
    assert identify(nn.Linear(2, 2)).comparable(identify(nn.Linear(2, 2)))
    assert identify(nn.Linear(2, 2, device="meta")).samples == {}


def test_adapters_training_and_merging_do_not_change_the_identity() -> None:
    model = tiny.model("llama")
    before = identify(model)
    attach(model, LoRA(rank=2, bias="all"), targets=["all-linear", "embed_tokens"], name="a")
    attach(model, Full(), targets="norm", name="b")
    assert identify(model) == before
    attach(model, LoRA(rank=2), targets="lm_head", name="c")
    for name in ("a", "b"):
        for adapter in adapters(model, name).values():
            for parameter in adapter.parameters():
                parameter.data.add_(0.1)
    merge(model, "a", keep_base=True)
    merge(model, "b", keep_base=True)
    assert identify(model) == before == extract(model, "c").base
    unmerge(model)
    assert identify(model) == before
    merge(model, "a")
    assert identify(model).difference(before) is not None  # for good: now it is another base


def test_it_survives_json() -> None:
    one = identify(tiny.model("t5"))
    again = BaseIdentity.from_dict(json.loads(json.dumps(one.to_dict())))
    assert again == one and 20 <= len(one.samples) <= 52


def test_the_name_is_a_hub_id_or_the_last_part_of_a_folder(tmp_path: Path) -> None:
    model = tiny.model("llama")
    (tmp_path / "folder").mkdir()
    for given, name in (("owner/model", "owner/model"), (f"{tmp_path}/folder/", "folder"), ("", "LlamaForCausalLM")):
        model.config._name_or_path = given
        assert identify(model).name == name
