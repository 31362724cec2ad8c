"""Encoded rows on disk, read back one at a time: tokens of data that is larger than memory.

    tokens.bin   int32, the ids of all rows, one after the other
    learnt.bin   uint8, 1 where the token is supervised
    read.bin     JSON [text, [image, …]]: what the base's processor reads of a row; nothing where the base has none
    in memory    where each row ends in them, and what was cut: 24 bytes a row

Of images their names are kept: a file is read again when its row is in a batch.

The files lie in the temporary folder (TMPDIR chooses the disk) and go when the store does.
"""

import json
import tempfile
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import overload

import numpy as np

from deltaw.data.encode import IGNORE, Encoded


class Store(Sequence[Encoded]):
    """Rows in the order in which they were appended; complete once `close` was called."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="deltaw-")  # removed with the last reference
        self._files = [(Path(self._folder.name) / name).open("wb") for name in ("tokens.bin", "learnt.bin", "read.bin")]
        self._ends, self._read, self._cut = array("q", [0]), array("q", [0]), array("q")

    def extend(self, rows: Iterable[Encoded]) -> None:
        for row in rows:
            ids = np.array(row.ids, dtype=np.int32)
            learnt = np.array(row.labels) != IGNORE
            self._files[0].write(ids.tobytes())
            self._files[1].write(learnt.astype(np.uint8).tobytes())
            self._ends.append(self._ends[-1] + len(ids))
            read = json.dumps([row.text, list(map(str, row.images))]).encode() if row.text else b""
            self._files[2].write(read)
            self._read.append(self._read[-1] + len(read))
            self._cut.append(row.cut)

    def close(self) -> None:
        """No more rows: from now on they can be read."""
        for file in self._files:
            file.close()
        names = [Path(file.name) for file in self._files]
        kinds = (np.int32, np.uint8, np.uint8)
        self._maps = [
            np.memmap(n, k, "r") if n.stat().st_size else np.zeros(0, k) for n, k in zip(names, kinds, strict=True)
        ]

    def __len__(self) -> int:
        return len(self._cut)

    @overload
    def __getitem__(self, place: int) -> Encoded: ...
    @overload
    def __getitem__(self, place: slice) -> list[Encoded]: ...
    def __getitem__(self, place: int | slice) -> Encoded | list[Encoded]:
        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(len(self)))]
        number = range(len(self))[place]
        part = slice(self._ends[number], self._ends[number + 1])
        tokens, learnt = (whole[part] for whole in self._maps[:2])
        read = self._maps[2][self._read[number] : self._read[number + 1]].tobytes()
        text, images = json.loads(read) if read else ("", ())
        labels = np.where(learnt, tokens, IGNORE).tolist()
        return Encoded(tokens.tolist(), labels, self._cut[number], text, tuple(map(Path, images)))

    @property
    def lengths(self) -> list[int]:
        return np.diff(self._ends).tolist()


def lengths(rows: Sequence[Encoded]) -> list[int]:
    """Tokens of each row."""
    return rows.lengths if isinstance(rows, Store) else [len(row.ids) for row in rows]
