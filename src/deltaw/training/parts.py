"""Part by part: which adapters a run attaches, which it goes on with, and which stay as they are, by `adapter.parts`.

    part        carried by the adapter it goes on from      then
    frozen      anything                                    stays attached and in the file, and is not trained
    a method    nothing                                     fresh adapters
    a method    that method                                 is trained further, as it is
    a method    another method                              an error

Pure: it reads the model's modules and what they carry, and touches nothing; `training.attaching` carries it out.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from deltaw.config.parts import FROZEN, PartConfig, everything
from deltaw.config.schema import AdapterConfig
from deltaw.core import targets as planning
from deltaw.core.attach import adapters
from deltaw.core.base import base_parameters, parameters
from deltaw.core.errors import TargetError, TrainError, faults
from deltaw.core.method import Site
from deltaw.core.parts import Parts, find
from deltaw.core.plan import Target, TargetPlan
from deltaw.core.text import columns
from deltaw.methods.full import Full
from deltaw.methods.token_rows import TokenRows


@dataclass(frozen=True)
class ByPart:
    """What becomes of every part of a model."""

    parts: Parts
    fresh: Mapping[str, TargetPlan]
    """Parts that get new adapters, and which."""
    further: tuple[Target, ...]
    """Adapters that are there and are trained on."""
    kept: tuple[Target, ...]
    """Adapters that are there and stay as they are."""
    remarks: tuple[str, ...] = ()

    def plan(self, model: nn.Module) -> TargetPlan:
        """All that is trained."""
        new = [target for plan in self.fresh.values() for target in plan.targets]
        notes = tuple(f"{part}: {note}" for part, plan in self.fresh.items() for note in plan.notes)
        return TargetPlan((*self.further, *new), parameters(model), notes)


def by_part(model: nn.Module, chosen: AdapterConfig, carried: Sequence[Target] = (), rows: bool = False) -> ByPart:
    """What `chosen.parts` asks of `model`, whose adapter has `carried` already. TargetError with all that cannot be.

    rows: are the token rows among `carried` trained, whatever part they are in?
    """
    assert chosen.parts is not None
    parts = find(model, chosen.modules)
    if parts is None:
        raise TargetError(
            "adapter.parts: the model has no parts, it is a text model: leave parts out, and give adapter.targets"
        )
    there: dict[str | None, list[Target]] = {}
    for target in carried:
        there.setdefault(parts.of(target.site.path), []).append(target)
    found: list[str] = []
    fresh: dict[str, TargetPlan] = {}
    remarks: list[str] = []
    for part, wanted in chosen.parts.items():
        if wanted is None and part in parts.roots:
            continue
        plan, wrong = _planned(model, chosen, part, wanted or PartConfig(method=Full(), targets="all"))
        if wanted is None:  # frozen, and not there
            found += wrong
            continue
        fault = _other_method(part, wanted, there.get(part, []), str(chosen.start))
        if fault:
            found.append(fault)
        elif not _own(there.get(part, [])):
            found += wrong
            fresh |= {} if plan is None else {part: plan}
        else:
            remarks += _unlike(part, plan, there[part])
    if found:
        raise faults(TargetError, "adapter.parts", found)
    trained = {part for part, wanted in chosen.parts.items() if wanted is not None}
    further = [t for t in carried if parts.of(t.site.path) in trained or (rows and isinstance(t.method, TokenRows))]
    kept = [target for target in carried if target not in further]
    return ByPart(parts, fresh, tuple(further), tuple(kept), tuple(remarks))


def _planned(
    model: nn.Module, chosen: AdapterConfig, part: str, wanted: PartConfig
) -> tuple[TargetPlan | None, list[str]]:
    """The plan of fresh adapters, or the sentences why there is none."""
    where: dict[str, Any] = {"exclude": wanted.exclude, "layers": wanted.layers, "given": chosen.modules}
    try:
        return planning.plan(model, wanted.method, {part: wanted.targets}, **where), []
    except TargetError as error:
        return None, [f"{part}: {fault}" for fault in error.faults or (str(error),)]


def whole(model: nn.Module, chosen: AdapterConfig) -> TargetPlan:
    """The plan of an adapter section without parts. TargetError, in a configuration's words where parts are needed."""

    def which(part: str, pattern: str) -> str:
        method = chosen.method
        one = method.name if pattern == everything(type(method)) else f"{{targets: {pattern!r}}}"
        return f"name it in adapter.parts, not in adapter.targets: for example adapter.parts={{{part}: {one}}}"

    return planning.plan(
        model, chosen.method, chosen.targets, exclude=chosen.exclude, layers=chosen.layers, which=which
    )


def _own(there: Sequence[Target]) -> set[type]:
    """The methods that a part carries; copies beside another method are that one's own (biases, modules_to_save)."""
    kinds = {type(target.method) for target in there} - {TokenRows}
    return kinds - {Full} or kinds


def _other_method(part: str, wanted: PartConfig, there: Sequence[Target], start: str) -> str | None:
    kinds = _own(there)
    if not kinds or kinds == {type(wanted.method)}:
        return None
    names = " and ".join(sorted(kind.name for kind in kinds))
    return (
        f"{part} carries {names} from {start}, and {wanted.method.name} is asked: write {part}: {names} to train it "
        f"further, {part}: {FROZEN} to keep it, or merge that adapter into the base first (deltaw merge)"
    )


