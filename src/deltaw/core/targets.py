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
from dataclasses import dataclass

import torch
from torch import nn

from deltaw.core.base import base_modules, parameters
from deltaw.core.carried import base_class_of
from deltaw.core.errors import TargetError, did_you_mean, faults
from deltaw.core.guards import bypassed
from deltaw.core.host import HostSpec, WeightHost, kind_of
from deltaw.core.layers import layer_index, parse_layers
from deltaw.core.method import Method, Site
from deltaw.core.plan import Target, TargetPlan

PRESETS = ("all-linear", "attention", "mlp")
Targets = str | Sequence[str]


@dataclass(frozen=True)
class ModuleFact:
    """What planning knows of one module."""

    path: str
    layer: str
    """Class name."""
    lineage: tuple[str, ...]
    """Class names of the modules above it, outermost first."""
    slots: dict[str, HostSpec]
    """Slots the method's protocol finds here, with their shapes; empty where the module cannot carry it."""
    parameters: dict[str, tuple[int, ...]]
    """Names and shapes of the parameters the module itself owns."""
    linear: bool
    """A linear layer, whatever the method needs of it: what presets choose among."""
    stack: bool
    """Experts of a kind that no view knows: a module of its own with 3-D weights."""
    head: bool
    """True for modules outside the model's body (language-model and classifier heads)."""
    refusal: str | None = None
    """Why adapters on this module would be ignored or wrong."""


def facts(model: nn.Module, method: Method) -> list[ModuleFact]:
    """Facts of every module of `model`, as the method's protocol sees them."""
    body = _body(model)
    get_output = getattr(model, "get_output_embeddings", None)
    output = get_output() if callable(get_output) else None
    result: list[ModuleFact] = []
    lineage: dict[str, tuple[str, ...]] = {}
    for path, module in base_modules(model):
        layer = base_class_of(module)
        above = lineage[path.rpartition(".")[0]] if path else ()
        lineage[path] = (*above, layer.__name__) if path else (layer.__name__,)
        own = {name: tuple(p.shape) for name, p in module._parameters.items() if p is not None}
        kind = kind_of(type(module), method.host)
        slots, refusal = dict[str, HostSpec](), None
        if kind is not None:
            for slot in kind.slots or own:
                if kind.has(module, slot):
                    host = kind(module, slot)
                    slots[slot] = host.spec
                    refusal = refusal or method.unstacked(host.spec) or host.fault()
        refusal = bypassed(model, path) or refusal
        head = module is output or (body is not None and bool(path) and path.split(".")[0] not in body)
        kinds = (_linear(module), _unknown_stack(module))
        result.append(ModuleFact(path, layer.__name__, lineage[path], slots, own, *kinds, head, refusal))
    return result


def _linear(module: nn.Module) -> bool:
    """Does the layer apply one matrix, or one for each expert, to vectors? Tables of rows and convolutions do not."""
    kind = kind_of(type(module))
    specs = [kind(module, slot).spec for slot in kind.slots if kind.has(module, slot)] if kind is not None else []
    return any(spec.linear and not spec.lookup and len(spec.shape) == 2 for spec in specs)


def _unknown_stack(module: nn.Module) -> bool:
    weights = [p for p in module._parameters.values() if p is not None and p.ndim == 3 and min(p.shape) > 1]
    own = not type(module).__module__.startswith("torch.nn.")
    return bool(weights) and own and kind_of(type(module)) is None


