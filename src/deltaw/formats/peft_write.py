"""AdapterState → PEFT's config and tensors, such that PEFT adapts exactly these modules with exactly these scales.

    what PEFT matches by             written as
    target_modules (suffix)          last names where they select the right set, else full paths, else one regex
    rank_pattern, alpha_pattern      last names where all such modules agree, else ^full path
    modules_to_save (endswith)       full paths; a module whose name would drag in others is written without an entry,
                                     and PEFT then loads its tensors in place of the base's
    task_type                        only where PEFT's task class finds the head it insists on

Without a Layout the other modules of the base are unknown, and full paths are written.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor

from deltaw.core.errors import ConfigError, faults
from deltaw.core.host import HostSpec
from deltaw.core.method import Method, Site
from deltaw.core.state import AdapterState
from deltaw.formats.layout import Layout
from deltaw.formats.peft_config import DUMMY
from deltaw.formats.peft_match import first_hit, matches, saved, shadowed
from deltaw.methods.dora import DoRA
from deltaw.methods.full import Full
from deltaw.methods.lora import LoRA
from deltaw.methods.token_rows import TokenRows

PREFIX = "base_model.model."
Value = TypeVar("Value", int, float)
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


RESERVED = {"base_layer", "original_module", "modules_to_save", "token_adapter", "lora_A", "lora_B"}
"""Parts of PEFT's keys: a base's module of such a name cannot be told from them."""


def to_peft(state: AdapterState, layout: Layout | None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config, tensors) that PEFT loads to the same function.

    ConfigError where PEFT has no format: another method than LoRA, DoRA, Full, TokenRows; grouped convolutions; LoRA
    beside DoRA. Such adapters are stored in our own layout (`deltaw.formats.directory`).
    """
    found = [f"{site}: {reason}" for site, m in state.methods.items() if (reason := _no_format(site, m, state))]
    low_rank = {site.path: m for site, m in state.methods.items() if isinstance(m, LoRA)}
    if len({type(method) for method in low_rank.values()}) > 1:
        found.append("LoRA and DoRA in one adapter: PEFT has one switch for all modules")
    if found:
        raise faults(ConfigError, "PEFT cannot hold this adapter", found)
    tensors: dict[str, Tensor] = {}
    for site in state.methods:
        adapted = site.path in low_rank
        tensors |= _tensors(site, state.methods[site], state.tensors[site], state.specs[site], adapted)
    return _config(state, low_rank, layout), tensors


def _no_format(site: Site, method: Method, state: AdapterState) -> str | None:
    if type(method) not in (LoRA, DoRA, Full, TokenRows):
        return f"PEFT has no format for {method.name!r}"
    if not site.path:
        return "PEFT never adapts the model itself, only modules inside it"
    if RESERVED & set(site.path.split(".")):
        return "a module on the way has one of PEFT's own names"
    if state.specs[site].groups > 1:
        return "PEFT's grouped convolution is another function (it has no ΔW of the weight's shape)"
    other = state.methods.get(Site(site.path))
    if isinstance(method, Full) and site.slot != "bias" and other is not None and not isinstance(other, Full):
        return "PEFT either adapts a module or trains it whole"
    return None


def _tensors(
    site: Site, method: Method, group: Mapping[str, Tensor], spec: HostSpec, adapted: bool
) -> dict[str, Tensor]:
    key = f"{PREFIX}{site.path}."
    if isinstance(method, TokenRows):
        return {f"{key}token_adapter.trainable_tokens_delta": group["rows"]}
    if isinstance(method, Full):
        return {f"{key}{'base_layer.' if adapted else ''}{site.slot}": group["copy"]}
    form = "lora_embedding_{}" if spec.lookup else "lora_{}.weight"
    tensors = {key + form.format(which): group[f"lora_{which}"] for which in "AB"}
    if isinstance(method, DoRA):
        kernel = len(spec.shape) - 2
        tensors[f"{key}lora_magnitude_vector"] = (
            group["magnitude"].view(1, -1, *[1] * kernel) if kernel else group["magnitude"]
        )
    return tensors


def _config(state: AdapterState, low_rank: Mapping[str, LoRA], layout: Layout | None) -> dict[str, Any]:
    methods = list(low_rank.values()) or [LoRA(rank=8, alpha=8.0)]
    rslora = all(method.rslora for method in methods)
    ranks = {path: method.rank or 0 for path, method in low_rank.items()}
    # scale · r where the modules disagree on rsLoRA: PEFT has one switch
    alphas = {
        path: float(m.alpha or 0) if m.rslora == rslora else m.scale * (m.rank or 0) for path, m in low_rank.items()
    }
    rank, alpha = _common(ranks, 8), _common(alphas, 8.0)
    full = {site for site, method in state.methods.items() if isinstance(method, Full)}
    biases = {site.path for site in full if {s.slot for s in full if s.path == site.path} == {"bias"}}
    whole = _whole_modules({site for site in full if site.path not in biases}, list(low_rank), layout)
    tokens = {site.path: list(method.tokens) for site, method in state.methods.items() if isinstance(method, TokenRows)}
    return {
        "peft_type": "LORA",
        "task_type": _task(state, full, list(low_rank), layout),
        "base_model_name_or_path": None
        if state.base is None or state.base.name == state.base.layer
        else state.base.name,
        "r": rank,
        "lora_alpha": _short(alpha),
        "lora_dropout": methods[0].dropout,
        "rank_pattern": _pattern(ranks, rank),
        "alpha_pattern": {key: _short(value) for key, value in _pattern(alphas, alpha).items()},
        "target_modules": _targets(sorted(low_rank), whole, layout),
        "modules_to_save": whole or None,
        "trainable_token_indices": tokens or None,
        "bias": "none" if not biases else "lora_only" if biases <= low_rank.keys() else "all",
        "use_rslora": rslora,
        "use_dora": isinstance(methods[0], DoRA),
        "fan_in_fan_out": layout is not None and any(path in layout.transposed for path in low_rank),
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _common(values: Mapping[str, Value], default: Value) -> Value:
    return Counter(values.values()).most_common(1)[0][0] if values else default


def _pattern(values: Mapping[str, Value], common: Value) -> dict[str, Value]:
    """Exceptions from the common value: by last name where all modules of that name agree, else by anchored path."""
    by_leaf: dict[str, set[Value]] = {}
    for path, value in values.items():
        by_leaf.setdefault(path.rpartition(".")[2], set()).add(value)
    result: dict[str, Value] = {}
    for path, value in values.items():
        leaf = path.rpartition(".")[2]
        if value != common:
            result[re.escape(leaf) if len(by_leaf[leaf]) == 1 else f"^{re.escape(path)}"] = value
    assert all((first_hit(result, path) or common) == value for path, value in values.items())
    return result


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


def _whole_modules(full: set[Site], low_rank: list[str], layout: Layout | None) -> list[str]:
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
        if full.issuperset(known) and not unfit and not any(shadowed([path], other) for other in low_rank):
            entries.append(path)
            covered += hits[path]
    return sorted(entries)


def _task(state: AdapterState, full: set[Site], low_rank: list[str], layout: Layout | None) -> str | None:
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
    return task if there and wanted <= full and not any(shadowed(heads, path) for path in low_rank) else None


def _short(value: float) -> float | int:
    """Whole numbers without a point: some readers take no other."""
    return int(value) if float(value).is_integer() else value
