"""torchtune's own adapter files (adapter_N.pt, epoch_N/adapter_model.pt) → states. s = α/r; α is in adapter_config.json.

    layers.N.attn.q_proj.lora_a.weight [r, in], lora_b.weight [out, r]; magnitude [out] (DoRA)

    torchtune                 transformers                    torchtune        transformers
    attn.q_proj, k_, v_       self_attn.q_proj, …             mlp.w1           mlp.gate_proj
    attn.output_proj          self_attn.o_proj                mlp.w2           mlp.down_proj
    output                    lm_head                         mlp.w3           mlp.up_proj

Names here are full: layers.N → model.layers.N. For models with Meta's rotary layout torchtune keeps the rows of q and k
of every head in pairs, where transformers has the first halves and then the second; with hd = head dimension

    B[h, j, i] = lora_b[h, i, j],   lora_b.view(heads, hd/2, 2, r),   B.view(heads, 2, hd/2, r)

and the same for the magnitude, which belongs to rows as well (torchtune's own export to PEFT leaves DoRA out). Qwen 2 has
no such reordering. Files that torchtune wrote for PEFT (adapter_model.safetensors beside the .pt) are PEFT's; of Qwen 2 they
have q and k reordered all the same, by the source: there the .pt is the one to convert.

Source: pytorch/torchtune `models/convert_weights.py` (00c242b), `training/checkpointing/_checkpointer.py` (0104e39). Read,
not run: torchtune is wound down and not installed here. Phi 3 (fused qkv) and vision models have other names, refused.
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from deltaw.core.errors import UseError
from deltaw.formats.foreign import Parts, Reading, States, lora, matrices
from deltaw.formats.peft_valid import positive

KEY = re.compile(
    r"(?P<path>(?:layers\.\d+\.(?:attn|mlp)\.\w+|output))\.(?P<end>lora_a\.weight|lora_b\.weight|magnitude)"
)
"""Every key of such a file."""
NAMES = {
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
}
ROTATED = {"llama": True, "mistral": True, "gemma": True, "qwen2": False}
"""model_type of transformers → are rows of q and k in another order? Others are refused: nothing here says so."""


def renamed(path: str) -> str | None:
    """The path in transformers' model, or None for a layer that has no name there."""
    if path == "output":
        return "lm_head"
    _, number, inside = path.split(".", 2)
    return f"model.layers.{number}.{NAMES[inside]}" if inside in NAMES else None


def unpaired(rows: Tensor, heads: int) -> Tensor:
    """Rows of q or k in transformers' order: [heads·hd, …], every head's pairs (i, j) as halves."""
    return rows.view(heads, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def from_torchtune(
    tensors: Mapping[str, Tensor],
    parts: Parts,
    base: Mapping[str, Any],
    config: Mapping[str, Any] | None = None,
    *,
    alpha: float | None = None,
) -> tuple[States, list[str]]:
    """(states, notes). base: the model's own config (model_type, num_attention_heads, num_key_value_heads); config: the
    folder's adapter_config.json, whose lora_alpha counts where alpha is None."""
    kind, alpha = base.get("model_type"), alpha if alpha is not None else (config or {}).get("lora_alpha")
    if kind not in ROTATED:
        raise UseError(
            f"torchtune's order of rows is not known here for {kind!r} (known: {', '.join(ROTATED)}): take the files "
            "that torchtune wrote for PEFT beside it, and check their logits"
        )
    if not positive(alpha):
        raise UseError("the file holds no alpha, and no adapter_config.json says it: give lora_alpha (--alpha 16)")
    reading, role, groups = Reading(parts), next(iter(parts)), dict[str, dict[str, Tensor]]()
    heads = {"attn.q_proj": base.get("num_attention_heads"), "attn.k_proj": base.get("num_key_value_heads")}
    for key, tensor in tensors.items():
        hit = KEY.fullmatch(key)
        if hit is None:
            reading.found.append(f"key {key!r} is not one of an adapter of torchtune")
        else:
            groups.setdefault(hit["path"], {})[hit["end"]] = tensor
    for path, group in groups.items():
        other, inside = renamed(path), path.split(".", 2)[-1]
        if other is None or reading.spec(role, other, path) is None:
            reading.found += [f"{path}: torchtune's name of no layer that is known here"] if other is None else []
            continue
        missing = {"lora_a.weight", "lora_b.weight"} - set(group)
        if missing:
            reading.found.append(f"{path}: missing {' and '.join(sorted(missing))}")
            continue
        a, b, m = group["lora_a.weight"], group["lora_b.weight"], group.get("magnitude")
        if not matrices(a, b) or (m is not None and m.shape != b.shape[:1]):
            size = "" if m is None else f" and magnitude {tuple(m.shape)}"
            reading.found.append(
                f"{path}: lora_a is {tuple(a.shape)} and lora_b is {tuple(b.shape)}{size}, expected two matrices"
                + (", and of the magnitude a number for each row of lora_b" if size else "")
            )
            continue
        if ROTATED[kind] and (
            count := heads.get(inside) or (base.get("num_attention_heads") if inside in heads else None)
        ):
            if len(b) % (2 * count):
                reading.found.append(f"{path}: lora_b is {tuple(b.shape)}, which is not {count} heads of an even size")
                continue
            b, m = unpaired(b, count), None if m is None else unpaired(m, count)
        reading.put(role, other, *lora(a, b, float(alpha or 0), m))
    return reading.done("torchtune")
