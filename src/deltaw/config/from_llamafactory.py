"""A LLaMA-Factory training YAML → a configuration of ours. Its keys are flat and have defaults of their own.

    model_name_or_path, quantization_bit …     model, quantize
    dataset, dataset_dir, max_samples          data.train: dataset_dir/dataset_info.json#name, rows; media_dir: images
    val_size, eval_dataset, cutoff_len …       data.eval, data.max_length
    lora_* , use_dora, pissa_init …            adapter (through the names of PEFT's LoraConfig)
    freeze_vision_tower …                      adapter.parts (`llamafactory_parts`)
    learning_rate, num_train_epochs …          train: the names of transformers' TrainingArguments

What a key that is absent means there is written out where it decides what is learnt and ours is another value (rank 8, learning
rate 5e-5, 3 epochs, linear schedule without warm-up, seed 42, no held-out rows, checkpointing). What would train something
else (a stage or a finetuning_type that we do not have) is an error. Facts: LLaMA-Factory 0.9.6, `hparams/*.py`, and
`data/loader.py` for max_samples (of each data set); transformers 5, `TrainingArguments`.
"""

from collections.abc import Mapping
from typing import Any

from deltaw.config import from_lora_config
from deltaw.config.given import Given, Left, explained, number, said, words
from deltaw.config.llamafactory_parts import FREEZE, by_part
from deltaw.core.errors import ConfigError, faults

