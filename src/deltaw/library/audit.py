"""Is a library whole? Every digest is taken again, every name followed, and what does not belong is named.

fault     content that is not what its digest says, or cannot be read; a name or a parent without its content; a
          history or a record that was edited; a file that is no part of a library
remark    what an interrupted change left (the next one sweeps it away), content that no name reaches (the next
          removal deletes it), parents that were never in the library
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from deltaw.core.errors import DeltawError
from deltaw.formats.directory import open_directory
from deltaw.formats.weights import WEIGHTS
from deltaw.library import content, names, place
from deltaw.library.content import Record
from deltaw.library.history import History
from deltaw.library.lineage import by_tensors, reachable
from deltaw.library.place import ADAPTER, RECORD
from deltaw.library.store import Library


@dataclass(frozen=True)
class Audit:
    adapters: int
    names: int
    bytes: int
    faults: tuple[str, ...]
    remarks: tuple[str, ...]


def audit(library: Library, each: Callable[[int, int], None] = lambda done, total: None) -> Audit:
    """Look at everything in `library`; each(done, total) is called after every adapter. Changes nothing, and keeps out
    those who would in the meantime."""
    with place.looking(library.path):
        faults = [_stranger(path) for path in place.strangers(library.path)]
        remarks = [
            f"{p}: left by a change that was cut off, the next one deletes it" for p in place.drafts(library.path)
        ]
        histories = dict(_histories(library, faults))
        digests, records = place.digests(library.path), dict[str, Record]()
        for number, digest in enumerate(digests, 1):
            record = _adapter(library, digest, faults)
            if record is not None:
                records[digest] = record
            each(number, len(digests))
        there = set(digests)
        for name, history in histories.items():
            faults += [
                f"{name}@{one.number} points to {names.short(one.digest)}, which is not there: restore it, or remove "
                f"{name if one == history.current else f'{name}@{one.number}'}"
                for one in history.generations
                if one.digest not in there
            ]
        held = by_tensors(records)
        for digest, record in records.items():
            missing = [parent for parent in record.parents if parent not in held]
            lost = [parent for parent in missing if parent not in record.outside]
            faults += [
                f"{names.short(digest)} lost its parent {names.short(parent)}: add that again" for parent in lost
            ]
            remarks += [
                f"{names.short(digest)}: its parent {names.short(parent)} was never in the library"
                for parent in missing
                if parent not in lost
            ]
        roots = {digest for history in histories.values() for digest in history.digests}
        unreached = sorted(records.keys() - reachable(roots, records))
        remarks += [
            f"no name reaches {names.short(d)}: the next `deltaw adapters remove` deletes it" for d in unreached
        ]
        size = sum(record.bytes for record in records.values())
        named = sum(bool(history.generations) for history in histories.values())
    return Audit(len(digests), named, size, tuple(faults), tuple(remarks))


def _stranger(path: Path) -> str:
    return f"{path} is no part of a library: move it elsewhere"


def _histories(library: Library, faults: list[str]) -> Iterator[tuple[str, History]]:
    for name in place.named(library.path):
        try:
            yield name, library.history(name)
        except DeltawError as error:
            faults.append(str(error))


def _adapter(library: Library, digest: str, faults: list[str]) -> Record | None:
    """The record of one adapter whose files are what its digest says; else None, and what is wrong."""
    blob, short = library.blob(digest), names.short(digest)
    files = {RECORD, ADAPTER, *(f"{ADAPTER}/{name}" for name in (*content.TEXTS, WEIGHTS))}
    faults += [
        _stranger(path)
        for path in sorted(blob.rglob("*"))
        if path.is_symlink() or str(path.relative_to(blob)) not in files
    ]
    try:
        stored = open_directory(blob / ADAPTER)
        found = content.digest(content.texts(blob / ADAPTER), stored.digest)
        record = library.record(digest)
    except (DeltawError, OSError, ValueError) as error:
        faults.append(f"{short} cannot be read: {error}")
        return None
    if found != digest:
        faults.append(f"{short} is not what it was: its content is {names.short(found)} now; restore it")
    size = sum(path.stat().st_size for path in (blob / ADAPTER).iterdir())
    again = content.record(stored, digest, size, record.added, set())
    edited = [
        key
        for key in ("digest", "tensors", "bytes", "parameters", "base", "meta")
        if getattr(again, key) != getattr(record, key)
    ]
    if edited:
        faults.append(f"{short}: {RECORD} says another {', '.join(edited)} than its files: restore it")
    return record