def _body(model: nn.Module) -> set[str] | None:
    """Names of the model's children that form its body, where the model tells (transformers: base_model_prefix)."""
    prefix = getattr(model, "base_model_prefix", "")
    return {prefix} if prefix and isinstance(model._modules.get(prefix), nn.Module) else None


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
    known = facts(model, method)
    by_path = {fact.path: fact for fact in known}
    whole = not issubclass(method.host, WeightHost)
    found: list[str] = []
    notes: list[str] = []
    chosen: dict[str, ModuleFact] = {}
    for pattern in _patterns(targets, found):
        hits = [fact for fact in known if _matches(pattern, fact, whole)]
        able = _able(pattern, hits, by_path)
        able += [dataclasses.replace(fact, slots=part) for fact in known if (part := _weights(pattern, fact))]
        if not able:
            found.append(_nothing(pattern, hits, known, method))
        for fact in able:
            others = chosen[fact.path].slots if fact.path in chosen else {}
            chosen[fact.path] = dataclasses.replace(fact, slots=fact.slots | others)
        if pattern in PRESETS:
            left = {fact.path: fact.refusal for fact in able if fact.refusal}
            chosen = {path: fact for path, fact in chosen.items() if path not in left}
            stacks = [
                fact
                for fact in known
                if fact.stack and _matches(pattern, dataclasses.replace(fact, linear=True), whole)
            ]
            left |= {
                fact.path: f"deltaw does not know how a {fact.layer} uses its stacks of weights" for fact in stacks
            }
            notes += _left_out(left)
    for pattern in _patterns(exclude, found):
        named = [fact for fact in (known if pattern in PRESETS else chosen.values()) if _matches(pattern, fact, True)]
        gone = {path: part for path, fact in chosen.items() if (part := _weights(pattern, fact))}
        gone |= {fact.path: fact.slots for fact in _able(pattern, named, by_path) if fact.path in chosen}
        if not gone:
            found.append(f"exclude={pattern!r} takes nothing away from the targets")
        for path, slots in gone.items():
            rest = {slot: spec for slot, spec in chosen[path].slots.items() if slot not in slots}
            chosen[path] = dataclasses.replace(chosen[path], slots=rest)
        chosen = {path: fact for path, fact in chosen.items() if fact.slots}
    if layers is not None:
        wanted = parse_layers(layers)
        missing = wanted - {layer_index(path) for path in chosen}
        if missing:
            there = sorted({index for index in map(layer_index, chosen) if index is not None})
            some = f"{sorted(missing)[:8]}{' and more' if len(missing) > 8 else ''}"
            found.append(f"layers {some} hold no target; targets are in layers {there}")
        chosen = {path: fact for path, fact in chosen.items() if layer_index(path) in wanted}
    found += [f"{path or 'the model itself'}: {fact.refusal}" for path, fact in chosen.items() if fact.refusal]

    extra = method.companions({fact.path: fact.parameters for fact in known}, list(chosen))
    planned: list[Target] = []
    unfit: dict[tuple[str, str, str], list[str]] = {}  # what does not fit, with all modules it is true of
    saved = {site.path for site in extra if site.slot == "weight"}
    method = method.over({Site(p, slot): s for p in chosen if p not in saved for slot, s in chosen[p].slots.items()})
    for path in [path for path in chosen if path not in saved]:
        for slot, spec in chosen[path].slots.items():
            reason = method.at(path, spec).unfit(spec)
            if reason:
                unfit.setdefault((chosen[path].layer, "×".join(map(str, spec.whole)), reason), []).append(path)
            else:
                planned.append(_target(Site(path, slot), chosen[path].layer, spec, method))
    for (layer, shape, reason), paths in unfit.items():
        more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        found.append(f"{paths[0] or 'the model itself'}{more} ({layer} {shape}): {reason}")
    found += method.unused([t.site.path for t in planned])
    for site, companion in extra.items():
        host = companion.host(model.get_submodule(site.path), site.slot)
        reason = bypassed(model, site.path) or host.fault()
        if reason:
            found.append(f"{site}: {reason}")
        planned.append(_target(site, by_path[site.path].layer, host.spec, companion))
    if not planned and not found:
        because = f": {'; '.join(notes)}" if notes else ""
        found.append(f"{targets!r} leaves nothing to adapt{because}")
    if found:
        raise faults(TargetError, f"targets for {type(method).__name__}", found)
    return TargetPlan(tuple(planned), parameters(model), tuple(notes))


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
    targets = [_target(t.site, t.layer, t.spec, methods[t.site]) if t.site in methods else t for t in plan.targets]
    return dataclasses.replace(plan, targets=tuple(targets))


def _target(site: Site, layer: str, spec: HostSpec, method: Method) -> Target:
    resolved = method.at(site.path, spec)
    with torch.device("meta"):  # shapes only: nothing is drawn or allocated
        adapter = resolved.build(spec)
    return Target(site, layer, spec, resolved, sum(p.numel() for p in adapter.parameters()))


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
        hint = f"; {_modules(inside)} inside can: name those" if inside else ""
        return f"{pattern!r} matches {_modules(len(hits))} ({kinds}), none of which can carry {method.name}{hint}"
    if re.fullmatch(r"[\w.\-]+(\s*,\s*[\w.\-]+)+", pattern):
        several = ", ".join(re.split(r"[,\s]+", pattern))
        return f"{pattern!r} is one name: write several as a list, [{several}]"
    leaves = Counter(fact.path.rpartition(".")[2] for fact in able)
    hint = did_you_mean(pattern.rpartition(".")[2], leaves, 1) or did_you_mean(pattern, [f.path for f in able], 1)
    near = [name for name in leaves if f"{name!r}" in hint]
    if near:
        return f"no module matched {pattern!r}{hint} ({_modules(leaves[near[0]])})"
    listed = ", ".join(f"{name} ({count})" for name, count in leaves.most_common(12))
    return f"no module matched {pattern!r}{hint}; {method.name} fits: {listed or 'no module of this model'}"


def _modules(count: int) -> str:
    return f"{count} module{'' if count == 1 else 's'}"
