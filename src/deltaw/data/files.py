"""Files → records with their place. Files that are missing are named at once; a bad line is a fault among the others.

.jsonl            an object per line
.json             a list of objects, or {"data": [objects]}
.csv .tsv         a header, then rows of text
.parquet          through `datasets`, as hub ids are
.txt              one text; or with a pattern a record per line, its named groups the fields
"""

import codecs
import csv
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from deltaw.core.errors import DataError, UseError, did_you_mean, faults

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")
NAMES = "dataset_info.json"  # LLaMA-Factory's list of datasets describes files, it is none


@dataclass(frozen=True)
class Record:
    """One row as it stands in its file."""

    fields: Mapping[str, Any]
    line: int
    where: str
    file: Path | None = None
    """None for a row of a hub id."""


def data_files(paths: Sequence[str | Path]) -> list[Path]:
    """Every data file that `paths` name, folders opened, each once. All that cannot be found is named at once."""
    result: list[Path] = []
    found: list[str] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix in SUFFIXES and p.name != NAMES)
            kinds = sorted({p.suffix for p in inside})
            if not inside:
                held = ", ".join(sorted(p.name for p in path.iterdir())[:6]) or "nothing"
                found.append(f"the folder {str(path)!r} has no file of rows in it (it holds {held})")
            elif len(kinds) > 1:
                found.append(
                    f"the folder {str(path)!r} has files of several kinds ({', '.join(kinds)}): name the ones you mean"
                )
            result += inside
        elif not path.exists():
            seen_from = "" if path.is_absolute() else f", seen from {Path.cwd()}"
            found.append(f"no file {str(path)!r}{seen_from}{_near(path)}")
        elif path.suffix not in SUFFIXES:
            found.append(f"{str(path)!r} is none of {', '.join(SUFFIXES)}: write one JSON object per line, as .jsonl")
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
    return did_you_mean(path.name, names) or f"; the folder holds {', '.join(files[:6]) or 'no file of rows'}"


def records(path: Path, lines: bool = False) -> Iterator[Record | str]:
    """The records of a file in order; in the place of one that cannot be read, the fault as a sentence.

    lines: each line of a .txt file is a record, not the whole of it.
    """
    for one in _parquet(path) if path.suffix == ".parquet" else _file(path, lines):
        yield one if isinstance(one, str) else replace(one, file=path)


def matched(record: Record, pattern: str) -> Record | str:
    """The record with the named groups of a pattern in the place of its `text`."""
    text = record.fields.get("text")
    if not isinstance(text, str):
        return f"{record.where} has no `text` for data.pattern (it has {', '.join(map(str, record.fields))})"
    match = re.fullmatch(pattern, text, re.DOTALL)
    if match is None:
        return f"{record.where} does not match data.pattern: {text[:60]!r}"
    rest = {key: value for key, value in record.fields.items() if key != "text"}
    return replace(record, fields={**rest, **match.groupdict()})


def _file(path: Path, lines: bool) -> Iterator[Record | str]:
    by_line = {".jsonl": _objects, ".txt": _texts if lines else None}.get(path.suffix)
    try:
        if by_line is not None:
            yield from by_line(path, _numbered(path))
            return
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
    if path.suffix == ".txt":
        yield Record({"text": text}, 1, f"{path.name} line 1")
        return
    if path.suffix in (".csv", ".tsv"):
        yield from _table(path, text)
        return
    try:
        whole = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # objects one after the other: JSON lines under the name .json
            yield from _objects(path, iter(enumerate(text.split("\n"), 1)))
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


def _numbered(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a file, one in memory at a time; at a line feed only, JSON allows U+2028 inside a string."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield number, line.removeprefix(codecs.BOM_UTF8 if number == 1 else b"").decode("utf-8")
            except UnicodeDecodeError as error:  # as if the whole file had been decoded: the place tells the line
                raise UnicodeDecodeError(
                    "utf-8", b"\n" * (number - 1) + line, number - 1, number, error.reason
                ) from None


def _objects(path: Path, lines: Iterator[tuple[int, str]]) -> Iterator[Record | str]:
    first = ""
    for number, line in lines:
        if not line.strip():
            continue
        first = first or line.lstrip()[:1]
        where = f"{path.name} line {number}"
        try:
            fields = json.loads(line)
        except json.JSONDecodeError as error:
            hint = "; the file is one list: name it .json" if first == "[" else ""
            yield f"{where} is not JSON: {error.msg} at column {error.colno}{hint}"
            if first == "[":
                return  # a list over several lines: each of them would be a fault
            continue
        yield _record(fields, number, where)
    if not first:
        yield f"{path.name} is empty: no row in it"


def _texts(path: Path, lines: Iterator[tuple[int, str]]) -> Iterator[Record | str]:
    empty = True
    for number, line in lines:
        if line.strip():
            empty = False
            yield Record({"text": line.strip()}, number, f"{path.name} line {number}")
    if empty:
        yield f"{path.name} is empty: no row in it"


def _record(fields: Any, number: int, where: str) -> Record | str:
    if not isinstance(fields, dict):
        return f'{where} is a {_kind(fields)}, not an object: a row is {{"prompt": "…", "completion": "…"}} or messages'
    return Record(fields, number, where)


def _kind(value: Any) -> str:
    return {dict: "object", list: "list", str: "text", bool: "boolean", type(None): "null"}.get(type(value), "number")


def _table(path: Path, text: str) -> Iterator[Record | str]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
    try:
        header = next(reader)
        if len(set(header)) != len(header):
            yield f"{path.name} names a column twice in its header: {', '.join(header)}"
            return
        for row in filter(None, reader):  # a blank line is no row
            where = f"{path.name} line {reader.line_num}"
            if len(row) != len(header):
                yield f"{where} has {len(row)} cells, the header has {len(header)} ({', '.join(header)})"
                continue
            yield Record(dict(zip(header, row, strict=True)), reader.line_num, where)
    except csv.Error as error:
        yield f"{path.name} line {reader.line_num} is not CSV: {error}"


def _parquet(path: Path) -> Iterator[Record | str]:
    yield from loaded(str(path), path.name, ("parquet",), {"data_files": str(path), "split": "train"})


def loaded(shown: str, short: str, given: Sequence[str], options: Mapping[str, Any]) -> Iterator[Record | str]:
    """The records of whatever `datasets.load_dataset(*given, **options)` reads."""
    try:
        import datasets
    except ImportError:
        raise UseError(f"{shown} needs the datasets library: pip install 'deltaw[train]'") from None
    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(*given, **options)
    except Exception as error:  # whatever a foreign file or a hub raises, it is one thing: data that cannot be read
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise DataError(f"{shown} cannot be read: {reason}") from None
    for number, fields in enumerate(rows, 1):
        yield _record(fields, number, f"{short} row {number}")
