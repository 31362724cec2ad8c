"""Fields that name modules ({pattern: value}), by PEFT's rule: the first key that, as a regular expression, is the end of
the path after a dot, or all of it.
"""

import re
from collections.abc import Mapping
from typing import TypeVar

Value = TypeVar("Value")


def hits(pattern: str, path: str) -> bool:
    """Does the pattern name the module at `path`?"""
    return re.match(rf"(.*\.)?({pattern})$", path) is not None


def first_hit(patterns: Mapping[str, Value], path: str) -> Value | None:
    """The value of the first pattern that names the module at `path`."""
    return next((value for pattern, value in patterns.items() if hits(pattern, path)), None)


def invalid(pattern: str) -> str | None:
    """What is wrong with a pattern, or None."""
    try:
        re.compile(pattern)
    except re.error as error:
        return f"{pattern!r} is not a valid regular expression: {error}"
    return None
