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
    ["q_proj", "mlp"]       several of these

Planning is pure: it reads facts about modules and never touches the model. A pattern that matches nothing, or only
modules that cannot carry the method, is an error that names what is there. What a preset means but has to leave out
(experts under a method without a form for them, or of an unknown kind) is a note of the plan. Routers are weights of
modules of their own in most models (`gate`, `router`) and no preset takes them; those that are nn.Linear are linear
layers like others. To train routers in full: LoRA(modules_to_save=["gate"]).
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from deltaw.core.base import by_path, parameters
from deltaw.core.errors import TargetError, did_you_mean, faults
from deltaw.core.facts import ModuleFact, facts
from deltaw.core.guards import bypassed, untrue
from deltaw.core.host import HostSpec, WeightHost
from deltaw.core.layers import layer_index, parse_layers
from deltaw.core.method import Method, Shapes, Site
from deltaw.core.plan import Target, TargetPlan
from deltaw.core.text import counted

PRESETS = ("all-linear", "attention", "mlp")
Targets = str | Sequence[str]


def _in_attention(fact: ModuleFact) -> bool:
    above = [*fact.lineage[:-1], *fact.path.split(".")[:-1]]
    return any("attention" in name.lower() or "attn" in name.lower() for name in above)


def _matches(pattern: str, fact: ModuleFact, whole: bool) -> bool:
    """Does one pattern hit one module? With `whole`, a hit on a module above it counts too (fully trained modules)."""
    if pattern in PRESETS:
        if not fact.linear or fact.head or pattern == "all-linear":
            return fact.linear and not fact.head
        block = bool(re.search(r"\.\d+\.", fact.path))
        return _in_attention(fact) if pattern == "attention" else block and not _in_attention(fact)
    plain = re.fullmatch(r"[\w.\-]*", pattern) is not None
    parts = fact.path.split(".")
    candidates = [".".join(parts[: i + 1]) for i in range(len(parts))] if whole else [fact.path]
    if plain:
        return any(c == pattern or (pattern and c.endswith("." + pattern)) for c in candidates)
    return any(re.fullmatch(pattern, c) for c in candidates)


def _able(pattern: str, hits: Sequence[ModuleFact], by_path: dict[str, ModuleFact]) -> list[ModuleFact]:
    """What can carry the method among the modules that a pattern hits. A preset names linear layers: where those cannot
    carry it themselves, it means the nearest modules above them that can (of a block method, the sublayers)."""
    if pattern not in PRESETS:
        return [fact for fact in hits if fact.slots]
    parts = [fact.path.split(".") for fact in hits]
    above = ([".".join(names[:count]) for count in range(len(names), 0, -1)] for names in parts)
    nearest = (next((path for path in paths if by_path[path].slots), None) for paths in above)
    return [by_path[path] for path in dict.fromkeys(nearest) if path is not None]


def _weights(pattern: str, fact: ModuleFact) -> dict[str, HostSpec]:
    """Single weights of an expert stack that a dotted name means: "experts.down_proj"."""
    if not re.fullmatch(r"[\w\-]+(\.[\w\-]+)+", pattern):
        return {}
    stacks = {slot: spec for slot, spec in fact.slots.items() if spec.stack is not None}
    return {slot: stacks[slot] for slot in stacks if f".{fact.path}.{slot}".endswith(f".{pattern}")}


def plan(
    model: nn.Module,
    method: Method,
    targets: Targets,
    *,
    exclude: Targets = (),
    layers: str | int | Iterable[int] | None = None,
) -> TargetPlan:
    """Resolve `targets` against `model` for `method`. Pure; raises TargetError with every fault found."""
    known, there = facts(model, method), by_path(model)
    found: list[str] = []
    notes: list[str] = []
    chosen = _chosen(_patterns(targets, found), known, method, found, notes)
    chosen = _without(_patterns(exclude, found), chosen, known, found)
    chosen = chosen if layers is None else _in_layers(layers, chosen, found)
    found += [f"{path or 'the model itself'}: {fact.refusal}" for path, fact in chosen.items() if fact.refusal]
    extra = method.companions({fact.path: fact.parameters for fact in known}, list(chosen))
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
    patterns: Sequence[str], known: Sequence[ModuleFact], method: Method, found: list[str], notes: list[str]
) -> dict[str, ModuleFact]:
    """What the patterns choose, by path, each with the slots that are meant; faults and notes are added to the lists."""
    whole = not issubclass(method.host, WeightHost)
    by_path = {fact.path: fact for fact in known}
    chosen: dict[str, ModuleFact] = {}
    asked: set[str] = set()  # by name: never left out, whatever else a preset leaves out
    for pattern in patterns:
        hits = [fact for fact in known if _matches(pattern, fact, whole)]
        able = _able(pattern, hits, by_path)
        able += [dataclasses.replace(fact, slots=part) for fact in known if (part := _weights(pattern, fact))]
        if not able:
            found.append(_nothing(pattern, hits, known, method))
        for fact in able:
            others = chosen[fact.path].slots if fact.path in chosen else {}
            chosen[fact.path] = dataclasses.replace(fact, slots=fact.slots | others)
        if pattern in PRESETS:
            left = {fact.path: fact.refusal for fact in able if fact.refusal and fact.path not in asked}
            chosen = {path: fact for path, fact in chosen.items() if path not in left}
            notes += _left_out(left | _unknown_stacks(pattern, known, whole))
        else:
            asked |= {fact.path for fact in able}
    return chosen


