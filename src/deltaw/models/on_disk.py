"""A base whose weights stay on disk: its outline, and one module at a time with its own parameters read.

    OnDisk(folder)(path)   the module at `path` in the files' dtype; the next call reads another one

For whoever needs some weights and not the model: memory is one module. It reads safetensors whose names are those of the
model in memory (with or without the class's own prefix, tied ones under either name) and of no quantised base; where
transformers renames or joins tensors on loading, `open_base` says None and the model is loaded as a whole.
"""

import contextlib
import copy
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from deltaw.core.base import BaseIdentity, by_path, sample
from deltaw.core.errors import FileError
from deltaw.core.files import read_json
from deltaw.models.base import TINY, outline, read_config, resolve
from deltaw.models.quantize import method_of

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class OnDisk:
    """Path → module of a base, read when asked."""

    def __init__(self, name: str, model: nn.Module, files: dict[str, Path]):
        self.name, self.model, self.files = name, model, files
        self.modules = by_path(model)
        alike: dict[int, list[str]] = {}
        for path, module in self.modules.items():
            for slot, parameter in module._parameters.items():
                if parameter is not None:
                    alike.setdefault(id(parameter), []).append(f"{path}.{slot}".lstrip("."))
        prefix = f"{getattr(model, 'base_model_prefix', '')}."
        self.keys: dict[str, str] = {}
        """Name in memory → name on disk, of all that can be read."""
        for names in alike.values():
            there = next((k for n in names for k in (n, n.removeprefix(prefix)) if k in files), None)
            self.keys |= {} if there is None else dict.fromkeys(names, there)

    def __call__(self, path: str) -> nn.Module | None:
        """A copy of the module with its own parameters, or None where there is no such module. FileError."""
        module = self.modules.get(path)
        if module is None:
            return None
        found = copy.copy(module)
        found._parameters = {  # type: ignore[assignment]
            slot: parameter if parameter is None else nn.Parameter(self.tensor(f"{path}.{slot}".lstrip(".")), requires_grad=False)
            for slot, parameter in module._parameters.items()
        }  # fmt: skip
        return found

    def tensor(self, name: str) -> Tensor:
        key = self.keys.get(name)
        if key is None:
            raise FileError(f"the files of the base {self.name!r} hold no {name!r}: fetch them again")
        with _opened(self.files[key]) as file:
            found: Tensor = file.get_tensor(key)
        return found

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Of a parameter on disk; None where the files hold none of that name."""
        if name not in self.keys:
            return None
        with _opened(self.files[self.keys[name]]) as file:
            return tuple(file.get_slice(self.keys[name]).get_shape())

    def identity(self, names: Iterable[str]) -> BaseIdentity:
        """Of the base, from those of its parameters (an adapter's `base.samples`) that are there."""
        named = [(name, self.tensor(name)) for name in names if name in self.keys]
        return BaseIdentity(self.name, type(self.model).__name__, sample(named))


def open_base(name: str, paths: Iterable[str]) -> OnDisk | None:
    """The base on disk, where all parameters of the modules at `paths` can be read one at a time; else None."""
    folder = Path(resolve(name)) if name != "tiny" else TINY
    if not folder.is_dir() or method_of(read_config(name)) is not None:
        return None
    files = _files(folder)
    if not files:
        return None
    base = OnDisk(name, outline(name), files)
    owned = [(path, base.modules[path]._parameters) for path in paths if path in base.modules]
    wanted = {f"{path}.{slot}": p for path, own in owned for slot, p in own.items() if p is not None}
    return base if all(base.shape(name) == tuple(p.shape) for name, p in wanted.items()) else None


def _files(folder: Path) -> dict[str, Path]:
    """Name of every tensor → its file; empty where there are no safetensors."""
    if (folder / INDEX).is_file():
        record = read_json(folder / INDEX, "fetch the base again").get("weight_map", {})
        return {name: folder / file for name, file in record.items()}
    if not (folder / SINGLE).is_file():
        return {}
    with _opened(folder / SINGLE) as file:
        return dict.fromkeys(file.keys(), folder / SINGLE)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise FileError(f"{path} cannot be read: {error}: fetch the base again") from None
