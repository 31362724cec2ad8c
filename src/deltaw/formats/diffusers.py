"""diffusers' LoRA files ↔ states by part. Facts: diffusers 0.42, `loaders/`, `utils/state_dict_utils.py`.

    <part>.<path>.lora_A.weight, lora_B.weight, lora_magnitude_vector     since PEFT is the backend; what we write
    <part>.<path>.lora.down.weight, lora.up.weight                        UNet, before
    <part>.<path>.lora_linear_layer.down.weight, up.weight                text encoder, before
    <part>.<…attn1>.processor.to_q_lora.down.weight                       attention processors: <…attn1>.to_q
    <part>.<…self_attn>.to_q_lora.down.weight                             of a text encoder: <…self_attn>.q_proj

The part (unet., text_encoder., …) is missing in files of one model. The scale is in no key: it is α/r of the LoraConfig
that the safetensors header may hold (lora_adapter_metadata, keys "<part>.r", …), or of <path>.alpha tensors; a file with
neither means α = r. All of this is PEFT's format under other names, and is read and written by `peft`.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from deltaw.core.errors import ConfigError, FileError, UseError, faults
from deltaw.core.state import AdapterState
from deltaw.formats.foreign import Parts, Reading, States, number
from deltaw.formats.kohya_names import CLIP
from deltaw.formats.peft import from_peft
from deltaw.formats.peft_write import PREFIX, to_peft

HEADER = "lora_adapter_metadata"
ROLES = ("unet", "transformer", "transformer_2", "text_encoder", "text_encoder_2", "text_encoder_3")
"""Parts of a pipeline that carry adapters."""
_NAMED = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "out_proj"}  # CLIP's attention
_PROCESSED = {"q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"}  # diffusers' attention
_END = {"down": "lora_A.weight", "up": "lora_B.weight"}
_WAYS = "|".join(("down", "up"))
_OLD = rf"(?P<above>.+?)(?P<processor>\.processor)?\.to_(?P<which>q|k|v|out)_lora\.(?P<old>{_WAYS})\.weight"
_ADDED = rf"(?P<added>.+?)\.processor\.(?P<name>add_[kv]_proj)_lora\.(?P<new>{_WAYS})\.weight"
_DOTTED = rf"(?P<path>.+)\.(?:lora|lora_linear_layer)\.(?P<way>{_WAYS})\.weight"
_PEFT = (
    r"(?P<module>.+)\.(?P<end>lora_[AB]\.weight|lora_magnitude_vector(?:\.weight)?|lora_B\.bias|lokr_w[12](?:_[ab])?)"
)
KEY = re.compile(rf"(?:(?P<role>{'|'.join(ROLES)})\.)?(?:{_ADDED}|{_OLD}|{_DOTTED}|{_PEFT}|(?P<scaled>.+)\.alpha)")
"""Every key of such a file."""
MAGNITUDE = ".lora_magnitude_vector"
"""Without ".weight" in PEFT's files; transformers 5.23 then leaves those of a text encoder out, and both read it with."""
ENCODER = ("q_proj", "k_proj", "v_proj", "out_proj")


def place(key: str) -> tuple[str | None, str, str] | None:
    """(role, path, PEFT's end) of a key, the end "alpha" for a scale; None where it is no key of diffusers."""
    hit = KEY.fullmatch(key)
    if hit is None:
        return None
    if hit["added"]:
        return hit["role"], f"{hit['added']}.{hit['name']}", _END[hit["new"]]
    if hit["above"]:
        return (
            hit["role"],
            f"{hit['above']}.{(_PROCESSED if hit['processor'] else _NAMED)[hit['which']]}",
            _END[hit["old"]],
        )
    if hit["path"]:
        return hit["role"], hit["path"].replace(".processor.", "."), _END[hit["way"]]
    return (hit["role"], hit["module"], hit["end"]) if hit["module"] else (hit["role"], hit["scaled"], "alpha")


def from_diffusers(
    tensors: Mapping[str, Tensor], parts: Parts, header: Mapping[str, str] | None = None
) -> tuple[States, list[str]]:
    """(states by part, notes). FileError names every key that is unknown, incomplete or does not fit the base."""
    reading, metadata = Reading(parts), _metadata(header or {})
    groups: dict[str, dict[str, dict[str, Tensor]]] = {}  # role → path → end → tensor
    prefixed: dict[str, bool] = {}
    for key, tensor in tensors.items():
        placed = place(key)
        if placed is None:
            reading.found.append(f"key {key!r} is not one of diffusers' files")
            continue
        said, path, end = placed
        if said and list(parts) == ["model"]:  # no pipeline: the word is the model's own, as GPT-2's transformer
            said, path = None, f"{said}.{path}"
        role = _role(said, path, parts)
        if role is None:
            reading.found.append(
                f"key {key!r}: the base has {', '.join(parts)}, and the key is of {said or 'none of them'}"
            )
            continue
        layout = parts[role]
        other = path.removeprefix(f"{CLIP}.") if path.startswith(f"{CLIP}.") else f"{CLIP}.{path}"
        path = (
            other
            if role.startswith("text_encoder") and path not in layout.entries and other in layout.entries
            else path
        )
        prefixed[role] = said is not None
        if reading.spec(role, path, key) is not None:
            groups.setdefault(role, {}).setdefault(path, {})[end] = tensor
    for role, layers in groups.items():
        own = {k.removeprefix(f"{role}."): v for k, v in metadata.items() if k.startswith(f"{role}.")}
        config, notes = _config(layers, own if prefixed[role] else metadata, reading)
        flat = {f"{PREFIX}{p}.{end}": t for p, ends in layers.items() for end, t in ends.items() if end != "alpha"}
        try:
            state, more = from_peft(config, flat)
        except (ConfigError, FileError) as error:
            reading.found += error.faults or (str(error),)
            continue
        reading.notes += [f"{role}: {note}" for note in (*notes, *more)]
        for site, method in state.methods.items():
            reading.put(role, site.path, method, state.tensors[site])
    return reading.done("diffusers")


