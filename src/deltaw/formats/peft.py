"""PEFT's two files ↔ AdapterState, by renaming. Format facts: PEFT 0.21, `adapter_config.json` + `adapter_model.safetensors`.

    base_model.model.<path>.lora_A.weight              [r, in, *kernel]        lora_A
    base_model.model.<path>.lora_B.weight              [out, r, *ones]         lora_B
    base_model.model.<path>.lora_embedding_A / _B      [r, vocab] / [dim, r]   lora_A / lora_B of an embedding
    base_model.model.<path>.lora_magnitude_vector      [out] or [1, out, 1, …] magnitude (DoRA)
    base_model.model.<path>.base_layer.bias, <p>.bias  trained biases          Full at slot bias
    base_model.model.<path>.<parameter>                modules_to_save         Full at that slot
    base_model.model.<path>.token_adapter.trainable_tokens_delta  [n, dim]     TokenRows (absolute rows)

On read the tensors are the truth: every one must land, ranks come from shapes, alphas from the config's patterns. What
the config says beyond that is checked against them and reported. Pure functions on plain data; PEFT is not needed.
"""

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from deltaw.core.errors import ConfigError, FileError, faults
from deltaw.core.host import HostSpec
from deltaw.core.method import Method, Site
from deltaw.core.state import AdapterState
from deltaw.formats.peft_config import alpha_of, check, leaf_targets, method_of
from deltaw.methods.dora import DoRA
from deltaw.methods.full import Full
from deltaw.methods.lora import LoRA
from deltaw.methods.token_rows import TokenRows

PREFIX = "base_model.model."
_KEY = re.compile(
    r"^(?P<path>.*?)\.?(?P<kind>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector"
    r"|token_adapter\.trainable_tokens_delta)(?:\.(?!weight$|bias$)[^.]+)?(?P<tail>\.weight|\.bias)?$"
)
_NAMES = {"lora_A": "lora_A", "lora_B": "lora_B", "lora_embedding_A": "lora_A", "lora_embedding_B": "lora_B"}


