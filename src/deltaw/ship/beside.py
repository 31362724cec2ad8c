"""The rest of a model's folder: where it lies, what goes along to the merged one, and is there room for it?"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from deltaw.core.errors import FileError, UseError
from deltaw.core.files import read_json, write_text
from deltaw.models.checkpoint import AGAIN, Checkpoint
from deltaw.ship.disk import rewritten

TEMPLATES = "additional_chat_templates"
"""The one folder that belongs to a tokenizer: its templates by other names."""
CONFIG, REPORT = "config.json", "merge.json"
WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".npz"}
"""Endings of files that hold weights, of the base and not of what is written."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LEFT = {".md", ".gitattributes", ".gitignore", ".metadata"}
"""The base's own card, and what belongs to the place it lay in."""


def copy_beside(source: Path, folder: Path, dtype: torch.dtype | None) -> None:
    """Configuration, tokenizer, template, generation settings, licence: every file of `source` that holds no weights."""
    for file in sorted(source.iterdir()):
        ending = file.suffix or file.name
        index = file.name.endswith(".index.json")
        if not file.is_file() or ending in WEIGHTS | LEFT or index or file.name == REPORT:
            continue
        shutil.copyfile(file, folder / file.name)
    if (source / TEMPLATES).is_dir():
        shutil.copytree(source / TEMPLATES, folder / TEMPLATES)
    if dtype is not None:
        record = read_json(folder / CONFIG, AGAIN)
        kind = str(dtype).removeprefix("torch.")
        write_text(folder / CONFIG, json.dumps(_typed({"dtype": kind, **record}, kind), indent=2) + "\n")


def _typed(record: Any, kind: str) -> Any:
    """A configuration, and those of its parts, that say the dtype of what was written."""
    if not isinstance(record, dict):
        return record
    return {
        key: kind if key in ("dtype", "torch_dtype") and value else _typed(value, kind) for key, value in record.items()
    }


def room(target: Path, checkpoint: Checkpoint, dtype: torch.dtype | None) -> None:
    """FileError where the disk of `target` has not the room for the weights."""
    needed = 0
    for file in checkpoint.files:
        header, entries = rewritten(checkpoint, file, dtype)
        needed += len(header) + max((entry.end for entry in entries.values()), default=0)
    above = next(folder for folder in (target, *target.absolute().parents) if folder.exists())
    free = shutil.disk_usage(above).free
    if free < needed:
        raise FileError(
            f"the merged model takes {needed / 1e6:,.1f} MB and {above} has {free / 1e6:,.1f} MB left: nothing was written, "
            "give a disk with more room"
        )


def asked(dtype: str) -> torch.dtype | None:
    """The dtype to write, None for each weight's own."""
    if dtype != "auto" and dtype not in DTYPES:
        raise UseError(f"dtype {dtype!r} is none of auto, {', '.join(DTYPES)}")
    return DTYPES.get(dtype)