OBJECTIVES = {"sft": "sft", "pt": "text"}
SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant", "constant_with_warmup": "constant"}
OPTIMIZERS = {
    "adamw_torch": "adamw", "adamw_torch_fused": "adamw", "adamw_8bit": "adamw-8bit", "adamw_bnb_8bit": "adamw-8bit",
    "paged_adamw_8bit": "paged-adamw-8bit",
}  # fmt: skip
PLAIN = {
    "per_device_train_batch_size": ("batch_size", 8),
    "gradient_accumulation_steps": ("gradient_accumulation", None),
    "learning_rate": ("learning_rate", 5e-5),
    "num_train_epochs": ("epochs", 3.0),
    "weight_decay": ("weight_decay", None),
    "max_grad_norm": ("clip", None),
    "seed": ("seed", 42),
    "neftune_noise_alpha": ("neftune", None),
    "save_total_limit": ("keep", None),
    "early_stopping_steps": ("early_stopping", None),
    "load_best_model_at_end": ("best", None),
}
"""Its key → ours in `train`, and the value to write where it is absent, for those whose default there is not ours."""
AGREE: Mapping[str, tuple[Any, ...]] = {
    "do_train": (True,), "do_eval": (True,), "plot_loss": (True,), "use_fast_tokenizer": (True,), "model_revision": ("main",),
    "flash_attn": ("auto",), "low_cpu_mem_usage": (True,), "mix_strategy": ("concat",), "ignore_pad_token_for_loss": (True,),
    "eval_strategy": ("steps",), "evaluation_strategy": ("steps",), "save_strategy": ("steps",), "logging_strategy": ("steps",),
    "metric_for_best_model": ("eval_loss", "loss"), "greater_is_better": (False,), "pissa_convert": (True, False),
    "train_sampling_strategy": ("random",), "adam_beta1": (0.9,), "adam_beta2": (0.999,), "adam_epsilon": (1e-8,),
    "remove_unused_columns": (True, False),
}  # fmt: skip
REASONS = explained(
    {
        "rows go through the base's own chat template; data.template names another, `deltaw plan` shows them": "template "
        "default_system enable_thinking tool_format",
        "packing changes speed only here, never what a row sees, and is automatic": "packing neat_packing",
        "rows of all sources are shuffled together, each source with its weight": "mix_strategy interleave_probs",
        "rows are read with data.streaming, or all at once, each time anew": "buffer_size tokenized_path overwrite_cache "
        "preprocessing_num_workers preprocessing_batch_size dataloader_num_workers dataloader_pin_memory "
        "dataloader_persistent_workers dataloader_prefetch_factor dataloader_drop_last data_seed disable_shuffling",
        "the adapter's run is described by its report and events.jsonl": "plot_loss include_num_input_tokens_seen log_level "
        "include_effective_tokens_per_second compute_accuracy print_param_status run_name logging_first_step disable_tqdm "
        "logging_strategy logging_dir ray_run_name",
        "a run directory is never written over, and holds adapters and what a resume needs": "overwrite_output_dir "
        "save_only_model save_strategy save_safetensors",
        "continue with `deltaw train --resume RUN`": "resume_from_checkpoint ignore_data_skip",
        "held-out rows are evaluated by steps (train.eval_every), with the batch size of training": "eval_strategy "
        "evaluation_strategy per_device_eval_batch_size eval_on_each_dataset eval_accumulation_steps eval_delay do_eval "
        "metric_for_best_model greater_is_better eval_on_start",
        "a configuration trains: `deltaw eval` and `deltaw generate` do this": "do_predict predict_with_generate max_new_tokens "
        "do_train temperature top_p top_k num_beams repetition_penalty length_penalty max_length do_sample skip_special_tokens "
        "eval_num_beams infer_backend infer_dtype generation_num_beams generation_max_length",
        "`deltaw merge` writes merged models": "export_dir export_size export_device export_legacy_format export_hub_model_id "
        "export_quantization_bit export_quantization_dataset",
        "code of a hub repository is not run": "trust_remote_code",
        "a hub id is loaded at its newest revision: give a folder for another": "model_revision",
        "where files are kept and how a hub is entered is for the environment (HF_HOME, `hf auth login`)": "cache_dir "
        "hf_hub_token ms_hub_token om_hub_token hub_token push_to_hub hub_model_id hub_strategy use_modelscope",
        "how processes are launched and share the work is for accelerate": "deepspeed fsdp fsdp_config ddp_timeout ddp_backend "
        "ddp_find_unused_parameters ray_num_workers ray_scope use_ray local_rank tp_size sequence_parallel_size",
        "attention and kernels are chosen by themselves": "flash_attn shift_attn use_unsloth use_unsloth_gc enable_liger_kernel "
        "use_v1_kernels use_reentrant_gc torch_compile use_kv_cache low_cpu_mem_usage gradient_checkpointing_kwargs tf32 "
        "use_liger_kernel auto_find_batch_size",
        "trained tensors are fp32, the base is held in train.dtype": "upcast_layernorm upcast_lmhead_output fp8 fp8_backend "
        "fp8_enable_fsdp_float8_all_gather bf16_full_eval",
        "data.tokens adds tokens and trains their rows: name them there": "add_tokens add_special_tokens new_special_tokens_config "
        "init_special_tokens resize_vocab",
        "the base is taken as it is": "rope_scaling mixture_of_depths moe_aux_loss_coef train_from_scratch use_llama_pro "
        "split_special_tokens quantization_device_map offload_folder use_fast_tokenizer",
        "the base's own processor says how large images are": "image_max_pixels image_min_pixels",
        "rows hold text and images": "video_max_pixels video_min_pixels video_fps video_maxlen audio_sampling_rate",
        "the optimizer is AdamW with β 0.9, 0.999": "use_galore use_apollo use_badam use_adam_mini use_muon adam_beta1 adam_beta2 "
        "adam_epsilon optim_args lr_scheduler_kwargs",
        "the loss is cross-entropy on what is supervised": "label_smoothing_factor use_dft_loss pref_beta pref_ftx pref_loss "
        "dpo_label_smoothing simpo_gamma ref_model reward_model ppo_epochs ppo_target kto_chosen_weight kto_rejected_weight",
        "new rows of embeddings are trained at the rate of the rest: train.rates changes that": "loraplus_lr_embedding",
        "other loggers are named in train.report_to": "use_swanlab swanlab_project swanlab_run_name swanlab_workspace swanlab_mode "
        "swanlab_api_key trackio_space_id",
        "rows are drawn at random, or grouped with train.group_by_length": "train_sampling_strategy length_column_name",
        "which columns are read depends on the form of the rows": "remove_unused_columns",
    }
)
ADAPTER = words(
    "lora_rank lora_alpha lora_dropout lora_target additional_target use_rslora use_dora pissa_init pissa_iter loraplus_lr_ratio"
)
SIGNS = words(
    "model_name_or_path stage finetuning_type lora_rank lora_target quantization_bit cutoff_len dataset_dir max_samples pissa_init",
    "loraplus_lr_ratio adapter_name_or_path",
)
"""Keys that tell its configurations."""
KNOWN = words(
    "create_new_adapter quantization_method quantization_type double_quantization dataset eval_dataset val_size train_on_prompt",
    "mask_history streaming pissa_convert max_steps media_dir",
    "lr_scheduler_type warmup_ratio warmup_steps bf16 fp16 pure_bf16 optim logging_steps save_steps eval_steps group_by_length",
    "report_to output_dir disable_gradient_checkpointing gradient_checkpointing",
    *ADAPTER,
    *FREEZE,
    *SIGNS,
    *PLAIN,
)


