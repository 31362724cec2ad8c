"""Fields that name modules ({pattern: value}), by PEFT's rule: the first key that, as a regular expression, is the end of
the path after a dot, or all of it.
"""

import re
from collections.abc import Mapping, Sequence
from typing import TypeVar

from deltaw.core.errors import did_you_mean

Value = TypeVar("Value")


def hits(pattern: str, path: str) -> bool:
    """Does the pattern name the module at `path`?"""
    return re.match(rf"(.*\.)?({pattern})$", path) is not None


def first_hit(patterns: Mapping[str, Value], path: str) -> Value | None:
    """The value of the first pattern that names the module at `path`."""
    return next((value for pattern, value in patterns.items() if hits(pattern, path)), None)


def unused(patterns: Sequence[tuple[str, str]], paths: Sequence[str]) -> list[str]:
    """(option, pattern) pairs that name none of the adapted `paths`, each a sentence."""
    names = [path.rpartition(".")[2] for path in paths]
    return [
        f"{option} {pattern!r} matches no adapted module{did_you_mean(pattern, names)}"
        for option, pattern in patterns
        if not any(hits(pattern, path) for path in paths)
    ]


def invalid(pattern: str) -> str | None:
    """What is wrong with a pattern, or None."""
    try:
        re.compile(pattern)
    except re.error as error:
        return f"{pattern!r} is not a valid regular expression: {error}"
    return None
