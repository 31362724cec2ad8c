"""PEFT's LoraConfig → our `adapter` section: names changed, values as they are, module names meant as PEFT means them.

    r 8, lora_alpha 8, lora_dropout     rank, alpha, dropout
    use_rslora, use_dora                rslora, method: dora
    init_lora_weights                   init: kaiming, gaussian, pissa (pissa_niter_16: niter 16), olora, eva (rho), loftq
    target_modules, exclude_modules     targets, exclude
    layers_to_transform                 layers
    rank_pattern, alpha_pattern, bias, modules_to_save, target_parameters (among the targets)

Its defaults are written out where ours are others. Facts: PEFT 0.21, `LoraConfig` (src/peft/tuners/lora/config.py).
The block `lora_config: {rank, lora_alpha, target_modules, lora_dropout}`, which is found in notes and blogs and which no
tool reads, has the same keys, but for `rank`; what it does not say is left to our defaults.
"""

import re
from collections.abc import Mapping
from typing import Any

from deltaw.config.given import Given, Left, explained, said, words
from deltaw.core.errors import ConfigError
from deltaw.core.matching import PRESETS

NAMES = {
    "rank": "r", "lora_rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout", "targets": "target_modules",
    "lora_target": "target_modules", "rslora": "use_rslora",
}  # fmt: skip
"""What such blocks call the keys of a LoraConfig."""
INITS = {"true": None, "gaussian": "gaussian", "pissa": "pissa", "olora": "olora", "eva": "eva", "loftq": "loftq"}
AGREE: Mapping[str, tuple[Any, ...]] = {
    "task_type": ("CAUSAL_LM", "TaskType.CAUSAL_LM"), "qalora_group_size": (16,),
    "megatron_core": ("megatron.core",), "revision": ("main",),
}  # fmt: skip
SAID_ELSEWHERE = words("peft_type peft_version auto_mapping inference_mode runtime_config fan_in_fan_out")
"""What the base itself or its files tell, or that says nothing about training."""
REASONS = explained(
    {
        "only causal language models are trained": "task_type",
        "a hub id is loaded at its newest revision: give a folder for another": "revision",
        "name the tokens themselves in data.tokens: their rows are trained with the adapter": "trainable_token_indices",
        "layers are told by their number alone": "layers_pattern",
        "an adapter of a tied weight is one adapter here, or an error that says so": "ensure_weight_tying",
        "there is no bias on B here": "lora_bias",
        "there is no such LoRA here": "use_qalora use_bdlora alora_invocation_tokens layer_replication kasa_config velora_config "
        "monteclora_config arrow_config corda_config lora_ga_config qalora_group_size enable_lora",
        "there are no Megatron layers here": "megatron_config megatron_core",
        "of init: eva only rho is a choice here": "eva_config",
        "the bits are those of `quantize`, and there is one turn": "loftq_config",
        "merging is a verb of its own here": "merge_weights",
    }
)
KNOWN = words(
    "base_model_name_or_path r lora_alpha lora_dropout use_rslora use_dora rank_pattern alpha_pattern bias modules_to_save",
    "target_modules exclude_modules layers_to_transform init_lora_weights target_parameters",
)


def converted(record: Mapping[str, Any]) -> tuple[dict[str, Any], list[Left]]:
    """adapter_config.json of a LoRA, or the dictionary of a LoraConfig, as a configuration of ours without data."""
    kind = str(record["peft_type"]).upper().removeprefix("PEFTTYPE.")
    if kind != "LORA":
        raise ConfigError(
            f"peft_type {kind} cannot be carried over, only LORA: write its `adapter` section by hand, "
            "`deltaw schema` lists every method with its options"
        )
    given = Given({key: value for key, value in record.items() if key not in SAID_ELSEWHERE})
    model = given.take("base_model_name_or_path")
    if "target_modules" not in given and "target_parameters" not in given:
        why = "PEFT would take its own list for the architecture: here all linear layers are adapted"
        given.left_out("target_modules", None, why)
    found = adapter(given, rank=8, alpha=8)
    left = given.finish(REASONS, KNOWN, "PEFT's LoraConfig")
    return {**({} if model is None else {"model": model}), "adapter": found}, left


