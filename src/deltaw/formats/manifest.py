"""deltaw.json: what PEFT's config cannot say. Method of every site, shapes, identity of the base, digest of the tensors.

{"format": 1, "deltaw": "0.1.0", "layout": "peft" | "native", "digest": "sha256:…", "base": {…},
 "methods": [{"method": "lora", "rank": 16, …}], "sites": [["model.layers.0.q_proj", "weight", 0, {"shape": […]}]],
 "meta": {task type, recipe, metrics, parents, …}}
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from deltaw import __version__
from deltaw.core.base import BaseIdentity
from deltaw.core.errors import ConfigError, FileError
from deltaw.core.host import HostSpec
from deltaw.core.method import Method, Site, from_dict
from deltaw.core.state import AdapterState

FORMAT = 1
LAYOUTS = ("peft", "native")
"""How the tensors are named: by PEFT's keys, or path:slot:name where PEFT has no format."""


def write(state: AdapterState, layout: str, tensors: Mapping[str, Tensor]) -> str:
    """The manifest of a state whose file holds `tensors`, as JSON text."""
    records: list[dict[str, Any]] = []
    sites = []
    for site, method in state.methods.items():
        record = method.to_dict()
        if record not in records:
            records.append(record)
        sites.append([site.path, site.slot, records.index(record), _written(state.specs.get(site))])
    manifest = {
        "format": FORMAT,
        "deltaw": __version__,
        "layout": layout,
        "digest": digest(tensors),
        "base": None if state.base is None else state.base.to_dict(),
        "methods": records,
        "sites": sites,
        "meta": dict(state.meta),
    }
    try:
        return json.dumps(manifest, ensure_ascii=False, separators=(",", ":")) + "\n"
    except (TypeError, ValueError) as error:
        raise ConfigError(f"meta is kept as JSON, plain values, lists and tables only: {error}") from None


def _written(spec: HostSpec | None) -> dict[str, Any] | None:
    """None for a site read from a stranger's file that does not tell the layer's shape."""
    if spec is None:
        return None
    default = {f.name: f.default for f in dataclasses.fields(HostSpec)}
    return {k: v for k, v in dataclasses.asdict(spec).items() if k == "shape" or v != default[k]}


@dataclasses.dataclass(frozen=True)
class Manifest:
    layout: str
    digest: str
    base: BaseIdentity | None
    methods: Mapping[Site, Method]
    specs: Mapping[Site, HostSpec]
    meta: Mapping[str, Any]


def read(text: str, source: str) -> Manifest:
    """Parse a manifest; FileError with the reason where it is not one of ours, or of a newer format."""
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise FileError(f"{source}, line {error.lineno}: not JSON ({error.msg})") from None
    try:
        version, layout = int(record["format"]), str(record["layout"])
        methods = [from_dict(method) for method in record["methods"]] if version <= FORMAT else []
        sites = record["sites"] if version <= FORMAT else []
        here = {Site(path, slot): (methods[index], spec) for path, slot, index, spec in sites}
        base = None if record["base"] is None else BaseIdentity.from_dict(record["base"])
        parsed = Manifest(
            layout, str(record["digest"]), base,
            {site: method for site, (method, _) in here.items()},
            {site: _spec(spec) for site, (_, spec) in here.items() if spec is not None},
            dict(record["meta"]),
        )  # fmt: skip
    except ConfigError as error:  # a method that is not installed, or newer
        raise ConfigError(f"{source}: {error}") from None
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        raise FileError(f"{source} is not a manifest of deltaw: {type(error).__name__} {error}") from None
    if version > FORMAT:
        raise FileError(f"{source} is of format {version}, this deltaw reads up to {FORMAT}: upgrade deltaw")
    if layout not in LAYOUTS:
        raise FileError(f"{source} says layout {layout!r}, known are {' and '.join(LAYOUTS)}: upgrade deltaw")
    return parsed


def _spec(record: Mapping[str, Any]) -> HostSpec:
    return HostSpec(**{**record, "shape": tuple(record["shape"])})


def digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, dtypes, shapes and bytes, in the order of the names."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous().cpu()
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return f"sha256:{total.hexdigest()}"
