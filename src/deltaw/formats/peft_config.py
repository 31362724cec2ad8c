"""What a PEFT adapter_config.json says: which method, which targets; and what is refused, by name.

Only peft_type is mandatory; r and lora_alpha default to 8, the scale is α/r, or α/√r with use_rslora. What changes the
computation and is not supported is an error. A key that nobody here knows is a note where it is empty, and an error
where it holds a value: it may be a switch of a newer PEFT that changes what the tensors mean.
"""

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from deltaw.core.errors import ConfigError, faults
from deltaw.formats.peft_match import first_hit, matches
from deltaw.methods.dora import DoRA
from deltaw.methods.lora import LoRA

DUMMY = "dummy-target-modules"
"""PEFT's own word for a LoRA config that adapts no module: only biases, saved modules or token rows."""
UNSUPPORTED = {
    "lora_bias": "a bias on B (lora_bias)",
    "use_qalora": "QA-LoRA (use_qalora)",
    "use_bdlora": "BD-LoRA (use_bdlora)",
    "alora_invocation_tokens": "activated LoRA (alora_invocation_tokens)",
    "layer_replication": "layer replication (layer_replication)",
    "target_parameters": "MoE parameters as targets (target_parameters)",
    "kasa_config": "KaSA (kasa_config)",
    "velora_config": "VeLoRA (velora_config)",
    "monteclora_config": "MonteCLoRA (monteclora_config)",
    "arrow_config": "Arrow routing (arrow_config)",
    "megatron_config": "Megatron layers (megatron_config)",
    "enable_lora": "LoRA on parts of a fused weight (enable_lora)",
}
"""Keys that change what an adapter computes; anything but an empty value is refused."""
FOR_TRAINING = {
    "trainable_token_indices": "token rows (attach TokenRows under the same name)",
    "ensure_weight_tying": "adapters shared by tied modules (ensure_weight_tying)",
}
"""Keys that a file's tensors answer, but a new adapter made from the config would not honour."""
INITS: Mapping[str, Literal["kaiming", "gaussian"]] = {
    "gaussian": "gaussian", "eva": "kaiming", "orthogonal": "kaiming", "true": "kaiming", "false": "kaiming"
}  # fmt: skip
"""Initialisations that leave the base's weight alone → how we would start A."""
IRRELEVANT = {
    "peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode",
    "fan_in_fan_out", "init_lora_weights", "qalora_group_size", "loftq_config", "eva_config", "corda_config",
    "lora_ga_config", "megatron_core", "runtime_config", "merge_weights",
}  # fmt: skip
"""Keys that say nothing about what finished tensors compute, whatever their value."""


def check(config: Mapping[str, Any], *, strict: bool = True) -> list[str]:
    """Notes for the user. ConfigError names everything that is impossible or not supported, at once."""
    kind = str(config.get("peft_type") or "").upper().removeprefix("PEFTTYPE.")
    if not kind:
        raise ConfigError("adapter_config.json has no peft_type: is it PEFT's?")
    if kind != "LORA":
        raise ConfigError(f"peft_type {kind} is not supported yet, only LORA (LoRA, rsLoRA and DoRA)")
    found = [f"{what} is not supported yet" for key, what in UNSUPPORTED.items() if config.get(key)]
    init = _init(config)
    if init not in INITS:
        found.append(f"initialisation {init!r} is not supported yet: it changes the base's weight or freezes a factor")
    notes = []
    for key, value in config.items():
        if key in VALID:
            words = VALID[key](value)
            found += [f"{key}={value!r} is not {words}"] if words else []
        elif key not in IRRELEVANT and key not in UNSUPPORTED and key not in FOR_TRAINING:
            unknown = f"the key {key}={value!r} is unknown here"
            if value and strict:
                found.append(f"{unknown} and may change what the adapter computes: remove it if it does not")
            else:
                notes.append(f"{unknown}; it is left out")
    if found:
        raise faults(ConfigError, "this PEFT adapter cannot be read", found)
    return notes