def _unlike(part: str, plan: TargetPlan | None, there: Sequence[Target]) -> list[str]:
    """A remark where a part that is trained further is other than it would be made anew."""
    planned = {} if plan is None else {target.site: target.method for target in plan.targets}
    own = {target.site: target.method for target in there if not isinstance(target.method, TokenRows)}
    apart = Counter(
        f"{field.name} {getattr(has, field.name)!r}, not {getattr(planned[site], field.name)!r}"
        for site, has in own.items()
        if type(planned.get(site)) is type(has)
        for field in dataclasses.fields(has)
        if getattr(has, field.name) != getattr(planned[site], field.name)
    )
    said = [text for text, _ in apart.most_common(3)]
    if planned.keys() - own.keys():
        said.append(f"{len(own)} adapters, and not {len(planned.keys() - own.keys())} more")
    return [f"{part} is trained further as it is: {', '.join(said)}"] if said else []


def rates(chosen: AdapterConfig, parts: Parts | None, usual: float) -> Callable[[str], float]:
    """Path of a module → its peak learning rate."""
    if chosen.parts is None or parts is None:
        return lambda path: usual
    own = {name: part.learning_rate for name, part in chosen.parts.items() if part is not None and part.learning_rate}
    return lambda path: own.get(parts.of(path) or "", usual)


def only(model: nn.Module, name: str, sites: Sequence[Site]) -> None:
    """Of the trained adapter `name` only these sites stay trained."""
    wanted = set(sites)
    for site, adapter in adapters(model, name).items():
        adapter.requires_grad_(site in wanted)


def exactly(model: nn.Module, name: str, sites: Sequence[Site], optimizer: torch.optim.Optimizer) -> None:
    """TrainError unless the tensors of these sites, and no others, require a gradient and are in the optimizer."""
    there, wanted = adapters(model, name), set(sites)
    tensors = {id(p): f"{s}.{n}" for s, a in there.items() if s in wanted for n, p in a.named_parameters()}
    found = [f"{site} is to be trained and has no adapter" for site in sites if site not in there]
    for path, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in tensors:
            found.append(f"{path} is not to be trained and requires a gradient")
        if not parameter.requires_grad and id(parameter) in tensors:
            found.append(f"{tensors[id(parameter)]} is to be trained and requires no gradient")
    given = {id(p) for group in optimizer.param_groups for p in group["params"]}
    found += [
        f"{text} is to be trained and the optimizer lacks it" for key, text in tensors.items() if key not in given
    ]
    if given - tensors.keys():
        found.append(f"{len(given - tensors.keys())} tensors of the optimizer are not to be trained")
    if found:
        raise faults(TrainError, "what would be trained is not what was asked for", found)


@dataclass(frozen=True)
class PartRow:
    """A line of the table of parts."""

    part: str
    method: str
    """frozen, or what trains it."""
    learning_rate: float | None
    tensors: int
    """That are trained."""
    parameters: int
    base_parameters: int


def table(
    model: nn.Module, chosen: AdapterConfig, found: ByPart, usual: float, attached: Sequence[Target] | None = None
) -> list[PartRow]:
    """What is trained of every part, the frozen ones too. model: an outline is enough. attached: what is trained, where that
    is more than was planned (token rows)."""
    sizes = Counter[str]()
    for path, parameter in base_parameters(model):
        sizes[found.parts.of(path) or "(no part)"] += parameter.numel()
    rate, rows = rates(chosen, found.parts, usual), []
    trained: dict[str, list[Target]] = {}
    for target in found.plan(model).targets if attached is None else attached:
        trained.setdefault(found.parts.of(target.site.path) or "(no part)", []).append(target)
    kept = {found.parts.of(target.site.path): target.method.name for target in found.kept}
    for part in [*found.parts.roots, *([] if "(no part)" not in sizes else ["(no part)"])]:
        own = trained.get(part, [])
        names = " + ".join(dict.fromkeys(target.method.name for target in own))
        still = f"{FROZEN}, keeps its {kept[part]}" if part in kept else FROZEN
        peak = rate(own[0].site.path) if own else None
        size = sum(target.trainable for target in own)
        rows.append(PartRow(part, names or still, peak, tensors(own), size, sizes[part]))
    return rows


def tensors(targets: Sequence[Target]) -> int:
    """How many tensors these adapters train."""
    known: dict[Any, int] = {}
    for target in targets:
        key = type(target.method), target.spec
        if key not in known:
            with torch.device("meta"):
                known[key] = sum(1 for _ in target.method.build(target.spec).parameters())
    return sum(known[type(target.method), target.spec] for target in targets)


def said(rows: Sequence[PartRow]) -> str:
    head = ("part", "trained by", "rate", "tensors", "parameters", "of")
    cells = [
        (
            row.part, row.method, "–" if row.learning_rate is None else f"{row.learning_rate:g}", f"{row.tensors:,}",
            f"{row.parameters:,}", f"{row.base_parameters:,}",
        )
        for row in rows
    ]  # fmt: skip
    return columns([head, *cells])
