"""What a PEFT adapter_config.json says: which method, which targets; and what is refused, by name.

Only peft_type is mandatory; what else there is depends on it (`peft_methods`). What changes the computation and is not
supported is an error. A key that nobody here knows is a note where it is empty, and an error where it holds a value:
it may be a switch of a newer PEFT that changes what the tensors mean.
"""

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from deltaw.core.errors import ConfigError, faults
from deltaw.core.method import Method
from deltaw.formats.peft_kind import PLAIN
from deltaw.formats.peft_match import matches
from deltaw.formats.peft_methods import kind_of
from deltaw.formats.peft_valid import ANYWHERE, IRRELEVANT

DUMMY = "dummy-target-modules"
"""PEFT's own word for a LoRA config that adapts no module: only biases, saved modules or token rows."""


def check(config: Mapping[str, Any], *, strict: bool = True) -> list[str]:
    """Notes for the user. ConfigError names everything that is impossible or not supported, at once."""
    kind = kind_of(config)
    found = [f"{what} is not supported yet" for key, what in kind.unsupported.items() if config.get(key)]
    found += kind.faults(config)
    valid = {**ANYWHERE, **kind.valid}
    silent = IRRELEVANT | {*kind.unused, *kind.unsupported, *kind.for_training}
    notes = kind.notes(config)
    for key, value in config.items():
        if key in valid:
            words = valid[key](value)
            found += [f"{key}={value!r} is not {words}"] if words else []
        elif key not in silent:
            unknown = f"the key {key}={value!r} is unknown here"
            if value and strict:
                found.append(f"{unknown} and may change what the adapter computes: remove it if it does not")
            else:
                notes.append(f"{unknown}; it is left out")
    if found:
        raise faults(ConfigError, "this PEFT adapter cannot be read", found)
    return notes


def method_of(config: Mapping[str, Any], *, strict: bool = True) -> Method:
    """The method that the config describes, with its patterns."""
    check(config, strict=strict)
    return kind_of(config).method(config)


@dataclass(frozen=True)
class Recipe:
    """A PEFT config as something to train: attach(model, recipe.method, targets=recipe.targets(paths, linear, head))."""

    method: Method
    config: Mapping[str, Any]

    def targets(self, paths: Iterable[str], linear: Collection[str] = (), head: Collection[str] = ()) -> list[str]:
        """Full paths of the modules that PEFT would adapt (`deltaw.formats.peft_match`)."""
        return matches(self.config, paths, linear, head)


def parse_config(config: Mapping[str, Any]) -> Recipe:
    """The recipe a config stands for. ConfigError names what is not supported, also what only training would need."""
    method, kind = method_of(config), kind_of(config)
    known = {field.name for field in dataclasses.fields(method)}
    found = [f"{what} cannot be taken over from a config" for key, what in kind.for_training.items() if config.get(key)]
    found += [
        f"{key} cannot be taken over from a config: {method.name} has no such option"
        for key in PLAIN
        if key not in known and config.get(key) not in (None, "none", {}, [])
    ]
    found += kind.untrainable(config)
    if found:
        raise faults(ConfigError, "this PEFT config cannot be trained", found)
    return Recipe(method, config)
