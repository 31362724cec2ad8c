"""PEFT's two files ↔ AdapterState, by renaming. Format facts: PEFT 0.21, `adapter_config.json` + `adapter_model.safetensors`.

    base_model.model.<path>.<end>                      what the method trains  (`peft_methods` has the ends)
    base_model.model.<path>.base_layer.<end>           of a stack of experts   (`peft_experts`)
    base_model.model.<path>.base_layer.bias, <p>.bias  trained biases          Full at slot bias
    base_model.model.<path>.<parameter>                modules_to_save         Full at that slot
    base_model.model.<path>.token_adapter.trainable_tokens_delta  [n, dim]     TokenRows (absolute rows)
    base_model.model.<path>.base_layer.weight          copy of the base's own  not part of the adapter

Older files write the adapter's name too (lora_A.default.weight). On read the tensors are the truth: every one must
land, ranks come from shapes, alphas from the config's patterns; what the config says beyond that is checked against
them and reported. Pure functions on plain data; PEFT is not needed. `to_peft` is in `peft_write`, `matches` in
`peft_match`, `parse_config` in `peft_config`.
"""

import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from deltaw.core.errors import FileError, faults
from deltaw.core.host import HostSpec
from deltaw.core.method import Method, Site
from deltaw.core.state import AdapterState
from deltaw.formats.peft_config import DUMMY, check, parse_config
from deltaw.formats.peft_experts import NESTED, full_name, is_stack, sites
from deltaw.formats.peft_kind import Kind, Ranked
from deltaw.formats.peft_match import matches, named, saved, shadowed
from deltaw.formats.peft_methods import KINDS, kind_of
from deltaw.formats.peft_write import PREFIX, to_peft
from deltaw.methods.full import Full
from deltaw.methods.patterns import first_hit
from deltaw.methods.token_rows import TokenRows

__all__ = ["base_copies", "from_peft", "matches", "parse_config", "to_peft"]

_NAME = r"(?:\.(?P<name>(?!weight$|bias$)[^.]+))?"  # the adapter's name, in older files
_ROWS = re.compile(rf"(?P<path>.+)\.token_adapter\.trainable_tokens_delta{_NAME}")
_COPY = re.compile(r"(?P<path>.+?)\.(?:token_adapter\.)?base_layer\.weight")
_ORIGINAL = re.compile(r"(?P<path>.+)\.original_module\.(?P<slot>.+)")
_SAVED = re.compile(r"(?P<path>.+)\.modules_to_save(?:\.default)?\.(?P<slot>.+)")


@dataclass
class _Sorted:
    """The tensors of a file by what they are."""

    adapted: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """Path in the keys → end of the key → tensor."""
    shared: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)
    whole: dict[Site, Tensor] = field(default_factory=dict)
    copies: dict[str, Tensor] = field(default_factory=dict)
    originals: list[str] = field(default_factory=list)
    names: set[str] = field(default_factory=set)
    found: list[str] = field(default_factory=list)
    compiled: bool = False


