"""PEFT's matching rules, rule by rule against PEFT itself: a table of configs × a table of paths."""

import itertools
from typing import Any

import peft
import pytest
from families import FAMILIES, build
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import nn
from transformers.pytorch_utils import Conv1D

from deltaw.core.errors import ConfigError
from deltaw.formats.peft import matches, parse_config
from deltaw.methods.patterns import first_hit

PATHS = [
    "q", "enc.q", "vision.q", "xq", "enc.xq", "lm_head", "score", "pre_classifier", "classifier", "classifier.dense",
    "model.embed_tokens", "layers.0.q_proj", "layers.1.q_proj", "model.layers.0.self_attn.q_proj",
    "model.layers.1.self_attn.q_proj", "model.layers.10.self_attn.q_proj", "model.layers.1.self_attn.v_proj",
    "model.layers.1.mlp.experts.0.up_proj", "model.layers.0.mlp.experts.1.up_proj", "h.1.attn.c_attn", "transformer.h.1.attn.c_attn",
    "transformer.h.0.attn.c_attn", "encoder.block.0.layer.0.SelfAttention.q", "decoder.block.1.layer.0.SelfAttention.q",
    "foo", "foo.bar", "foo.bar.foo", "bar.foo.1.baz", "down_blocks.0.to_out.0", "down_blocks.0.to_out.1", "a.weird-name_2",
]  # fmt: skip
TARGETS: list[Any] = [
    ["q"], ["q_proj"], ["q_proj", "v_proj"], ["self_attn.q_proj"], ["model.layers.0.self_attn.q_proj"], ["foo"], ["bar.foo"],
    ["to_out.0", "c_attn"], ["0"], ["classifier"], ["lm_head", "embed_tokens"], [], ["weird-name_2"], ["nothing"],
    "q", r".*\.q", r".*q_proj", r"model\.layers\.[01]\..*_proj", r".*\.(q|v)_proj$", "classifier.*", "^q$|^enc.q$",
]  # fmt: skip
OTHERS: list[dict[str, Any]] = [
    {},
    {"exclude_modules": ["q_proj"]},
    {"exclude_modules": ["enc.q", "model.layers.1.self_attn.q_proj"]},
    {"exclude_modules": r".*layers\.1.*"},
    {"exclude_modules": "q_proj"},
    {"modules_to_save": ["classifier"]},
    {"modules_to_save": ["score", "enc"]},
    {"modules_to_save": ["foo"]},
    {"modules_to_save": [".*_proj"]},
    {"layers_to_transform": [0]},
    {"layers_to_transform": 1},
    {"layers_to_transform": [1, 10]},
    {"layers_to_transform": []},
    {"layers_to_transform": [0], "layers_pattern": "layers"},
    {"layers_to_transform": [1], "layers_pattern": ["block", "h"]},
    {"layers_to_transform": [1], "layers_pattern": []},
    {"layers_to_transform": [0, 1], "layers_pattern": ["experts"]},
    {"layers_to_transform": [0], "exclude_modules": ["v_proj"], "modules_to_save": ["lm_head"]},
]


def test_matches_as_peft_does() -> None:
    compared = hits = 0
    for targets, other in itertools.product(TARGETS, OTHERS):
        if isinstance(targets, str) and "layers_to_transform" in other:
            continue  # PEFT refuses the combination
        config = {"peft_type": "LORA", "target_modules": targets, **other}
        theirs = peft.LoraConfig(target_modules=targets, **other)
        expected = [path for path in PATHS if _yes(check_target_module_exists(theirs, path))]
        assert matches(config, PATHS) == expected, config
        compared, hits = compared + len(PATHS), hits + len(expected)
    assert compared > 8000 and hits > 500


def _yes(answer: Any) -> bool:
    return bool(answer) and "Excluded" not in type(answer).__name__


@pytest.mark.parametrize("family", FAMILIES)
def test_all_linear_as_peft_does(family: str) -> None:
    model = build(family)
    linear = [path for path, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    heads = [path for path, module in model.named_modules() if module is output]
    if output is None and family == "bert":
        heads = ["classifier"]
    paths = [path for path, _ in model.named_modules()]
    recipe = parse_config({"peft_type": "LORA", "target_modules": "all-linear"})
    config = peft.LoraConfig(target_modules="all-linear", task_type="SEQ_CLS" if family == "bert" else None)
    wrapped = peft.inject_adapter_in_model(config, model)
    adapted = [path for path, module in wrapped.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
    assert recipe.targets(paths, linear, heads) == adapted


@pytest.mark.parametrize(
    "patterns",
    [
        {"foo": 1}, {"^foo": 1}, {"^foo$": 1}, {"bar.foo": 1, "foo": 2}, {"foo": 2, "bar.foo": 1}, {r".*\.foo": 3},
        {"oo": 1}, {"layers.1.self_attn.q_proj": 4, "q_proj": 5}, {r"layers\.[01].*": 6}, {"q_proj|v_proj": 7}, {},
        {"model.layers.1.self_attn.q_proj": 8}, {r"experts\.\d+\.up_proj": 9},
    ],
)  # fmt: skip
def test_patterns_as_peft_does(patterns: dict[str, int]) -> None:
    for path in PATHS:
        assert first_hit(patterns, path) == patterns.get(get_pattern_key(patterns.keys(), path))


def test_no_targets() -> None:
    with pytest.raises(ConfigError, match="no target_modules"):
        matches({"peft_type": "LORA"}, PATHS)
    assert matches({"peft_type": "LORA", "target_parameters": ["w"]}, PATHS) == []


def test_a_recipe_trains_what_peft_would() -> None:
    """From a config alone: the same modules, ranks, alphas, biases and saved modules as PEFT."""
    import deltaw

    config = {
        "peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1],
        "rank_pattern": {"down_proj": 3}, "alpha_pattern": {"q_proj": 5}, "use_rslora": True, "bias": "lora_only",
        "modules_to_save": ["lm_head"], "exclude_modules": ["nothing"],
    }  # fmt: skip
    model, recipe = build("qwen"), parse_config(config)
    plan = deltaw.attach(model, recipe.method, targets=recipe.targets([path for path, _ in model.named_modules()]))
    theirs = peft.get_peft_model(
        build("qwen"), peft.LoraConfig(**{k: v for k, v in config.items() if k != "peft_type"})
    )
    assert plan.trainable == sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    scales = {
        path.removeprefix("base_model.model."): module.scaling["default"]
        for path, module in theirs.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    ours = {t.site.path: t.method.scale for t in plan.targets if t.method.name == "lora"}
    assert ours.keys() == scales.keys() and all(abs(ours[path] - scales[path]) < 1e-12 for path in scales)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"trainable_token_indices": [1]}, "TokenRows"),
        ({"ensure_weight_tying": True}, "ensure_weight_tying"),
        ({"init_lora_weights": False}, "random change"),
        ({"init_lora_weights": "mica"}, "mica"),
        ({"r": 0}, "r=0"),
        ({"r": "8"}, "r='8'"),
        ({"lora_alpha": "x"}, "lora_alpha"),
        ({"rank_pattern": {"(": 3}}, "rank_pattern"),
        ({"alpha_pattern": [1]}, "alpha_pattern"),
        ({"target_modules": "("}, "target_modules"),
        ({"modules_to_save": "classifier"}, "modules_to_save"),
        ({"lora_dropout": 2}, "lora_dropout"),
        ({"bias": "some"}, "bias"),
        ({"use_rslora": "yes"}, "use_rslora"),
    ],
)
def test_what_cannot_be_trained_is_named(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_config({"peft_type": "LORA", "target_modules": ["q_proj"], **change})
