"""The weights of a base one at a time, by name from its safetensors files: for what looks at a few and needs no model.

    site → parameter of the outline (modules and shapes, meta device) → key in a file → tensor → canonical weight

Files may leave out the prefix of the body (GPT-2's `h.0.…`) and tied weights. Where they name weights otherwise, as those
of experts that transformers joins while it loads, the base is loaded whole, and `remarks` says so.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from deltaw.core.base import BaseIdentity, by_path, sample
from deltaw.core.errors import BaseMismatchError, FileError, UseError, did_you_mean, faults
from deltaw.core.files import read_json
from deltaw.core.host import HostSpec, ParameterHost, host_of
from deltaw.core.method import Shapes, Site
from deltaw.core.state import AdapterState, misfit
from deltaw.models.base import load_base, outline, read_config, resolve
from deltaw.models.quantize import method_of

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


class BaseWeights:
    """Callable: site of `state` → its canonical weight in the dtype of the files, on the CPU; None where there is none:
    of trained modules that the base does not have (a classifier's head), of adapters beside a block."""

    def __init__(self, name: str, state: AdapterState, *, allow_base_mismatch: bool = False):
        """name: as for `load_base`. FileError where the adapter does not fit it, BaseMismatchError for another base's."""
        own = method_of(read_config(name))
        if own is not None:
            raise UseError(f"the files of the base {name!r} are quantised ({own}): give the unquantised base")
        self.name, self.remarks = name, list[str]()
        self._model = outline(name)
        self._methods, self._modules = state.methods, by_path(self._model)
        self.specs = self._fit(state)
        self._opened: dict[Path, Any] = {}
        self._keys = _keys(name)
        self._names = _names(self._model)
        missing = [site for site in self.specs if self._there(site) and not self._on_disk(self._parameter(site))]
        if missing:
            self.remarks.append(
                f"the base's files name {missing[0]} otherwise than the model, or in another shape: it was loaded whole"
            )
            self._model = load_base(name, dtype="fp32", device=torch.device("cpu")).model
            self._modules, self._keys = by_path(self._model), {}
        self._check(state, allow_base_mismatch)

    def __call__(self, site: Site) -> Tensor | None:
        if not self._there(site):
            return None
        module, host = self._modules[site.path], self._host(site)
        outlined = module._parameters[site.slot]
        key = self._key(outlined)
        if key is not None:
            module._parameters[site.slot] = nn.Parameter(self._read(key), requires_grad=False)
        try:
            weight: Tensor = host.weight.detach()
        finally:
            module._parameters[site.slot] = outlined
        return weight

    def _there(self, site: Site) -> bool:
        """Is there a parameter? Not of adapters beside a block, nor of modules that the base does not have."""
        return site in self.specs and site.slot in self._modules[site.path]._parameters

    def _host(self, site: Site) -> Any:
        return host_of(self._modules[site.path], site.slot, self._methods[site].host)

    def _parameter(self, site: Site) -> Tensor:
        parameter = self._modules[site.path]._parameters[site.slot]
        assert parameter is not None  # `_fit` has been there
        return parameter

    def _fit(self, state: AdapterState) -> dict[Site, HostSpec]:
        """The shape of every site in the base. FileError for what it does not have, or in another shape."""
        specs, found, lacking, shapes = dict[Site, HostSpec](), list[str](), list[Site](), Shapes()
        for site, method in state.methods.items():
            module = self._modules.get(site.path)
            host = None if module is None else host_of(module, site.slot, method.host)
            if module is None and method.host is ParameterHost:
                lacking.append(site)
            elif module is None:
                found.append(f"{site}: the base has no such module{did_you_mean(site.path, self._modules)}")
            elif host is None or not host.has(module, site.slot):
                found.append(f"{site}: {type(module).__name__} cannot carry {method.name} at {site.slot!r}")
            elif reason := misfit(method, state.tensors[site], host.spec, shapes):
                found.append(f"{site}: {reason}")
            else:
                specs[site] = host.spec
        if found:
            raise faults(FileError, f"the adapter does not fit the base {self.name!r}", found)
        if lacking and not specs:
            raise FileError(f"the base {self.name!r} has nothing of what the adapter changes: {lacking[0]}, …")
        if lacking:
            self.remarks.append(f"the base has no {', '.join(map(str, lacking))}: trained beside it, seen without it")
        return specs

    def _check(self, state: AdapterState, allowed: bool) -> None:
        """Is it the base that the adapter was trained on? The same values are compared as when it is loaded."""
        if state.base is None:
            self.remarks.append("the adapter does not say which base it was trained on")
            return
        parameters = dict(self._model.named_parameters(remove_duplicate=False))
        known = [(path, self._named(parameters[path])) for path in state.base.samples if path in parameters]
        samples = {name: one for pair in known if pair[1] is not None for name, one in sample([pair]).items()}  # type: ignore[list-item]
        here = BaseIdentity(self.name, type(self._model).__name__, samples)
        why = state.base.difference(here)
        if why and not allowed:
            raise BaseMismatchError(
                f"the adapter was trained on {state.base.name!r}, {self.name!r} is another base: {why}. "
                "Give the right one, or pass --allow-base-mismatch if you know better"
            )
        if why or not state.base.comparable(here):
            self.remarks.append(
                f"another base, allowed: {why}" if why else "nothing tells whether it is the right base"
            )

    def _named(self, parameter: Tensor) -> Tensor | None:
        """A parameter with its values; None where no file holds it."""
        if parameter.device.type != "meta":
            return parameter.detach()
        key = self._key(parameter)
        return None if key is None else self._read(key)

    def _key(self, parameter: Tensor | None) -> str | None:
        """Its key in the files: under any of its names, with or without the body's prefix."""
        prefix = f"{getattr(self._model, 'base_model_prefix', '')}."
        for name in self._names.get(id(parameter), ()):
            for key in (name, name.removeprefix(prefix), f"{prefix}{name}"):
                if key in self._keys:
                    return key
        return None

    def _on_disk(self, parameter: Tensor) -> bool:
        """Do the files hold it as it is in memory?"""
        key = self._key(parameter)
        return key is not None and self._read(key, shape_only=True) == tuple(parameter.shape)

    def _read(self, key: str, shape_only: bool = False) -> Any:
        file = self._keys[key]
        try:
            if file not in self._opened:
                self._opened[file] = safe_open(file, framework="pt")
            opened = self._opened[file]
            return tuple(opened.get_slice(key).get_shape()) if shape_only else opened.get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise FileError(f"{key} cannot be read from {file} ({error}): fetch the base again") from None


def _names(model: nn.Module) -> dict[int, list[str]]:
    """id of each parameter → all its names: several where weights are tied."""
    found: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found.setdefault(id(parameter), []).append(name)
    return found


def _keys(name: str) -> dict[str, Path]:
    """Key → file that holds it; empty where the base has no safetensors files (then it is loaded whole)."""
    source = Path(resolve(name))
    folder = source if source.is_dir() else _fetched(name)
    if (folder / INDEX).is_file():
        shards = read_json(folder / INDEX, "fetch the base again").get("weight_map", {})
        return {key: folder / file for key, file in shards.items()}
    if not (folder / SINGLE).is_file():
        return {}
    try:
        with safe_open(folder / SINGLE, framework="pt") as opened:
            return dict.fromkeys(opened.keys(), folder / SINGLE)
    except (SafetensorError, OSError) as error:
        raise FileError(f"{folder / SINGLE} is not a safetensors file ({error}): fetch the base again") from None


def _fetched(name: str) -> Path:
    """The folder of a hub id in the hub's cache, with its safetensors files."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=[INDEX, "model*.safetensors"]))
    except Exception as error:  # whatever the hub raises, it is one thing: a base that cannot be fetched
        raise FileError(f"the base {name!r} cannot be fetched: {' '.join(str(error).split())[:300]}") from None
