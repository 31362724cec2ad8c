"""deltaw export: an adapter folder → a folder in the form of a profile, read back and held against the adapter.

    portable   plain LoRA of one rank and scale 1, complete layers (`deltaw.ship.portable`): for serving engines
    peft       PEFT's own format with all it can say (patterns, DoRA, …); what PEFT has no format for becomes plain LoRA
    kohya, diffusers   one file under the names of those tools (`deltaw.ship.convert`): for image models

    source → to_lora where the profile needs it → written → `deltaw.ship.readback`

The folder appears only when what was read back is the adapter, to rounding and to the error of a cut that was asked for.
lora_manifest.json beside it says where it came from; engines ignore it.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from deltaw import __version__
from deltaw.analysis.norms import norm
from deltaw.core.errors import BaseMismatchError, ConfigError, UseError, did_you_mean, faults
from deltaw.core.files import must_be_free, whole_folder, write_text
from deltaw.core.host import ParameterHost, WeightHost
from deltaw.core.state import AdapterState
from deltaw.data.kept import read_kept
from deltaw.formats import directory
from deltaw.formats.layout import Layout
from deltaw.formats.manifest import digest
from deltaw.formats.peft import to_peft
from deltaw.formats.weights import read_file
from deltaw.mixing.convert import to_lora
from deltaw.mixing.through import Conversion, Converted
from deltaw.models.adapters import layout
from deltaw.models.base import named_base
from deltaw.models.foreign import placed
from deltaw.models.mapped import open_base
from deltaw.models.outlines import outlines
from deltaw.models.renamed import renamed
from deltaw.ship import portable, readback
from deltaw.ship.convert import one_file
from deltaw.ship.look import Seen, look

MANIFEST = "lora_manifest.json"


@dataclass(frozen=True)
class Options:
    """What a profile may be asked for, and where the adapter and its base are."""

    adapter: Path
    model: str | None = None
    """The base, where it is given."""
    rank: int | None = None
    """R of the file; modules of a higher rank are cut to it."""
    max_rank: int | None = None
    """No rank above this: what is larger is cut."""
    dtype: str | None = None
    fill: bool = True
    allow_base_mismatch: bool = False

    @property
    def cut(self) -> int | None:
        return self.rank if self.rank is not None else self.max_rank

    @functools.cached_property
    def seen(self) -> Seen:
        return look(self.adapter, self.model)

    @functools.cached_property
    def layout(self) -> Layout | None:
        return None if self.seen.outline is None else layout(self.seen.outline)


@dataclass(frozen=True)
class Exported:
    """What was written, and how far each module is from the adapter."""

    path: Path
    profile: str
    modules: Mapping[str, Converted]
    """Of every module of the adapter: how it was converted, its rank before padding, its relative error as read back."""
    dtype: str
    bytes: int
    """Of all tensors."""
    rank: int | None = None
    """The one rank of a portable file."""
    filled: int = 0
    """Modules that were added with zeros, and their bytes."""
    filled_bytes: int = 0
    remarks: tuple[str, ...] = ()

    @property
    def error(self) -> float:
        """The largest relative error of a module."""
        return max((one.error for one in self.modules.values()), default=0.0)


def export(
    adapter: str | Path, output: str | Path, profile: str = "portable", *, model: str | None = None, rank: int | None = None,
    max_rank: int | None = None, dtype: str | None = None, fill: bool = True, allow_base_mismatch: bool = False,
    allow_pickle: bool = False,
) -> Exported:  # fmt: skip
    """Write the adapter folder as `output` in the form of `profile`, and hold what was written against it.

    model: the base, by default the one that the adapter names where it is at hand; its config is read, its weights only
    where ΔW depends on them (DoRA). rank, max_rank: of the file, by SVD where a module has more; dtype: bf16 (default),
    fp16 or fp32, of portable. fill: add zeros for missing modules and layers (portable). UseError for what the profile
    cannot hold, MergeError where the file read back is not the adapter: nothing is left behind then.
    """
    target, options = Path(output), Options(Path(adapter), model, rank, max_rank, dtype, fill, allow_base_mismatch)
    must_be_free(target)
    _possible(profile, options)
    stored = directory.open_directory(adapter, allow_pickle=allow_pickle)
    if profile in ("portable", "peft") and options.seen.outline is not None:
        stored = renamed(options.seen.outline, stored)
    _does_something(stored.state)
    state = dataclasses.replace(stored.state, meta={**stored.state.meta, "parents": [stored.digest]})
    with whole_folder(target) as draft:
        done = PROFILES[profile](state, draft, options)
        for name, text in read_kept(options.adapter).files.items():
            write_text(draft / name, text)
        write_text(draft / MANIFEST, _manifest(done, draft, stored))
    return dataclasses.replace(done, path=target, remarks=(*stored.notes, *_trained_quantized(state), *done.remarks))


def _portable(state: AdapterState, folder: Path, options: Options) -> Exported:
    """One rank, scale 1, complete layers."""
    portable.refuse(portable.unportable(state))
    seen, linear = options.seen, None if options.seen.base is None else options.seen.base.linear
    remarks = [] if seen.remark is None else [seen.remark]
    if linear is None and options.fill:
        raise UseError(
            f"which modules and layers of its base the adapter lacks is not known: {seen.remark}; its config is enough. "
            "Or export what is there, with --no-fill"
        )
    if linear is not None:
        old, new = portable.beginning([site.path for site in state.methods], linear)
        if old != new:
            remarks.append(
                f"its paths begin with {new or 'nothing'!r} in this base and so in the file, not with {old!r}"
            )
            state = portable.at_other_paths(state, old, new, type(seen.outline).__name__)
        _same_shapes(state, linear)
    plain, converted, model = _as_lora(state, options)
    portable.refuse(portable.unportable(plain))
    size = portable.rank_for([one.rank for one in converted.sites.values()], options.rank, options.max_rank)
    dtype = portable.DTYPES[options.dtype or "bf16"]
    done, missing = portable.uniform(plain, size, dtype), list[str]()
    if options.fill and linear is not None:
        done, missing = portable.filled(done, size, dtype, linear)
    modules = _written(done, folder, state, converted, model, options)
    bytes_of = {site.path: sum(t.nbytes for t in group.values()) for site, group in done.tensors.items()}
    return Exported(
        folder, "portable", modules, str(dtype).removeprefix("torch."), sum(bytes_of.values()), size,
        len(missing), sum(bytes_of[path] for path in missing), tuple(remarks),
    )  # fmt: skip


def _peft(state: AdapterState, folder: Path, options: Options) -> Exported:
    """As PEFT has it, or as plain LoRA where it has no format or a rank is asked for."""
    if options.dtype is not None or not options.fill:
        raise UseError("dtype and no-fill are for the profile portable, peft keeps what the adapter has")
    finished, model = state.finished(), None
    ranks = {site: getattr(method, "rank", None) or 0 for site, method in finished.methods.items()}
    done, converted = finished, Conversion({site: Converted("kept", rank, 0.0) for site, rank in ranks.items()})
    remarks = [] if options.seen.remark is None else [options.seen.remark]
    try:
        to_peft(finished, options.layout)
        reason = None if options.cut is None else f"rank {options.cut} was asked for"
    except ConfigError as error:
        reason = str(error)
    if reason is not None:
        done, converted, model = _as_lora(state, options)
        remarks.append(f"written as plain LoRA: {reason}")
    modules = _written(done, folder, state, converted, model, options)
    tensors = [tensor for group in done.tensors.values() for tensor in group.values()]
    dtypes = "+".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}))
    return Exported(folder, "peft", modules, dtypes, sum(t.nbytes for t in tensors), remarks=tuple(remarks))


def _of_a_tool(to: str, state: AdapterState, folder: Path, options: Options) -> Exported:
    """One file of kohya's or diffusers', whose names are looked up in the base."""
    if options.cut is not None or options.dtype is not None or not options.fill:
        raise UseError(
            f"rank, max-rank, dtype and no-fill are not for the profile {to}, which keeps what the adapter has"
        )
    name = options.model or named_base(options.adapter)
    if name is None:
        raise UseError(f"the names in {to}'s files are looked up in the base: say which, --model folder-or-hub-id")
    base = outlines(name)
    states = placed({"": state.finished()}, base)
    error, notes = one_file(states, folder, options.adapter.absolute().name, base, to, dict(state.meta))
    (done,) = states.values()
    ranks = {str(site): getattr(method, "rank", None) or 0 for site, method in done.methods.items()}
    tensors = [tensor for group in done.tensors.values() for tensor in group.values()]
    dtypes = "+".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}))
    modules = {site: Converted("exact", rank, error) for site, rank in ranks.items()}
    return Exported(folder, to, modules, dtypes, sum(t.nbytes for t in tensors), remarks=tuple(notes))


PROFILES: Mapping[str, Callable[[AdapterState, Path, Options], Exported]] = {
    "portable": _portable,
    "peft": _peft,
    "kohya": functools.partial(_of_a_tool, "kohya"),
    "diffusers": functools.partial(_of_a_tool, "diffusers"),
}
"""Name → what writes a state into an empty folder and holds it against the state."""


def _written(
    done: AdapterState,
    folder: Path,
    source: AdapterState,
    converted: Conversion,
    model: nn.Module | None,
    options: Options,
) -> dict[str, Converted]:
    """Write `done` as PEFT's directory and read it back: what became of every module of the source."""
    to_peft(done, options.layout)  # else our own layout would be written, which only we read
    directory.write(done, folder, layout=options.layout)
    found = readback.errors(source, readback.read_back(folder, source), converted, model)
    return {str(site): dataclasses.replace(converted.sites[site], error=error) for site, error in found.items()}