def converted(record: Mapping[str, Any], adapter: Mapping[str, Any] | None = None) -> tuple[dict[str, Any], list[Left]]:
    """A configuration of ours, and what could not be carried over. `adapter`: an adapter section that is known otherwise.
    ConfigError for a stage or finetuning_type that would train something else."""
    given = Given(record)
    stage, kind = given.take("stage", "sft"), given.take("finetuning_type", "lora")
    found = (
        []
        if stage in list(OBJECTIVES)
        else [f"stage: {stage} is none of those that deltaw trains: {', '.join(OBJECTIVES)}"]
    )
    if kind != "lora":
        found.append(
            f"finetuning_type: {kind} is not carried over, only lora: name a method of `deltaw schema` yourself"
        )
    if found:
        raise faults(ConfigError, "this configuration of LLaMA-Factory", found)
    for key in ADAPTER if adapter is not None else ():
        given.leave(key, "the block lora_config says what the adapter is")
    config = {
        "model": given.take("model_name_or_path"),
        "quantize": _quantize(given),
        "data": _data(given, cuts=stage == "sft"),
        "adapter": by_part(given, _adapter(given) if adapter is None else adapter),
        "train": {**({"objective": "text"} if stage == "pt" else {}), **_train(given)},
        "output": given.take("output_dir"),
    }
    for key, values in AGREE.items():
        given.agrees(key, *values)
    left = given.finish(REASONS, KNOWN, "LLaMA-Factory")
    return said(config), left


def _names(value: Any) -> list[str]:
    """identity,alpaca_en_demo → both"""
    listed = value if isinstance(value, list | tuple) else [] if value is None else str(value).split(",")
    return [str(one).strip() for one in listed]


def _quantize(given: Given) -> str | None:
    bits, method = given.take("quantization_bit"), given.take("quantization_method", "bnb")
    kind, double = given.take("quantization_type", "nf4"), given.take("double_quantization", True)
    if bits is None:
        return None
    if method in ("bnb", "bitsandbytes") and bits == 8:
        return "int8"
    if method in ("bnb", "bitsandbytes") and bits == 4 and kind == "nf4":
        return "nf4-double" if double else "nf4"
    given.left_out(
        "quantization_bit", bits, f"{bits} bits by {method} ({kind}) are not there: the base stays unquantised"
    )
    return None


def _data(given: Given, cuts: bool) -> dict[str, Any]:
    """cuts: rows are conversations, whose ends it cuts away; texts go in pieces, there and here."""
    folder, own = (
        given.take("dataset_dir", "data"),
        {"rows": given.take("max_samples"), "images": given.take("media_dir")},
    )
    train = _sources(given.take("dataset"), folder, said(own))
    held_out: Any = _sources(given.take("eval_dataset"), folder, said(own))
    size = given.take("val_size", 0)
    if size and held_out is None:
        if number(size) and 0 < size < 1:
            held_out = size
        else:
            given.left_out("val_size", size, "held-out rows are a share of the rows: set data.eval")
    if cuts and "cutoff_len" in given:
        why = (
            "it is data.max_length, but longer rows are dropped, where LLaMA-Factory cuts the ends of prompt and answer; "
            "data.overflow: cut keeps them without their beginning"
        )
        given.left_out("cutoff_len", given.peek("cutoff_len"), why)
    found = {
        "train": train, "max_length": given.take("cutoff_len", 2048), "train_on_prompt": given.take("train_on_prompt"),
        "turns": "last" if given.take("mask_history") else None, "streaming": given.take("streaming"),
    }  # fmt: skip
    return {**said(found), "eval": held_out}


def _sources(names: Any, folder: str, own: dict[str, Any]) -> Any:
    """`alpaca` → data/dataset_info.json#alpaca, with the fields of a source that are given; one alone, or a list."""
    paths = [name if folder == "ONLINE" else f"{folder}/dataset_info.json#{name}" for name in _names(names)]
    found = [{"path": path, **own} if own else path for path in paths]
    return (found[0] if len(found) == 1 else found) if found else None