def from_peft(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], *, strict: bool = True
) -> tuple[AdapterState, list[str]]:
    """A state and the notes a user should read. ConfigError for features that are not supported, FileError for keys.

    strict=False leaves out what cannot be placed, with a note each.
    """
    notes, kind = check(config, strict=strict), kind_of(config)
    parts = _sort(config, tensors, kind)
    methods: dict[Site, Method] = {}
    specs: dict[Site, HostSpec] = {}
    placed: dict[Site, Mapping[str, Tensor]] = {}
    where, unclear = (
        sites(config, parts.adapted) if kind.stacks else ({path: Site(path, kind.slot) for path in parts.adapted}, [])
    )
    parts.found += unclear
    for path, site in where.items():
        ends = parts.adapted[path]
        lacking = kind.incomplete(config, {kind.keys[end] for end in ends})
        piece = lacking or (
            kind.read_stack(config, full_name(site), ends)
            if is_stack(site)
            else kind.read(config, path, ends, parts.shared)
        )
        if isinstance(piece, str):
            parts.found.append(f"{site}: {piece}")
            continue
        notes += piece.notes
        methods[site], placed[site] = piece.method, piece.tensors
        if piece.spec is not None:
            specs[site] = piece.spec
    for path, rows in parts.rows.items():
        tokens = _tokens(config, path)
        if tokens is None or len(tokens) != len(rows):
            parts.found.append(f"{path}: {len(rows)} token rows, but trainable_token_indices names {tokens} for it")
            continue
        methods[Site(path)], placed[Site(path)] = TokenRows(tokens=tokens), {"rows": rows}
        specs[Site(path)] = HostSpec((rows.shape[1], max(tokens) + 1), lookup=True)  # the least vocabulary it can be
    for site, tensor in parts.whole.items():
        methods[site], placed[site] = Full(), {"copy": tensor}
        specs[site] = HostSpec(tuple(tensor.shape), linear=False)
    if len(parts.names) > 1:
        parts.found.append(f"it holds several adapters ({', '.join(sorted(parts.names))}): split it into a file each")
    if parts.found and strict:
        raise faults(FileError, "the adapter's tensors cannot be read", parts.found)
    if not methods:
        raise FileError("the adapter's file holds no tensor of an adapter")
    notes += [f"left out: {fault}" for fault in parts.found]
    if copied := [*parts.copies, *parts.originals]:
        notes.append(f"{', '.join(copied)}: PEFT's copy of the base's own, not part of the adapter, left out")
    notes += ["keys say _orig_mod: saved from a compiled model, read without it"] if parts.compiled else []
    notes += _dead(config, methods, kind)
    meta = {"task_type": config["task_type"]} if config.get("task_type") else {}
    return AdapterState(methods, placed, specs, base=None, meta=meta), notes