def _unknown_stacks(pattern: str, known: Sequence[ModuleFact], whole: bool) -> dict[str, str]:
    """Why a preset leaves out which stacks of experts that it would have meant."""
    stacks = [fact for fact in known if fact.stack and _matches(pattern, dataclasses.replace(fact, linear=True), whole)]
    return {fact.path: f"deltaw does not know how a {fact.layer} uses its stacks of weights" for fact in stacks}


def _without(
    patterns: Sequence[str], chosen: dict[str, ModuleFact], known: Sequence[ModuleFact], found: list[str]
) -> dict[str, ModuleFact]:
    """What `exclude` leaves of the chosen ones."""
    by_path = {fact.path: fact for fact in known}
    for pattern in patterns:
        named = [fact for fact in (known if pattern in PRESETS else chosen.values()) if _matches(pattern, fact, True)]
        gone = {path: part for path, fact in chosen.items() if (part := _weights(pattern, fact))}
        gone |= {fact.path: fact.slots for fact in _able(pattern, named, by_path) if fact.path in chosen}
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


def _left_out(reasons: Mapping[str, str]) -> list[str]:
    """Notes of what a preset had to leave out, one for each reason."""
    paths: dict[str, list[str]] = {}
    for path, reason in reasons.items():
        paths.setdefault(reason, []).append(path)
    return [
        f"left out {p[0]}{f' and {len(p) - 1} more' if len(p) > 1 else ''}: {reason}" for reason, p in paths.items()
    ]


def replaced(plan: TargetPlan, methods: Mapping[Site, Method]) -> TargetPlan:
    """The plan with other methods, already resolved, at some of its sites."""
    shapes = Shapes()
    targets = [
        _target(t.site, t.layer, t.spec, methods[t.site], shapes) if t.site in methods else t for t in plan.targets
    ]
    return dataclasses.replace(plan, targets=tuple(targets))


def _target(site: Site, layer: str, spec: HostSpec, resolved: Method, shapes: Shapes) -> Target:
    return Target(site, layer, spec, resolved, shapes.of(resolved, spec)[1])


def _patterns(targets: Targets, found: list[str]) -> list[str]:
    if not isinstance(targets, str | Sequence):
        found.append(
            f"{targets!r} is no target: give a name, a preset ({', '.join(PRESETS)}), a pattern, or a list of them"
        )
        return []
    listed = [targets] if isinstance(targets, str) else list(targets)
    for pattern in listed:
        if not isinstance(pattern, str):
            found.append(f"{pattern!r} is not a module name, preset or pattern")
            continue
        try:
            re.compile(pattern)
        except re.error as error:
            found.append(f"{pattern!r} is not a valid regular expression: {error}")
    return [] if found else listed


def _nothing(pattern: str, hits: Sequence[ModuleFact], known: Sequence[ModuleFact], method: Method) -> str:
    """The sentence for a pattern that adapts nothing."""
    able = [fact for fact in known if fact.slots]
    if hits:
        kinds = ", ".join(sorted({fact.layer for fact in hits}))
        above = tuple(f"{hit.path}." if hit.path else "" for hit in hits)
        inside = sum(fact.path.startswith(above) for fact in able)
        hint = f"; {counted(inside, 'module')} inside can: name those" if inside else ""
        return (
            f"{pattern!r} matches {counted(len(hits), 'module')} ({kinds}), none of which can carry {method.name}{hint}"
        )
    if re.fullmatch(r"[\w.\-]+(\s*,\s*[\w.\-]+)+", pattern):
        several = ", ".join(re.split(r"[,\s]+", pattern))
        return f"{pattern!r} is one name: write several as a list, [{several}]"
    leaves = Counter(fact.path.rpartition(".")[2] for fact in able)
    hint = did_you_mean(pattern.rpartition(".")[2], leaves, 1) or did_you_mean(pattern, [f.path for f in able], 1)
    near = [name for name in leaves if f"{name!r}" in hint]
    if near:
        return f"no module matched {pattern!r}{hint} ({counted(leaves[near[0]], 'module')})"
    listed = ", ".join(f"{name} ({count})" for name, count in leaves.most_common(12))
    return f"no module matched {pattern!r}{hint}; {method.name} fits: {listed or 'no module of this model'}"
