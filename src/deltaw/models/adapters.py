"""save and load: a live model ↔ an adapter directory. Loading is strict and asks whether the base is the right one.

match      the identity in deltaw.json agrees with the model
mismatch   it does not: BaseMismatchError, unless allow_base_mismatch
unknown    a stranger's file that does not say: loads, and the report says so
"""

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from deltaw.core.attach import extract, fit, insert
from deltaw.core.base import identify
from deltaw.core.errors import BaseMismatchError
from deltaw.core.state import AdapterState
from deltaw.formats import directory

log = logging.getLogger("deltaw")


@dataclass(frozen=True)
class LoadReport:
    """What landed. `print(report)` reads as a few lines."""

    name: str
    sites: int
    parameters: int
    base: Literal["match", "mismatch", "unknown"]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        said = {
            "match": "trained on this base",
            "mismatch": "trained on another base, allowed",
            "unknown": "the file does not say which base it was trained on",
        }[self.base]
        head = f"adapter {self.name!r}: {self.sites} sites, {self.parameters:,} parameters; {said}"
        return "\n".join([head, *(f"  note: {note}" for note in self.notes)])


def save(model: nn.Module, path: str | Path, *, name: str = "default", meta: Mapping[str, Any] | None = None) -> None:
    """Write adapter `name` as a directory: PEFT's two files where PEFT has a format for it, and deltaw.json.

    `meta`: free facts kept with it (task_type, recipe, metrics). The model is left as it is.
    """
    state = dataclasses.replace(extract(model, name), meta=dict(meta or {}))
    directory.write(state, path, paths=base_paths(model))


def base_paths(model: nn.Module) -> list[str]:
    """Module paths of the base, those of attached adapters left out."""
    inside = [f"{path}.adapters".lstrip(".") for path, module in model.named_modules() if "entries" in module.__dict__]
    return [p for p, _ in model.named_modules() if p and not any(p == i or p.startswith(f"{i}.") for i in inside)]


def load(
    model: nn.Module,
    path: str | Path,
    *,
    name: str = "default",
    strict: bool = True,
    allow_base_mismatch: bool = False,
    allow_pickle: bool = False,
) -> LoadReport:
    """Load an adapter directory into `model` as adapter `name`, frozen, and make it the one that is live.

    Every tensor must land. strict=False loads what fits and reports the rest loudly. Raises FileError for files that
    are missing, corrupt or do not fit, ConfigError for PEFT features that are not supported, BaseMismatchError.
    """
    state, notes = directory.read(path, allow_pickle=allow_pickle)
    base: Literal["match", "mismatch", "unknown"] = "unknown"
    if state.base is not None:
        here = identify(model)
        difference = state.base.difference(here)
        if difference and not allow_base_mismatch:
            raise BaseMismatchError(
                f"{path} was trained on {state.base.name!r} ({state.base.layer}), this model is another base: {difference}. "
                "Load the right base, or pass allow_base_mismatch=True (--allow-base-mismatch) if you know better"
            )
        base = "mismatch" if difference else "match" if state.base.comparable(here) else "unknown"
    if not strict:
        state, left = _what_fits(model, state)
        notes = [*notes, *left]
        for fault in left:
            log.warning("%s: left out: %s", path, fault)
    insert(model, state, name=name)
    return LoadReport(name, len(state.methods), state.parameters, base, tuple(notes))


def _what_fits(model: nn.Module, state: AdapterState) -> tuple[AdapterState, list[str]]:
    """The part of a state that fits the model, and the faults of the rest."""
    faults = fit(model, state)
    kept = [site for site in state.methods if site not in faults]
    part = AdapterState(
        {site: state.methods[site] for site in kept}, {site: state.tensors[site] for site in kept},
        {site: state.specs[site] for site in kept}, state.base, state.meta,
    )  # fmt: skip
    return part, [f"{site}: {fault}" for site, fault in faults.items()]
