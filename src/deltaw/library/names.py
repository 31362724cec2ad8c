"""How adapters of a library are called. Names are safe as file names on every disk, and as parts of addresses.

    name        sql · sql-v2 · team.sql_2      lower-case letters and digits, single . _ - between them, at most 100
    reference   sql                            what the name points to now
                sql@3                          what it pointed to in its third generation
                sha256:0a1b2c3d                content, by at least eight digits of its digest

Lower case only: `SQL` and `sql` are one file on some disks and two on others.
"""

import re
from typing import NamedTuple

from deltaw.core.errors import UseError

NAME = re.compile(r"[a-z0-9]+(?:[._-][a-z0-9]+)*")
LONGEST = 100
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
SHORTEST = 8


class Reference(NamedTuple):
    name: str | None = None
    generation: int | None = None
    """None: the current one."""
    digest: str | None = None
    """The digest, or how it begins."""


def checked(name: str) -> str:
    """`name`, where it is one; UseError with a name that would do."""
    if NAME.fullmatch(name) and len(name) <= LONGEST:
        return name
    near = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:LONGEST].rstrip("-")
    hint = f", for example {near!r}" if near else ""
    raise UseError(
        f"{name[:120]!r} is no name for an adapter: give lower-case letters and digits, with single . _ or - between "
        f"them, at most {LONGEST}{hint}"
    )


def parse(text: str) -> Reference:
    """A reference as users write it; UseError where it is none."""
    if text.startswith("sha256:"):
        if not re.fullmatch(rf"sha256:[0-9a-f]{{{SHORTEST},64}}", text):
            raise UseError(f"{text[:80]!r} is no digest: give sha256: and at least {SHORTEST} of its 64 hex digits")
        return Reference(digest=text)
    name, at, number = text.partition("@")
    if at and not re.fullmatch(r"[1-9]\d{0,17}", number):
        raise UseError(f"{text[:120]!r} names no generation: write {name[:100]}@3 for the third")
    return Reference(name=checked(name), generation=int(number) if at else None)


def short(digest: str) -> str:
    """A digest as people read it: sha256: and twelve digits."""
    return digest[: len("sha256:") + 12]
