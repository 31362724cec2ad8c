"""A directory of adapters as a collection: content by digest, names that point to it, every change whole or not at all.

    add        folder → check → blobs/<digest>/ → names/<name>.json
    resolve    name → digest → folder
    remove     names/<name>.json → what nothing reaches any more goes from blobs/

`deltaw.library.place` says what lies where. Content is written first, synced and renamed into place, then the name; what
nothing reaches is deleted last. A process that dies in between leaves a library that reads as before, and drafts that the
next change sweeps away.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from safetensors.torch import save_file

from deltaw.core.errors import FileError, NotFoundError, UseError, did_you_mean
from deltaw.core.files import read_json, sync, whole_folder, write_text
from deltaw.formats.directory import Stored, open_directory
from deltaw.formats.weights import PICKLED, WEIGHTS, read_tensors
from deltaw.library import content, history, names, place
from deltaw.library.content import Record
from deltaw.library.history import History
from deltaw.library.lineage import reachable
from deltaw.library.place import ADAPTER, BLOBS, MARK, NAMES, RECORD

FORMAT = 1


@dataclass(frozen=True)
class Entry:
    """One adapter, as a reference found it."""

    digest: str
    folder: Path
    """Its files, to be read and never written: every verb takes this folder."""
    record: Record
    name: str | None = None
    generation: int | None = None


@dataclass(frozen=True)
class Added:
    entry: Entry
    new: bool
    """False where the library had this content already."""
    remarks: tuple[str, ...]


class Library:
    """The library at `path`. Makes nothing until `add`; raises FileError where the directory is something else."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        mark = self.path / MARK
        if mark.is_file():
            version = read_json(mark, 'restore it: {"format": 1}').get("format")
            if version != FORMAT:
                raise FileError(f"{mark} says format {version!r}, this deltaw reads {FORMAT}: upgrade deltaw")
        elif self.path.exists():
            others = place.strangers(self.path) if self.path.is_dir() else [self.path]
            if others:
                raise UseError(f"{self.path} is not a library (it holds {others[0].name}, …): give another folder")

    @property
    def there(self) -> bool:
        return (self.path / MARK).is_file()

    # Reading: no lock, every file is whole

    def names(self) -> list[str]:
        """All names that point to something, in order."""
        return [name for name in place.named(self.path) if self.history(name).generations]

    def history(self, name: str) -> History:
        """What `name` points to and pointed to; an empty history where there is none. FileError."""
        file = self.path / NAMES / f"{names.checked(name)}.json"
        if not file.is_file():
            return History(name)
        return history.from_dict(read_json(file, "restore it, or delete it and add the adapter again"), name, str(file))

    def record(self, digest: str) -> Record:
        return content.from_file(self.blob(digest) / RECORD)

    def records(self, damaged: bool = False) -> dict[str, Record]:
        """Of every adapter, by digest. FileError for one that is damaged; damaged=True leaves it out."""
        found = {}
        for digest in place.digests(self.path):
            try:
                found[digest] = self.record(digest)
            except FileError:
                if not damaged:
                    raise
        return found

    def blob(self, digest: str) -> Path:
        return self.path / BLOBS / digest.removeprefix("sha256:")

    def resolve(self, reference: str) -> Entry:
        """The adapter that `name`, `name@generation` or `sha256:…` means, at this moment. Keep the entry, not the name:
        a name may point elsewhere the next time. NotFoundError, UseError for what is no reference, FileError."""
        ref = names.parse(reference)
        if ref.name is None:
            return self._entry(self._matching(str(ref.digest)))
        found = self._named(ref.name)
        generation = found.at(ref.generation)
        try:
            return self._entry(generation.digest, ref.name, generation.number)
        except FileError:
            if self.history(ref.name) == found:
                raise
            return self.resolve(reference)  # it was removed between the two reads

    # Changing: under the lock

    def add(self, folder: str | Path, name: str, *, allow_pickle: bool = False, expected: int | None = None) -> Added:
        """Copy an adapter folder, ours or PEFT's own, into the library and point `name` to it.

        It must read strictly, its tensors finite; a pickle is written as safetensors (allow_pickle). The same content
        is kept once. expected: the generation that `name` must be at, 0 for a new name. UseError, FileError,
        ConfigError for what PEFT's config has and is not supported, ConflictError.
        """
        names.checked(name)
        source = Path(folder)
        stored = open_directory(source, allow_pickle=allow_pickle)
        files = content.texts(source)
        digest = content.digest(files, stored.digest)
        with self._changing(create=True):
            self.history(name).expect(expected)
            new = not self._sound(digest)
            if new:
                self._write(digest, source, stored, files, allow_pickle)
            entry = self._point(name, digest, f"add {source}")
        remarks = [*stored.notes, *_remarks(entry.record, source)]
        if not new and content.texts(entry.folder) != files:
            remarks.append("this content was there; it keeps the recipe, metrics and card of the first copy")
        return Added(entry, new, tuple(remarks))

    def alias(self, name: str, reference: str, *, expected: int | None = None) -> Entry:
        """Point `name`, new or not, to what `reference` means now: `alias("prod", "sql@3")`. NotFoundError, ConflictError."""
        names.checked(name)
        with self._changing():
            self.history(name).expect(expected)
            return self._point(name, self.resolve(reference).digest, f"alias of {reference}")

    def rollback(self, name: str, to: int | None = None, *, expected: int | None = None) -> Entry:
        """Point `name` to what it pointed to before, or to what it did in generation `to`. A new generation."""
        with self._changing():
            found = self._named(names.checked(name))
            found.expect(expected)
            back = found.rolled_back(to, _now())
            self._entry(back.at().digest)  # it is still there, and readable
            self._save(back)
        return self._entry(back.at().digest, name, back.last)

    def remove(self, reference: str, *, expected: int | None = None) -> list[str]:
        """Take away a name with its history, or one generation that is not the current one (`sql@2`), and delete what no
        name, no generation and no lineage reaches any more. The digests that were deleted."""
        ref = names.parse(reference)
        if ref.name is None:
            raise UseError(f"{reference} is content: remove the names that point to it, it goes with the last of them")
        with self._changing():
            found = self._named(ref.name)
            found.expect(expected)
            shorter = found.without(ref.generation)
            roots = {d for name in self.names() if name != ref.name for d in self.history(name).digests}
            known = self.records()
            gone = sorted(known.keys() - reachable(roots | shorter.digests, known))  # all was read: no name is missed
            self._save(shorter)
            for digest in gone:
                aside = self.path / BLOBS / f".{self.blob(digest).name}.{os.getpid()}.gone"
                os.replace(self.blob(digest), aside)
                shutil.rmtree(aside)
        return gone

    def _named(self, name: str) -> History:
        found = self.history(name)
        if not found.generations:
            raise NotFoundError(f"no adapter {name!r} in {self.path}{did_you_mean(name, self.names())}")
        return found

    def _sound(self, digest: str) -> bool:
        """Is this content there, and what its digest says? What is damaged is written anew."""
        if not self.blob(digest).is_dir():
            return False
        try:
            self.record(digest)
            return content.of_folder(self.blob(digest) / ADAPTER) == digest
        except FileError:
            return False

    def _matching(self, prefix: str) -> str:
        found = [digest for digest in place.digests(self.path) if digest.startswith(prefix)]
        if len(found) != 1:
            said = f"{len(found)} adapters in {self.path} begin with {prefix}: give more digits"
            raise NotFoundError(said if found else f"no adapter {prefix} in {self.path}")
        return found[0]

    def _entry(self, digest: str, name: str | None = None, generation: int | None = None) -> Entry:
        blob = self.blob(digest)
        if not blob.is_dir():
            raise FileError(
                f"{name or digest} points to {names.short(digest)}, which is not in {self.path}: restore it"
            )
        return Entry(digest, blob / ADAPTER, self.record(digest), name, generation)

    def _write(self, digest: str, source: Path, stored: Stored, files: dict[str, bytes], allow_pickle: bool) -> None:
        """The blob of an adapter that was read from `source`, checked by reading back what was written."""
        known = {record.tensors for other, record in self.records(damaged=True).items() if other != digest}
        with whole_folder(self.blob(digest)) as draft:
            adapter = draft / ADAPTER
            adapter.mkdir()
            for name, data in files.items():
                (adapter / name).write_bytes(data)
            if (source / WEIGHTS).is_file():
                shutil.copyfile(source / WEIGHTS, adapter / WEIGHTS)
            else:
                tensors = read_tensors(source, allow_pickle)
                save_file({k: t.contiguous().clone() for k, t in tensors.items()}, adapter / WEIGHTS, {"format": "pt"})
            if content.of_folder(adapter) != digest:
                raise FileError(f"{source} changed while it was copied: add it again")
            size = sum(file.stat().st_size for file in adapter.iterdir())
            facts = content.to_dict(content.record(stored, digest, size, _now(), known))
            write_text(draft / RECORD, json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
            for file in (draft / RECORD, *adapter.iterdir()):
                file.chmod(0o444)  # never changed: whoever tries by mistake hears of it

    def _point(self, name: str, digest: str, how: str) -> Entry:
        before = self.history(name)
        after = before.moved(digest, _now(), how)
        if after is not before:
            self._save(after)
        return self._entry(digest, name, after.at().number)

    def _save(self, changed: History) -> None:
        folder = self.path / NAMES
        write_text(folder / f"{changed.name}.json", json.dumps(changed.to_dict(), indent=1, ensure_ascii=False) + "\n")
        sync(folder)  # before anything is deleted: after a power cut no name points to what is gone

    @contextlib.contextmanager
    def _changing(self, create: bool = False) -> Iterator[None]:
        """One process at a time, in a library that is there and swept. FileError where it cannot be written."""
        if not create and not self.there:
            raise NotFoundError(f"no library at {self.path}: `deltaw adapters add` makes one")
        try:
            for folder in (BLOBS, NAMES):
                (self.path / folder).mkdir(parents=True, exist_ok=True)
            with place.alone(self.path):
                if not self.there:
                    write_text(self.path / MARK, json.dumps({"format": FORMAT}) + "\n")
                place.sweep(self.path)
                yield
        except OSError as error:
            raise FileError(f"the library {self.path} cannot be changed: {error.strerror or error}") from None


def _remarks(record: Record, source: Path) -> list[str]:
    """What whoever adds an adapter should know of it."""
    kept = {*content.TEXTS, WEIGHTS if (source / WEIGHTS).is_file() else PICKLED}
    left = sorted(path.name for path in source.iterdir() if path.name not in kept)
    found = [f"not copied, not the adapter's own: {', '.join(left)}"] if left else []
    if record.layer is None:
        found.append("its files do not say which base it was trained on, beyond a name")
    if record.change == 0:
        found.append("‖ΔW‖ is 0 at every low-rank site: it was not trained, or its change was lost")
    return found + [f"its parent {names.short(parent)} is not in the library" for parent in record.outside]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
