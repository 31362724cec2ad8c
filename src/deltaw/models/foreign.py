"""An adapter of any tool, from disk, as states on the parts of the real base.

folder with adapter_config.json and adapter_model…     ours or PEFT's
folder with unet/, text_encoder/, … of that kind       a pipeline's
one file, or a folder that holds one                   another tool's, told by its keys (`formats.detect`)
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from deltaw.core.errors import FileError, UseError, faults
from deltaw.core.files import read_json
from deltaw.core.method import Shapes
from deltaw.core.state import AdapterState, misfit
from deltaw.formats import directory, mlx
from deltaw.formats.detect import GRAMMARS, detect
from deltaw.formats.diffusers import ROLES, from_diffusers
from deltaw.formats.foreign import States
from deltaw.formats.kohya import from_kohya
from deltaw.formats.loralib import from_loralib
from deltaw.formats.manifest import digest
from deltaw.formats.mlx import from_mlx
from deltaw.formats.torchtune import from_torchtune
from deltaw.formats.weights import PICKLED, WEIGHTS, read_file
from deltaw.models.outlines import Outline

FOLDERS = ("deltaw", "peft")
DIFFUSERS = "pytorch_lora_weights.safetensors"  # the name that its loaders look for in a folder
NAMED = (mlx.FILE, DIFFUSERS, "pytorch_lora_weights.bin", "adapter_model.pt")
"""Files that tools write into a folder, in the order in which they are looked for."""


@dataclass(frozen=True)
class Source:
    """What there is to read: adapter folders of ours or PEFT's by role ("" where none is said), or one file of another tool."""

    tool: str
    folders: Mapping[str, directory.Stored] = dataclasses.field(default_factory=dict)
    tensors: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    header: Mapping[str, str] = dataclasses.field(default_factory=dict)
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """adapter_config.json beside the file, of tools that have one."""

    @property
    def digests(self) -> list[str]:
        return [stored.digest for stored in self.folders.values()] or [digest(self.tensors)]


def open_source(path: Path, tool: str | None, allow_pickle: bool) -> Source:
    """What is at `path`: a file, an adapter folder, or a folder with one for each part of a pipeline."""
    if path.is_file():
        return _foreign(path, tool, allow_pickle)
    if not path.is_dir():
        raise FileError(f"no adapter {str(path)!r}: neither a file nor a folder")
    if tool in (None, *FOLDERS):
        inside = {"": path} if _ours(path) else {role: path / role for role in ROLES if _ours(path / role)}
        if inside:
            opened = {role: directory.open_directory(at, allow_pickle=allow_pickle) for role, at in inside.items()}
            kind = "deltaw" if all((at / directory.OURS).is_file() for at in inside.values()) else "peft"
            return Source(kind, folders=opened)
    found = [path / name for name in NAMED if (path / name).is_file()] or sorted(path.glob("*.safetensors"))
    found = found or sorted(file for end in ("pt", "bin", "ckpt") for file in path.glob(f"*.{end}"))
    if len(found) == 1 or (found and found[0].name in NAMED):
        return _foreign(found[0], tool, allow_pickle)
    listed = ", ".join(file.name for file in found) or "no .safetensors, .bin or .pt"
    raise FileError(f"{path} holds {listed}: give the adapter's file itself")


def _ours(folder: Path) -> bool:
    """Is it a folder that PEFT or we wrote? mlx-lm's has an adapter_config.json too, and other tensors."""
    return (folder / directory.CONFIG).is_file() and any((folder / name).is_file() for name in (WEIGHTS, PICKLED))


def _foreign(file: Path, tool: str | None, allow_pickle: bool) -> Source:
    tensors, header = read_file(file, allow_pickle)
    odd = [f"{key} is in {t.dtype}" for key, t in tensors.items() if not t.is_floating_point() and t.numel() > 1]
    if odd:
        raise faults(FileError, f"{file}: weights of adapters are floating-point numbers", odd)
    kind = tool or detect(tensors)
    if kind in FOLDERS:
        raise UseError(f"{file} holds an adapter of PEFT without its adapter_config.json: give the folder of both")
    config = file.parent / directory.CONFIG
    beside = read_json(config, "fetch the folder again") if kind in ("mlx", "torchtune") and config.is_file() else {}
    return Source(kind, tensors=tensors, header=header, config=beside)


def read(
    found: Source, base: Outline | None, alpha: float | None, enable_lora: Sequence[bool] | None
) -> tuple[States, list[str]]:
    """The states by part, and what a user should know."""
    if alpha is not None and found.tool not in ("loralib", "mlx", "torchtune"):
        raise UseError(f"--alpha is for files that hold none (loralib, mlx, torchtune); {found.tool}'s say it")
    if enable_lora is not None and found.tool != "loralib":
        raise UseError(f"--enable-lora is for loralib's MergedLinear; {found.tool}'s files have no such thing")
    if found.folders:
        notes = [note for stored in found.folders.values() for note in stored.notes]
        return placed({role: stored.state for role, stored in found.folders.items()}, base), notes
    assert base is not None and found.tool in GRAMMARS
    if found.tool == "kohya":
        return from_kohya(found.tensors, base.parts)
    if found.tool == "diffusers":
        return from_diffusers(found.tensors, base.parts, found.header)
    if len(base.parts) > 1:
        raise UseError(
            f"{found.tool}'s files are of one model, and {base.name!r} is a pipeline: give the folder of its part"
        )
    if found.tool == "loralib":
        return from_loralib(found.tensors, base.parts, alpha=alpha, enable_lora=enable_lora)
    if found.tool == "mlx":
        return from_mlx(found.tensors, base.parts, found.config, alpha=alpha)
    return from_torchtune(found.tensors, base.parts, base.config, found.config, alpha=alpha)


def placed(given: Mapping[str, AdapterState], base: Outline | None) -> States:
    """States by role ("" where none is said), each on the part of the base that has all its modules. FileError."""
    states, found = States(), list[str]()
    for role, state in given.items():
        if base is None:
            states[role or "model"] = state
            continue
        paths = {site.path for site in state.methods}
        fit = [r for r, layout in base.parts.items() if role in ("", r) and paths <= set(layout.entries)]
        if len(fit) != 1:
            near = next(iter(sorted(paths - {p for layout in base.parts.values() for p in layout.entries})), None)
            why = f"has no module {near!r}" if near else f"has them in {' and in '.join(fit) or 'no single part'}"
            raise FileError(f"the adapter does not fit the base {base.name!r}: it {why}")
        layout, shapes = base.parts[fit[0]], Shapes()
        specs = {site: layout.specs[site] for site in state.methods if site in layout.specs}
        for site, spec in specs.items():
            reason = misfit(state.methods[site], state.tensors[site], spec, shapes)
            found += [f"{site}: {reason}"] if reason else []
        states[fit[0]] = dataclasses.replace(state, specs={**state.specs, **specs})
    if found:
        raise faults(FileError, "the adapter does not fit the base", found)
    return states
