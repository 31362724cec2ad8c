"""An adapter directory: what users keep, share and serve. Written whole or not at all; safetensors only, never pickle.

    adapter_config.json          PEFT's config; where PEFT has no format for the adapter, a peft_type it does not know
    adapter_model.safetensors    the tensors, under PEFT's keys (layout peft) or path:slot:name (layout native)
    deltaw.json                  methods, shapes, identity of the base, digest, recipe (`deltaw.formats.manifest`)
    README.md                    a model card
    chat_template.jinja, tokens.json   what the adapter needs of its tokenizer, where it does (`deltaw.data.kept`)

A directory written by PEFT alone, without deltaw.json, reads too; its base is then unknown. Other files beside these
(a tokenizer) are kept when the adapter is written again.
"""

import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from deltaw.core.errors import ConfigError, FileError, faults
from deltaw.core.files import read_json, whole_folder, write_text
from deltaw.core.method import Site
from deltaw.core.state import AdapterState
from deltaw.formats import manifest
from deltaw.formats.card import card
from deltaw.formats.layout import Layout
from deltaw.formats.peft import base_copies, from_peft, to_peft
from deltaw.formats.peft_kind import Kind
from deltaw.formats.peft_methods import kind_for, kind_of
from deltaw.formats.peft_write import to_nobody
from deltaw.formats.weights import PICKLED, WEIGHTS, read_tensors

CONFIG, OURS, CARD = "adapter_config.json", "deltaw.json", "README.md"
TEMPLATE, TOKENS = "chat_template.jinja", "tokens.json"
WRITTEN = {CONFIG, WEIGHTS, PICKLED, OURS, CARD, TEMPLATE, TOKENS}
"""What a write replaces; the pickle goes, its tensors are in the safetensors file. Template and tokens are an adapter's
own: those of the one that stood there before would be wrong for the next."""

log = logging.getLogger("deltaw")


@dataclass(frozen=True)
class Stored:
    """What a directory holds."""

    state: AdapterState
    notes: list[str]
    copies: Mapping[str, Tensor]
    """Copies of the base's own tensors that PEFT put beside the adapter, by their names in the model."""
    base_name: str | None
    """What the files call the base; not proven by anything."""
    digest: str
    """Of the tensors, as deltaw.json has it."""
    kind: Kind | None = None
    """Of a directory that only PEFT's config describes."""


