"""AdapterState → PEFT's config and tensors, such that PEFT adapts exactly these modules with exactly these scales.

    what PEFT matches by             written as
    target_modules (suffix)          last names where they select the right set, else full paths, else one regex
    target_parameters (suffix)       whole names of stacks of experts (`peft_experts`)
    rank_pattern, alpha_pattern      last names where all such modules agree, else ^full path
    modules_to_save (endswith)       full paths; a module whose name would drag in others is written without an entry,
                                     and PEFT then loads its tensors in place of the base's
    task_type                        only where PEFT's task class finds the head it insists on

Without a Layout the other modules of the base are unknown, and full paths are written.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor

from deltaw.core.errors import ConfigError, faults
from deltaw.core.method import Method, Site
from deltaw.core.state import AdapterState
from deltaw.formats.layout import Layout
from deltaw.formats.peft_config import DUMMY
from deltaw.formats.peft_experts import full_name, is_stack, keys
from deltaw.formats.peft_kind import Kind
from deltaw.formats.peft_match import matches, saved, shadowed
from deltaw.formats.peft_methods import KINDS, OURS, kind_for
from deltaw.methods.full import Full
from deltaw.methods.token_rows import TokenRows

PREFIX = "base_model.model."
TASKS: Mapping[str, Sequence[str]] = {
    "CAUSAL_LM": (),
    "SEQ_2_SEQ_LM": (),
    "FEATURE_EXTRACTION": (),
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""PEFT's task types → modules that their classes add to modules_to_save, and then miss in a file without them."""
CLASSES = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


RESERVED = {
    "base_layer",
    "original_module",
    "modules_to_save",
    "token_adapter",
    *(end.split(".")[0] for kind in KINDS.values() for end in kind.keys),
}
"""Parts of PEFT's keys: a base's module of such a name cannot be told from them."""


