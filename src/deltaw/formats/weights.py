"""The tensors of an adapter's file: safetensors, or a pickle where the user allows it (tensors only)."""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from deltaw.core.errors import FileError, faults

WEIGHTS, PICKLED = "adapter_model.safetensors", "adapter_model.bin"


def read_tensors(folder: Path, allow_pickle: bool) -> dict[str, Tensor]:
    """All tensors by their keys, on the CPU, finite. FileError says what is wrong with the file."""
    return read_file(folder / (WEIGHTS if (folder / WEIGHTS).is_file() else PICKLED), allow_pickle)[0]


def read_file(file: Path, allow_pickle: bool) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of one file by their keys, on the CPU, finite; and the texts in a safetensors file's header."""
    if file.suffix != ".safetensors" and not allow_pickle:
        raise FileError(f"{file} is a pickle: read it with allow_pickle=True (--allow-pickle), tensors only")
    tensors, header = _safe(file) if file.suffix == ".safetensors" else (_pickled(file), {})
    eighths = [key for key, t in tensors.items() if t.is_floating_point() and t.itemsize == 1]
    tensors |= {key: tensors[key].bfloat16() for key in eighths}  # exact, and torch has arithmetic for it
    found = [f"{key} holds NaN or infinite values" for key, t in tensors.items() if not torch.isfinite(t).all()]
    if found:
        raise faults(FileError, f"{file} (training diverged, or the file is damaged: fetch or train it again)", found)
    return tensors, header


def _safe(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(file, framework="pt") as opened:
            # clone: the tensors would stay mapped to the file, and crash the process when someone overwrites it
            tensors = {key: opened.get_tensor(key).clone() for key in opened.keys()}  # noqa: SIM118  not a mapping
            return tensors, opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        try:
            with open(file, "rb") as start:
                head = start.read(
                    9
                )  # of a safetensors file: the header's size, which may begin as a pickle does, and "{"
        except OSError as closed:
            raise FileError(
                f"{file} cannot be read: {closed.strerror or closed}; make it readable, or fetch it again"
            ) from None
        pickled = head[:2] == b"PK" or (head[:1] == b"\x80" and head[8:] != b"{")
        reason = "it is a pickle under another name" if pickled else f"corrupt or cut short ({error})"
        raise FileError(f"{file} is not a safetensors file: {reason}; fetch it again") from None


def _pickled(file: Path) -> dict[str, Tensor]:
    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a foreign pickle raises (KeyError, EOFError, …), it is one thing: unreadable
        raise FileError(
            f"{file} holds more than tensors, or is broken: {str(error).splitlines()[0] if str(error) else error!r}"
        ) from None
    if not isinstance(loaded, dict) or not all(isinstance(k, str) and isinstance(t, Tensor) for k, t in loaded.items()):
        raise FileError(f"{file} is not a table of named tensors: it is no adapter's file")
    return loaded
