"""One module in kohya's and LyCORIS' files → a method of ours and its tensors, and back. r = rank, s = α/r throughout.

    lora_up [out, r, 1…] · lora_down [r, in, *kernel]                 LoRA; with dora_scale [out, 1…] DoRA
    … lora_mid [r, r, *kernel], lora_down [r, in, 1…]                 Tucker: A[m, i, k] = Σₙ mid[m, n, k] · down[n, i]
    hada_w1_a [out, r], hada_w1_b [r, fan_in], w2 the same            LoHa
    … hada_t1 [r, r, *kernel], w1_a [r, out], w1_b [r, in]            Tucker: B₁ = w1_aᵀ, A₁[i, d, k] = Σⱼ t1[i, j, k] · w1_b[j, d]
    lokr_w1 | lokr_w1_a · lokr_w1_b,  lokr_w2 | lokr_w2_a · lokr_w2_b LoKr; s = 1 where both are full
    … lokr_t2 [r, r, *kernel], w2_a [r, c], w2_b [r, d]               Tucker, as above

All Tucker forms are exactly ones without a core tensor, of the same rank. A LoKr that is cut into its factors as ours never
is (LyCORIS' factor gives the larger part to the other side) is taken with both factors in full, or becomes a LoRA of rank
min(a, b)·r: exactly, where that is low. α missing or 0 means α = r. DoRA: ours scales rows; LyCORIS' other form, a scale
per input [1, in, …], has no place here.

Sources: kohya-ss/sd-scripts `networks/lora.py`; KohakuBlueleaf/LyCORIS `modules/{locon,loha,lokr}.py`, `functional/general.py`.
"""

from collections.abc import Collection, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from deltaw.core.errors import ConfigError, UseError
from deltaw.core.host import HostSpec
from deltaw.core.method import Method, Shapes
from deltaw.formats.foreign import Piece, lora, number, shaped
from deltaw.methods.dora import DoRA
from deltaw.methods.loha import LoHa
from deltaw.methods.lokr import LoKr
from deltaw.methods.lora import LoRA

DOWN, UP, MID, ALPHA, SCALE = "lora_down.weight", "lora_up.weight", "lora_mid.weight", "alpha", "dora_scale"
HADA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")
ENDS = (DOWN, UP, MID, ALPHA, SCALE, *HADA, "hada_t1", "hada_t2", *LOKR, "lokr_t2")
UNREAD: Mapping[str, str] = {
    "diff": "a full difference",
    "diff_b": "a difference of the bias",
    "w_norm": "a trained norm",
    "b_norm": "a trained norm",
    "weight": "LyCORIS' IA3",
    "on_input": "LyCORIS' IA3",
    "oft_blocks": "LyCORIS' OFT, which rotates outputs",
    "oft_diag": "LyCORIS' OFT, which rotates outputs",
    "rescale": "LyCORIS' OFT, which rotates outputs",
    "a1.weight": "GLoRA",
    "a2.weight": "GLoRA",
    "b1.weight": "GLoRA",
    "b2.weight": "GLoRA",
    "bm.weight": "GLoRA",
    "scalar": "a scalar of an unfinished LyCORIS training",
    "lokr_t1": "a core tensor of LoKr's small factor",
    "lora_up.bias": "a bias on lora_up",
    "lora_down.bias": "a bias on lora_down",
}
"""Ends of keys that deltaw has no method for → what they are."""


def read(group: Mapping[str, Tensor], spec: HostSpec) -> Piece | str:
    """The method and tensors of `group` (end of the key → tensor) on a layer of this shape, or why there is none."""
    if ALPHA in group and group[ALPHA].numel() != 1:
        return f"alpha must be one number, its tensor holds {group[ALPHA].numel()}: fetch the file again"
    try:
        return _read(group, spec)
    except (RuntimeError, IndexError):  # torch, of shapes that do not go together
        shapes = ", ".join(f"{end} {tuple(tensor.shape)}" for end, tensor in sorted(group.items()))
        return f"its tensors do not go together: {shapes}"
    except ConfigError as error:  # an alpha or a rank that is none
        return str(error)


def _read(group: Mapping[str, Tensor], spec: HostSpec) -> Piece | str:
    ends = set(group) - {ALPHA, SCALE}
    if ends in ({DOWN, UP}, {DOWN, UP, MID}):
        return _lora(group, spec)
    if SCALE in group:
        return f"dora_scale beside {', '.join(sorted(ends)) or 'nothing'}: deltaw has DoRA on LoRA alone"
    if ends in (set(HADA), {*HADA, "hada_t1", "hada_t2"}):
        return _loha(group)
    if ends and ends <= {*LOKR, "lokr_t2"}:
        return _lokr(group, spec)
    return f"{', '.join(sorted(group))} are not the tensors of one method"


def _alpha(group: Mapping[str, Tensor], rank: int) -> float:
    alpha = number(group[ALPHA]) if ALPHA in group else 0.0
    return alpha or float(rank)


def _lora(group: Mapping[str, Tensor], spec: HostSpec) -> Piece | str:
    a, b = group[DOWN], group[UP]
    if MID in group:
        a = _tucker(group[MID], a.flatten(1))
    if a.ndim < 2 or b.ndim < 2 or a.shape[0] != b.shape[1]:
        return f"lora_down is {tuple(a.shape)} and lora_up is {tuple(b.shape)}: their ranks differ"
    magnitude = group.get(SCALE)
    if magnitude is not None and (len(magnitude) != spec.shape[0] or magnitude.numel() != spec.shape[0]):
        axis = "a scale for each input" if magnitude.ndim > 1 and magnitude.shape[0] == 1 else "not one for each output"
        return (
            f"dora_scale is {tuple(magnitude.shape)}, {axis}: deltaw's DoRA has one for each of {spec.shape[0]} outputs"
        )
    return lora(*shaped(a, b, spec), _alpha(group, len(a)), magnitude)


