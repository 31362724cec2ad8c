"""Paths → records with their place. A file that is missing stops at once; a bad line is a fault among the others."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltaw.core.errors import DataError, did_you_mean, faults

SUFFIXES = (".jsonl", ".json")


@dataclass(frozen=True)
class Record:
    """One row as it stands in its file."""

    fields: Mapping[str, Any]
    line: int
    where: str


def data_files(paths: Sequence[str | Path]) -> list[Path]:
    """Every data file that `paths` name, folders opened, each once. All that cannot be found is named at once."""
    result: list[Path] = []
    found: list[str] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix in SUFFIXES)
            if not inside:
                held = ", ".join(sorted(p.name for p in path.iterdir())[:6]) or "nothing"
                found.append(f"the folder {str(path)!r} has no .jsonl or .json file in it (it holds {held})")
            result += inside
        elif not path.exists():
            found.append(f"no file {str(path)!r}{_near(path)}")
        elif path.suffix not in SUFFIXES:
            found.append(f"{str(path)!r} is not .jsonl or .json: write one JSON object per line, as .jsonl")
        else:
            result.append(path)
    if not paths:
        found.append("no file was given")
    if found:
        raise faults(DataError, "data", found)
    return list(dict.fromkeys(result))


def _near(path: Path) -> str:
    if not path.parent.is_dir():
        return f": there is no folder {str(path.parent)!r}"
    names = sorted(p.name for p in path.parent.iterdir())
    files = [name for name in names if name.endswith(SUFFIXES)]
    return did_you_mean(path.name, names) or f"; the folder holds {', '.join(files[:6]) or 'no .jsonl or .json file'}"


def records(path: Path) -> Iterator[Record | str]:
    """The records of a file in order; in the place of one that cannot be read, the fault as a sentence."""
    try:
        text = _text(path)
    except OSError as error:
        yield f"{path.name} cannot be read: {error.strerror or error}"
        return
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        yield f"{path.name} line {line} is not UTF-8 ({error.reason}): save the file as UTF-8"
        return
    if not text.strip():
        yield f"{path.name} is empty: no row in it"
        return
    if path.suffix == ".jsonl":
        yield from _lines(path, text)
        return
    try:
        whole = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # objects one after the other: JSON lines under the name .json
            yield from _lines(path, text)
            return
        yield f"{path.name} line {error.lineno} is not JSON: {error.msg} at column {error.colno}"
        return
    rows = whole.get("data") if isinstance(whole, dict) and isinstance(whole.get("data"), list) else whole
    if not isinstance(rows, list):
        yield f'{path.name} is one {_kind(whole)}, not a list of rows: write [row, row, …] or {{"data": [row, row, …]}}'
        return
    for number, fields in enumerate(rows, 1):
        yield _record(fields, number, f"{path.name} row {number}")


def _text(path: Path) -> str:
    return path.read_bytes().decode("utf-8-sig")  # with or without a byte order mark


def _lines(path: Path, text: str) -> Iterator[Record | str]:
    # Not splitlines(): it also cuts at characters that JSON allows inside a string, such as U+2028.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path.name} line {number}"
        try:
            fields = json.loads(line)
        except json.JSONDecodeError as error:
            yield f"{where} is not JSON: {error.msg} at column {error.colno}{_hint(text)}"
            if text.lstrip().startswith("["):
                return  # a list over several lines: each of them would be a fault
            continue
        yield _record(fields, number, where)


def _hint(text: str) -> str:
    return "; the file is one list: name it .json" if text.lstrip().startswith("[") else ""


def _record(fields: Any, number: int, where: str) -> Record | str:
    if not isinstance(fields, dict):
        return f'{where} is a {_kind(fields)}, not an object: a row is {{"prompt": "…", "completion": "…"}} or messages'
    return Record(fields, number, where)


def _kind(value: Any) -> str:
    return {dict: "object", list: "list", str: "text", bool: "boolean", type(None): "null"}.get(type(value), "number")
