"""mlx-lm's adapter folder → states: adapters.safetensors, and adapter_config.json with fine_tune_type and lora_parameters.

    layer              lora_a           lora_b         m        ours
    Linear             [in, r]          [r, out]       [out]    A = lora_aᵀ, B = lora_bᵀ, magnitude = m (DoRA)
    Embedding          [vocab, r]       [r, dim]                A = lora_aᵀ, B = lora_bᵀ

Experts (SwitchLinear) have other modules and names in transformers, which fuses gate and up: their keys are unknown here.

y = W x + scale · (x · lora_a) · lora_b: the scale is a number of its own and no α/r. Folders that also hold an `alpha`
mean scale · alpha/r in mlx-lm of early 2024, and ignore it later: the user says which.

Sources: ml-explore/mlx-lm `tuner/{lora,dora,utils}.py` (200af25, 35d46a9, 0367286); scale · (alpha / r) in mlx-examples.
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from deltaw.core.errors import FileError, UseError
from deltaw.core.host import HostSpec
from deltaw.formats.foreign import Parts, Piece, Reading, States, lora, matrices
from deltaw.formats.peft_valid import number, positive

KEY = re.compile(r"(?P<path>.+)\.(?P<end>lora_a|lora_b|m)")
"""Every key of such a file."""
FILE = "adapters.safetensors"
ASK = "say the scale times the rank (--alpha)"


def scale_of(config: Mapping[str, Any]) -> float:
    """The scale that a folder's config says. FileError where it says none, UseError where it can mean two."""
    kind, own = config.get("fine_tune_type", "lora"), config.get("lora_parameters")
    own = own if isinstance(own, Mapping) else {}
    if kind not in ("lora", "dora"):
        raise FileError(f"fine_tune_type is {kind!r} in the folder's config: only lora and dora are adapters")
    scale = own.get("scale")
    if not number(scale) or not scale:
        raise FileError(f"the folder's config holds no lora_parameters.scale: {ASK}")
    if own.get("alpha") is not None:
        raise UseError(
            f"lora_parameters has scale {scale:g} and alpha {own['alpha']}: mlx-lm of early 2024 multiplied by "
            f"scale · alpha/rank, later versions by scale alone; {ASK}"
        )
    return float(scale)


def from_mlx(
    tensors: Mapping[str, Tensor], parts: Parts, config: Mapping[str, Any], *, alpha: float | None = None
) -> tuple[States, list[str]]:
    """(states by part, notes). alpha: scale · rank of every layer, in place of what the config says."""
    if alpha is not None and not positive(alpha):
        raise UseError(f"alpha {alpha} is not a positive number: {ASK}")
    reading, scale = Reading(parts), None if alpha is not None else scale_of(config)
    groups: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        hit = KEY.fullmatch(key)
        if hit is None:
            reading.found.append(f"key {key!r} is not one of an adapter of mlx-lm (lora_a, lora_b, m)")
        else:
            groups.setdefault(hit["path"], {})[hit["end"]] = tensor
    role = next(iter(parts))
    for path, group in groups.items():
        spec = reading.spec(role, path, path)
        if spec is None:
            continue
        piece = _piece(group, spec, scale, alpha)
        if isinstance(piece, str):
            reading.found.append(f"{path}: {piece}")
        else:
            reading.put(role, path, *piece)
    return reading.done("mlx-lm")


def _piece(group: Mapping[str, Tensor], spec: HostSpec, scale: float | None, alpha: float | None) -> Piece | str:
    missing = {"lora_a", "lora_b"} - set(group)
    if missing:
        return f"missing {' and '.join(sorted(missing))}"
    a, b, m = group["lora_a"], group["lora_b"], group.get("m")
    if m is not None and spec.lookup:
        return "mlx-lm scales every row of a table by itself (DoRAEmbedding), deltaw's DoRA has no such form"
    if not matrices(a, b):
        return (
            f"lora_a is {tuple(a.shape)} and lora_b is {tuple(b.shape)}: empty, quantised, or of another kind of layer"
        )
    return lora(a.T, b.T, scale * a.shape[1] if scale is not None else alpha or 0.0, m)
