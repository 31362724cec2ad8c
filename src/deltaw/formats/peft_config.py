"""What a PEFT adapter_config.json says: which method, which targets, and what is refused by name.

Only peft_type is mandatory; r and lora_alpha default to 8. Features that change the computation and that we do not
have are errors. Keys nobody here knows are notes when they are empty, and errors when they hold a value.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from deltaw.core.errors import ConfigError, faults
from deltaw.methods.dora import DoRA
from deltaw.methods.lora import LoRA

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
    "ensure_weight_tying": "tied adapters (ensure_weight_tying)",
}
"""Keys that change what an adapter computes; anything but an empty value is refused."""
HARMLESS = {
    "peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "r",
    "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules",
    "layers_to_transform", "layers_pattern", "modules_to_save", "trainable_token_indices", "bias", "fan_in_fan_out",
    "init_lora_weights", "use_dora", "qalora_group_size", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    "megatron_core", "runtime_config", "enable_lora", "merge_weights",
}  # fmt: skip
INITS = {True, False, None, "gaussian", "eva", "orthogonal"}
"""Initialisations that leave the base's weight alone."""


def check(config: Mapping[str, Any]) -> list[str]:
    """Notes for the user. ConfigError names everything that is not supported."""
    kind = str(config.get("peft_type", "")).upper().removeprefix("PEFTTYPE.")
    if not kind:
        raise ConfigError("adapter_config.json has no peft_type: is it PEFT's?")
    if kind != "LORA":
        raise ConfigError(f"peft_type {kind} is not supported yet, only LORA")
    found = [f"{what} is not supported yet" for key, what in UNSUPPORTED.items() if config.get(key)]
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init not in INITS:
        found.append(f"initialisation {init!r} is not supported yet: it changes the base or freezes a factor")
    notes = []
    for key, value in config.items():
        if key not in HARMLESS and key not in UNSUPPORTED:
            if value:
                found.append(f"the key {key}={value!r} is unknown here and may change what the adapter computes")
            else:
                notes.append(f"adapter_config.json has a key {key!r} that is unknown here; it is empty and left out")
    if config.get("enable_lora"):
        found.append("enable_lora (LoRA on parts of a fused weight) is not supported yet")
    if found:
        raise faults(ConfigError, "this PEFT adapter cannot be read", found)
    return notes


def method_of(config: Mapping[str, Any]) -> LoRA:
    """The LoRA or DoRA that the config describes, with its patterns."""
    check(config)
    bias = config.get("bias", "none")
    return (DoRA if config.get("use_dora") else LoRA)(
        rank=int(config.get("r") or 8),
        alpha=float(config.get("lora_alpha", 8)),
        dropout=float(config.get("lora_dropout") or 0.0),
        rslora=bool(config.get("use_rslora")),
        init="gaussian" if config.get("init_lora_weights") == "gaussian" else "kaiming",
        rank_pattern=dict(config.get("rank_pattern") or {}),
        alpha_pattern=dict(config.get("alpha_pattern") or {}),
        bias=bias,
        modules_to_save=tuple(dict.fromkeys(config.get("modules_to_save") or ())),
    )


def alpha_of(config: Mapping[str, Any], path: str) -> float:
    """α of one module: the first pattern that is the end of its path, else lora_alpha."""
    for pattern, alpha in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return float(alpha)
    return float(config.get("lora_alpha", 8))


def matched(
    config: Mapping[str, Any], paths: Iterable[str], linear: Collection[str] = (), head: Collection[str] = ()
) -> list[str]:
    """The module paths that PEFT would adapt, by its own rules. `linear`, `head`: for the preset "all-linear"."""
    return [path for path in paths if _matches(config, path, linear, head)]


def _matches(config: Mapping[str, Any], path: str, linear: Collection[str], head: Collection[str]) -> bool:
    exclude = config.get("exclude_modules")
    if exclude and (re.fullmatch(exclude, path) if isinstance(exclude, str) else _named(exclude, path)):
        return False
    saved = config.get("modules_to_save") or ()
    if any(re.match(rf"(^|.*\.){name}($|\..*)", path) for name in saved):
        return False
    targets = config.get("target_modules")
    if targets is None:
        return False
    if isinstance(targets, str):
        if targets.lower() == "all-linear":
            return path in linear and path not in head
        return re.fullmatch(targets, path) is not None
    if path in targets:
        return True  # an exact name is not subject to layers_to_transform
    return _named(targets, path) and _in_layers(config, path)


def _named(names: Iterable[str], path: str) -> bool:
    return any(path == name or path.endswith("." + name) for name in names)


def _in_layers(config: Mapping[str, Any], path: str) -> bool:
    layers = config.get("layers_to_transform")
    if layers is None or (isinstance(layers, list) and not layers):
        return True
    patterns = config.get("layers_pattern") or []
    if patterns:
        found = None
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            found = re.match(rf"(?:^|.*?\.){pattern}\.(?P<index>\d+)\.", path)
            if found:
                break
    else:
        found = re.match(r".*?\.[^.]*\.(?P<index>\d+)\.", path)
    if not found:
        return False
    index = int(found["index"])
    return index == layers if isinstance(layers, int) else index in layers


def leaf_targets(adapted: Sequence[str], paths: Collection[str] | None) -> list[str]:
    """target_modules for `adapted`: the last names of the paths where these select exactly them, else the full paths."""
    leaves = sorted({path.rpartition(".")[2] for path in adapted})
    if paths is not None and {p for p in paths if _named(leaves, p)} == set(adapted):
        return leaves
    return sorted(adapted)
