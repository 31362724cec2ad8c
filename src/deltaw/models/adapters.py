"""save and load: a live model ↔ an adapter directory. Loading is strict and asks whether the base is the right one.

match      the identity in deltaw.json agrees with the model
mismatch   it does not, or PEFT's copy of the embedding is another one: BaseMismatchError, unless allow_base_mismatch
unknown    a stranger's file that does not say: loads, and the report says so
"""

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from deltaw.analysis.norms import norms
from deltaw.core.attach import extract, fit, insert
from deltaw.core.base import BaseIdentity, base_modules, base_parameters, identify, quantization, unwrapped
from deltaw.core.errors import BaseMismatchError, FileError, faults
from deltaw.core.host import HostSpec, host_of
from deltaw.core.method import Site
from deltaw.core.state import AdapterState
from deltaw.formats import directory
from deltaw.formats.layout import Layout
from deltaw.hosts.linear import TransposedLinearHost
from deltaw.models.renamed import renamed

log = logging.getLogger("deltaw")
Answer = Literal["match", "mismatch", "unknown"]


@dataclass(frozen=True)
class LoadReport:
    """What landed. `print(report)` reads as a few lines."""

    name: str
    sites: int
    parameters: int
    base: Answer
    notes: tuple[str, ...] = ()
    base_name: str | None = None
    """What the files call the base."""
    change: float = 0.0
    """‖ΔW‖ over all low-rank sites; 0 where there are none."""
    digest: str = ""
    """Of the tensors in the folder."""
    left_out: tuple[str, ...] = ()
    """With strict=False: what did not fit, and why."""
    keeps: str | None = None
    """Where the folder keeps a template or tokens: how a tokenizer gets them."""

    @property
    def said(self) -> str:
        """Which base it was trained on."""
        named = f" ({self.base_name})" if self.base_name else ""
        unknown = "the file does not say which base it was trained on"
        return {
            "match": f"trained on this base{named}",
            "mismatch": f"trained on another base{named}, allowed",
            "unknown": f"{unknown}, beyond a name{named}" if named else unknown,
        }[self.base]

    @property
    def remarks(self) -> list[str]:
        """What someone must hear who asked for nothing: a base that is not known to be the right one, and the notes."""
        return [*([] if self.base == "match" else [self.said]), *self.notes]

    def __str__(self) -> str:
        size = f", ‖ΔW‖ {self.change:.3g}" if self.change else ""
        head = f"adapter {self.name!r}: {self.sites} sites, {self.parameters:,} parameters{size}; {self.said}"
        left = [f"  left out: {fault}" for fault in self.left_out]
        notes = [*self.notes, *([self.keeps] if self.keeps else [])]
        return "\n".join([head, *left, *(f"  note: {note}" for note in notes)])


def save(
    model: nn.Module,
    path: str | Path,
    *,
    name: str = "default",
    meta: Mapping[str, Any] | None = None,
    beside: Mapping[str, str] | None = None,
) -> None:
    """Write adapter `name` as a directory: PEFT's two files where PEFT has a format for it, and deltaw.json.

    `meta`: free facts kept with it (task_type, recipe, metrics), plain JSON values; `beside`: text files to put with it,
    {name: text}, such as the template and tokens it needs (`deltaw.data.kept.read_kept(folder).files`). The model is left
    as it is.
    """
    state = dataclasses.replace(extract(model, name), meta=dict(meta or {}))
    directory.write(state, path, layout=layout(model), beside=beside)


def layout(model: nn.Module) -> Layout:
    """What files need to know of the base under `model`, which may be on the meta device; adapters are left out."""
    entries, containers, transposed, specs = {}, set(), set(), dict[Site, HostSpec]()
    lists = nn.ModuleDict | nn.ModuleList | nn.ParameterDict | nn.ParameterList
    for path, module in base_modules(model):
        saved = set(module._buffers) - module._non_persistent_buffers_set
        entries[path] = [n for n, t in (*module._parameters.items(), *module._buffers.items()) if t is not None]
        entries[path] = [n for n in entries[path] if n in module._parameters or n in saved]
        if isinstance(module, lists):
            containers.add(path)
        host = host_of(module)
        if isinstance(host, TransposedLinearHost):
            transposed.add(path)
        for slot in () if host is None else host.slots:
            if host.has(module, slot):
                specs[Site(path, slot)] = type(host)(module, slot).spec
    return Layout(entries, containers, transposed, specs)


