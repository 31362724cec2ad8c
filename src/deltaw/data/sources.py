"""Where rows come from: a file, a folder, a hub id, an entry of LLaMA-Factory's dataset_info.json.

    train: rows.jsonl
    train: [a.jsonl, {path: b.csv, columns: {prompt: question, completion: answer}, weight: 0.5}]
    train: data/dataset_info.json#alpaca_en_demo
    train: owner/name                                a hub id, where there is no such file

`columns` maps our fields to those of the file, `pattern` takes a text apart, `weight` repeats rows or leaves some out.
"""

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from deltaw.config.schema import Source
from deltaw.core.errors import DataError, did_you_mean
from deltaw.data import images
from deltaw.data.files import SUFFIXES, Record, data_files, loaded, matched, records

METADATA = "metadata"
"""Name of the file in a folder of images that says something of each."""
HUB = re.compile(r"[\w.\-]+/[\w.\-]+")


Given = str | Path | Source


def named(given: Given) -> Source:
    """A source as the user wrote it; an entry of dataset_info.json becomes the source it describes."""
    source = given if isinstance(given, Source) else Source(path=str(given))
    file, entry = source.path.rpartition("#")[::2]
    return _described(Path(file), entry, source) if file else source


def read(source: Source, streaming: bool = False) -> Iterator[Record | str]:
    """The records of a source under our field names; in the place of one that cannot be read, the fault.

    streaming: of a hub id fetch no more than what is read.
    """
    for record in itertools.islice(_records(source, streaming), source.rows):
        found = record if isinstance(record, str) else _renamed(_of_folder(record), source)
        if source.pattern is not None and isinstance(found, Record):
            found = matched(found, source.pattern)
        yield found


def _records(source: Source, streaming: bool) -> Iterator[Record | str]:
    path = Path(source.path)
    hub = HUB.fullmatch(source.path) and path.suffix not in SUFFIXES and not path.parent.is_dir()
    if hub and not path.exists():
        options: dict[str, Any] = {
            "split": source.split,
            "streaming": streaming,
            **({"name": source.subset} if source.subset else {}),
        }
        yield from loaded(f"the data set {source.path!r}", source.path, (source.path,), options)
        return
    for file in data_files([path]):
        yield from records(file, lines=source.pattern is not None)


def _of_folder(record: Record) -> Record:
    """A row of a folder of images, whose `file_name` in metadata.jsonl (or .csv) is its image."""
    key = next((key for key in ("file_name", "file_names") if record.fields.get(key)), None)
    if key is None or record.file is None or record.file.stem != METADATA or images.held(record.fields):
        return record
    rest = {name: value for name, value in record.fields.items() if name != key}
    return replace(record, fields={**rest, "images": record.fields[key]})


def _renamed(record: Record, source: Source) -> Record | str:
    """Our names for the fields of a record, and for those of its turns."""
    fields = {k: v for k, v in record.fields.items() if k not in source.columns.values()}
    for ours, theirs in source.columns.items():
        try:
            fields[ours] = _inside(record.fields, theirs)
        except (KeyError, IndexError, ValueError, TypeError):
            near = did_you_mean(theirs, map(str, record.fields))
            return f"{record.where} has no column {theirs!r}{near} (it has {', '.join(map(str, record.fields))})"
    if source.roles:
        for key in ("messages", "conversations", "chosen", "rejected"):
            if key in fields:
                fields[key] = _turns(fields[key], source.roles)
    return replace(record, fields=fields)


def _inside(fields: Mapping[str, Any], name: str) -> Any:
    """The field `name`; `instances.0.output` looks into lists and objects."""
    if name in fields:
        return fields[name]
    value: Any = fields
    for part in name.split("."):
        value = value[int(part)] if isinstance(value, list) else value[part]
    return value


def _turns(given: Any, roles: Mapping[str, str]) -> Any:
    if isinstance(given, list):
        return [_turns(turn, roles) for turn in given]
    if not isinstance(given, Mapping):
        return given
    role, content = roles.get("role", "role"), roles.get("content", "content")
    back = {theirs: ours for ours, theirs in roles.items() if ours not in ("role", "content")}
    turn = {key: value for key, value in given.items() if key not in (role, content)}
    if role in given:
        turn["role"] = back.get(given[role], given[role])
    if content in given:
        turn["content"] = given[content]
    return turn


TAGS = {
    "role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant",
    "observation_tag": "tool", "function_tag": "function_call", "system_tag": "system",
}  # fmt: skip
COLUMNS = {
    "prompt": "instruction", "query": "input", "response": "output", "history": "history", "messages": "messages",
    "system": "system", "tools": "tools", "chosen": "chosen", "rejected": "rejected", "kto_tag": "label",
    "images": "images",
}  # fmt: skip
"""Keys of dataset_info.json → ours. Format facts: LLaMA-Factory's data/README.md, version 0.9.6."""
KNOWN = {
    "file_name",
    "hf_hub_url",
    "ms_hub_url",
    "om_hub_url",
    "script_url",
    "formatting",
    "columns",
    "tags",
    "ranking",
}
KNOWN |= {"subset", "split", "folder", "num_samples"}


def _described(file: Path, entry: str, source: Source) -> Source:
    """The source that an entry of dataset_info.json describes. DataError for what cannot be carried over."""
    try:
        known: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read as a list of data sets: {error}") from None
    if not isinstance(known, dict) or not isinstance(known.get(entry), dict):
        names = list(known) if isinstance(known, dict) else []
        raise DataError(f"{file} has no data set {entry!r}{did_you_mean(entry, names)}")
    record = known[entry]
    columns, tags = record.get("columns") or {}, record.get("tags") or {}
    strange = (
        [k for k in record if k not in KNOWN]
        + [k for k in columns if k not in COLUMNS]
        + [k for k in tags if k not in TAGS]
    )
    if strange:
        raise DataError(f"{file}, {entry}: {', '.join(map(repr, strange))} cannot be read yet")
    if record.get("num_samples") or record.get("folder"):
        raise DataError(f"{file}, {entry}: num_samples and folder are not read: give the file itself, with a weight")
    path = str(file.parent / record["file_name"]) if "file_name" in record else record.get("hf_hub_url")
    if not path:
        raise DataError(f"{file}, {entry} names neither a file_name nor an hf_hub_url")
    sharegpt = record.get("formatting", "alpaca") == "sharegpt"
    mapping = {COLUMNS[key]: value for key, value in columns.items() if value}
    if mapping.keys() == {"instruction"}:  # a prompt and no answer: what its `stage: pt` reads, raw text
        mapping = {"text": mapping["instruction"]}
    if sharegpt:
        mapping.setdefault("messages", "conversations")
    given = {TAGS[key]: value for key, value in tags.items()}
    roles = {"role": "from", "content": "value", **given} if sharegpt else {}
    mapping = {ours: theirs for ours, theirs in mapping.items() if ours != theirs}
    return replace(
        source, path=path, columns={**mapping, **source.columns}, roles={**roles, **source.roles},
        subset=record.get("subset"), split=record.get("split", "train"),
    )  # fmt: skip


def repeated(places: Sequence[float], weight: float) -> list[int]:
    """How often each row is taken: `places` are numbers in [0, 1) that depend on what the rows say."""
    whole, part = divmod(weight, 1.0)
    return [int(whole) + (place < part) for place in places]
