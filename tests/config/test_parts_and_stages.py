"""adapter.parts and stages: strict, all faults at once, round trips; stages become plain configurations."""

import json
from typing import Any

import pytest

from deltaw.config import parse
from deltaw.core.errors import ConfigError
from deltaw.methods.full import Full
from deltaw.methods.lora import LoRA
from deltaw.methods.oft import OFT

MINIMAL = {"model": "tiny", "data": {"train": "rows.jsonl"}}
PARTS = {
    "vision": "frozen",
    "projector": "full",
    "language": {"rank": 64, "layers": "0-10", "learning_rate": "1e-4"},
    "head": {"method": "oft", "targets": ["lm_head"]},
}
STAGED: dict[str, Any] = {
    **MINIMAL,
    "adapter": {"rank": 8, "alpha": 16},
    "train": {"max_steps": 10, "seed": 3},
    "output": "runs/both",
    "stages": [
        {"name": "align", "parts": {"projector": "full"}, "train": {"learning_rate": 1e-3}},
        {
            "name": "instruct",
            "data": {"train": "chats.json"},
            "parts": {"projector": "full", "language": "lora"},
            "train": {"max_steps": 20},
        },
    ],
}


def of(change: dict[str, Any]) -> Any:
    return parse.parse({**MINIMAL, **change})


def test_each_part_has_its_method_fields_and_targets() -> None:
    config = of({"adapter": {"rank": 8, "alpha": 32, "parts": PARTS, "modules": {"output_projector": "model.out"}}})
    parts = config.adapter.parts
    assert parts["vision"] is None
    assert (type(parts["projector"].method), parts["projector"].targets) == (Full, "all")
    language = parts["language"]
    assert language.method == LoRA(rank=64, alpha=32)  # the section's fields, changed
    assert (language.targets, language.layers, language.learning_rate) == ("all-linear", "0-10", 1e-4)
    assert (parts["head"].method, parts["head"].targets) == (OFT(), ("lm_head",))  # another method starts afresh
    assert config.adapter.modules == {"output_projector": ("model.out",)}
    assert parse.parse(json.loads(json.dumps(config.to_dict()))) == config


def test_an_adapter_is_gone_on_from_part_by_part() -> None:
    config = of({"adapter": {"from": "runs/a/adapter", "rank": 4, "parts": {"language": "lora"}}})
    assert config.adapter.start == "runs/a/adapter" and config.adapter.parts["language"].method == LoRA(rank=4)
    assert parse.parse(config.to_dict()) == config
    plain = of({"adapter": {"from": "runs/a/adapter"}})
    assert plain.to_dict()["adapter"] == {"from": "runs/a/adapter"}


