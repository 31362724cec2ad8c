"""Are the values of a PEFT config what they must be? Checks give "" where a value is fine, else what it should be."""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

Check = Callable[[Any], str]


def whole(value: Any, least: int = 1) -> bool:
    return type(value) is int and value >= least


def number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def positive(value: Any) -> bool:
    return number(value) and value > 0


def names(value: Any) -> bool:
    return isinstance(value, list | tuple | set) and all(isinstance(name, str) and name for name in value)


def regex(value: Any) -> bool:
    try:
        re.compile(value)
    except (re.error, TypeError):
        return False
    return True


def ids(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(whole(item, 0) for item in value)


def one(test: Callable[[Any], bool], words: str) -> Check:
    """An absent value is always fine."""
    return lambda value: "" if value is None or test(value) else words


def patterns(test: Callable[[Any], bool], words: str) -> Check:
    return one(lambda value: isinstance(value, Mapping) and all(regex(k) and test(v) for k, v in value.items()), words)


TARGETS = one(lambda v: names(v) or (isinstance(v, str) and regex(v)), "a list of names or a regular expression")
NAMES = one(names, "a list of names")
SWITCH = one(lambda v: isinstance(v, bool), "true or false")
WHOLE = one(whole, "a whole number of at least 1")
COUNT = one(lambda v: whole(v, 0), "a whole number of at least 0")
POSITIVE = one(positive, "a positive number")
SHARE = one(lambda v: v == 0 or (positive(v) and v < 1), "in [0, 1)")
RANKS = patterns(whole, "a table {pattern: whole number of at least 1}")
ALPHAS = patterns(positive, "a table {pattern: positive number}")
TOKENS = one(
    lambda v: ids(v) or (isinstance(v, Mapping) and all(ids(each) for each in v.values())),
    "a list of token ids, or a table {module: ids}",
)
ANYWHERE: Mapping[str, Check] = {
    "target_modules": TARGETS,
    "exclude_modules": TARGETS,
    "modules_to_save": one(lambda v: names(v) and all(map(regex, v)), "a list of names"),
    "layers_to_transform": one(lambda v: ids(v) or whole(v, 0), "a layer index or a list of them"),
    "layers_pattern": one(lambda v: isinstance(v, str) or names(v), "a name or a list of names"),
}
"""Keys that every peft_type has, and the values they may have."""
IRRELEVANT = {
    "peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode",
    "fan_in_fan_out", "runtime_config",
}  # fmt: skip
"""Keys of every peft_type that say nothing about what finished tensors compute, whatever their value."""


def biases(word: str) -> Check:
    allowed = ("none", "all", word)
    return one(lambda v: v in allowed, f"none, all or {word}")
