"""Where things lie in a library, whose turn it is to change them, and what a change that was cut off left behind.

    library.json                    {"format": 1}: this directory is a library
    blobs/<64 hex digits>/          one adapter, never changed: record.json, and the adapter's files in adapter/
    names/<name>.json               what the name points to, and pointed to before (`deltaw.library.history`)
    lock                            held by whoever changes something; readers need none

The lock is the kernel's (flock): it goes with the process that held it, however that ends.
"""

import contextlib
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from deltaw.library.names import DIGEST, LONGEST, NAME

MARK, BLOBS, NAMES, LOCK = "library.json", "blobs", "names", "lock"
RECORD, ADAPTER = "record.json", "adapter"
DRAFT = re.compile(r"\.([0-9a-f]{64}|[a-z0-9._-]+\.json)\.\d+\.(tmp|old|gone)")
"""Names of drafts: those of `deltaw.core.files`, and of content that is being deleted."""


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """Nobody else changes the library meanwhile, nor looks closely (`looking`)."""
    with _locked(path / LOCK, os.O_RDWR | os.O_CREAT, fcntl.LOCK_EX):
        yield


@contextlib.contextmanager
def looking(path: Path) -> Iterator[None]:
    """Nobody changes the library meanwhile; several may look. A medium that is read only needs no lock, nor has it one."""
    file = path / LOCK
    with _locked(file, os.O_RDONLY, fcntl.LOCK_SH) if file.is_file() else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def _locked(file: Path, flags: int, kind: int) -> Iterator[None]:
    descriptor = os.open(file, flags, 0o644)
    try:
        fcntl.flock(descriptor, kind)
        yield
    finally:
        os.close(descriptor)


def drafts(path: Path) -> list[Path]:
    """What changes that were cut off left in the library; while one is under way, its own too."""
    places = [place for place in (path, path / BLOBS, path / NAMES) if place.is_dir()]
    return sorted(found for place in places for found in place.iterdir() if DRAFT.fullmatch(found.name))


def sweep(path: Path) -> None:
    """Delete all drafts; only for whoever is `alone`."""
    for draft in drafts(path):
        shutil.rmtree(draft) if draft.is_dir() else draft.unlink()


def digests(path: Path) -> list[str]:
    """All adapters there are, by their digests."""
    return sorted(f"sha256:{found.name}" for found in (path / BLOBS).glob("*") if _is_blob(found))


def named(path: Path) -> list[str]:
    """All names that have a file; what it says is another matter."""
    return sorted(found.stem for found in (path / NAMES).glob("*") if _is_name(found))


def strangers(path: Path) -> list[Path]:
    """What lies at the top, among the blobs or among the names and is no part of a library."""
    ours = {path / name for name in (MARK, BLOBS, NAMES, LOCK)}
    ours |= {found for found in (path / BLOBS).glob("*") if _is_blob(found)}
    ours |= {found for found in (path / NAMES).glob("*") if _is_name(found)}
    places = [place for place in (path, path / BLOBS, path / NAMES) if place.is_dir()]
    there = {found for place in places for found in place.iterdir()}
    return sorted(there - ours - set(drafts(path)))


def _is_blob(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink() and DIGEST.fullmatch(f"sha256:{path.name}") is not None


def _is_name(path: Path) -> bool:
    return path.suffix == ".json" and NAME.fullmatch(path.stem) is not None and len(path.stem) <= LONGEST
