"""The models of a base without their weights, by role: what files of other tools are read and written against.

    model_index.json              a diffusers pipeline      unet | transformer, text_encoder, text_encoder_2, …
    config.json, _class_name      one diffusers model       unet | transformer
    config.json                   one transformers model    text_encoder for CLIP's, else model

Only configurations are read; modules are built on the meta device. A hub id is looked up as diffusers and transformers do.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deltaw.core.errors import FileError, UseError
from deltaw.formats.diffusers import ROLES
from deltaw.formats.layout import Layout
from deltaw.models.adapters import layout
from deltaw.models.base import TINY, outline, read_config, require_transformers, resolve, said, unreadable

INDEX, CONFIG = "model_index.json", "config.json"
CLIP = ("CLIPTextModel", "CLIPTextModelWithProjection")


@dataclass(frozen=True)
class Outline:
    """A base as files need to know it."""

    name: str
    parts: dict[str, Layout]
    pipeline: bool
    config: dict[str, Any]
    """Of a transformers model: its configuration; else empty."""


def outlines(name: str) -> Outline:
    """The parts of a base: a folder, a hub id or `tiny`. FileError where it cannot be read, UseError for a missing library."""
    index = _read(name, INDEX)
    if index is not None:
        found = {role: _part(name, role, *index[role]) for role in ROLES if _there(index.get(role))}
        if not found:
            raise FileError(f"the pipeline {name!r} has none of the parts that carry adapters ({', '.join(ROLES)})")
        return Outline(name, {role: layout(model) for role, model in found.items()}, True, {})
    config = _read(name, CONFIG)
    if config is not None and "_class_name" in config:
        model = _diffusers(name, str(config["_class_name"]), None)
        return Outline(name, {"unet" if "UNet" in type(model).__name__ else "transformer": layout(model)}, False, {})
    model = _transformers(name, config)
    role = "text_encoder" if type(model).__name__ in CLIP else "model"
    return Outline(name, {role: layout(model)}, False, model.config.to_dict())


def _there(entry: Any) -> bool:
    """Does a pipeline name a class for this part? [null, null] stands for none."""
    return isinstance(entry, list) and len(entry) == 2 and all(isinstance(word, str) for word in entry)


def _part(name: str, role: str, library: str, kind: str) -> nn.Module:
    if library == "diffusers":
        return _diffusers(name, kind, role)
    if library != "transformers":
        raise FileError(
            f"{name!r} has a {role} of {library}.{kind}: only parts of diffusers and transformers are known"
        )
    found = getattr(require_transformers(), kind, None)
    if found is None:
        raise FileError(f"{name!r} has a {role} of the class {kind}, which the installed transformers does not have")
    config = _read(name, f"{role}/{CONFIG}")
    if config is None:  # transformers would take its defaults, and build another model
        raise FileError(f"the pipeline {name!r} names a {role} and holds no {role}/{CONFIG}: fetch it again, whole")
    return _built(name, lambda: found(found.config_class.from_dict(config)))


def _diffusers(name: str, kind: str, subfolder: str | None) -> nn.Module:
    try:
        import diffusers
    except ImportError:
        raise UseError("this base needs diffusers: pip install 'deltaw[diffusion]'") from None
    found = getattr(diffusers, kind, None)
    if found is None:
        raise FileError(f"{name!r} is of the class {kind}, which the installed diffusers does not have: upgrade it")
    options = {} if subfolder is None else {"subfolder": subfolder}
    return _built(name, lambda: found.from_config(found.load_config(name, **options)))


def _transformers(name: str, config: dict[str, Any] | None) -> Any:
    """As the class that the configuration names; a causal language model where it names none."""
    kinds = (config or {}).get("architectures") or [None]
    kind = getattr(require_transformers(), str(kinds[0]), None)
    if kind is None:
        return outline(name)
    found = read_config(name)
    return _built(name, lambda: kind(found))


def _built(name: str, build: Any) -> Any:
    try:
        with torch.device("meta"):
            return build()
    except Exception as error:  # whatever a foreign folder raises, it is one thing: a base that cannot be built
        raise FileError(
            f"the base {name!r} cannot be built from its configuration: {said(error)}; fetch it again, whole"
        ) from None


def _read(name: str, file: str) -> dict[str, Any] | None:
    """A JSON file of a base, or None where it has none."""
    if name == "tiny":
        name = str(TINY)
    if Path(name).is_dir():
        found = Path(name) / file
        path = str(found) if found.is_file() else None
    else:
        cached_file, source = require_transformers().utils.hub.cached_file, resolve(name)
        try:
            path = cached_file(source, file, _raise_exceptions_for_missing_entries=False)
        except OSError as error:
            raise unreadable(name, error) from None
    if path is None:
        return None
    try:
        loaded = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FileError(f"{path} cannot be read: {error}") from None
    return loaded if isinstance(loaded, dict) else None
