"""PEFT's rules for which modules a config names. Paths are those of the unwrapped model.

    order   rule                                                                       a hit
    1       exclude_modules: string = regex over the whole path; list = suffix rule    not adapted
    2       modules_to_save: an entry covers whole components anywhere in the path     not adapted
    3       target_modules, string: regex over the whole path, or "all-linear"         adapted
    4       target_modules, list: the very path                                        adapted
    5       target_modules, list: the path ends with "." + entry, in a wanted layer    adapted

    suffix rule     path == entry, or path ends with "." + entry
    saved rule      the path ends with the entry, no dot needed: "classifier" saves "pre_classifier" too
    pattern rule    that of `methods.patterns`

A bare suffix matches everywhere; only a regex over the whole path anchors it.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from deltaw.core.errors import ConfigError


def matches(
    config: Mapping[str, Any], paths: Iterable[str], linear: Collection[str] = (), head: Collection[str] = ()
) -> list[str]:
    """The `paths` that PEFT would adapt. `linear` and `head` (paths of all linear layers, of output heads) serve
    the preset "all-linear", which takes the first without the second."""
    return [path for path in paths if path and _adapted(config, path, linear, head)]


def named(names: Iterable[str], path: str) -> bool:
    """The suffix rule."""
    return any(path == name or path.endswith("." + name) for name in names)


def saved(names: Iterable[str], path: str) -> bool:
    """Would PEFT wrap this very module for modules_to_save? Its rule is a bare `endswith`."""
    return any(path.endswith(name) for name in names)


def shadowed(names: Iterable[str], path: str) -> bool:
    """Is the module inside one of modules_to_save, and therefore never adapted?"""
    return any(re.match(rf"(^|.*\.){name}($|\..*)", path) for name in names)


def _adapted(config: Mapping[str, Any], path: str, linear: Collection[str], head: Collection[str]) -> bool:
    exclude, targets = config.get("exclude_modules"), config.get("target_modules")
    if exclude and (re.fullmatch(exclude, path) if isinstance(exclude, str) else named(exclude, path)):
        return False
    if shadowed(config.get("modules_to_save") or (), path):
        return False
    if targets is None:
        if config.get("target_parameters") is not None:
            return False
        raise ConfigError("no target_modules: PEFT would take its default for the architecture; name the modules")
    if isinstance(targets, str):
        if targets.lower() == "all-linear":
            return path in linear and path not in head
        return re.fullmatch(targets, path) is not None
    return path in targets or (named(targets, path) and _in_layers(config, path))  # an exact name is in any layer


def _in_layers(config: Mapping[str, Any], path: str) -> bool:
    layers, patterns = config.get("layers_to_transform"), config.get("layers_pattern")
    if layers is None or (isinstance(layers, list) and not layers):
        return True
    index = _layer(path, [patterns] if isinstance(patterns, str) and patterns else patterns or ())
    return index is not None and (index == layers if isinstance(layers, int) else index in layers)


def _layer(path: str, patterns: Sequence[str]) -> int | None:
    """The first number that stands for a layer: after one of `patterns`, or after any component but the first."""
    rules = [rf"(?:^|.*?\.){pattern}\.(?P<index>\d+)\." for pattern in patterns] or [r".*?\.[^.]*\.(?P<index>\d+)\."]
    found = next((hit for hit in (re.match(rule, path) for rule in rules) if hit), None)
    return int(found["index"]) if found else None