@pytest.mark.parametrize(
    ("adapter", "words"),
    [
        ({"parts": {"vision": "frozn", "head": "full"}}, ["adapter.parts.vision: no method 'frozn'", "mean 'frozen'"]),
        ({"parts": {"language": "loar"}}, ["adapter.parts.language: no method 'loar'", "did you mean 'lora'"]),
        ({"parts": {"language": True}}, ["adapter.parts.language=True is none of frozen, a method's name"]),
        ({"parts": {"language": {"ranks": 4}}}, ["no key 'adapter.parts.language.ranks'", "did you mean 'rank'"]),
        ({"parts": {"language": {"rank": 0}}}, ["adapter.parts.language", "rank=0", "at least 1"]),
        ({"parts": {"language": {"learning_rate": 0}}}, ["adapter.parts.language.learning_rate=0.0 must be above 0"]),
        (
            {"parts": {"projector": {"method": "full", "rank": 4}}},
            ["no key 'adapter.parts.projector.rank'", "a field of other"],
        ),
        (
            {"parts": {"vision": {"method": "frozen", "learning_rate": 1e-5}, "head": "full"}},
            ["adapter.parts.vision is frozen: leave out 'learning_rate', or give it a method"],
        ),
        ({"parts": {"vision": "frozen"}}, ["adapter.parts trains nothing, every part is frozen"]),
        ({"parts": {}}, ["adapter.parts={} must be a section"]),
        ({"parts": "full"}, ["adapter.parts='full' must be a section"]),
        (
            {"targets": "mlp", "layers": "0", "parts": {"language": "lora"}},
            ["adapter.targets: each part has its own: adapter.parts.language.targets", "adapter.layers: each part"],
        ),
        ({"modules": {"out": ["x"]}}, ["adapter.modules names parts for adapter.parts"]),
        ({"modules": {"out": 3}, "parts": {"out": "full"}}, ["adapter.modules={'out': 3}"]),
        ({"from": "x", "rank": 4}, ["adapter.from brings its own method and targets: leave out 'rank'"]),
        (
            {"parts": {"vision": 3, "language": {"rank": 0}, "head": "loar"}},
            ["3 faults", "vision=3", "rank=0", "'loar'"],
        ),
    ],
)
def test_a_fault_in_parts_is_a_sentence(adapter: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        of({"adapter": adapter})
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_stages_are_plain_configurations() -> None:
    config = parse.parse(STAGED)
    assert parse.parse(json.loads(json.dumps(config.to_dict()))) == config
    first, second = parse.stages(config)
    assert not first.stages and (first.output, second.output) == ("runs/both/1-align", "runs/both/2-instruct")
    assert first.adapter.start is None and second.adapter.start == "runs/both/1-align/adapter"
    assert (first.data.train, second.data.train) == ("rows.jsonl", "chats.json")
    assert (first.train.learning_rate, first.train.max_steps, first.train.seed) == (1e-3, 10, 3)
    assert (second.train.learning_rate, second.train.max_steps, second.train.seed) == (2e-4, 20, 3)
    assert first.adapter.parts is not None and list(first.adapter.parts) == ["projector"]
    assert second.adapter.parts is not None and second.adapter.parts["language"].method == LoRA(rank=8, alpha=16)  # type: ignore[union-attr]
    plain = of({})
    assert parse.stages(plain) == [plain]


def test_stages_without_parts_go_on_with_the_whole_adapter() -> None:
    config = of(
        {"adapter": {"rank": 4}, "data": {"train": "a", "tokens": ["<x>"]}, "stages": [{"name": "a"}, {"name": "b"}]}
    )
    first, second = parse.stages(config)
    assert first.adapter.method == LoRA(rank=4) and first.data.tokens == ("<x>",)
    assert second.to_dict()["adapter"] == {"from": "runs/latest/1-a/adapter"} and second.data.tokens == ()


def test_rows_may_be_named_by_the_stages_alone() -> None:
    config = parse.parse(
        {"model": "tiny", "stages": [{"name": "a", "data": {"train": "x"}}, {"name": "b", "data": {"train": "y"}}]}
    )
    assert [one.data.train for one in parse.stages(config)] == ["x", "y"]


def test_another_method_in_a_stage_starts_afresh() -> None:
    stages = [{"name": "a", "adapter": {"method": "oft", "block": 4}}]
    (one,) = parse.stages(of({"adapter": {"rank": 8, "layers": "0"}, "stages": stages}))
    assert one.adapter.method == OFT(block=4) and one.adapter.layers == "0"


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        ({"name": "a"}, ["stages={'name': 'a'} must be a list of sections"]),
        (["align"], ["stages[0]='align' must be a section"]),
        ([{"data": {}}], ["stages[0].name is missing"]),
        ([{"name": "a/b"}], ["stages[0].name='a/b' names a folder"]),
        ([{"name": "a", "trian": {}}], ["no key 'stages[0].trian'", "did you mean 'train'"]),
        ([{"name": "a", "train": {"lr": 1}}], ["stages[0] (a): no key 'train.lr'", "'train.learning_rate'"]),
        ([{"name": "a", "parts": {}}], ["stages[0].parts is empty"]),
        ([{"name": "a", "parts": {"head": "full"}, "adapter": {"parts": {"head": "full"}}}], ["are one thing"]),
        ([{"name": "a"}, {"name": "b", "adapter": {"from": "x"}}], ["stages[1].adapter.from: a stage goes on"]),
        ([{"name": "a"}, {"name": "b", "adapter": {"rank": 4}}], ["stages[1] (b): adapter.from brings its own method"]),
        (
            [{"name": "a"}, {"name": "b", "data": {"tokens": ["<x>"]}}],
            ["stages[1] (b): adapter.from brings its own tokens"],
        ),
        (
            [{"name": "a", "parts": {"language": "loar"}}, {"name": "b", "train": {"clip": -1}}],
            ["2 faults", "stages[0] (a): adapter.parts.language: no method", "stages[1] (b): train.clip=-1"],
        ),
    ],
)
def test_a_fault_in_stages_is_a_sentence(stages: Any, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        of({"stages": stages})
    assert all(word in str(caught.value) for word in words), str(caught.value)
