"""A checkpoint written anew: the same files, names, order and metadata, some tensors with other values or in another dtype.

    old file, mapped → header → copied runs │ computed tensors, block by block → new file, synced while the next is computed

What is neither changed nor cast is copied inside the system; memory is one block (`deltaw.models.checkpoint` reads).
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltaw.core.errors import FileError
from deltaw.core.files import read_json, write_text
from deltaw.models.checkpoint import AGAIN, DTYPES, INDEX, SINGLE, Checkpoint, Entry, header_of


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
) -> set[str]:
    """Write the checkpoint into the folder `target`, its floats in `dtype` (None: each in its own).

    changed: name on disk → a function of the dtype that yields the tensor's new values from the first to the last, a block
    after the other. told(bytes) is called as they are written. Each file is synced while the next one is computed.
    Returns the names of the unchanged tensors that are too large for the dtype: they became infinite.
    """
    infinite = set[str]()
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
                        cast = partial(_cast, run[0], checkpoint.tensor(run[0]), infinite)
                        for block in (make or cast)(wanted):
                            _put(new, _bytes(block))
                    else:
                        _copy(source, new, len(checkpoint.headers[file]) + old[0].start, old[-1].end - old[0].start)
                    told(old[-1].end - old[0].start)
                syncing.append(behind.submit(_sync, os.dup(new.fileno())))
        for one in syncing:
            one.result()
    if checkpoint.files != (SINGLE,):
        index = read_json(checkpoint.folder / INDEX, AGAIN)
        if dtype is None:
            shutil.copyfile(checkpoint.folder / INDEX, target / INDEX)
        else:
            size = sum((target / f).stat().st_size - len(header_of(target / f)) for f in checkpoint.files)
            index["metadata"] = {**(index.get("metadata") or {}), "total_size": size}
            write_text(target / INDEX, json.dumps(index, indent=2) + "\n")
    return infinite


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


def _cast(key: str, tensor: Tensor, infinite: set[str], dtype: torch.dtype, size: int = 1 << 20) -> Iterator[Tensor]:
    """The values in `dtype`; where one was finite and no longer is, the key is added to `infinite`."""
    for block in tensor.flatten().split(size):
        cast = block.to(dtype)
        if bool((cast.isinf() & block.isfinite()).any()):
            infinite.add(key)
        yield cast


def _bytes(block: Tensor) -> memoryview:
    return block.contiguous().view(-1).view(torch.uint8).numpy().data


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
