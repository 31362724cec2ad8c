"""A checkpoint as it lies on disk: its safetensors files, what each holds and at which bytes.

    file = 8 bytes: length n │ n bytes: JSON {name: {dtype, shape, data_offsets}, __metadata__} │ the tensors, end to end
                                                          https://huggingface.co/docs/safetensors, "Format"

Files of one model: model.safetensors, or model-00001-of-…, with model.safetensors.index.json that says what is where.
Reading maps the files: nothing becomes private memory but what is computed.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from deltaw.core.errors import FileError, faults
from deltaw.core.files import read_json
from deltaw.models.base import resolve, unreadable

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Those that can be computed with."""
AGAIN = "fetch the base again"


@dataclass(frozen=True)
class Entry:
    """One tensor of a file."""

    file: str
    kind: str
    shape: tuple[int, ...]
    start: int
    end: int
    """Bytes from the end of the header."""

    @property
    def dtype(self) -> torch.dtype | None:
        return DTYPES.get(self.kind)


@dataclass(frozen=True)
class Checkpoint:
    folder: Path
    files: tuple[str, ...]
    entries: Mapping[str, Entry]
    headers: Mapping[str, bytes]
    """Of every file, its length in front."""
    _open: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def bytes(self) -> int:
        return sum((self.folder / file).stat().st_size for file in self.files)

    def slice(self, key: str) -> Any:
        """A tensor of which parts can be read by themselves."""
        return self._opened(key).get_slice(key)

    def tensor(self, key: str) -> Tensor:
        """A tensor, mapped from its file: it costs no memory of its own, and must not be written to."""
        found: Tensor = self._opened(key).get_tensor(key)
        return found

    def _opened(self, key: str) -> Any:
        file = self.entries[key].file
        if file not in self._open:
            try:
                self._open[file] = safe_open(self.folder / file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise FileError(f"{self.folder / file} cannot be read: {error}; {AGAIN}") from None
        return self._open[file]


def folder_of(model: str) -> Path:
    """The folder that a base lies in: its own, or the hub's cache, filled where it has to be."""
    found = resolve(model)
    if Path(found).is_dir():
        return Path(found)
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(found, allow_patterns=["model*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"])
        )
    except (OSError, ValueError) as error:
        raise unreadable(model, error) from None


def open_checkpoint(folder: Path) -> Checkpoint | None:
    """The safetensors files of a model's folder; None where it has none. FileError for files that are missing or cut short."""
    if (folder / SINGLE).is_file():
        files: tuple[str, ...] = (SINGLE,)
        listed: Any = {}
    elif (folder / INDEX).is_file():
        listed = read_json(folder / INDEX, AGAIN).get("weight_map")
        if not isinstance(listed, dict) or not all(isinstance(file, str) for file in listed.values()):
            raise FileError(f"{folder / INDEX} has no weight_map that says which file holds what; {AGAIN}")
        files = tuple(sorted(set(listed.values())))
    else:
        return None
    outside = [file for file in files if Path(file).name != file]
    if outside:
        raise FileError(f"{folder / INDEX} names {outside[0]!r}, which is not a file beside it; {AGAIN}")
    missing = [f"{file} is not there" for file in files if not (folder / file).is_file()]
    if missing:
        raise faults(FileError, f"the base in {folder} is not whole ({AGAIN})", missing)
    entries, headers, found = dict[str, Entry](), dict[str, bytes](), list[str]()
    for file in files:
        try:
            with safe_open(folder / file, framework="pt"):  # checks the header against the size of the file
                pass
            headers[file] = header_of(folder / file)
        except (SafetensorError, OSError) as error:
            found.append(f"{file} is corrupt or cut short ({error})")
            continue
        for key, one in json.loads(headers[file][8:]).items():
            if key in entries:
                found.append(f"{key} is in {entries[key].file} and in {file}")
            elif key != "__metadata__":
                entries[key] = Entry(file, one["dtype"], tuple(one["shape"]), *one["data_offsets"])
    found += [f"{key} is not in {file}" for key, file in listed.items() if key not in entries and file in headers]
    if found:
        raise faults(FileError, f"the base in {folder} is not whole ({AGAIN})", found)
    return Checkpoint(folder, files, entries, headers)


def header_of(file: Path) -> bytes:
    with open(file, "rb") as opened:
        length = opened.read(8)
        return length + opened.read(int.from_bytes(length, "little"))
