"""Files and folders that appear whole or not at all: written under a temporary name beside them, synced, renamed."""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deltaw.core.errors import FileError, UseError

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
"""What only writing meets."""


def must_be_free(target: Path) -> None:
    """UseError where `target` is there and is not an empty folder: nothing is ever written over."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UseError(f"{target} exists and is not an empty folder: give another output")


@contextlib.contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target` that becomes `target` when the block ends well, and vanishes when it fails."""
    draft = _draft(target)
    old = draft.with_suffix(".old")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir()
        if target.exists():
            shutil.copymode(target, draft)
    except OSError as error:
        raise FileError(f"{target} cannot be written: {error.strerror or error}: give another folder") from None
    try:
        yield draft
        for file in sorted(draft.rglob("*")):
            if file.is_file():
                sync(file)
        if target.exists():  # moved aside first: at no moment is there neither the old folder nor the new one
            shutil.rmtree(old, ignore_errors=True)
            os.replace(target, old)
        os.replace(draft, target)
        sync(target.parent)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        if old.exists() and not target.exists():
            os.replace(old, target)
        raise


def _draft(target: Path) -> Path:
    return target.parent / f".{target.name}.{os.getpid()}.tmp"


def not_made(target: Path, error: Exception, fix: str) -> FileError:
    """The sentence for an error that ended the block of `whole_folder(target)`; fix: of what cannot be written.

    An OSError that names a file elsewhere could not read it, unless it says that a disk is full: copying names the source.
    """
    reason, named = getattr(error, "strerror", None) or str(error), getattr(error, "filename", None)
    own = (
        named is None or {_draft(target), target} & {Path(named), *Path(named).parents} or Path(named) == target.parent
    )
    if own or getattr(error, "errno", None) in FULL:
        return FileError(f"{target} cannot be written: {reason}; nothing was left there: {fix}")
    return FileError(
        f"{named} cannot be read: {reason}; nothing was left at {target}: make it readable, or fetch it again"
    )


def read_json(path: Path, fix: str) -> dict[str, Any]:
    """The object in a JSON file; FileError, ending with `fix`, where it cannot be read or holds something else."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise FileError(f"{path}, line {error.lineno}: {path.name} is not JSON: {error.msg}; {fix}") from None
    except UnicodeDecodeError:
        raise FileError(f"{path} is not text: {path.name} is not JSON; {fix}") from None
    except (OSError, ValueError) as error:
        raise FileError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}; {fix}") from None
    if not isinstance(record, dict):
        raise FileError(f"{path} is a {type(record).__name__}, expected an object; {fix}")
    return record


def write_text(path: Path, text: str) -> None:
    """Write a file whole: temporary name, sync, rename."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    draft.write_text(text, encoding="utf-8")
    sync(draft)
    os.replace(draft, path)


def sync(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