def _as_lora(state: AdapterState, options: Options) -> tuple[AdapterState, Conversion, nn.Module | None]:
    """Plain LoRA; where the change depends on the base's weights, these are read."""
    movable = [site for site, m in state.methods.items() if m.host is WeightHost and not m.follows_ties]
    if options.cut is None and (full := [site for site in movable if state.factors(site) is None]):
        names = ", ".join(sorted({state.methods[site].name for site in full}))
        raise UseError(
            f"the change of {names} has no low-rank factors: give the rank to cut it at (--rank 64), the error is reported"
        )
    hopeless = any(method.host not in (WeightHost, ParameterHost) for method in state.methods.values())
    try:
        return *to_lora(state, rank=options.cut), None
    except UseError:
        if options.seen.name is None or hopeless:
            raise
    base = open_base(options.seen.name, [site.path for site in state.methods])
    apart = None if state.base is None else state.base.difference(base.identity)
    if apart and not options.allow_base_mismatch:
        raise BaseMismatchError(
            f"the adapter was trained on another base than {options.seen.name!r}: {apart}. Give the right one with --model, or "
            "pass allow_base_mismatch=True (--allow-base-mismatch) if you know better"
        )
    return *to_lora(state, base.model, options.cut), base.model


def _possible(profile: str, o: Options) -> None:
    if profile not in PROFILES:
        raise UseError(f"no profile {profile!r}{did_you_mean(profile, PROFILES)}; known are {', '.join(PROFILES)}")
    ranks = {"rank": o.rank, "max_rank": o.max_rank}
    found = [f"{name}={value!r} must be at least 1" for name, value in ranks.items() if value is not None and value < 1]
    if o.rank is not None and o.max_rank is not None and o.rank > o.max_rank:
        found.append(f"rank={o.rank} is above max_rank={o.max_rank}")
    if o.dtype is not None and o.dtype not in portable.DTYPES:
        found.append(f"dtype={o.dtype!r} is none of {', '.join(portable.DTYPES)}")
    if found:
        raise faults(UseError, "this cannot be exported", found)


