"""Which modules an adapter goes to: names, presets and patterns → a TargetPlan that prints as a table.

    targets                 meaning
    "all-linear"            every linear layer and expert stack except the model's heads
    "attention"             the linear layers inside attention modules
    "mlp"                   the linear layers and expert stacks of repeated blocks that are not in attention
                            (of methods on whole sublayers, these three mean the sublayers that own such layers)
    "q_proj"                modules of that name, at any depth; "self_attn.q_proj" anchors it further
    "model.layers.0.mlp.up_proj"     one module by its full path; "" is the model itself
    "experts"               the expert stacks of that name, all their weights; "experts.down_proj" is one weight of them
    r".*layers\\.[0-3]\\..*_proj"     a regular expression over the full path
    "all"                   every module that owns parameters, heads too: for methods on parameters (full)
    ["q_proj", "mlp"]       several of these
    {"vision": "attention"} of a model that has parts (`deltaw.core.parts`): the same, among the modules of one part

In a model with parts a pattern that hits more than one of them is an error: which was meant is for the user to say. So are
by name modules that can never get a gradient (`deltaw.core.reach`); presets leave them out.

Planning is pure: it reads facts about modules and never touches the model. A pattern that matches nothing, or only
modules that cannot carry the method, is an error that names what is there. What a preset means but has to leave out
(experts under a method without a form for them, or of an unknown kind) is a note of the plan. Routers are weights of
modules of their own in most models (`gate`, `router`) and no preset takes them; those that are nn.Linear are linear
layers like others. To train routers in full: LoRA(modules_to_save=["gate"]).
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from deltaw.core.base import by_path, parameters
from deltaw.core.errors import TargetError, faults
from deltaw.core.facts import ModuleFact, facts
from deltaw.core.groups import ByPart, Group, Which, grouped, in_python
from deltaw.core.guards import bypassed, untrue
from deltaw.core.host import HostSpec, WeightHost
from deltaw.core.layers import layer_index, parse_layers
from deltaw.core.matching import PRESETS, Targets, able, matches, patterns, unknown_stacks, weights
from deltaw.core.method import Method, Shapes, Site
from deltaw.core.parts import find
from deltaw.core.plan import Target, TargetPlan
from deltaw.core.reach import refused, unreached


def plan(
    model: nn.Module,
    method: Method,
    targets: Targets | ByPart,
    *,
    exclude: Targets = (),
    layers: str | int | Iterable[int] | None = None,
    given: Mapping[str, Sequence[str]] | None = None,
    which: Which = in_python,
) -> TargetPlan:
    """Resolve `targets` against `model` for `method`. Pure; raises TargetError with every fault found.

    given: parts of the model that it does not tell itself (`deltaw.core.parts.find`).
    which: how an error says that one part is to be chosen, where that is written in another way than here.
    """
    parts, there = find(model, given), by_path(model)
    known = refused(facts(model, method), unreached(model, parts))
    found: list[str] = []
    notes: list[str] = []
    chosen: dict[str, ModuleFact] = {}
    groups = grouped(targets, parts, known, found, which)
    for group in groups:
        chosen = _chosen(group, chosen, method, found, notes)
    chosen = _without(patterns(exclude, found), chosen, known, found)
    chosen = chosen if layers is None else _in_layers(layers, chosen, found)
    found += _by_reason({path: fact.refusal for path, fact in chosen.items() if fact.refusal})
    owned = {fact.path: fact.parameters for group in groups for fact in group.known}
    extra = method.companions(owned, list(chosen)) if owned else {}
    sites = {
        Site(path, slot): spec
        for path, fact in chosen.items()
        for slot, spec in fact.slots.items()
        if Site(path, slot) not in extra  # trained in full
    }
    layer = {fact.path: fact.layer for fact in known}
    shapes = Shapes()
    planned = _adapted(sites, layer, method.over(sites), shapes, found)
    found += method.unused([t.site.path for t in planned])
    found += [f"{site}: {reason}" for site in sites if (reason := untrue(there, site, method))]
    for site, companion in extra.items():
        host = companion.host(there[site.path], site.slot)
        reason = bypassed(there, site.path) or host.fault()
        if reason:
            found.append(f"{site}: {reason}")
        planned.append(_target(site, layer[site.path], host.spec, companion.at(site.path, host.spec), shapes))
    if not planned and not found:
        because = f": {'; '.join(notes)}" if notes else ""
        found.append(f"{targets!r} leaves nothing to adapt{because}")
    if found:
        raise faults(TargetError, f"targets for {type(method).__name__}", found)
    return TargetPlan(tuple(planned), parameters(model), tuple(notes))


def _chosen(
    group: Group, chosen: dict[str, ModuleFact], method: Method, found: list[str], notes: list[str]
) -> dict[str, ModuleFact]:
    """What is chosen, and what the patterns of a group choose, by path, each with the slots that are meant; faults and notes
    are added to the lists."""
    whole = not issubclass(method.host, WeightHost)
    by_path = {fact.path: fact for fact in group.known}
    asked: set[str] = set()  # by name: never left out, whatever else a preset leaves out
    for pattern in group.patterns:
        hits = [fact for fact in group.known if matches(pattern, fact, whole)]
        meant = able(pattern, hits, by_path)
        meant += [dataclasses.replace(fact, slots=part) for fact in group.known if (part := weights(pattern, fact))]
        fault = group.fault(pattern, hits, meant, method)
        if fault:
            found.append(fault)
            continue
        for fact in meant:
            others = chosen[fact.path].slots if fact.path in chosen else {}
            chosen[fact.path] = dataclasses.replace(fact, slots=fact.slots | others)
        if pattern in PRESETS:
            left = {fact.path: fact.refusal for fact in meant if fact.refusal and fact.path not in asked}
            chosen = {path: fact for path, fact in chosen.items() if path not in left}
            left |= unknown_stacks(pattern, group.known, whole)
            notes += [f"left out {line}" for line in _by_reason(left)]
        else:
            asked |= {fact.path for fact in meant}
    return chosen


def _without(
    names: Sequence[str], chosen: dict[str, ModuleFact], known: Sequence[ModuleFact], found: list[str]
) -> dict[str, ModuleFact]:
    """What `exclude` leaves of the chosen ones."""
    by_path = {fact.path: fact for fact in known}
    for pattern in names:
        named = [fact for fact in (known if pattern in PRESETS else chosen.values()) if matches(pattern, fact, True)]
        gone = {path: part for path, fact in chosen.items() if (part := weights(pattern, fact))}
        gone |= {fact.path: fact.slots for fact in able(pattern, named, by_path) if fact.path in chosen}
        if not gone:
            found.append(f"exclude={pattern!r} takes nothing away from the targets")
        for path, slots in gone.items():
            rest = {slot: spec for slot, spec in chosen[path].slots.items() if slot not in slots}
            chosen[path] = dataclasses.replace(chosen[path], slots=rest)
        chosen = {path: fact for path, fact in chosen.items() if fact.slots}
    return chosen


def _in_layers(
    layers: str | int | Iterable[int], chosen: dict[str, ModuleFact], found: list[str]
) -> dict[str, ModuleFact]:
    """What is chosen in these repeated blocks."""
    wanted = parse_layers(layers)
    missing = wanted - {layer_index(path) for path in chosen}
    if missing:
        there = sorted({index for index in map(layer_index, chosen) if index is not None})
        some = f"{sorted(missing)[:8]}{' and more' if len(missing) > 8 else ''}"
        found.append(f"layers {some} hold no target; targets are in layers {there}")
    return {path: fact for path, fact in chosen.items() if layer_index(path) in wanted}


def _adapted(
    sites: Mapping[Site, HostSpec], layer: Mapping[str, str], method: Method, shapes: Shapes, found: list[str]
) -> list[Target]:
    """The targets of the method itself; what does not fit is a fault, said once with all modules it is true of."""
    planned: list[Target] = []
    unfit: dict[tuple[str, str, str], list[str]] = {}
    for site, spec in sites.items():
        resolved = method.at(site.path, spec)
        reason = resolved.unfit(spec)
        if reason:
            unfit.setdefault((layer[site.path], "×".join(map(str, spec.whole)), reason), []).append(site.path)
        else:
            planned.append(_target(site, layer[site.path], spec, resolved, shapes))
    for (kind, shape, reason), paths in unfit.items():
        more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        found.append(f"{paths[0] or 'the model itself'}{more} ({kind} {shape}): {reason}")
    return planned


def _by_reason(reasons: Mapping[str, str]) -> list[str]:
    """What is refused, one line for each reason."""
    paths: dict[str, list[str]] = {}
    for path, reason in reasons.items():
        paths.setdefault(reason, []).append(path or "the model itself")
    return [f"{p[0]}{f' and {len(p) - 1} more' if len(p) > 1 else ''}: {reason}" for reason, p in paths.items()]


def replaced(plan: TargetPlan, methods: Mapping[Site, Method]) -> TargetPlan:
    """The plan with other methods, already resolved, at some of its sites."""
    shapes = Shapes()
    targets = [
        _target(t.site, t.layer, t.spec, methods[t.site], shapes) if t.site in methods else t for t in plan.targets
    ]
    return dataclasses.replace(plan, targets=tuple(targets))


def _target(site: Site, layer: str, spec: HostSpec, resolved: Method, shapes: Shapes) -> Target:
    return Target(site, layer, spec, resolved, shapes.of(resolved, spec)[1])