def to_peft(state: AdapterState, layout: Layout | None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config, tensors) that PEFT loads to the same function.

    ConfigError where PEFT has no format: methods it does not know, two kinds in one adapter, layers it has not written
    the method for, grouped convolutions. Such adapters are stored in our own layout (`deltaw.formats.directory`).
    """
    state = state.finished()
    adapted = {site: m for site, m in state.methods.items() if not isinstance(m, Full | TokenRows)}
    kinds = {kind.type: kind for m in adapted.values() if (kind := kind_for(m))} or {"LORA": KINDS["LORA"]}
    kind = next(iter(kinds.values()))
    found = [
        f"{site}: {reason}" for site, m in state.methods.items() if (reason := _no_format(site, m, state, kind, layout))
    ]
    if len(kinds) > 1:
        found.append(f"{' and '.join(kinds)} in one adapter: PEFT has one method for all modules")
    found += [] if found else kind.unplaced(state, adapted, layout)
    if found:
        raise faults(ConfigError, "PEFT cannot hold this adapter", found)
    by_name = {full_name(site): method for site, method in adapted.items()}
    specs = {full_name(site): state.specs.get(site) for site in adapted}
    config = _config(state, kind, kind.options(by_name, specs), adapted, layout)
    tensors, paths, owners = kind.common(by_name, specs), keys(adapted), {site.path for site in adapted}
    for site, method in state.methods.items():
        key, group = f"{PREFIX}{paths.get(site, site.path)}.", state.tensors[site]
        if isinstance(method, TokenRows):
            tensors[f"{key}token_adapter.trainable_tokens_delta"] = group["rows"]
        elif isinstance(method, Full):
            tensors[f"{key}{'base_layer.' if site.path in owners else ''}{site.slot}"] = group["copy"]
        else:
            ends = kind.tensors(method, group, specs[full_name(site)])
            tensors |= {key + end: tensor for end, tensor in ends.items()}
    return config, tensors


def to_nobody(state: AdapterState) -> dict[str, Any]:
    """The config of an adapter that PEFT has no format for: a peft_type that no other reader knows, so that none opens
    half of it or takes it for something else; and nothing that a reader who does not look at it could go by."""
    names = sorted({method.name for method in state.methods.values() if not isinstance(method, Full | TokenRows)})
    word = "_".join(re.sub(r"\W", "_", name).upper() for name in names or ["full"])
    return {
        "peft_type": f"{OURS}{word}",
        "base_model_name_or_path": _base(state),
        "target_modules": sorted({site.path for site in state.methods}),
        "task_type": None,
        "inference_mode": True,
    }


def _no_format(site: Site, method: Method, state: AdapterState, kind: Kind, layout: Layout | None) -> str | None:
    full, rows = isinstance(method, Full), isinstance(method, TokenRows)
    if not (full or rows or kind_for(method)):
        return f"PEFT has no format for {method.name!r}"
    if not site.path:
        return "PEFT never adapts the model itself, only modules inside it"
    if RESERVED & set(site.path.split(".")):
        return "a module on the way has one of PEFT's own names"
    if rows and not kind.token_rows:
        return f"PEFT has no token rows beside {kind.label}"
    if full and "modules_to_save" in kind.lacks:
        return f"PEFT trains nothing beside {kind.label}"
    if full and site.slot == "bias" and kind.bias is None and Site(site.path) in state.methods:
        return f"PEFT trains no biases beside {kind.label}"
    if full or rows:
        other = state.methods.get(Site(site.path))
        if full and site.slot != "bias" and other is not None and not isinstance(other, Full):
            return "PEFT either adapts a module or trains it whole"
        return None
    if site.slot != kind.slot and not (kind.stacks and is_stack(site)):
        return f"PEFT has no {method.name} on parameters of their own ({site.slot})"
    return kind.unheld(method, state.specs.get(site), layout is not None and site.path in layout.transposed)


def _config(
    state: AdapterState, kind: Kind, options: Mapping[str, Any], adapted: Collection[Site], layout: Layout | None
) -> dict[str, Any]:
    full = {site for site, method in state.methods.items() if isinstance(method, Full)}
    modules = [site.path for site in adapted if not is_stack(site)]
    stacks = [full_name(site) for site in adapted if is_stack(site)]
    biases = {site.path for site in full if {s.slot for s in full if s.path == site.path} == {"bias"}}
    whole = _whole_modules({site for site in full if site.path not in biases}, [s.path for s in adapted], layout)
    tokens = {site.path: list(method.tokens) for site, method in state.methods.items() if isinstance(method, TokenRows)}
    config = {
        "peft_type": kind.type,
        "task_type": _task(state, full, [s.path for s in adapted], layout),
        "base_model_name_or_path": _base(state),
        "target_modules": [] if stacks and not modules else _targets(sorted(modules), whole, layout),
        "modules_to_save": whole or None,
        "inference_mode": True,
        **options,
    }
    if kind.token_rows:
        config["trainable_token_indices"] = tokens or None
    if kind.bias is not None:
        config["bias"] = "none" if not biases else kind.bias if biases <= set(modules) else "all"
    if kind.transposed:
        config["fan_in_fan_out"] = layout is not None and any(path in layout.transposed for path in modules)
    if stacks:
        config["target_parameters"] = sorted(stacks)
    return {key: value for key, value in config.items() if key not in kind.lacks}


def _base(state: AdapterState) -> str | None:
    return None if state.base is None or state.base.name == state.base.layer else state.base.name


def _targets(paths: list[str], whole: list[str], layout: Layout | None) -> list[str] | str:
    """What makes PEFT adapt exactly `paths`."""
    if not paths:
        return DUMMY
    known = paths if layout is None else list(layout.entries)
    leaves = sorted({path.rpartition(".")[2] for path in paths})
    for targets in (paths,) if layout is None else (leaves, paths):
        if sorted(matches({"target_modules": targets, "modules_to_save": whole}, known)) == paths:
            return targets
    return "|".join(map(re.escape, paths))  # a suffix would hit other modules: anchor it


def _whole_modules(full: set[Site], adapted: list[str], layout: Layout | None) -> list[str]:
    """Entries of modules_to_save: topmost modules that are trained whole and drag in no other."""
    owners = sorted({site.path for site in full})
    tops = [p for p in owners if not any(p.startswith(f"{other}.") for other in owners)]
    hits = {p: [p] if layout is None else [other for other in layout.entries if saved([p], other)] for p in tops}
    entries: list[str] = []
    covered: list[str] = []
    for path in sorted(tops, key=lambda p: (-len(hits[p]), p)):  # an entry that wraps several goes first
        if any(path == other or path.startswith(f"{other}.") for other in covered):
            continue
        known = [] if layout is None else [Site(*entry) for hit in hits[path] for entry in layout.below(hit)]
        unfit = any(a != b and a.startswith(f"{b}.") for a in hits[path] for b in hits[path])
        unfit = unfit or (layout is not None and any(hit in layout.containers for hit in hits[path]))
        if full.issuperset(known) and not unfit and not any(shadowed([path], other) for other in adapted):
            entries.append(path)
            covered += hits[path]
    return sorted(entries)


def _task(state: AdapterState, full: set[Site], adapted: list[str], layout: Layout | None) -> str | None:
    """The task type, or None where PEFT's class for it would look for a head that is not in the file."""
    task = state.meta.get("task_type")
    if task is None and state.base is not None:
        task = next((task for suffix, task in CLASSES.items() if state.base.layer.endswith(suffix)), None)
    if not isinstance(task, str) or task not in TASKS:
        return None
    heads = TASKS[task]
    paths = {site.path for site in full} if layout is None else set(layout.entries)
    wanted = {Site(*entry) for p in paths if saved(heads, p) for entry in (layout.below(p) if layout else ())}
    there = not heads or any(saved(heads, site.path) for site in full)
    return task if there and wanted <= full and not any(shadowed(heads, path) for path in adapted) else None
