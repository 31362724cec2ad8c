"""A checkpoint as it lies on disk: its safetensors files, what each holds and at which bytes; and a new one written so.

    file = 8 bytes: length n │ n bytes: JSON {name: {dtype, shape, data_offsets}, __metadata__} │ the tensors, end to end
                                                          https://huggingface.co/docs/safetensors, "Format"

Files of one model: model.safetensors, or model-00001-of-…, with model.safetensors.index.json that says what is where.
Reading maps the files: nothing becomes private memory but what is computed.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from deltaw.core.errors import FileError, faults
from deltaw.core.files import read_json, write_text

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Those that a merge computes with; tensors of other kinds are copied as they are."""
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
            self._open[file] = safe_open(self.folder / file, framework="pt")
        return self._open[file]


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
            headers[file] = _header(folder / file)
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


def _header(file: Path) -> bytes:
    with open(file, "rb") as opened:
        length = opened.read(8)
        return length + opened.read(int.from_bytes(length, "little"))


def rewritten(checkpoint: Checkpoint, file: str, dtype: torch.dtype | None) -> tuple[bytes, dict[str, Entry]]:
    """Header and entries of the new file: those of the old one, with all floats in `dtype` where one is given.

    Names, order and metadata stay.
    """
    old = {key: entry for key, entry in checkpoint.entries.items() if entry.file == file}
    old = dict(sorted(old.items(), key=lambda item: item[1].start))
    if dtype is None or all(entry.dtype in (None, dtype) for entry in old.values()):
        return checkpoint.headers[file], old
    kind = next(kind for kind, known in DTYPES.items() if known == dtype)
    header, new, place = json.loads(checkpoint.headers[file][8:]), dict[str, Entry](), 0
    for key, entry in old.items():
        size = entry.end - entry.start
        if entry.dtype is not None:
            size = size // entry.dtype.itemsize * dtype.itemsize
        named = kind if entry.dtype is not None else entry.kind
        new[key] = Entry(file, named, entry.shape, place, place + size)
        header[key] |= {"dtype": named, "data_offsets": [place, place + size]}
        place += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors start at whole 8 bytes
    return len(text).to_bytes(8, "little") + text, new


def write(
    checkpoint: Checkpoint, target: Path, dtype: torch.dtype | None, changed: Mapping[str, Any], told: Any
) -> None:
    """Write the checkpoint into the folder `target`, its floats in `dtype` (None: each in its own).

    changed: name on disk → a function of the dtype that yields the tensor's new values from the first to the last, a block
    after the other. told(bytes) is called as they are written. Each file is synced while the next one is computed.
    """
    with ThreadPoolExecutor(1) as behind:
        syncing: list[Future[None]] = []
        for file in checkpoint.files:
            header, entries = rewritten(checkpoint, file, dtype)
            with open(checkpoint.folder / file, "rb") as source, open(target / file, "wb", buffering=0) as new:
                _put(new, memoryview(header))
                for run in _runs(checkpoint, entries, changed):
                    old = [checkpoint.entries[key] for key in run]
                    if run[0] in changed or old[0].kind != entries[run[0]].kind:
                        wanted = entries[run[0]].dtype
                        assert wanted is not None, "only floats are computed"
                        make = changed.get(run[0])
                        blocks = make(wanted) if make is not None else _cast(checkpoint.tensor(run[0]), wanted)
                        for block in blocks:
                            _put(new, _bytes(block))
                    else:
                        _copy(source, new, len(checkpoint.headers[file]) + old[0].start, old[-1].end - old[0].start)
                    told(old[-1].end - old[0].start)
                syncing.append(behind.submit(_sync, os.dup(new.fileno())))
        for one in syncing:
            one.result()
    if (checkpoint.folder / INDEX).is_file() and checkpoint.files != (SINGLE,):
        if dtype is None:
            shutil.copyfile(checkpoint.folder / INDEX, target / INDEX)
        else:
            index = read_json(checkpoint.folder / INDEX, AGAIN)
            size = sum((target / f).stat().st_size - len(_header(target / f)) for f in checkpoint.files)
            index["metadata"] = {**(index.get("metadata") or {}), "total_size": size}
            write_text(target / INDEX, json.dumps(index, indent=2) + "\n")


def _runs(checkpoint: Checkpoint, entries: Mapping[str, Entry], changed: Mapping[str, Any]) -> Iterator[list[str]]:
    """The tensors of a file in order: each computed one by itself, those that are copied in runs."""
    run: list[str] = []
    for key, entry in entries.items():
        if key in changed or checkpoint.entries[key].kind != entry.kind:
            yield from [run] if run else []
            yield [key]
            run = []
        else:
            run.append(key)
    yield from [run] if run else []


def _cast(tensor: Tensor, dtype: torch.dtype, size: int = 1 << 20) -> Iterable[Tensor]:
    return (block.to(dtype) for block in tensor.flatten().split(size))


def _bytes(block: Tensor) -> memoryview:
    return memoryview(block.contiguous().view(-1).view(torch.uint8).numpy())


def _copy(source: Any, target: Any, start: int, size: int) -> None:
    """Bytes from file to file inside the system, where it can."""
    done, way = 0, getattr(os, "sendfile", None)
    while way is not None and done < size:
        count = way(target.fileno(), source.fileno(), start + done, size - done)
        if count == 0:
            break
        done += count
    source.seek(start + done)
    while done < size:
        piece = source.read(min(1 << 24, size - done))
        if not piece:
            raise FileError(f"{source.name} became shorter while it was read")
        _put(target, memoryview(piece))
        done += len(piece)


def _put(target: Any, view: memoryview) -> None:
    while view:
        view = view[target.write(view) :]


def _sync(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
