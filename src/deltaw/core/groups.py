"""Targets by part of the model: for each part its patterns, and the modules that they choose among.

Without parts there is one group, of the whole model. In a model that has parts a pattern must then hit one of them only:
names repeat from part to part (`q_proj`, `fc1`, `linear_1`), and no name is safe.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from deltaw.core.errors import did_you_mean
from deltaw.core.facts import ModuleFact
from deltaw.core.host import ParameterHost
from deltaw.core.matching import ALL, Targets, nothing, patterns
from deltaw.core.method import Method
from deltaw.core.parts import Parts

ByPart = Mapping[str, Targets]
"""Part → the targets in it."""
Which = Callable[[str, str], str]
"""(part, pattern) → how the caller is told to say that the pattern is meant in that part."""


def in_python(part: str, pattern: str) -> str:
    return f"say which, for example {{{part!r}: {pattern!r}}}"


@dataclasses.dataclass(frozen=True)
class Group:
    part: str | None
    """None: the whole model."""
    patterns: Sequence[str]
    known: Sequence[ModuleFact]
    """What the patterns choose among, each module with the slots that the part owns."""
    parts: Parts | None
    which: Which = in_python

    def fault(
        self, pattern: str, hits: Sequence[ModuleFact], meant: Sequence[ModuleFact], method: Method
    ) -> str | None:
        """Why a pattern that hits these, and of them means those, cannot be carried out; None where it can."""
        if pattern == ALL and not issubclass(method.host, ParameterHost):
            why = f"'all' is every parameter, which a method on parameters (full) can train: for {method.name} say 'all-linear'"
        elif not meant:
            why = nothing(pattern, hits, self.known, method, "of this model" if self.part is None else "of this part")
            bare = self.part is not None and not any(fact.slots for fact in self.known)
            why += ", its parameters can be trained in full (full, with 'all')" if bare else ""
        else:
            return self._crossing(pattern, meant)
        return why if self.part is None else f"part {self.part!r}: {why}"

    def _crossing(self, pattern: str, meant: Sequence[ModuleFact]) -> str | None:
        if self.parts is None or self.part is not None or pattern in (ALL, *(fact.path for fact in self.known)):
            return None
        owners = Counter(owner for fact in meant for owner in {self.parts.of(name) for name in _names(fact)})
        if len(owners) < 2:
            return None
        counts = ", ".join(f"{owner or 'none of them'} ({count})" for owner, count in owners.items())
        fix = "language" if "language" in owners else next(owner for owner in owners if owner is not None)
        return f"{pattern!r} hits several parts of the model, {counts}: {self.which(fix, pattern)}"


def grouped(
    targets: Targets | ByPart,
    parts: Parts | None,
    known: Sequence[ModuleFact],
    found: list[str],
    which: Which = in_python,
) -> list[Group]:
    """The groups of `targets`; faults are added to `found`."""
    if not isinstance(targets, Mapping):
        return [Group(None, patterns(targets, found), _heads(known, parts), parts, which)]
    if parts is None:
        found.append(
            f"{targets!r} names parts, and this model has none (no encoder beside a language model): leave them out"
        )
        return []
    groups = []
    for part, wanted in targets.items():
        if part not in parts.roots:
            there = ", ".join(parts.roots)
            found.append(f"no part {part!r}{did_you_mean(str(part), parts.roots)} (this model has {there})")
            continue
        mine = [owned for fact in known if (owned := _of(part, parts, fact)) is not None]
        listed = patterns(wanted, faults := [])
        if not any(fact.parameters for fact in mine):
            faults = ["it owns no parameter"]
        elif not listed and not faults:
            faults = [f"{wanted!r} is no target"]
        found += [f"part {part!r}: {fault}" for fault in faults]
        groups += [] if faults else [Group(part, listed, mine, parts)]
    return groups


def _of(part: str, parts: Parts, fact: ModuleFact) -> ModuleFact | None:
    """What of a module a part owns, or None; inside a part nothing is set apart as a head."""
    mine = {name for name in {*fact.slots, *fact.parameters} if parts.of(_name(fact, name)) == part}
    if not mine and parts.of(fact.path) != part:
        return None
    slots = {slot: spec for slot, spec in fact.slots.items() if slot in mine}
    own = {name: shape for name, shape in fact.parameters.items() if name in mine}
    return dataclasses.replace(fact, slots=slots, parameters=own, head=False)


def _heads(known: Sequence[ModuleFact], parts: Parts | None) -> Sequence[ModuleFact]:
    """In a model with parts its head is the part; other modules beside the body are parts of their own."""
    if parts is None or "language" not in parts.roots:
        return known
    return [dataclasses.replace(fact, head=parts.of(fact.path) == "head") for fact in known]


def _names(fact: ModuleFact) -> list[str]:
    """Full names of what an adapter on it would change."""
    return [_name(fact, slot) for slot in fact.slots]


def _name(fact: ModuleFact, slot: str) -> str:
    return f"{fact.path}.{slot}" if fact.path else slot