def block(record: Mapping[str, Any]) -> tuple[dict[str, Any], list[Left]]:
    """The mapping under `lora_config:` as our adapter section."""
    meant = [NAMES.get(key, key) for key in record]
    twice = [key for key in record if meant.count(NAMES.get(key, key)) > 1]
    if twice:
        raise ConfigError(f"lora_config says one thing twice, {' and '.join(map(str, twice))}: leave one out")
    given = Given({NAMES.get(key, key): value for key, value in record.items()})
    found = adapter(given, rank=None, alpha=None)
    return found, given.finish(REASONS, [*KNOWN, *NAMES], "lora_config")


def adapter(given: Given, rank: int | None, alpha: float | None) -> dict[str, Any]:
    """Our adapter section; `rank` and `alpha` are the defaults of whoever wrote it, None for ours."""
    found: dict[str, Any] = {
        "method": "dora" if given.take("use_dora", False) else "lora",
        "rank": given.take("r", rank),
        "alpha": given.take("lora_alpha", alpha),
        "dropout": given.take("lora_dropout"),
        "rslora": given.take("use_rslora"),
        **_init(given),
        **{key: given.take(key) for key in ("rank_pattern", "alpha_pattern", "bias", "modules_to_save")},
        "targets": _targets(given),
        "exclude": modules(given.take("exclude_modules")),
        "layers": given.take("layers_to_transform"),
    }
    if found["method"] == "dora" and found.get("init") in ("pissa", "olora", "loftq"):
        why = "DoRA has no norm for a start beside W: it starts as usual"
        given.left_out("init_lora_weights", found.pop("init"), why)
        found.pop("niter", None)
    for key, values in AGREE.items():
        given.agrees(key, *values)
    plain = {"bias": "none", "dropout": 0}
    return {key: value for key, value in said(found).items() if key not in plain or value != plain[key]}


def _init(given: Given) -> dict[str, Any]:
    value = given.take("init_lora_weights", True)
    word, _, turns = str(value).lower().partition("_niter_")
    if word in INITS and (not turns or (word == "pissa" and turns.isdigit())):
        return {
            "init": INITS[word],
            "niter": int(turns) if turns else None,
            "rho": _rho(given) if word == "eva" else None,
        }
    because = "B would start at random and change the base" if value is False else "there is no such start here"
    given.left_out("init_lora_weights", value, f"{because}: A starts at random and B at zero")
    return {}


def _rho(given: Given) -> Any:
    """Of EVA's options; the others are what they are here by default, or left."""
    options = given.peek("eva_config")
    if isinstance(options, Mapping):
        default = {"tau": 0.99, "use_label_mask": True, "label_mask_value": -100, "whiten": False}
        if (
            not options.keys()
            - {"rho", "adjust_scaling_factors"}
            - {k for k, v in default.items() if options.get(k) == v}
        ):
            given.take("eva_config")
        return options.get("rho")
    return None


def _targets(given: Given) -> Any:
    named, weights = modules(given.take("target_modules")), given.take("target_parameters")
    if weights and not isinstance(weights, list | tuple | set):
        raise ConfigError(f"target_parameters={weights!r} is not a list of names: write them as one")
    if weights:
        return [*([named] if isinstance(named, str) else named or []), *weights]
    return named


def modules(names: Any) -> Any:
    """PEFT's names of modules as ours. A string is a regular expression over the whole path there, and a name here; in a
    list names are the ends of paths in both, but here attention, mlp and all-linear are presets."""
    if isinstance(names, str):
        if names.lower() == "all-linear":
            return "all-linear"
        return f"(?:{names})" if re.fullmatch(r"[\w.\-]*", names) else names
    if not isinstance(names, list | tuple | set) or not all(isinstance(name, str) for name in names):
        return names
    ends = sorted(names) if isinstance(names, set) else list(names)
    plain = [re.fullmatch(r"[\w.\-]+", name) is not None and name not in PRESETS for name in ends]
    return [name if ok else rf"(?:.*\.)?{re.escape(name)}" for name, ok in zip(ends, plain, strict=True)]
