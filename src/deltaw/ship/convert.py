"""An adapter of one tool as an adapter of another: read → placed on the real base → written → read back and compared.

    deltaw.json | peft | kohya | diffusers | loralib | mlx | torchtune   →   states by part   →   deltaw | peft | kohya | diffusers

deltaw and peft write a folder for each part of a pipeline (`output/unet`, …), each an adapter of that part alone; kohya and
diffusers write one file for all. The output appears only when what was read back is the same change:
‖ΔW − ΔW'‖ ≤ 1e-6 · ‖ΔW‖ at every site.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from deltaw.analysis.norms import does_nothing
from deltaw.core.errors import ConfigError, FileError, MergeError, UseError, faults
from deltaw.core.files import must_be_free, read_json, whole_folder
from deltaw.data.kept import read_kept
from deltaw.formats import directory
from deltaw.formats.detect import TOOLS
from deltaw.formats.diffusers import from_diffusers, to_diffusers
from deltaw.formats.foreign import States
from deltaw.formats.kohya import from_kohya, to_kohya
from deltaw.formats.peft import from_peft
from deltaw.formats.peft_write import to_peft
from deltaw.formats.weights import WEIGHTS, read_file
from deltaw.models.foreign import DIFFUSERS, FOLDERS, open_source, read
from deltaw.models.outlines import Outline, outlines
from deltaw.ship.readback import apart

FILES: Mapping[str, Callable[..., tuple[dict[str, Tensor], dict[str, str], list[str]]]] = {
    "kohya": to_kohya,
    "diffusers": to_diffusers,
}
WRITTEN = (*FOLDERS, *FILES)
ALLOWED = 1e-6


@dataclass(frozen=True)
class Converted:
    """What was written, and how far it is from what was read."""

    path: Path
    tool: str
    to: str
    parts: Mapping[str, int]
    """Role → number of adapted layers."""
    parameters: int
    error: float
    """The largest ‖ΔW − ΔW'‖ / ‖ΔW‖ of a site, of what was read back."""
    notes: tuple[str, ...]


def convert(
    source: str | Path, output: str | Path, *, to: str = "deltaw", tool: str | None = None, model: str | None = None,
    alpha: float | None = None, enable_lora: Sequence[bool] | None = None, allow_pickle: bool = False,
) -> Converted:  # fmt: skip
    """Read an adapter of any known tool, write it as `to` (deltaw, peft, kohya, diffusers) and read it back.

    tool: whose it is, where its keys do not tell; model: its base, of which only the configuration is read; alpha,
    enable_lora: what some tools leave out of their files. UseError for what is missing, FileError for what does not fit.
    """
    target = Path(output)
    must_be_free(target)
    if to not in WRITTEN or (tool is not None and tool not in TOOLS):
        raise UseError(f"to={to!r}, from={tool!r}: written are {', '.join(WRITTEN)}; read are {', '.join(TOOLS)}")
    found = open_source(Path(source), tool, allow_pickle)
    named = model or (found.config.get("model") if found.tool == "mlx" else None)
    if named is None and (found.tool not in FOLDERS or to in FILES):
        tools = found.tool if found.tool not in FOLDERS else to
        raise UseError(
            f"the names in {tools}'s files are looked up in the base: say which, --model folder-or-hub-id (only its "
            "configuration is read)"
        )
    base = None if named is None else outlines(str(named))
    states, notes = read(found, base, alpha, enable_lora)
    if all(map(does_nothing, states.values())):
        notes = [*notes, "its change is zero everywhere, and so is what was written: was it trained?"]
    origin = {"parents": found.digests, "converted": {"from": found.tool, "file": Path(source).name}}
    states = {role: dataclasses.replace(s, meta={**s.meta, **origin}).finished() for role, s in states.items()}
    with whole_folder(target) as draft:
        if to in FOLDERS:
            beside = read_kept(Path(source)).files if "" in found.folders else {}
            error = compared(states, _folders(states, draft, base, to, beside))
        else:
            assert base is not None
            error, more = one_file(states, draft, target.name, base, to, origin)
            notes += more
    sizes = {role: len(state.methods) for role, state in states.items()}
    return Converted(target, found.tool, to, sizes, sum(s.parameters for s in states.values()), error, tuple(notes))


def _folders(states: States, draft: Path, base: Outline | None, to: str, beside: Mapping[str, str]) -> States:
    """Write a folder for each part, or one; what they hold when they are read again."""
    several = (base is not None and base.pipeline) or len(states) > 1
    again = States()
    for role, state in states.items():
        layout = base.parts.get(role) if base is not None else None
        folder = draft / role if several else draft
        if to == "peft":
            try:
                to_peft(state, layout)
            except ConfigError as error:
                raise UseError(f"{error}; --to deltaw holds every adapter") from None
        directory.write(state, folder, layout=layout, beside=beside)
        if to == "peft":  # as PEFT reads it, without what deltaw.json knows
            config = read_json(folder / directory.CONFIG, "convert again")
            again[role] = from_peft(config, read_file(folder / WEIGHTS, False)[0])[0]
        else:
            again[role] = directory.read(folder)[0]
    return again


def one_file(
    states: States, folder: Path, name: str, base: Outline, to: str, origin: Mapping[str, Any]
) -> tuple[float, list[str]]:
    """Write one file for all parts, named so where the tool leaves that open; the largest difference read back, and notes."""
    file = folder / (DIFFUSERS if to == "diffusers" else f"{name}.safetensors")
    tensors, header, notes = FILES[to](states, base.parts)
    tensors = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
    try:
        save_file(tensors, file, metadata={**header, "deltaw": json.dumps(origin)})
        file.chmod(0o644)
    except (OSError, SafetensorError) as error:
        raise FileError(f"{file.parent.parent / file.name} cannot be written: {error}; give another folder") from None
    written, head = read_file(file, False)
    again = from_kohya(written, base.parts) if to == "kohya" else from_diffusers(written, base.parts, head)
    return compared(states, again[0]), notes


def compared(states: States, again: States) -> float:
    """The largest relative difference of a site. MergeError where something was lost or is another change."""
    found, largest = [], 0.0
    if states.keys() != again.keys():
        found.append(f"parts {', '.join(states)} were read and {', '.join(again)} written")
    for role in states.keys() & again.keys():
        mine, theirs = states[role], again[role]
        lost = mine.methods.keys() ^ theirs.methods.keys()
        found += [f"{role} {site}: in one of the two only" for site in sorted(map(str, lost))]
        for site in mine.methods.keys() & theirs.methods.keys():
            error = apart(mine, theirs, site)
            largest = max(largest, error)
            found += [f"{role} {site}: the change read back differs by {error:.2g}"] if not error <= ALLOWED else []
    if found:
        raise faults(MergeError, "what was written is not what was read, nothing was kept", found)
    return largest
