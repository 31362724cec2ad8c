"""Configurations of other tools as ours. Which tool's it is, its keys tell, and every key that is not carried over is named.

    peft_type                                       PEFT's LoraConfig         `from_lora_config`
    lora_config: {…}, or r / rank with lora_alpha   a block of LoRA options   `from_lora_config`
    model_name_or_path, lora_rank, cutoff_len, …    LLaMA-Factory             `from_llamafactory`

    converted(record) -> (plain data for `deltaw.config.parse`, [Left(key, value, why), …])
    text(record)      -> (a YAML file with what was left as comments, the same list)

Pure: plain data in, plain data out. What comes out has been through `parse`, but for a model or data that nothing names.
"""

import json
from collections.abc import Mapping
from typing import Any

import yaml

from deltaw.config import from_llamafactory, from_lora_config
from deltaw.config.given import Left
from deltaw.config.parse import parse
from deltaw.core.errors import ConfigError

LLAMAFACTORY, BLOCK, PEFT = "LLaMA-Factory", "lora_config", "PEFT's LoraConfig"
OURS = {"model", "data", "adapter", "train"}


def tool(record: Any) -> str:
    """Whose configuration it is; ConfigError where its keys do not tell."""
    if not isinstance(record, Mapping):
        raise ConfigError(f"a configuration is a mapping of keys to values, not {record!r}")
    if record.keys() & OURS:
        ours = sorted(map(str, record.keys() & OURS))
        raise ConfigError(f"it is a configuration of deltaw already (it has {', '.join(ours)}): train with it as it is")
    if "peft_type" in record:
        return PEFT
    if isinstance(record.get("lora_config"), Mapping):
        return BLOCK
    if "lora_alpha" in record and record.keys() & {"r", "rank", "target_modules"}:
        return BLOCK
    if record.keys() & {*from_llamafactory.SIGNS}:
        return LLAMAFACTORY
    keys = ", ".join(map(repr, list(record)[:6]))
    raise ConfigError(
        f"whose configuration this is cannot be told from its keys ({keys or 'it has none'}): PEFT's has peft_type, "
        "LLaMA-Factory's model_name_or_path or lora_rank, a block of LoRA options stands under lora_config"
    )


def converted(record: Any) -> tuple[dict[str, Any], list[Left]]:
    """Another tool's configuration as plain data of ours, and all that was left, with what is missing to train.

    Values are carried over as they are, and what the other tool does without being told is written out where we would do
    something else. ConfigError where its keys do not tell whose it is, would train something else, or have impossible values.
    """
    whose = tool(record)
    if whose == PEFT:
        config, left = from_lora_config.converted(record)
    elif whose == LLAMAFACTORY:
        config, left = from_llamafactory.converted(record)
    else:
        rest = {key: value for key, value in record.items() if key != "lora_config"}
        section, left = from_lora_config.block(record.get("lora_config", record))
        config = {"adapter": section}
        if "lora_config" in record and rest:  # it stands in a file of LLaMA-Factory
            config, more = from_llamafactory.converted(rest, section)
            left += more
    data = config.get("data", {})
    missing = {} if "model" in config else {"model": "nothing names the base: a folder or a hub id"}
    missing |= {} if "train" in data else {"data.train": "nothing names the rows: a file, a folder or a hub id"}
    parse({"model": "?", **config, "data": {"train": "?", **data}})
    return config, [*left, *(Left(key, None, why) for key, why in missing.items())]


def text(record: Any) -> tuple[str, list[Left]]:
    """Another tool's configuration as the text of a YAML file of ours, and what was left; both as `converted`."""
    config, left = converted(record)
    lines = [f"# Converted from {tool(record)}." + (" Not carried over as it was, or missing:" if left else "")]
    for key, value, why in left:
        said = "" if value is None else f": {_short(value)}"
        lines.append("#   " + " ".join(f"{key}{said} ({why})".split()))  # one line, whatever a stranger's file holds
    return "\n".join([*lines, yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=120)]), left


def _short(value: Any) -> str:
    """A value on one line."""
    said = json.dumps(value, ensure_ascii=False, default=str)
    return said if len(said) <= 60 else f"{said[:57]}…"