def method_of(config: Mapping[str, Any], *, strict: bool = True) -> LoRA:
    """The LoRA or DoRA that the config describes, with its patterns."""
    check(config, strict=strict)
    return (DoRA if config.get("use_dora") else LoRA)(
        rank=config.get("r") or 8,
        alpha=float(config.get("lora_alpha") or 8),
        dropout=float(config.get("lora_dropout") or 0.0),
        rslora=bool(config.get("use_rslora")),
        init=INITS[_init(config)],
        rank_pattern=dict(config.get("rank_pattern") or {}),
        alpha_pattern=dict(config.get("alpha_pattern") or {}),
        bias=config.get("bias") or "none",
        modules_to_save=tuple(dict.fromkeys(config.get("modules_to_save") or ())),
    )


@dataclass(frozen=True)
class Recipe:
    """A PEFT config as something to train: attach(model, recipe.method, targets=recipe.targets(paths, linear, head))."""

    method: LoRA
    config: Mapping[str, Any]

    def targets(self, paths: Iterable[str], linear: Collection[str] = (), head: Collection[str] = ()) -> list[str]:
        """Full paths of the modules that PEFT would adapt (`deltaw.formats.peft_match`)."""
        return matches(self.config, paths, linear, head)


def parse_config(config: Mapping[str, Any]) -> Recipe:
    """The recipe a config stands for. ConfigError names what is not supported, also what only training would need."""
    found = [f"{what} cannot be taken over from a config" for key, what in FOR_TRAINING.items() if config.get(key)]
    if config.get("init_lora_weights") is False:
        found.append("init_lora_weights=false starts with a random change of the base: use true")
    method = method_of(config)
    if found:
        raise faults(ConfigError, "this PEFT config cannot be trained", found)
    return Recipe(method, config)


def alpha_of(config: Mapping[str, Any], path: str) -> float:
    """α of one module, by PEFT's rule."""
    return float(first_hit(config.get("alpha_pattern") or {}, path) or config.get("lora_alpha") or 8)


def rank_of(config: Mapping[str, Any], path: str) -> int:
    """The rank that the config claims for one module; tensors decide."""
    return int(first_hit(config.get("rank_pattern") or {}, path) or config.get("r") or 8)


def _init(config: Mapping[str, Any]) -> str:
    value = config.get("init_lora_weights")
    return "true" if value is None else str(value).lower()


Check = Callable[[Any], str]  # "" where the value is fine, else what it should be


def _rank(value: Any) -> bool:
    return type(value) is int and value >= 1


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def _names(value: Any) -> bool:
    return isinstance(value, list | tuple | set) and all(isinstance(name, str) and name for name in value)


def _regex(value: Any) -> bool:
    try:
        re.compile(value)
    except (re.error, TypeError):
        return False
    return True


def _ids(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(type(item) is int and item >= 0 for item in value)


def _one(test: Callable[[Any], bool], words: str) -> Check:
    return lambda value: "" if value is None or test(value) else words


def _patterns(test: Callable[[Any], bool], words: str) -> Check:
    return _one(
        lambda value: isinstance(value, Mapping) and all(_regex(k) and test(v) for k, v in value.items()), words
    )


_targets = _one(lambda v: _names(v) or (isinstance(v, str) and _regex(v)), "a list of names or a regular expression")
_switch = _one(lambda v: isinstance(v, bool), "true or false")
VALID: Mapping[str, Check] = {
    "r": _one(_rank, "a whole number of at least 1"),
    "lora_alpha": _one(_positive, "a positive number"),
    "lora_dropout": _one(lambda v: v == 0 or (_positive(v) and v < 1), "in [0, 1)"),
    "use_rslora": _switch,
    "use_dora": _switch,
    "rank_pattern": _patterns(_rank, "a table {pattern: whole number of at least 1}"),
    "alpha_pattern": _patterns(_positive, "a table {pattern: positive number}"),
    "target_modules": _targets,
    "exclude_modules": _targets,
    "modules_to_save": _one(lambda v: _names(v) and all(map(_regex, v)), "a list of names"),
    "trainable_token_indices": _one(
        lambda v: _ids(v) or (isinstance(v, Mapping) and all(_ids(ids) for ids in v.values())),
        "a list of token ids, or a table {module: ids}",
    ),
    "layers_to_transform": _one(lambda v: _ids(v) or (type(v) is int and v >= 0), "a layer index or a list of them"),
    "layers_pattern": _one(lambda v: isinstance(v, str) or _names(v), "a name or a list of names"),
    "bias": _one(lambda v: v in ("none", "all", "lora_only"), "none, all or lora_only"),
}
"""Keys with a meaning here, and the values they may have."""