def write(
    state: AdapterState,
    path: str | Path,
    *,
    layout: Layout | None = None,
    beside: Mapping[str, str] | None = None,
    finished: bool = True,
) -> None:
    """Write `state` as the directory `path`, replacing an adapter that is there. `layout`: of the base, where known;
    `beside`: further text files to put into it, {name: text}, where None warns of a template or tokens that go with the
    adapter that was there; finished=False keeps what only further training needs.

    Methods and layers that PEFT has no format for are written in our own layout, under a peft_type it does not know.
    """
    folder = Path(path)
    folder = folder.resolve() if folder.is_symlink() else folder
    state = state.finished() if finished else state
    try:
        if state.finished() is not state:
            raise ConfigError("PEFT's files hold finished adapters")
        config, tensors = to_peft(state, layout)
        kind = "peft"
    except ConfigError:
        config, kind = to_nobody(state), "native"
        tensors = {_native(s, name): t for s, group in state.tensors.items() for name, t in group.items()}
    tensors = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
    described = manifest.write(state, kind, tensors)
    others = [file for file in _others(folder) if file.name not in WRITTEN | set(beside or {})]
    gone = [name for name in (TEMPLATE, TOKENS) if beside is None and (folder / name).exists()]
    try:
        with whole_folder(folder) as draft:
            save_file(tensors, draft / WEIGHTS, metadata={"format": "pt"})
            (draft / WEIGHTS).chmod(0o644)
            write_text(draft / OURS, described)
            write_text(draft / CARD, card(state, kind))
            for name, text in (beside or {}).items():
                write_text(draft / name, text)
            write_text(draft / CONFIG, json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
            for other in others:
                _keep(other, draft / other.name)
    except OSError as error:
        raise FileError(f"the adapter cannot be written to {folder}: {error.strerror or error}") from None
    if gone:
        log.warning(
            "%s: %s went with the adapter that was there; where this one needs the same, give them to save as beside",
            folder, " and ".join(gone),
        )  # fmt: skip


def read(path: str | Path, *, allow_pickle: bool = False, strict: bool = True) -> tuple[AdapterState, list[str]]:
    """The state in a directory and notes for the user. FileError or ConfigError says what is wrong and what to do."""
    stored = open_directory(path, allow_pickle=allow_pickle, strict=strict)
    return stored.state, stored.notes


def open_directory(path: str | Path, *, allow_pickle: bool = False, strict: bool = True) -> Stored:
    """As `read`, with all that the directory says about its base."""
    folder = Path(path)
    _there(folder)
    tensors = read_tensors(folder, allow_pickle)
    if not (folder / OURS).is_file():
        config = _config(folder)
        state, notes = from_peft(config, tensors, strict=strict)
        copies, name = base_copies(config, tensors), config.get("base_model_name_or_path")
        return Stored(state, notes, copies, name, manifest.digest(tensors), kind_of(config))
    ours = manifest.read((folder / OURS).read_text(encoding="utf-8"), str(folder / OURS))
    if manifest.digest(tensors) != ours.digest:
        raise FileError(
            f"the tensors in {folder} are not those that {OURS} describes: fetch the folder again, or delete {OURS} "
            "to read what is there by PEFT's config alone"
        )
    if ours.layout == "peft":
        state, notes = from_peft(_config(folder), tensors)
        placed: Mapping[Site, Mapping[str, Tensor]] = state.tensors
        _agree(folder, state, ours)
    else:
        placed, notes = _by_site(tensors), []
    if placed.keys() != ours.methods.keys():
        apart = ", ".join(sorted(map(str, placed.keys() ^ ours.methods.keys()))[:6])
        raise FileError(f"{folder}: {OURS} and {WEIGHTS} disagree about {apart}")
    whole = AdapterState(ours.methods, placed, ours.specs, base=ours.base, meta=ours.meta)
    return Stored(whole, notes, {}, ours.base.name if ours.base else None, ours.digest)


def _agree(folder: Path, state: AdapterState, ours: manifest.Manifest) -> None:
    """Both files must give one function: a config edited after saving would be followed by PEFT and not by us."""
    found = []
    for site in state.methods.keys() & ours.methods.keys():
        theirs, mine = state.methods[site], ours.methods[site]
        kind = kind_for(mine)
        if type(theirs) is not type(mine):
            found.append(f"{site}: {theirs.name} in {CONFIG}, {mine.name} in {OURS}")
        elif kind is None:
            found += [f"{site}: {theirs} by {CONFIG}, {mine} by {OURS}"] if replace(theirs) != mine else []
        for fact in kind.same if kind is not None and type(theirs) is type(mine) else ():
            a, b = getattr(theirs, fact), getattr(mine, fact)
            if a != b and not (isinstance(b, float) and abs(a - b) <= 1e-9 * abs(b)):
                found.append(f"{site}: {fact} {_said(a)} by {CONFIG}, {_said(b)} by {OURS}")
    if found:
        head = f"{folder} was edited after it was saved: delete {OURS} to go by {CONFIG}, or save the adapter again"
        raise faults(FileError, head, sorted(found))


def _said(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _native(site: Site, name: str) -> str:
    return f"{site.path}:{site.slot}:{name}"


def _by_site(tensors: Mapping[str, Tensor]) -> dict[Site, dict[str, Tensor]]:
    placed: dict[Site, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        where, _, name = key.rpartition(":")
        path, _, slot = where.rpartition(":")
        placed.setdefault(Site(path, slot), {})[name] = tensor
    return placed


def _others(folder: Path) -> list[Path]:
    """Files in the folder of an adapter that is written again. FileError where `folder` is something else."""
    if folder.name in ("", ".."):
        raise FileError(f"{str(folder)!r} would be replaced as a whole: give the adapter a folder of its own")
    if not folder.exists():
        return []
    if not folder.is_dir():
        raise FileError(f"{folder} is a file: an adapter is a folder, give another name")
    inside = sorted(folder.iterdir())
    if inside and not {CONFIG, WEIGHTS, PICKLED} & {file.name for file in inside}:
        raise FileError(f"{folder} exists and is not an adapter (it holds {inside[0].name}, …): give another folder")
    return inside


def _keep(source: Path, target: Path) -> None:
    """Link where the disk can, else copy."""

    def link(a: str, b: str) -> str:
        try:
            os.link(a, b)
        except OSError:
            shutil.copy2(a, b)
        return b

    if source.is_dir():
        shutil.copytree(source, target, symlinks=True, copy_function=link)
    else:
        link(str(source), str(target))


def _there(folder: Path) -> None:
    """Say what is missing, and where it might be."""
    if folder.is_file():
        raise FileError(f"{folder} is a file: give the adapter's folder, {folder.parent}")
    if not folder.is_dir():
        raise FileError(f"no adapter folder {str(folder)!r}")
    if (folder / WEIGHTS).is_file() or (folder / PICKLED).is_file():
        return
    inside = sorted(file.name for file in folder.iterdir())
    below = sorted(file.parent.name for file in folder.glob(f"*/{CONFIG}"))
    hint = ""
    if below:
        hint = f"; there are adapters in its folders {', '.join(below)}: give {folder / below[0]}"
    elif "config.json" in inside:
        hint = "; it holds a model, not an adapter"
    raise FileError(f"{folder} holds no {WEIGHTS} (it holds {', '.join(inside[:6]) or 'nothing'}){hint}")


def _config(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG
    if not file.is_file():
        raise FileError(f"{folder} holds no {CONFIG}, which says what its tensors mean: fetch the folder again, whole")
    return read_json(file, "fetch the folder again")
