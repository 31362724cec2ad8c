"""Stages: runs after each other, each of which goes on from the adapter of the one before.

    stages: [{name: align, parts: {projector: full}, train: {learning_rate: 1e-3}},
             {name: instruct, data: {train: chats.json}, parts: {projector: full, language: lora}}]

A stage says what is other than in the sections above it. Its run is output/<number>-<name>; output/adapter is the last one's.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

SHARED = ("targets", "exclude", "layers", "parts", "modules", "from")
"""Keys of an adapter section that are not its method's."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    name: str
    """Part of the name of its folder: letters, digits, dots and dashes."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `data` that are other in this stage."""
    adapter: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `adapter` that are other in this stage; another method starts afresh."""
    parts: Mapping[str, Any] = field(default_factory=dict)
    """`adapter.parts` of this stage, whole: a part that is not named is frozen."""
    train: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `train` that are other in this stage."""

    def to_dict(self) -> dict[str, Any]:
        said = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {key: value for key, value in said.items() if value}


def folder(output: str, number: int, name: str) -> str:
    """The run directory of stage `number`, from 1."""
    return f"{output}/{number}-{name}"


def records(whole: Mapping[str, Any], given: Sequence[Stage]) -> list[dict[str, Any]]:
    """The configuration of every stage as plain data. whole: the configuration above them, plain data with all its sections."""
    found, before = [], None
    for number, stage in enumerate(given, 1):
        output = folder(whole["output"], number, stage.name)
        data = {**whole["data"], **stage.data}
        if before is not None and "tokens" not in stage.data:
            data.pop("tokens", None)  # the adapter brings them
        sections = {"data": data, "train": {**whole["train"], **stage.train}, "output": output}
        kept = {key: value for key, value in whole.items() if key not in (*sections, "adapter", "stages")}
        found.append({**kept, **sections, "adapter": _adapter(whole["adapter"], stage, before)})
        before = f"{output}/adapter"
    return found


def _adapter(above: Mapping[str, Any], stage: Stage, before: str | None) -> dict[str, Any]:
    own = {**stage.adapter, **({"parts": stage.parts} if stage.parts else {})}
    afresh = own.get("method", above.get("method")) != above.get("method")
    base = {key: value for key, value in above.items() if not afresh or key in SHARED}
    if before is None:
        return {**_only(base, own), **own}
    if "parts" not in own and "parts" not in above:  # it brings its own method and targets
        return {"from": before, **own}
    return {**{key: value for key, value in _only(base, own).items() if key != "from"}, **own, "from": before}


def _only(base: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Parts have their own targets: where a stage has parts, those of the section above, which has none, are not meant."""
    apart = ("targets", "exclude", "layers") if "parts" in own else ()
    return {key: value for key, value in base.items() if key not in apart}