def _trained_quantized(state: AdapterState) -> list[str]:
    held = None if state.base is None else state.base.quantized
    said = f"it was trained on the base in {held}: on another copy it differs by what quantising rounds off"
    return [said] if held else []


def _does_something(state: AdapterState) -> None:
    factors = [state.factors(site) for site in state.methods]
    if all(one is not None and norm(one) == 0 for one in factors):
        raise UseError("the change of this adapter is zero everywhere: exported it would do nothing; was it trained?")


def _same_shapes(state: AdapterState, linear: Mapping[str, tuple[int, ...]]) -> None:
    known = {site: spec.shape for site, spec in state.specs.items() if site in state.methods}
    found = [f"{s}: made for {shape}, here {linear[s.path]}" for s, shape in known.items() if shape != linear[s.path]]
    if found:
        raise faults(BaseMismatchError, "the adapter is not for this base: give the one that it was trained on", found)


def _manifest(done: Exported, folder: Path, stored: directory.Stored) -> str:
    """Where a folder came from, as JSON."""
    known, (file,) = stored.state.base, tuple(folder.glob("*.safetensors"))
    about = {
        "tool": f"deltaw {__version__}",
        "profile": done.profile,
        "tensors": digest(read_file(file, False)[0]),
        "file": f"sha256:{hashlib.sha256(file.read_bytes()).hexdigest()}",
        "parents": [stored.digest],
        "base": {"name": stored.base_name} if known is None else known.to_dict(),
        "rank": done.rank,
        "dtype": done.dtype,
        "largest_relative_error": done.error,
        "filled": done.filled,
    }
    return json.dumps(about, indent=1, ensure_ascii=False) + "\n"
