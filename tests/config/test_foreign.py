"""Other tools' configurations as ours: values exact, nothing lost in silence, facts checked against the installed libraries."""

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import EvaConfig, LoraConfig, get_peft_model
from torch import nn
from transformers import TrainingArguments

from deltaw.config import foreign, from_llamafactory, from_lora_config, parse
from deltaw.core.errors import ConfigError
from deltaw.core.targets import plan
from deltaw.training.prepare import prepare

FACTORY: dict[str, Any] = {
    "model_name_or_path": "some/model", "stage": "sft", "do_train": True, "finetuning_type": "lora", "lora_target": "all",
    "dataset": "identity,alpaca_en_demo", "template": "llama3", "cutoff_len": 1024, "max_samples": 1000,
    "overwrite_cache": True, "preprocessing_num_workers": 16, "output_dir": "saves/x", "logging_steps": 10, "save_steps": 500,
    "plot_loss": True, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, "learning_rate": 1.0e-4,
    "num_train_epochs": 3.0, "lr_scheduler_type": "cosine", "warmup_ratio": 0.1, "bf16": True, "val_size": 0.1,
    "per_device_eval_batch_size": 1, "eval_strategy": "steps", "eval_steps": 500, "report_to": "none",
}  # fmt: skip


def factory(**changes: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The example with changes (... takes a key away), converted; and what was left, by key."""
    given = {key: value for key, value in {**FACTORY, **changes}.items() if value is not ...}
    config, left = foreign.converted(given)
    parse.parse(config)
    return config, {one.key: one.value for one in left}


def lora(**record: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    config, left = foreign.converted({"peft_type": "LORA", **record})
    return config["adapter"], {one.key: one.value for one in left}


def test_an_example_of_llamafactory() -> None:
    config, left = factory()
    assert config == {
        "model": "some/model",
        "data": {
            "train": [{"path": f"data/dataset_info.json#{name}", "rows": 1000} for name in ("identity", "alpaca_en_demo")],
            "max_length": 1024, "eval": 0.1,
        },
        "adapter": {"method": "lora", "rank": 8, "alpha": 16, "targets": "all-linear"},
        "train": {
            "batch_size": 1, "gradient_accumulation": 8, "learning_rate": 1e-4, "epochs": 3.0, "seed": 42,
            "schedule": "cosine", "warmup": 0.1, "optimizer": "adamw", "dtype": "bf16", "log_every": 10, "save_every": 500,
            "eval_every": 500, "checkpointing": True,
        },
        "output": "saves/x",
    }  # fmt: skip
    assert left == {
        "cutoff_len": 1024, "template": "llama3", "overwrite_cache": True, "preprocessing_num_workers": 16,
        "per_device_eval_batch_size": 1,
    }  # fmt: skip


def test_what_is_absent_there_is_written_here() -> None:
    """Its defaults decide what is learnt; those of transformers are read from transformers."""
    config, left = foreign.converted({"model_name_or_path": "m", "dataset": "d"})
    found = parse.parse(config)
    theirs = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}
    assert found.train.learning_rate == theirs["learning_rate"] and found.train.epochs == theirs["num_train_epochs"]
    assert found.train.batch_size == theirs["per_device_train_batch_size"] and found.train.seed == theirs["seed"]
    assert found.train.gradient_accumulation == theirs["gradient_accumulation_steps"]
    assert found.train.clip == theirs["max_grad_norm"] and found.train.weight_decay == theirs["weight_decay"]
    assert found.train.schedule == theirs["lr_scheduler_type"] and found.train.warmup == theirs["warmup_steps"] == 0
    assert found.data.eval is None and found.data.max_length == 2048 and found.train.checkpointing
    assert (found.adapter.method.rank, found.adapter.method.alpha) == (8, 16)  # type: ignore[attr-defined]
    assert left == []
    assert config["data"]["train"] == "data/dataset_info.json#d"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"lora_rank": 64, "lora_alpha": 16}, {"rank": 64, "alpha": 16}),
        ({"use_rslora": True, "lora_rank": 4}, {"rank": 4, "alpha": 8, "rslora": True}),
        ({"use_dora": True}, {"method": "dora"}),
        ({"lora_target": "q_proj, v_proj"}, {"targets": ["q_proj", "v_proj"]}),
        ({"additional_target": "lm_head,embed_tokens"}, {"modules_to_save": ["lm_head", "embed_tokens"]}),
        ({"lora_target": ["q_proj"]}, {"targets": ["q_proj"]}),
        ({"loraplus_lr_ratio": 16.0}, {"plus": 16.0}),
        ({"pissa_init": True}, {"init": "pissa", "niter": 16}),
        ({"pissa_init": True, "pissa_iter": -1, "pissa_convert": True}, {"init": "pissa"}),
        ({"lora_dropout": 0.05}, {"dropout": 0.05}),
        ({"adapter_name_or_path": "saves/old"}, {"from": "saves/old"}),
    ],
)  # fmt: skip
def test_adapter_of_llamafactory(changes: dict, expected: dict) -> None:
    config, left = factory(**{"lora_target": ... if "adapter_name_or_path" in changes else "all", **changes})
    assert expected.items() <= config["adapter"].items() and not set(changes) & set(left)


@pytest.mark.parametrize(
    ("changes", "parts", "left_too"),
    [
        ({"image_max_pixels": 262144}, {"language": "lora"}, {"image_max_pixels"}),
        ({"freeze_vision_tower": True, "freeze_multi_modal_projector": True}, {"language": "lora"}, set()),
        ({"freeze_vision_tower": False}, {"language": "lora", "vision": "lora"}, set()),
        ({"freeze_vision_tower": False, "freeze_language_model": True, "use_dora": True}, {"vision": "dora"}, set()),
        ({"freeze_multi_modal_projector": False}, {"language": "lora"}, {"freeze_multi_modal_projector"}),
        ({"freeze_multi_modal_projector": False, "additional_target": "merger"},
         {"language": "lora", "projector": "full"}, set()),
        ({"additional_target": "model.multi_modal_projector,lm_head,embed_tokens"},
         {"language": {"modules_to_save": ["embed_tokens"]}, "projector": "full", "head": "full"}, set()),
        ({"freeze_vision_tower": False, "lora_target": "q_proj,v_proj"},
         {"language": {"targets": ["q_proj", "v_proj"]}, "vision": {"targets": ["q_proj", "v_proj"]}}, set()),
        ({"freeze_vision_tower": False, "freeze_language_model": True, "additional_target": "embed_tokens"},
         {"vision": "lora"}, {"additional_target"}),
    ],
)  # fmt: skip
def test_what_llamafactory_freezes_of_a_model_with_images(changes: dict, parts: dict, left_too: set) -> None:
    config, left = factory(**changes)
    assert config["adapter"]["parts"] == parts and not {"targets", "modules_to_save"} & set(config["adapter"])
    assert set(changes) & set(left) == left_too and "only text" not in foreign.text({**FACTORY, **changes})[0]


def test_frozen_parts_are_said_where_an_adapter_is_gone_on_from() -> None:
    config, left = factory(lora_target=..., adapter_name_or_path="saves/old", freeze_vision_tower=False)
    assert config["adapter"] == {"from": "saves/old"} and left["freeze_vision_tower"] is False


@pytest.mark.parametrize(
    ("changes", "section", "expected"),
    [
        ({"quantization_bit": 4}, "", {"quantize": "nf4-double"}),
        ({"quantization_bit": 4, "double_quantization": False}, "", {"quantize": "nf4"}),
        ({"quantization_bit": 8, "quantization_method": "bnb"}, "", {"quantize": "int8"}),
        ({"stage": "pt"}, "train", {"objective": "text"}),
        ({"max_steps": 7, "warmup_ratio": ..., "warmup_steps": 3}, "train", {"max_steps": 7, "warmup": 3 / 7}),
        ({"max_steps": 100, "warmup_steps": 29}, "train", {"warmup": 29.5 / 100}),
        ({"warmup_steps": 0.25}, "train", {"warmup": 0.25}),
        ({"max_steps": -1, "warmup_ratio": 0}, "train", {"warmup": 0}),
        ({"weight_decay": 0.0, "max_grad_norm": 0}, "train", {"weight_decay": 0.0, "clip": 0}),
        ({"lr_scheduler_type": "constant_with_warmup"}, "train", {"schedule": "constant", "warmup": 0.1}),
        ({"optim": "paged_adamw_8bit", "seed": 0}, "train", {"optimizer": "paged-adamw-8bit", "seed": 0}),
        ({"neftune_noise_alpha": 5}, "train", {"neftune": 5}),
        ({"report_to": "wandb"}, "train", {"report_to": ["wandb"]}),
        ({"bf16": False, "pure_bf16": None}, "train", {}),
        ({"save_total_limit": 3, "early_stopping_steps": 2}, "train", {"keep": 3, "early_stopping": 2}),
        ({"load_best_model_at_end": True}, "train", {"best": True}),
        ({"group_by_length": True, "disable_gradient_checkpointing": True}, "train", {"group_by_length": True}),
        ({"dataset_dir": "ONLINE", "dataset": "a/b", "max_samples": ...}, "data", {"train": "a/b"}),
        ({"dataset_dir": "/d", "dataset": "a", "max_samples": ..., "val_size": ..., "eval_dataset": "b,c"}, "data",
         {"train": "/d/dataset_info.json#a", "eval": ["/d/dataset_info.json#b", "/d/dataset_info.json#c"]}),
        ({"train_on_prompt": True, "streaming": True}, "data", {"train_on_prompt": True, "streaming": True}),
        ({"mask_history": True}, "data", {"turns": "last"}),
        ({"dataset": "a", "media_dir": "/m", "max_samples": ...}, "data",
         {"train": {"path": "data/dataset_info.json#a", "images": "/m"}}),
    ],
)  # fmt: skip
def test_the_rest_of_llamafactory(changes: dict, section: str, expected: dict) -> None:
    config, left = factory(**changes)
    found = config[section] if section else config
    assert expected.items() <= found.items() and not set(changes) & set(left), left
    if "disable_gradient_checkpointing" in changes:
        assert "checkpointing" not in found
    steps, share = found.get("max_steps"), changes.get("warmup_steps")
    assert not steps or not share or int(found["warmup"] * steps) == share  # as many as the trainer makes of it


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({"quantization_bit": 4, "quantization_method": "hqq"}, {"quantization_bit": 4}),
        ({"quantization_bit": 4, "quantization_type": "fp4"}, {"quantization_bit": 4}),
        ({"val_size": 100}, {"val_size": 100}),
        ({"warmup_steps": 100}, {"warmup_steps": 100}),
        ({"lr_scheduler_type": "polynomial"}, {"lr_scheduler_type": "polynomial"}),
        ({"lr_scheduler_type": "constant"}, {"warmup_ratio": 0.1}),
        ({"optim": "lion_32bit"}, {"optim": "lion_32bit"}),
        ({"bf16": ..., "fp16": True}, {"fp16": True}),
        ({"pure_bf16": True}, {"pure_bf16": True}),
        ({"packing": True}, {"packing": True}),
        ({"deepspeed": "ds_z3.json"}, {"deepspeed": "ds_z3.json"}),
        ({"use_dora": True, "pissa_init": True}, {"pissa_init": True}),
        ({"adapter_name_or_path": "a,b"}, {"adapter_name_or_path": "a,b"}),
        ({"adapter_name_or_path": "a", "lora_rank": 4}, {"lora_rank": 4}),
        ({"adapter_name_or_path": "a", "create_new_adapter": True}, {"adapter_name_or_path": "a"}),
        ({"save_steps": 0.1}, {"save_steps": 0.1}),
        ({"lora_rnak": 8}, {"lora_rnak": 8}),
        ({"hf_hub_token": "hf_secret"}, {"hf_hub_token": None}),
        ({"eval_strategy": "epoch"}, {"eval_strategy": "epoch"}),
    ],
)
def test_what_cannot_be_carried_over_is_named(changes: dict, kept: dict) -> None:
    _, left = factory(**changes)
    assert kept.items() <= left.items()


def test_near_misses_and_secrets() -> None:
    found, left = foreign.text({**FACTORY, "lora_rnak": 8, "swanlab_api_key": "abc123"})
    why = {one.key: one.why for one in left}
    assert "did you mean 'lora_rank'" in why["lora_rnak"] and "abc123" not in found and "swanlab_api_key" in found
    hidden = {"db_password": "abc123", "HF_TOKEN": "abc123", "login": {"user": "me", "keys": [{"api_key": "abc123"}]}}
    found, left = foreign.text({**FACTORY, **hidden})
    assert "abc123" not in found and "abc123" not in repr(left) and hidden.keys() <= {one.key for one in left}


ODD = ({}, {"a": 1}, [], [[1]], [None], "x", -1, 1.5, True, float("nan"), float("inf"), 10**400)


def test_odd_values_are_errors_of_the_configuration() -> None:
    """Whatever stands at a key, it is carried over, left with a reason, or a ConfigError; never another exception."""
    for key in (*from_llamafactory.KNOWN, *from_llamafactory.REASONS):
        for value in ODD:
            with contextlib.suppress(ConfigError):
                foreign.text({**FACTORY, key: value})
    for key in (*from_lora_config.KNOWN, *from_lora_config.REASONS):
        for value in ODD:
            with contextlib.suppress(ConfigError):
                foreign.text({"peft_type": "LORA", "r": 4, key: value})
    with pytest.raises(ConfigError, match=r"target_parameters=True is not a list"):
        foreign.text({"peft_type": "LORA", "target_parameters": True})
    with pytest.raises(ConfigError, match=r"stage: .* is none of"):
        foreign.text({**FACTORY, "stage": {"a": 1}})


@pytest.mark.parametrize(
    "changes", [{"stage": "dpo"}, {"finetuning_type": "full"}, {"stage": "rm", "finetuning_type": "freeze"}]
)
def test_what_would_train_something_else_is_an_error(changes: dict) -> None:
    with pytest.raises(ConfigError) as caught:
        foreign.converted({**FACTORY, **changes})
    assert all(str(value) in str(caught.value) for value in changes.values()) and len(caught.value.faults) == len(
        changes
    )


def test_every_key_changes_the_result_or_is_named() -> None:
    plain, before = from_llamafactory.converted(FACTORY)
    for key in from_llamafactory.REASONS:
        _, left = from_llamafactory.converted({**FACTORY, key: "something"})
        assert key in [one.key for one in left]
    assert not set(from_llamafactory.REASONS) & set(from_llamafactory.KNOWN)
    default = {
        "do_train",
        "plot_loss",
        "eval_strategy",
        "report_to",
        "stage",
        "finetuning_type",
        "lora_target",
        "num_train_epochs",
    }
    for key in FACTORY.keys() - {one.key for one in before} - default:
        assert from_llamafactory.converted({k: v for k, v in FACTORY.items() if k != key})[0] != plain, key


def test_the_block_of_the_notes(shared: Path) -> None:
    note = next(shared.glob("notes/001_*.txt")).read_text(encoding="utf-8")
    block = note[note.index("lora_config:") :]
    found, left = foreign.text(yaml.safe_load(block[: block.index("```")]))
    assert [one.key for one in left] == ["model", "data.train"] and "# Converted from lora_config." in found
    adapter = yaml.safe_load(found)["adapter"]
    assert adapter == {
        "method": "lora", "rank": 32, "alpha": 64, "dropout": 0.05,
        "targets": ["q_proj", "v_proj", "k_proj", "o_proj", "up_proj", "down_proj"],
    }  # fmt: skip
    for twice in ({"rank": 8, "r": 8}, {"rank": 8, "lora_rank": 8}):
        with pytest.raises(ConfigError, match=" and ".join(twice)):
            foreign.converted({"lora_config": twice})
    config, _ = foreign.converted({"lora_config": {"rank": 4}, "model_name_or_path": "m", "dataset": "d"})
    assert config["adapter"] == {"method": "lora", "rank": 4} and config["model"] == "m"
    _, left = foreign.converted({"lora_config": {"rank": 4}, "model_name_or_path": "m", "dataset": "d", "lora_rank": 8})
    assert [(one.key, one.why) for one in left] == [("lora_rank", "the block lora_config says what the adapter is")]


def test_every_option_of_pefts_config_is_known() -> None:
    record = LoraConfig().to_dict()
    known = {*from_lora_config.KNOWN, *from_lora_config.REASONS, *from_lora_config.SAID_ELSEWHERE}
    assert record.keys() <= known, record.keys() - known
    adapter, left = lora(**{**record, "peft_type": "LORA"})
    assert adapter == {"method": "lora", "rank": 8, "alpha": 8}
    assert left.keys() == {"target_modules", "model", "data.train"}


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"r": 4, "lora_alpha": 22.6, "use_rslora": True}, {"rank": 4, "alpha": 22.6, "rslora": True}),
        ({"use_dora": True, "lora_dropout": 0.1, "bias": "lora_only"}, {"method": "dora", "dropout": 0.1, "bias": "lora_only"}),
        ({"init_lora_weights": "pissa_niter_4"}, {"init": "pissa", "niter": 4}),
        ({"init_lora_weights": "gaussian"}, {"init": "gaussian"}),
        ({"init_lora_weights": "eva", "eva_config": dataclasses.asdict(EvaConfig(rho=1.5))}, {"init": "eva", "rho": 1.5}),
        ({"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"^a.b": 3}}, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"^a.b": 3}}),
        ({"modules_to_save": ["lm_head"], "layers_to_transform": [0, 2]}, {"modules_to_save": ["lm_head"], "layers": [0, 2]}),
        ({"target_modules": None, "target_parameters": ["experts.down_proj"]}, {"targets": ["experts.down_proj"]}),
    ],
)  # fmt: skip
def test_values_of_pefts_config(record: dict, expected: dict) -> None:
    adapter, left = lora(**{"target_modules": ["q_proj"], **record})
    assert expected.items() <= adapter.items() and left.keys() == {"model", "data.train"}


def test_what_pefts_config_has_and_we_have_not() -> None:
    named = {
        "init_lora_weights": False, "lora_bias": True, "task_type": "SEQ_CLS", "layers_pattern": "h", "revision": "v2",
        "eva_config": {"rho": 2.0, "whiten": True}, "some_new_switch": True, "trainable_token_indices": [1],
    }  # fmt: skip
    _, left = lora(target_modules=["a"], **named)
    assert named.items() <= left.items()
    assert "init_lora_weights" in lora(target_modules=["a"], use_dora=True, init_lora_weights="olora")[1]
    with pytest.raises(ConfigError, match="LOHA cannot be carried over"):
        lora(peft_type="LOHA")
    with pytest.raises(ConfigError, match="rank=-1"):
        lora(r=-1)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(4, 4)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"attention": nn.ModuleDict({"q_proj": nn.Linear(4, 4), "a+b": nn.Linear(4, 4)}), "mlp": nn.Linear(4, 4)})
            for _ in range(3)
        )  # fmt: skip
        self.encoder = nn.ModuleDict(
            {"layers": nn.ModuleList(nn.ModuleDict({"q_proj": nn.Linear(4, 4)}) for _ in range(3))}
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.q_proj(x)


@pytest.mark.parametrize(
    "record",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": "q_proj"},
        {"target_modules": r".*layers\.[01]\..*q_proj"},
        {"target_modules": ["mlp"]},
        {"target_modules": ["a+b", "encoder.layers.1.q_proj"]},
        {"target_modules": ["q_proj", "mlp"], "exclude_modules": ["encoder.layers.0.q_proj"]},
        {"target_modules": ["q_proj"], "exclude_modules": r"layers\..*"},
        {"target_modules": ["encoder.layers.0.q_proj", "layers.2.q_proj"]},
        {"target_modules": r"(layers\.1\..*q_proj|q_proj)"},
        {"target_modules": "all-linear"},
    ],
    ids=str,
)
def test_the_modules_are_those_that_peft_takes(record: dict) -> None:
    model = get_peft_model(Net(), LoraConfig(r=2, **record))
    theirs = sorted(model.base_model.targeted_module_names)
    found = parse.parse({"model": "x", "data": {"train": "x"}, "adapter": lora(r=2, **record)[0]}).adapter
    ours = plan(Net(), found.method, found.targets, exclude=found.exclude, layers=found.layers)
    assert sorted(target.site.path for target in ours.targets) == theirs and theirs


def test_strangers_files(shared: Path) -> None:
    files = sorted(shared.glob("adapters/**/adapter_config.json"))
    records = [json.loads(file.read_text()) for file in files]
    done = 0
    for record in records:
        if record["peft_type"] != "LORA":
            with pytest.raises(ConfigError, match=record["peft_type"]):
                foreign.converted(record)
            continue
        config, left = foreign.converted(record)
        assert config["adapter"]["rank"] == record["r"] and config["adapter"]["alpha"] == record["lora_alpha"]
        assert (config["adapter"]["method"] == "dora") == record.get("use_dora", False)
        assert all(one.why for one in left)
        done += 1
    assert done > 15


def test_whose_it_is() -> None:
    assert foreign.tool({"r": 8, "lora_alpha": 16, "target_modules": ["q"]}) == foreign.BLOCK
    assert foreign.tool({"lora_rank": 8, "lora_alpha": 16, "lora_target": "all"}) == foreign.LLAMAFACTORY
    assert foreign.tool({"peft_type": "LORA"}) == foreign.PEFT
    for record, words in (
        ({"model": "x", "data": {}}, "configuration of deltaw already"),
        ({"learning_rate": 1}, "cannot be told from its keys"),
        ({}, "it has none"),
        ([1], "mapping of keys"),
        (None, "mapping of keys"),
    ):
        with pytest.raises(ConfigError, match=words):
            foreign.tool(record)


def test_what_comes_out_reads_rows_and_the_text_reads_back(shared: Path) -> None:
    """LLaMA-Factory's own demonstration data, through its own dataset_info.json."""
    given = {**FACTORY, "model_name_or_path": "tiny", "dataset_dir": str(shared / "data/llamafactory_demo"), "max_samples": 40,
             "cutoff_len": 512, "template": ..., "dataset": "identity,alpaca_en_demo"}  # fmt: skip
    config, _ = factory(**given)
    text, _ = foreign.text({key: value for key, value in given.items() if value is not ...})
    assert yaml.safe_load(text) == config and text.startswith("# Converted from LLaMA-Factory.")
    data = prepare(parse.parse(config))
    assert 40 < len(data.encoded) + len(data.held_out) <= 80 and data.held_out


def test_pretraining_of_llamafactory_reads_its_texts(tmp_path: Path) -> None:
    """Its entries for `stage: pt` have a prompt and no answer: raw text."""
    (tmp_path / "dataset_info.json").write_text('{"c4": {"file_name": "c4.jsonl", "columns": {"prompt": "words"}}}')
    (tmp_path / "c4.jsonl").write_text("".join(f'{{"words": "Once there were {n} foxes."}}\n' for n in range(9)))
    given = {
        "stage": "pt",
        "model_name_or_path": "tiny",
        "dataset": "c4",
        "dataset_dir": str(tmp_path),
        "cutoff_len": 64,
    }
    config, left = foreign.converted(given)
    data = prepare(parse.parse(config))
    assert left == [] and config["train"]["objective"] == "text" and len(data.encoded) == 9 and not data.held_out