def base_copies(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The base's own embeddings that a file carries beside the adapter, by their names in the model.

    Only those PEFT insists on to be the same; what stood under a module that is replaced does not matter.
    """
    return _sort(config, tensors, kind_of(config)).copies


def _sort(config: Mapping[str, Any], tensors: Mapping[str, Tensor], kind: Kind) -> _Sorted:
    parts, whole_modules = _Sorted(), config.get("modules_to_save") or ()
    ends = [(end, _ending(end)) for end in (*kind.keys, *kind.unread)]
    others = [(end, k) for k in KINDS.values() for end in k.keys if end not in kind.keys]
    for key, tensor in tensors.items():
        if key in kind.shared:
            parts.shared[key] = tensor
            continue
        if not key.startswith(PREFIX):
            parts.found.append(
                f"key {key!r} does not begin with {PREFIX!r}: the file was not written by PEFT, or renamed"
            )
            continue
        name = key.removeprefix(PREFIX)
        if "_orig_mod." in name:
            name, parts.compiled = name.replace("_orig_mod.", ""), True
        if shadowed(whole_modules, name.rpartition(".")[0]):  # in here names like lora_A are the base's own
            _whole(parts, name, tensor)
        elif found := next(((end, hit) for end, rule in ends if (hit := rule.fullmatch(name))), None):
            _adapted(parts, kind, *found, tensor, key)
        elif rows := _ROWS.fullmatch(name):
            parts.rows[rows["path"]] = tensor
            parts.names |= {rows["name"]} if rows["name"] else set()
        elif other := next((k for end, k in others if _ending(end).fullmatch(name)), None):
            parts.found.append(f"key {key!r} is a tensor of {other.label}, and the config says {kind.called(config)}")
        else:
            _whole(parts, name, tensor)
    return parts


@functools.cache
def _ending(end: str) -> re.Pattern[str]:
    """Keys of this end; the adapter's name may stand after the first word."""
    word, dot, rest = end.partition(".")
    return re.compile(rf"(?P<path>.+)\.{re.escape(word)}{_NAME}{re.escape(dot + rest)}")


def _adapted(parts: _Sorted, kind: Kind, end: str, hit: re.Match[str], tensor: Tensor, key: str) -> None:
    path, name = hit["path"], hit["name"]
    if end in kind.unread:
        parts.found.append(f"key {key!r}: {kind.unread[end]} is not supported yet")
    elif path.endswith(NESTED) and not kind.stacks:
        parts.found.append(f"key {key!r}: PEFT has no {kind.label} inside another (target_parameters)")
    elif end in parts.adapted.setdefault(path, {}):
        parts.found.append(f"key {key!r}: {path}.{end} is in the file twice")
    else:
        parts.adapted[path][end] = tensor
        parts.names |= {name} if name else set()


def _whole(parts: _Sorted, name: str, tensor: Tensor) -> None:
    """A fully trained parameter, or a copy of the base's own."""
    if hit := _ORIGINAL.fullmatch(name):
        parts.originals.append(f"{hit['path']}.{hit['slot']}")
        return
    if hit := _COPY.fullmatch(name):
        parts.copies[f"{hit['path']}.weight"] = tensor
        return
    hit = _SAVED.fullmatch(name)
    name = f"{hit['path']}.{hit['slot']}" if hit else name.replace(".base_layer.", ".")
    path, _, slot = name.rpartition(".")
    known = parts.whole.setdefault(Site(path, slot), tensor)
    if known is not tensor and not torch.equal(known, tensor):
        parts.found.append(f"{name} is in the file twice, with different values")


def _tokens(config: Mapping[str, Any], path: str) -> tuple[int, ...] | None:
    """A list is for the input embedding, a table is by (the end of) the module's path."""
    given = config.get("trainable_token_indices")
    if isinstance(given, Mapping):
        given = next((ids for name, ids in given.items() if path.endswith(name)), None)
    return None if given is None else tuple(given)


def _dead(config: Mapping[str, Any], methods: Mapping[Site, Method], kind: Kind) -> list[str]:
    """What the config names and the file lacks, and the other way round."""
    held = [site for site, method in methods.items() if kind.holds(method)]
    adapted = [site.path for site in held if not is_stack(site)]
    stacks = [full_name(site) for site in held if is_stack(site)]
    config = {**config, "target_modules": kind.targets(config)}
    whole = {site.path for site, method in methods.items() if isinstance(method, Full)}
    above = {".".join(path.split(".")[: i + 1]) for path in whole for i in range(path.count(".") + 1)}
    targets, asked, notes = config.get("target_modules"), config.get("modules_to_save") or (), []
    if isinstance(targets, str) and (targets.lower() == "all-linear" or targets == DUMMY):
        targets = None
    if isinstance(targets, str):
        notes += _lacking("target_modules", [] if any(re.fullmatch(targets, path) for path in adapted) else [targets])
    else:
        dead = [name for name in sorted(targets or ()) if not any(named([name], path) for path in adapted)]
        notes += _lacking("target_modules", dead)
    extra = sorted(set(adapted) - set(matches(config, adapted))) if targets else []
    if extra:
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        notes.append(f"the file adapts {extra[0]}{more}, which target_modules does not select: loaded all the same")
    weights = [*stacks, *(f"{path}.weight" for path in adapted)]
    parameters = config.get("target_parameters") or ()
    notes += _lacking("target_parameters", [p for p in parameters if not any(named([p], w) for w in weights)])
    notes += _lacking("modules_to_save", [m for m in dict.fromkeys(asked) if not any(saved([m], p) for p in above)])
    for option in ("rank_pattern", "alpha_pattern") if isinstance(kind, Ranked) else ():
        patterns = config.get(option) or {}
        notes += _lacking(
            option, [p for p in patterns if not any(first_hit({p: True}, path) for path in [*adapted, *stacks])]
        )
    if config.get("trainable_token_indices") and not any(isinstance(method, TokenRows) for method in methods.values()):
        notes += _lacking("trainable_token_indices", ["tokens"])
    return notes


def _lacking(option: str, dead: Iterable[str]) -> list[str]:
    listed = ", ".join(map(repr, dead))
    return [f"{option} names {listed}, for which the file holds no tensor"] if listed else []
