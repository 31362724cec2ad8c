"""An adapter directory: what users keep, share and serve. Written whole or not at all; safetensors only, never pickle.

    adapter_config.json          PEFT's config, where PEFT has a format for the adapter
    adapter_model.safetensors    the tensors, under PEFT's keys (layout peft) or ours (layout native)
    deltaw.json                  methods, shapes, identity of the base, digest, recipe (`deltaw.formats.manifest`)
    README.md                    a model card

A directory written by PEFT alone, without deltaw.json, reads too; its base is then unknown.
"""

import json
import pickle
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from deltaw.core.errors import ConfigError, FileError, faults
from deltaw.core.files import whole_folder, write_text
from deltaw.core.method import Site
from deltaw.core.state import AdapterState
from deltaw.formats import manifest
from deltaw.formats.peft import from_peft, to_peft

CONFIG, WEIGHTS, PICKLED, OURS = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "deltaw.json"


def write(state: AdapterState, path: str | Path, *, paths: Collection[str] | None = None) -> None:
    """Write `state` as the directory `path`, replacing an adapter that is there. `paths`: the base's module paths."""
    folder = Path(path)
    if folder.exists() and not (folder / WEIGHTS).exists() and any(folder.iterdir()):
        raise FileError(f"{folder} exists and is not an adapter: give another folder")
    try:
        config, tensors = to_peft(state, paths)
        layout = "peft"
    except ConfigError:
        config, layout = None, "native"
        tensors = {_native(s, name): t for s, group in state.tensors.items() for name, t in group.items()}
    tensors = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
    with whole_folder(folder) as draft:
        save_file(tensors, draft / WEIGHTS, metadata={"format": "pt"})
        (draft / WEIGHTS).chmod(0o644)
        write_text(draft / OURS, manifest.write(state, layout, tensors))
        write_text(draft / "README.md", card(state, layout))
        if config is not None:
            write_text(draft / CONFIG, json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def _native(site: Site, name: str) -> str:
    return f"{site.path}:{site.slot}:{name}"


def read(path: str | Path, *, allow_pickle: bool = False) -> tuple[AdapterState, list[str]]:
    """The state in a directory and notes for the user. FileError or ConfigError says what is wrong and what to do."""
    folder = Path(path)
    _there(folder)
    tensors = _tensors(folder, allow_pickle)
    if not (folder / OURS).is_file():
        return from_peft(_config(folder), tensors)
    ours = manifest.read((folder / OURS).read_text(encoding="utf-8"), str(folder / OURS))
    if manifest.digest(tensors) != ours.digest:
        raise FileError(
            f"the tensors in {folder} are not those that {OURS} describes: the folder was changed or mixed up"
        )
    if ours.layout == "peft":
        state, notes = from_peft(_config(folder), tensors)
        placed: Mapping[Site, Mapping[str, Tensor]] = state.tensors
    else:
        placed, notes = _by_site(tensors), []
    if placed.keys() != ours.methods.keys():
        apart = ", ".join(sorted(map(str, placed.keys() ^ ours.methods.keys()))[:6])
        raise FileError(f"{folder}: {OURS} and {WEIGHTS} disagree about {apart}")
    return AdapterState(ours.methods, placed, ours.specs, base=ours.base, meta=ours.meta), notes


def _by_site(tensors: Mapping[str, Tensor]) -> dict[Site, dict[str, Tensor]]:
    placed: dict[Site, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        where, _, name = key.rpartition(":")
        site_path, _, slot = where.rpartition(":")
        placed.setdefault(Site(site_path, slot), {})[name] = tensor
    return placed


def _there(folder: Path) -> None:
    """Say what is missing, and where it might be."""
    if not folder.is_dir():
        raise FileError(f"no adapter folder {str(folder)!r}")
    if (folder / WEIGHTS).is_file() or (folder / PICKLED).is_file():
        return
    inside = sorted(p.name for p in folder.iterdir())
    below = [p.parent.name for p in folder.glob(f"*/{CONFIG}")]
    hint = ""
    if below:
        hint = f"; there are adapters in its folders {', '.join(below)}"
    elif "config.json" in inside:
        hint = "; it holds a model, not an adapter"
    raise FileError(f"{folder} holds no {WEIGHTS} (it holds {', '.join(inside[:6]) or 'nothing'}){hint}")


def _config(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG
    if not file.is_file():
        raise FileError(f"{folder} holds no {CONFIG}: the method of its tensors is unknown")
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FileError(f"{file} is not JSON: {error}") from None
    if not isinstance(record, dict):
        raise FileError(f"{file} is a {type(record).__name__}, expected an object")
    return record


def _tensors(folder: Path, allow_pickle: bool) -> dict[str, Tensor]:
    file = folder / WEIGHTS
    if not file.is_file():
        file = folder / PICKLED
        if not allow_pickle:
            raise FileError(
                f"{folder} has only {PICKLED}, a pickle: read it with allow_pickle=True (--allow-pickle), tensors only"
            )
        try:
            loaded = torch.load(file, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise FileError(f"{file} holds more than tensors, or is broken: {str(error).splitlines()[0]}") from None
        tensors = dict(loaded)
    else:
        try:
            with safe_open(file, framework="pt") as opened:
                tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118  not a mapping
        except (SafetensorError, OSError) as error:
            pickled = file.read_bytes()[:2] in (b"PK", b"\x80\x02")
            reason = "it is a pickle under another name" if pickled else f"corrupt or cut short ({error})"
            raise FileError(f"{file} is not a safetensors file: {reason}; fetch it again") from None
    found = [
        f"{key} holds NaN or infinite values" for key, tensor in tensors.items() if not torch.isfinite(tensor).all()
    ]
    if found:
        raise faults(FileError, f"{file}", found)
    return tensors


def card(state: AdapterState, layout: str) -> str:
    """A short model card."""
    methods = ", ".join(sorted({method.name for method in state.methods.values()}))
    base = f"`{state.base.name}` ({state.base.layer})" if state.base else "not recorded"
    reads = "PEFT and everything that reads its format, and deltaw" if layout == "peft" else "deltaw"
    return (
        f"---\nlibrary_name: {'peft' if layout == 'peft' else 'deltaw'}\ntags: [lora, deltaw]\n---\n\n# Adapter\n\n"
        f"| | |\n|---|---|\n| base | {base} |\n| methods | {methods} |\n| modules | {len(state.methods)} |\n"
        f"| parameters | {state.parameters:,} |\n| read by | {reads} |\n\n"
        "It holds the trained change only, not the base. With the base loaded as `model`:\n\n"
        '```python\nimport deltaw\n\ndeltaw.load(model, "path/of/this/folder")\n```\n'
    )