def _role(said: str | None, path: str, parts: Parts) -> str | None:
    """The part that a key belongs to: as it says, else the only one, else the one that has such a module."""
    if said is not None:
        return said if said in parts else None
    having = [role for role, layout in parts.items() if path in layout.entries]
    return next(iter(parts)) if len(parts) == 1 else having[0] if len(having) == 1 else None


def _metadata(header: Mapping[str, str]) -> dict[str, Any]:
    try:
        found = json.loads(header.get(HEADER) or "{}")
    except ValueError:
        raise FileError(f"the header's {HEADER} is not JSON: the file is damaged, fetch it again") from None
    if not isinstance(found, dict):
        raise FileError(f"the header's {HEADER} is a {type(found).__name__}, expected a table: fetch the file again")
    return found


def _config(
    layers: Mapping[str, Mapping[str, Tensor]], metadata: Mapping[str, Any], reading: Reading
) -> tuple[dict[str, Any], list[str]]:
    """PEFT's config of one part, and notes: as the header says, else of the ranks and of the α that are in the file."""
    told = {path: ends["alpha"] for path, ends in layers.items() if "alpha" in ends}
    reading.found += [
        f"key '{path}.alpha' must be one number, its tensor holds {alpha.numel()}: fetch the file again"
        for path, alpha in told.items()
        if alpha.numel() != 1
    ]
    alphas = {path: number(alpha) for path, alpha in told.items() if alpha.numel() == 1}
    kind = "LOKR" if any(end.startswith("lokr_") for ends in layers.values() for end in ends) else "LORA"
    if metadata:
        if alphas:
            reading.found.append(f"the header gives alpha, and so do tensors ({next(iter(alphas))}.alpha): one must go")
        return {"peft_type": kind, **metadata}, []
    ranks = {p: rank for p, ends in layers.items() if (rank := _rank(ends)) is not None}
    for path in alphas.keys() - ranks.keys():
        reading.found.append(f"key '{path}.alpha': the file holds no adapter of that layer")
    alphas = {path: alphas.get(path, float(rank)) for path, rank in ranks.items()}
    given = sum("alpha" in ends for ends in layers.values())
    config = {
        "peft_type": kind,
        "use_dora": any(end.startswith("lora_magnitude_vector") for ends in layers.values() for end in ends),
        "rank_pattern": {f"^{re.escape(path)}": rank for path, rank in ranks.items()},
        "alpha_pattern": {f"^{re.escape(path)}": alpha for path, alpha in alphas.items()},
    }
    if kind == "LOKR":
        del config["use_dora"]
    said = "the file says no alpha, neither in its header nor as tensors: read as alpha = rank, a scale of 1, as diffusers does"
    return config, [] if given == len(ranks) else [said]


def _rank(ends: Mapping[str, Tensor]) -> int | None:
    down = next((ends[end] for end in ("lora_A.weight", "lokr_w2_b", "lokr_w1_b") if end in ends), None)
    if down is None and "lokr_w2" in ends:
        return int(max(ends["lokr_w2"].shape))
    return None if down is None else int(down.shape[0])


def to_diffusers(
    states: Mapping[str, AdapterState], parts: Parts
) -> tuple[dict[str, Tensor], dict[str, str], list[str]]:
    """(tensors, header, notes) of one file for `load_lora_weights`. UseError where diffusers has no form for the adapter.

    The header holds each part's whole LoraConfig: without it diffusers takes α = r, and the scale is lost.
    """
    tensors, metadata, found, notes = dict[str, Tensor](), dict[str, Any](), list[str](), list[str]()
    for role, state in states.items():
        if role not in ROLES:
            found.append(f"a {role} is no part of a diffusers pipeline ({', '.join(ROLES)})")
            continue
        try:
            config, flat = to_peft(state, parts.get(role))
        except ConfigError as error:
            found += [f"{role}: {fault}" for fault in error.faults or (str(error),)]
            continue
        named = {key.removeprefix(PREFIX): tensor for key, tensor in flat.items()}
        named = {key + ".weight" * key.endswith(MAGNITUDE): tensor for key, tensor in named.items()}
        found += [f"{role}: {k}: diffusers loads LoRA and DoRA on layers, nothing else" for k in named if not _loads(k)]
        tensors |= {f"{role}.{name}": tensor for name, tensor in named.items()}
        metadata |= {f"{role}.{key}": value for key, value in config.items()}
        if role.startswith("text_encoder") and not any(p.rpartition(".")[2] in ENCODER for p, _ in state.methods):
            notes.append(f"diffusers 0.42 recognises an adapter of a {role} by its attention layers, and this has none")
    if found:
        raise faults(UseError, "this adapter has no form in diffusers' files", found)
    return tensors, {"format": "pt", HEADER: json.dumps(metadata, indent=2, sort_keys=True)}, notes


def _loads(name: str) -> bool:
    return name.endswith((".lora_A.weight", ".lora_B.weight", f"{MAGNITUDE}.weight"))