def from_peft(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[AdapterState, list[str]]:
    """A state and the notes a user should read. ConfigError for features that are not supported, FileError for keys."""
    notes = check(config)
    low_rank: dict[str, dict[str, Tensor]] = {}
    embeddings: set[str] = set()
    rows: dict[str, Tensor] = {}
    whole: dict[Site, Tensor] = {}
    found: list[str] = []
    for key, tensor in tensors.items():
        if not key.startswith(PREFIX):
            found.append(
                f"key {key!r} does not begin with {PREFIX!r}: the file was written by hand or from a wrapped model"
            )
            continue
        name = key.removeprefix(PREFIX)
        match = _KEY.match(name)
        if match is None:
            _plain(name, tensor, whole, notes)
        elif match["tail"] == ".bias":
            found.append(f"key {key!r}: a bias on B (lora_bias) is not supported yet")
        elif match["kind"] == "token_adapter.trainable_tokens_delta":
            rows[match["path"]] = tensor
        elif match["kind"] == "lora_magnitude_vector":
            low_rank.setdefault(match["path"], {})["magnitude"] = tensor.flatten()
        else:
            low_rank.setdefault(match["path"], {})[_NAMES[match["kind"]]] = tensor
            if match["kind"].startswith("lora_embedding"):
                embeddings.add(match["path"])
    template = method_of(config)
    methods: dict[Site, Method] = {}
    specs: dict[Site, HostSpec] = {}
    placed: dict[Site, Mapping[str, Tensor]] = {}
    for path, group in low_rank.items():
        needed = {"lora_A", "lora_B"} | ({"magnitude"} if isinstance(template, DoRA) else set())
        if group.keys() != needed:
            lacks = ", ".join(sorted(needed - group.keys())) or "none"
            extra = ", ".join(sorted(group.keys() - needed)) or "none"
            found.append(f"{path}: missing {lacks}, unexpected {extra}; the config says {type(template).__name__}")
            continue
        a, b = group["lora_A"], group["lora_B"]
        if a.shape[0] != b.shape[1]:
            found.append(f"{path}: A is {tuple(a.shape)} and B is {tuple(b.shape)}: their ranks differ")
            continue
        site = Site(path)
        methods[site] = replace(
            template,
            rank=a.shape[0],
            alpha=alpha_of(config, path),
            rank_pattern={},
            alpha_pattern={},
            bias="none",
            modules_to_save=(),
        )
        specs[site] = HostSpec((b.shape[0], *a.shape[1:]), lookup=path in embeddings)
        placed[site] = group
    for path, tensor in rows.items():
        methods[Site(path)] = TokenRows(tokens=_tokens(config, path, len(tensor)))
        placed[Site(path)] = {"rows": tensor}
        specs[Site(path)] = HostSpec((tensor.shape[1], 0), lookup=True)
    for site, tensor in whole.items():
        methods[site], placed[site] = Full(), {"copy": tensor}
        specs[site] = HostSpec(tuple(tensor.shape), linear=False)
    if found:
        raise faults(FileError, "the adapter's tensors cannot be read", found)
    if not methods:
        raise FileError("the adapter's file holds no tensor")
    notes += _dead_names(config, [site.path for site in methods])
    meta = {"task_type": config.get("task_type")} if config.get("task_type") else {}
    return AdapterState(methods, placed, specs, base=None, meta=meta), notes


def _plain(name: str, tensor: Tensor, whole: dict[Site, Tensor], notes: list[str]) -> None:
    """A key without a LoRA part: a fully trained parameter, or PEFT's automatic copy of a base embedding."""
    name = re.sub(r"\.modules_to_save\.[^.]+\.", ".", name)
    path, _, slot = name.rpartition(".")
    if path.endswith(".base_layer") or path == "base_layer":
        path = path.removesuffix("base_layer").rstrip(".")
        if slot == "weight":
            notes.append(
                f"{path}.weight in the file is PEFT's copy of the base's own weight: not part of the adapter, left out"
            )
            return
    whole[Site(path, slot)] = tensor


def _tokens(config: Mapping[str, Any], path: str, count: int) -> tuple[int, ...]:
    given = config.get("trainable_token_indices")
    if isinstance(given, Mapping):
        given = next((ids for name, ids in given.items() if path == name or path.endswith("." + name)), None)
    if not isinstance(given, Sequence) or len(given) != count:
        raise FileError(f"{path}: {count} token rows, but trainable_token_indices names {given!r}")
    return tuple(int(token) for token in given)


def _dead_names(config: Mapping[str, Any], paths: Sequence[str]) -> list[str]:
    """Names in the config that no tensor of the file answers to: a line each, as nobody else would tell."""
    notes = []
    for key in ("target_modules", "modules_to_save"):
        names = config.get(key)
        if isinstance(names, list | tuple | set):
            # a module saved whole may be a part: "classifier" answers for classifier.dense
            dead = [n for n in sorted(set(names)) if not any(re.search(rf"(^|\.){re.escape(n)}(\.|$)", p) for p in paths)]
            notes += [f"{key} names {name!r}, for which the file holds no tensor" for name in dead]
    return notes


def to_peft(state: AdapterState, paths: Collection[str] | None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config, tensors) that PEFT loads to the same function. `paths`: all module paths of the base, for short targets.

    ConfigError where PEFT has no format for a method or layer; such adapters are stored in our own layout.
    """
    tensors: dict[str, Tensor] = {}
    low_rank: dict[str, LoRA] = {}
    saved: list[str] = []
    biases: list[str] = []
    tokens: dict[str, list[int]] = {}
    found: list[str] = []
    for site, method in state.methods.items():
        group, spec = state.tensors[site], state.specs[site]
        key = f"{PREFIX}{site.path}."
        if type(method) in (LoRA, DoRA):
            assert isinstance(method, LoRA)
            if spec.groups > 1:
                found.append(
                    f"{site}: PEFT's grouped convolution is another function (it has no ΔW of the weight's shape)"
                )
            low_rank[site.path] = method
            for name in ("lora_A", "lora_B"):
                tensors[key + (name.replace("lora_", "lora_embedding_") if spec.lookup else f"{name}.weight")] = group[
                    name
                ]
            if isinstance(method, DoRA):
                shape = (1, -1, *[1] * (len(spec.shape) - 2)) if len(spec.shape) > 2 else (-1,)
                tensors[f"{key}lora_magnitude_vector"] = group["magnitude"].view(shape)
        elif type(method) is TokenRows:
            tensors[f"{key}token_adapter.trainable_tokens_delta"] = group["rows"]
            tokens[site.path] = list(method.tokens)
        elif type(method) is Full:
            own = {s.slot for s, m in state.methods.items() if s.path == site.path and type(m) is Full}
            if own == {"bias"}:
                biases.append(site.path)
                adapted = any(s.path == site.path and s.slot == "weight" for s in state.methods)
                key += "base_layer." if adapted else ""
            elif site.path not in saved:
                saved.append(site.path)
            tensors[f"{key}{site.slot}"] = group["copy"]
        else:
            found.append(f"{site}: PEFT has no format for {method.name!r}")
    kinds = {type(method) for method in low_rank.values()}
    if len(kinds) > 1:
        found.append("LoRA and DoRA in one adapter: PEFT has one switch for all modules")
    if not low_rank:
        found.append("PEFT's format needs at least one low-rank module")
    if found:
        raise faults(ConfigError, "PEFT cannot hold this adapter", found)
    return _config(state, low_rank, saved, biases, tokens, paths), tensors


def _config(
    state: AdapterState, low_rank: Mapping[str, LoRA], saved: list[str], biases: list[str],
    tokens: Mapping[str, list[int]], paths: Collection[str] | None,
) -> dict[str, Any]:  # fmt: skip
    rslora = all(method.rslora for method in low_rank.values())
    # scale · r where the modules disagree on rsLoRA: PEFT has one switch
    alphas = {path: m.alpha if m.rslora == rslora else m.scale * (m.rank or 0) for path, m in low_rank.items()}
    rank = Counter(m.rank for m in low_rank.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    adapted_biases = all(path in low_rank for path in biases)
    return {
        "peft_type": "LORA",
        "task_type": state.meta.get("task_type"),
        "base_model_name_or_path": state.base.name if state.base and state.base.name != state.base.layer else None,
        "r": rank,
        "lora_alpha": _whole(alpha),
        "lora_dropout": next(iter(low_rank.values())).dropout,
        "rank_pattern": {f"^{re.escape(p)}": m.rank for p, m in low_rank.items() if m.rank != rank},
        "alpha_pattern": {f"^{re.escape(p)}": _whole(a) for p, a in alphas.items() if a != alpha},
        "target_modules": leaf_targets(list(low_rank), paths),
        "modules_to_save": saved or None,
        "trainable_token_indices": dict(tokens) or None,
        "bias": "none" if not biases else "lora_only" if adapted_biases else "all",
        "use_rslora": rslora,
        "use_dora": isinstance(next(iter(low_rank.values())), DoRA),
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _whole(value: float | None) -> float | int | None:
    return int(value) if value is not None and float(value).is_integer() else value