def _adapter(given: Given) -> dict[str, Any]:
    start = _names(given.take("adapter_name_or_path"))
    fresh = given.take("create_new_adapter", False)
    if len(start) == 1 and not fresh:
        for key in ADAPTER:
            given.leave(key, "the adapter that training goes on from brings its own")
        return {"from": start[0]}
    if start:
        why = "it would be merged into the base first: `deltaw merge` it, and give the merged model"
        given.left_out("adapter_name_or_path", ",".join(start), why)
    rank, pissa, turns = given.take("lora_rank", 8), given.take("pissa_init", False), given.take("pissa_iter", 16)
    plus, targets = given.take("loraplus_lr_ratio"), _names(given.take("lora_target", "all"))
    as_peft = Given(
        {
            "r": rank,
            "lora_alpha": given.take("lora_alpha"),  # absent: twice the rank, there and here
            "lora_dropout": given.take("lora_dropout"),
            "target_modules": "all-linear" if "all" in targets else targets,
            "modules_to_save": _names(given.take("additional_target")),
            "use_rslora": given.take("use_rslora"),
            "use_dora": given.take("use_dora"),
            "init_lora_weights": True if not pissa else "pissa" if turns == -1 else f"pissa_niter_{turns}",
        }
    )
    found = from_lora_config.adapter(as_peft, rank=8, alpha=2 * rank if isinstance(rank, int) else None)
    for left in as_peft.left:
        given.left_out("pissa_init", pissa, left.why)
    return {**found, **({} if plus is None else {"plus": plus})}


def _train(given: Given) -> dict[str, Any]:
    found = {ours: given.take(theirs, default) for theirs, (ours, default) in PLAIN.items()}
    steps = given.take("max_steps", -1)
    found["max_steps"] = None if steps == -1 else steps
    schedule = given.take("lr_scheduler_type", "linear")
    found["schedule"] = _one_of(SCHEDULES, schedule, given, "lr_scheduler_type")
    found["warmup"] = _warmup(given, found["max_steps"])
    if schedule == "constant" and found["warmup"]:
        given.left_out("warmup_ratio", found["warmup"], "the constant schedule there has no warm-up")
        found["warmup"] = 0.0
    found["optimizer"] = _one_of(OPTIMIZERS, given.take("optim", "adamw_torch"), given, "optim")
    pure = given.take("pure_bf16", False)
    found["dtype"] = "bf16" if given.take("bf16", False) or pure else None
    if pure:
        given.left_out("pure_bf16", True, "the base is in bf16 (train.dtype), what is trained in fp32")
    given.leave("fp16", "fp16 is not trained in: train.dtype is auto, bf16 where the device has it")
    for key, ours in (("logging_steps", "log_every"), ("save_steps", "save_every"), ("eval_steps", "eval_every")):
        every = given.take(key)
        if isinstance(every, int | float) and number(every) and every % 1 == 0:
            found[ours] = int(every)
        elif every is not None:
            given.left_out(key, every, f"train.{ours} counts steps, in whole numbers")
    found["group_by_length"] = given.take("group_by_length")
    found["checkpointing"] = not given.take("disable_gradient_checkpointing", False)
    given.take("gradient_checkpointing")  # the other key decides
    loggers = given.take("report_to", "none")
    found["report_to"] = [one for one in _names(loggers) if one != "none"]
    return said(found)


def _one_of(known: Mapping[str, str], value: Any, given: Given, key: str) -> str | None:
    if value not in list(known):  # which may be a table, that no dictionary looks up
        given.left_out(
            key, value, f"there are {', '.join(dict.fromkeys(known.values()))} here, the first of them by default"
        )
        return None
    return known[value]


def _warmup(given: Given, steps: int | None) -> float:
    """Warm-up as a share of the steps. A number of steps is one where their total is known."""
    share, count = given.take("warmup_ratio", 0.0), given.take("warmup_steps", 0)
    if not count:
        return share
    if not number(count):
        given.left_out("warmup_steps", count, "it is no number")
        return share
    if 0 < count < 1:
        return count
    if number(steps) and 0 < count < steps:
        exact = count / steps
        return exact if int(exact * steps) == count else (count + 0.5) / steps
    given.left_out(
        "warmup_steps", count, "warm-up is a share of the steps: train.warmup is that over the number of steps"
    )
    return share
