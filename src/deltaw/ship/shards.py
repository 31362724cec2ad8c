"""Which tensors on disk a merge changes, and how: planned on the mapped base, before anything is written.

    adapters on the mapped base → {parameter: changes} → {name on disk: what makes its new values}

A plan has one of three ends: the way to write every shard; a reason why this merge needs the whole base in memory; or
MergeError, for what no way can merge.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from deltaw.analysis.norms import norm
from deltaw.core.adapter import Factors, WeightAdapter
from deltaw.core.errors import MergeError, faults
from deltaw.core.merge import changes, obstacles
from deltaw.models.adapters import LoadReport
from deltaw.models.checkpoint import Checkpoint
from deltaw.models.mapped import Mapped, mapped
from deltaw.ship.fold import Tally, Term, blocks, low_rank
from deltaw.ship.live import Job, grows, load_all

NOTHING = (
    "merging {} would change no weight at all: its ΔW is zero, or too small for the weights' dtype. "
    "Was it trained, and did its file load?"
)


@dataclass(frozen=True)
class Plan:
    checkpoint: Checkpoint
    base: Mapped
    reports: Sequence[LoadReport]
    targets: Mapping[str, Sequence[str]]
    """Parameter → the tensors on disk that hold it."""
    changed: Mapping[str, Any]
    """Name on disk → what `disk.write` asks for its new values."""
    tally: Tally = field(default_factory=Tally)

    def dtype(self, asked: torch.dtype | None) -> torch.dtype:
        """The coarsest dtype that changed weights are written in."""
        kinds = {asked or self.checkpoint.entries[key].dtype for key in self.changed}
        return max((kind for kind in kinds if kind is not None), key=lambda kind: torch.finfo(kind).eps)

    def vanished(self, subject: str, infinite: Collection[str] = ()) -> list[str]:
        """After writing: parameters that were to change and did not. MergeError where none did, or one overflowed.

        infinite: tensors beside them that the dtype cannot hold.
        """
        infinite = [name for name, keys in self.targets.items() if self.tally.infinite & set(keys)] + sorted(infinite)
        if infinite:
            head = f"{subject} cannot be merged"
            raise faults(
                MergeError, head, [f"{name}: the weight is not finite in the dtype to write" for name in infinite]
            )
        if not self.tally.changed:
            raise MergeError(NOTHING.format(subject))
        return [name for name, keys in self.targets.items() if not self.tally.changed & set(keys)]


def plan(job: Job, checkpoint: Checkpoint) -> Plan | str:
    """How to write the merge file by file, or why that cannot be. Raises what `load` raises, and MergeError."""
    base = mapped(job.model, checkpoint, job.layer)
    reports = load_all(base.model, job, {**job.allowed, "here": base.identity})
    if grows(base.model, list(job.route)):
        return "the adapter brings rows that the base's tables have no place for"
    terms = {base.one[stored]: own for stored, own in changing(base.model, job).items()}
    targets = {parameter: base.names.keys(parameter) for parameter in terms}
    for parameter, keys in targets.items():
        reason = base.names.lost.get(parameter) if not keys else None
        if any(checkpoint.entries[key].dtype is None for key in keys):
            reason = f"it is stored as {checkpoint.entries[keys[0]].kind}"
        elif keys and base.names.pieces[keys[0]].weight is not None and not low_rank(terms[parameter]):
            reason = "its change is not of low rank, and it lies on disk in pieces"
        if reason:
            return f"{parameter}: {reason}"
    tally = Tally()
    changed = {
        key: blocks(key, base.names.pieces[key], _reader(checkpoint, key), terms[parameter], tally)
        for parameter, keys in targets.items()
        for key in keys
    }
    return Plan(checkpoint, base, reports, targets, changed, tally)


def changing(model: nn.Module, job: Job) -> dict[int, list[Term]]:
    """What the adapters of a job, on `model`, do to each parameter, by its id. MergeError where nothing can be merged, or
    where the changes are zero together."""
    terms = dict[int, list[Term]]()
    for name, strength in job.route.items():
        work = changes(model, name)
        hopeless = obstacles(model, work)
        if hopeless:
            raise faults(MergeError, f"{subject(job)} cannot be merged", list(hopeless.values()))
        for adapter, host in work:
            assert isinstance(adapter, WeightAdapter), "those without a ΔW are obstacles"
            if strength:
                terms.setdefault(id(host.stored), []).append(Term(adapter, host, strength))
    if not any(map(_act, terms.values())):
        raise MergeError(NOTHING.format(subject(job)))
    return terms


def subject(job: Job) -> str:
    """The adapters of a job, for messages."""
    return " + ".join(str(folder) if strength == 1 else f"{strength:g} × {folder}" for folder, strength in job.parts)


def _act(terms: Sequence[Term]) -> bool:
    """Do these change their parameter? Not where they cancel to what rounding leaves of them."""
    known = [(factors, term.strength) for term in terms if (factors := term.adapter.factors()) is not None]
    if len(known) < len(terms):
        return True
    a = torch.cat([one.a.double() for one, _ in known], dim=-2)
    b = torch.cat([weight * one.scale * one.b.double() for one, weight in known], dim=-1)
    return norm(Factors(a, b, 1.0)) > 1e-6 * sum(abs(weight) * norm(one) for one, weight in known)


def _reader(checkpoint: Checkpoint, key: str) -> Any:
    return lambda: checkpoint.tensor(key)