def _loha(group: Mapping[str, Tensor]) -> Piece | str:
    tensors = {name: group[name] for name in HADA}
    for i in ("1", "2") if "hada_t1" in group else ():
        core, up, down = group[f"hada_t{i}"], group[f"hada_w{i}_a"], group[f"hada_w{i}_b"]
        tensors[f"hada_w{i}_a"], tensors[f"hada_w{i}_b"] = up.T.contiguous(), _tucker(core, down).flatten(1)
    rank = tensors["hada_w1_b"].shape[0]
    alpha = _alpha(group, rank)
    if alpha < 0:
        tensors["hada_w1_a"] = -tensors["hada_w1_a"]
    return LoHa(rank=rank, alpha=abs(alpha)), tensors


def _lokr(group: Mapping[str, Tensor], spec: HostSpec) -> Piece | str:
    """The first form that cuts the layer as the file does: as it is, both factors in full, else a LoRA."""
    tensors = {name: group[name] for name in LOKR if name in group}
    if "lokr_t2" in group:
        tensors["lokr_w2_a"] = group["lokr_w2_a"].T.contiguous()
        tensors["lokr_w2_b"] = _tucker(group["lokr_t2"], group["lokr_w2_b"])
    if "lokr_w2_b" in tensors:
        tensors["lokr_w2_b"] = tensors["lokr_w2_b"].flatten(1)
    if any((f"lokr_w{i}" in tensors) == ({f"lokr_w{i}_a", f"lokr_w{i}_b"} <= tensors.keys()) for i in "12"):
        return f"{', '.join(sorted(group))} are not the two factors of a LoKr"
    ranks = {tensors[name].shape[0] for name in ("lokr_w1_b", "lokr_w2_b") if name in tensors}
    if len(ranks) > 1:
        return f"its factors have ranks {' and '.join(map(str, sorted(ranks)))}"
    rank = next(iter(ranks), 0)
    scale = _alpha(group, rank) / rank if rank else 1.0
    if scale < 0:
        small = "lokr_w1" if "lokr_w1" in tensors else "lokr_w1_a"
        scale, tensors[small] = -scale, -tensors[small]
    c, d = (_full(tensors, f"lokr_w{i}") for i in "12")
    full = {"lokr_w1": c, "lokr_w2": d.reshape(d.shape[0], -1, *spec.shape[2:])}
    for form, r in ((tensors, rank), (full, 0)):
        r = r or max(full["lokr_w2"].shape[:2])
        method = _cut(form, LoKr(rank=r, alpha=scale * r, decompose_both="lokr_w1" not in form), {-1, *c.shape}, spec)
        if method is not None:
            return method, form
    factors = LoKr(rank=rank or 1, alpha=scale * (rank or 1)).factors(tensors)
    if factors is None:
        return "it is cut into its two factors as deltaw's LoKr never is, and its change is not of low rank"
    return lora(*shaped(factors.a, factors.b, spec), factors.scale * len(factors.a))


def _full(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    whole = tensors.get(name)
    return tensors[f"{name}_a"].float() @ tensors[f"{name}_b"].float() if whole is None else whole


def _cut(tensors: Mapping[str, Tensor], method: LoKr, factors: Collection[int], spec: HostSpec) -> LoKr | None:
    """The method with the decompose_factor that gives tensors of these shapes."""
    given, shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}, Shapes()
    tried = (replace(method, decompose_factor=factor) for factor in sorted(factors))
    return next((m for m in tried if m.unfit(spec) is None and dict(shapes.of(m, spec)[0]) == given), None)


def _tucker(core: Tensor, down: Tensor) -> Tensor:
    """core [r, r, *kernel] and down [r, in] as one [r, in, *kernel], in fp32: files in 16 bits would be rounded again."""
    return torch.einsum("mn...,ni->mi...", core.float(), down.float())


def write(method: Method, tensors: Mapping[str, Tensor], spec: HostSpec) -> dict[str, Tensor]:
    """End of the key → tensor. UseError where kohya's files have no form for the method or the layer."""
    if spec.lookup or spec.stack is not None or spec.groups > 1 or not spec.linear:
        kind = (
            "embeddings" if spec.lookup else "stacks of experts" if spec.stack is not None else "grouped convolutions"
        )
        raise UseError(f"kohya's files hold no adapters on {kind}")
    method, tensors = method.finished(tensors)
    if type(method) in (LoRA, DoRA):
        ends = {DOWN: tensors["lora_A"], UP: tensors["lora_B"]}
        alpha = method.scale * len(tensors["lora_A"])  # type: ignore[attr-defined]
        if isinstance(method, DoRA):
            ends[SCALE] = tensors["magnitude"].view(-1, *[1] * (len(spec.shape) - 1))
    elif type(method) in (LoHa, LoKr):
        ends, alpha = dict(tensors), method.alpha  # type: ignore[attr-defined]
        if type(method) is LoKr and not any(
            name.endswith("_b") for name in ends
        ):  # other readers take the scale of two full factors for 1
            ends["lokr_w1"] = method.scale * ends["lokr_w1"]
    else:
        raise UseError(
            f"kohya's files have no form for {method.name}: make it a LoRA first (deltaw mix ADAPTER --rank 16 --output …)"
        )
    return {**ends, ALPHA: torch.tensor(float(alpha))}
