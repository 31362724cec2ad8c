"""A state dict of microsoft/LoRA (`loralib.lora_state_dict`) → states. s = α/r; the file holds no α: the user says it.

    layer          lora_A            lora_B                ΔW as its forward computes it
    Linear         [r, in]           [out, r]              B·A
    Embedding      [r, vocab]        [dim, r]              B·A, of the transposed table
    MergedLinear   [n·r, in]         [n·out/m, r]          n of m blocks of rows: B₁A₁, …; the others zero (enable_lora)
    Conv2d         [r·k, in·k]       [out·k, r·k]          (B·A).view(out, in, k, k)
    <path>.bias    [out]                                   a trained bias (bias="all" or "lora_only")

What a layer is, only the base tells. Conv2d's change has rank up to r·k² as a matrix [out, in·k²], and that LoRA is exact:
A = I_k ⊗ lora_A, B = lora_B.view(out, k·r·k). Which blocks of a fused weight are enabled is in no file: the user says it.

Source: microsoft/LoRA `loralib/layers.py`, `loralib/utils.py` (0771c1e).
"""

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from deltaw.core.errors import UseError
from deltaw.core.host import HostSpec
from deltaw.formats.foreign import Parts, Piece, Reading, States, grouped, lora, matrices
from deltaw.formats.peft_valid import positive

KEY = re.compile(r"(?:module\.)?(?P<path>.+)\.(?P<end>lora_A|lora_B|bias)")
"""Every key of such a file; `module.` is left by DistributedDataParallel."""


def from_loralib(
    tensors: Mapping[str, Tensor],
    parts: Parts,
    *,
    alpha: float | None = None,
    enable_lora: Sequence[bool] | None = None,
) -> tuple[States, list[str]]:
    """(states by part, notes). alpha: lora_alpha of the training, the same for all layers; enable_lora: of MergedLinear.

    UseError where alpha is missing, or a fused layer does not say which blocks; FileError for keys and shapes.
    """
    if not positive(alpha):
        raise UseError(
            "loralib's files hold no alpha, and the change is scaled by alpha/r: say the lora_alpha that it was trained "
            "with (--alpha 16)"
        )
    assert alpha is not None
    reading, pairs, biases = Reading(parts), dict[str, dict[str, Tensor]](), dict[str, Tensor]()
    for key, tensor in tensors.items():
        hit = KEY.fullmatch(key)
        if hit is None:
            reading.found.append(f"key {key!r} is not one of loralib's: it has no lora_A, lora_B or bias")
        elif hit["end"] == "bias":
            biases[hit["path"]] = tensor
        else:
            pairs.setdefault(hit["path"], {})[hit["end"]] = tensor
    role, layout = next(iter(parts.items()))
    for path, pair in pairs.items():
        spec = reading.spec(role, path, path)
        if spec is None:
            continue
        if len(pair) < 2:
            reading.found.append(f"{path}: missing {'lora_B' if 'lora_A' in pair else 'lora_A'}")
            continue
        piece = _piece(pair["lora_A"], pair["lora_B"], alpha, spec, enable_lora)
        if isinstance(piece, str):
            reading.found.append(f"{path}: {piece}")
        else:
            reading.put(role, path, *piece)
    for path, bias in biases.items():
        if "bias" in layout.entries.get(path, ()):
            reading.put_bias(role, path, bias)
        else:
            reading.found.append(f"key '{path}.bias': the base has no such bias")
    return reading.done("loralib")


def _piece(a: Tensor, b: Tensor, alpha: float, spec: HostSpec, enabled: Sequence[bool] | None) -> Piece | str:
    shapes = f"lora_A is {tuple(a.shape)} and lora_B is {tuple(b.shape)} on a layer {'×'.join(map(str, spec.shape))}"
    if not matrices(a, b) or spec.stack is not None:
        return f"{shapes}: they are no pair of matrices for it"
    if len(spec.shape) > 2:
        return _conv(a, b, alpha, spec) if len(spec.shape) == 4 else f"{shapes}: loralib has Conv2d alone"
    if a.shape[0] == b.shape[1] and b.shape[0] == spec.shape[0]:
        return lora(a, b, alpha)
    n, remainder = divmod(a.shape[0], b.shape[1])
    if remainder or n == 0 or b.shape[0] % n or spec.shape[0] % (b.shape[0] // n):
        return f"{shapes}: their ranks differ, and they are no blocks of a fused weight (MergedLinear)"
    blocks = spec.shape[0] // (b.shape[0] // n)
    if enabled is None and n < blocks:
        example = ",".join(["true"] * n + ["false"] * (blocks - n))
        return (
            f"{n} of {blocks} blocks of its rows are adapted, and the file does not say which: --enable-lora {example}"
        )
    chosen = [True] * blocks if enabled is None else list(enabled)
    if len(chosen) != blocks or sum(chosen) != n:
        return f"enable_lora has {sum(chosen)} of {len(chosen)} blocks, the tensors are {n} of {blocks}"
    return lora(*grouped(a, b, chosen), alpha * n)  # of rank n·r: the scale stays α/r


def _conv(a: Tensor, b: Tensor, alpha: float, spec: HostSpec) -> Piece | str:
    out, inside, k, other = spec.shape
    r = a.shape[0] // k
    if (
        k != other
        or a.shape != (r * k, inside * spec.groups * k)
        or b.shape != (out * k // spec.groups, r * k)
        or spec.groups > 1
    ):
        want = f"expected ({r}·{k}, {inside}·{k}) and ({out}·{k}, {r}·{k})"
        return f"lora_A is {tuple(a.shape)} and lora_B is {tuple(b.shape)}, {want} for a convolution {k}×{other} of one group"
    wide = torch.kron(torch.eye(k, dtype=a.dtype), a.contiguous())  # [k·r·k, k·in·k]
    rank = len(wide)
    return lora(wide.view(rank, inside, k, k), b.reshape(out, rank, 1, 1), alpha / r * rank)
