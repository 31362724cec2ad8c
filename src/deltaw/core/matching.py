"""What one pattern of a target means among the facts of a model's modules, and what is said where it means none."""

import dataclasses
import re
from collections import Counter
from collections.abc import Sequence

from deltaw.core.errors import did_you_mean
from deltaw.core.facts import ModuleFact
from deltaw.core.host import HostSpec
from deltaw.core.method import Method

ALL = "all"
PRESETS = ("all-linear", "attention", "mlp", ALL)
Targets = str | Sequence[str]


def patterns(targets: Targets, found: list[str]) -> list[str]:
    """The single patterns of a target; what is none is added to `found`."""
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


def matches(pattern: str, fact: ModuleFact, whole: bool) -> bool:
    """Does one pattern hit one module? With `whole`, a hit on a module above it counts too (fully trained modules)."""
    if pattern == ALL:
        return bool(fact.parameters)
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


def _in_attention(fact: ModuleFact) -> bool:
    above = [*fact.lineage[:-1], *fact.path.split(".")[:-1]]
    return any("attention" in name.lower() or "attn" in name.lower() for name in above)


def able(pattern: str, hits: Sequence[ModuleFact], by_path: dict[str, ModuleFact]) -> list[ModuleFact]:
    """What can carry the method among the modules that a pattern hits. A preset names linear layers: where those cannot
    carry it themselves, it means the nearest modules above them that can (of a block method, the sublayers)."""
    if pattern not in PRESETS:
        return [fact for fact in hits if fact.slots]
    names = [fact.path.split(".") for fact in hits]
    above = ([".".join(name[:count]) for count in range(len(name), 0, -1)] for name in names)
    nearest = (next((path for path in paths if path in by_path and by_path[path].slots), None) for paths in above)
    return [by_path[path] for path in dict.fromkeys(nearest) if path is not None]


def weights(pattern: str, fact: ModuleFact) -> dict[str, HostSpec]:
    """Single weights of an expert stack that a dotted name means: "experts.down_proj"."""
    if not re.fullmatch(r"[\w\-]+(\.[\w\-]+)+", pattern):
        return {}
    stacks = {slot: spec for slot, spec in fact.slots.items() if spec.stack is not None}
    return {slot: stacks[slot] for slot in stacks if f".{fact.path}.{slot}".endswith(f".{pattern}")}


def unknown_stacks(pattern: str, known: Sequence[ModuleFact], whole: bool) -> dict[str, str]:
    """Why a preset of linear layers leaves out which stacks of experts that it would have meant."""
    stacks = [f for f in known if f.stack and pattern != ALL and matches(pattern, _as_linear(f), whole)]
    return {fact.path: f"deltaw does not know how a {fact.layer} uses its stacks of weights" for fact in stacks}


def _as_linear(fact: ModuleFact) -> ModuleFact:
    return dataclasses.replace(fact, linear=True)


def nothing(
    pattern: str, hits: Sequence[ModuleFact], known: Sequence[ModuleFact], method: Method, where: str = "of this model"
) -> str:
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
    return f"no module matched {pattern!r}{hint}; {method.name} fits: {listed or f'no module {where}'}"


def _modules(count: int) -> str:
    return f"{count} module{'' if count == 1 else 's'}"
