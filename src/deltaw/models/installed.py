"""What is installed beside what deltaw asks for, from the metadata of packages: none of them is imported.

requirements   torch>=2.6                      of the core
               transformers>=5.23; extra …     of the extra `train`
"""

import importlib.metadata
import importlib.util
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

REQUIREMENT = re.compile(r"(?P<name>[\w.\-]+)\s*(\[[^\]]*\])?\s*(?P<wanted>[^;]*?)\s*(;(?P<marker>.*))?")
COMPARED = re.compile(r"(>=|<=|==|!=|>|<)\s*(\d+(?:\.\d+)*)")


@dataclass(frozen=True)
class Package:
    """A package that deltaw uses. `extras` install it; none for the core. `version` is None where it is not there."""

    name: str
    wanted: str
    extras: tuple[str, ...] = ()
    version: str | None = None

    @property
    def fits(self) -> bool:
        return self.version is not None and within(self.version, self.wanted)


def packages() -> list[Package]:
    """All packages that the metadata of deltaw names; none where deltaw runs from a folder without being installed."""
    try:
        given = importlib.metadata.requires("deltaw") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    return [Package(name, wanted, extras, version(name)) for name, wanted, extras in read(given)]


def read(requirements: Iterable[str]) -> list[tuple[str, str, tuple[str, ...]]]:
    """(name, range, extras) of each package; deltaw's own extras, which name it again, are left out."""
    found: dict[str, tuple[str, list[str]]] = {}
    for text in requirements:
        match = REQUIREMENT.fullmatch(text.strip())
        if match is None or match["name"].lower() == "deltaw":
            continue
        extra = re.search(r"""extra\s*==\s*["']([\w\-]+)["']""", match["marker"] or "")
        _, extras = found.setdefault(match["name"], (match["wanted"].strip("()"), []))
        extras += [extra[1]] if extra else []
    return [(name, wanted, tuple(extras)) for name, (wanted, extras) in found.items()]


def version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def python_wanted() -> str:
    """The range of Python versions that deltaw asks for; empty where it is not installed."""
    try:
        return str(importlib.metadata.metadata("deltaw").json.get("requires_python", ""))
    except importlib.metadata.PackageNotFoundError:
        return ""


def within(given: str, wanted: str) -> bool:
    """Is a version in a range like >=2.6,<3? By the numbers of its release alone: 5.23.0.dev0 counts as 5.23."""
    mine = _release(given)
    for sign, number in COMPARED.findall(wanted):
        other = _release(number)
        width = max(len(mine), len(other))
        a, b = (one + (0,) * (width - len(one)) for one in (mine, other))
        if not {">=": a >= b, "<=": a <= b, "==": a == b, "!=": a != b, ">": a > b, "<": a < b}[sign]:
            return False
    return True


def _release(text: str) -> tuple[int, ...]:
    numbers = re.match(r"\d+(?:\.\d+)*", text)
    return tuple(map(int, numbers[0].split("."))) if numbers else (0,)


def copies() -> list[Path]:
    """The folders of every deltaw that Python could import here, the one that it does first."""
    here = (Path(entry or ".") / "deltaw" for entry in sys.path)
    found = [folder.resolve() for folder in here if (folder / "__init__.py").is_file()]
    return list(dict.fromkeys(found))


def natives() -> tuple[str, ...] | None:
    """What bitsandbytes has compiled code for: cpu, cuda128, …; None where it is not installed."""
    spec = importlib.util.find_spec("bitsandbytes")
    if spec is None or not spec.origin:
        return None
    files = (
        re.fullmatch(r"(?:lib)?bitsandbytes_(\w+)\.(?:so|dll|dylib)", f.name)
        for f in Path(spec.origin).parent.iterdir()
    )
    return tuple(sorted(match[1] for match in files if match))