def load(
    model: nn.Module,
    path: str | Path,
    *,
    name: str = "default",
    strict: bool = True,
    allow_base_mismatch: bool = False,
    allow_pickle: bool = False,
    here: BaseIdentity | None = None,
) -> LoadReport:
    """Load an adapter directory into `model` as adapter `name`, frozen, and make it the one that is live.

    Every tensor must land. strict=False loads what fits and reports the rest loudly. Raises FileError for files that
    are missing, corrupt or do not fit, ConfigError for PEFT features that are not supported, BaseMismatchError.
    here: which base this is, where `model` does not hold all of its values (`deltaw.models.mapped`).
    """
    stored = directory.open_directory(path, allow_pickle=allow_pickle, strict=strict)
    stored = renamed(unwrapped(model), stored)
    state, notes = stored.state, list(stored.notes)
    answer, why = _base_answer(model, stored, here)
    if why and not allow_base_mismatch:
        raise BaseMismatchError(
            f"{path} was trained on {repr(stored.base_name) if stored.base_name else 'a base it does not name'}, "
            f"this model is another base: {why}. "
            "Load the right base, or pass allow_base_mismatch=True (--allow-base-mismatch) if you know better"
        )
    notes += [f"another base, allowed: {why}"] if why else []
    trained, now = stored.state.base, quantization(model)
    if trained is not None and trained.quantized != now:
        notes.append(
            f"trained on the base {_held(trained.quantized)}, this one is {_held(now)}: "
            "outputs differ by what quantising rounds off"
        )
    left: list[str] = []
    other = _otherwise(model, stored)
    if other and strict:
        raise faults(FileError, f"{path} cannot be read", [f"{site}: {why}" for site, why in other.items()])
    if not strict:
        state, left = _what_fits(model, state, other, str(path))
        for fault in left:
            log.warning("%s: left out: %s", path, fault)
    insert(model, state, name=name)
    change = sum(norm**2 for norm in norms(state).values() if norm is not None) ** 0.5
    return LoadReport(
        name,
        len(state.methods),
        state.parameters,
        answer,
        tuple(notes),
        stored.base_name,
        change,
        stored.digest,
        tuple(left),
        _keeps(Path(path)),
    )


def _keeps(folder: Path) -> str | None:
    kept = [file for file in (directory.TEMPLATE, directory.TOKENS) if (folder / file).is_file()]
    if not kept:
        return None
    return f"it was trained with {' and '.join(kept)}: deltaw.data.kept.use_kept(tokenizer, {str(folder)!r}) sets them"


def _base_answer(model: nn.Module, stored: directory.Stored, here: BaseIdentity | None) -> tuple[Answer, str | None]:
    """The answer, and for a mismatch what tells the bases apart."""
    there = dict(base_parameters(model))
    for name, copy in stored.copies.items():
        mine = there.get(name)
        if mine is not None and not _equal(mine.detach().cpu(), copy):
            apart = "its values" if mine.shape == copy.shape else f"shape, {_size(copy)} and {_size(mine)} here"
            return "mismatch", f"the file carries a copy of the base's {name}, which differs in {apart}"
    trained, now = stored.state.base, quantization(model)
    if trained is None:
        return "unknown", None
    if trained.quantized != now and any(method.corrects for method in stored.state.methods.values()):
        return (
            "mismatch",
            f"it makes up for what quantising rounds off (init: loftq): its base is {_held(trained.quantized)}, this one is {_held(now)}",
        )
    here = here or identify(model)
    difference = trained.difference(here)
    if difference:
        return "mismatch", difference
    return ("match" if trained.comparable(here) else "unknown"), None


def _held(quantized: str | None) -> str:
    return f"in {quantized}" if quantized else "unquantised"


def _equal(mine: Tensor, theirs: Tensor) -> bool:
    """Equal after rounding both to the coarser dtype."""
    if mine.shape != theirs.shape:
        return False
    if not (mine.is_floating_point() and theirs.is_floating_point()):
        return torch.equal(mine, theirs.to(mine.dtype))
    coarse = max(mine.dtype, theirs.dtype, key=lambda dtype: torch.finfo(dtype).eps)
    return torch.equal(mine.to(coarse), theirs.to(coarse))


def _size(tensor: Tensor) -> str:
    return "×".join(map(str, tensor.shape))


def _otherwise(model: nn.Module, stored: directory.Stored) -> dict[Site, str]:
    """Sites of a file of PEFT's on layers for which PEFT has not the method, or computes it in another way."""
    found, modules = {}, dict(model.named_modules())
    for site, method in stored.state.methods.items() if stored.kind is not None else ():
        host = host_of(modules[site.path], site.slot, method.host) if site.path in modules else None
        if stored.kind is None or host is None or not stored.kind.holds(method) or not host.has(host.module, site.slot):
            continue
        reason = stored.kind.unheld(method, host.spec, isinstance(host, TransposedLinearHost))
        if reason:
            found[site] = reason
    return found


def _what_fits(
    model: nn.Module, state: AdapterState, other: Mapping[Site, str], path: str
) -> tuple[AdapterState, list[str]]:
    """The part of a state that fits the model, and the faults of the rest. FileError where nothing fits."""
    misfits = {**other, **fit(model, state)}
    kept = [site for site in state.methods if site not in misfits]
    left = [f"{site}: {fault}" for site, fault in misfits.items()]
    if not kept:
        raise faults(FileError, f"nothing of {path} fits this model", left)
    part = AdapterState(
        {site: state.methods[site] for site in kept}, {site: state.tensors[site] for site in kept},
        {site: state.specs[site] for site in kept if site in state.specs}, state.base, state.meta,
    )  # fmt: skip
    return part, left
