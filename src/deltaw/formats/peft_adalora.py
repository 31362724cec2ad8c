"""ADALORA in PEFT's files: lora_A [r, fan_in], lora_E [r, 1], lora_B [out, r]; scale α/(init_r + 1e-5).

rank_pattern says for every pruned module which of its init_r triplets are left; its tensors hold those alone.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from deltaw.core.errors import ConfigError
from deltaw.core.host import HostSpec
from deltaw.core.method import Method
from deltaw.formats.peft_kind import Kind, Piece
from deltaw.formats.peft_lora import LORA
from deltaw.formats.peft_valid import COUNT, SHARE, TOKENS, WHOLE, biases, number, one, positive


@dataclass(frozen=True, kw_only=True)
class AdaLoRAKind(Kind):
    def faults(self, config: Mapping[str, Any]) -> list[str]:
        return ["use_dora: AdaLoRA has none"] if config.get("use_dora") else []

    def method(self, config: Mapping[str, Any]) -> Method:
        rank = config.get("init_r") or 12
        steps = {"tinit": config.get("tinit") or 0, "tfinal": config.get("tfinal") or 0}
        return self.make(
            config, "adalora", rank=rank, target_rank=min(config.get("target_r") or 8, rank), alpha=_scale(config) * rank,
            dropout=float(config.get("lora_dropout") or 0.0), **steps, delta_t=config.get("deltaT") or 1,
            beta1=config.get("beta1") or 0.85, beta2=config.get("beta2") or 0.85, orth=config.get("orth_reg_weight", 0.5),
        )  # fmt: skip

    def read(
        self, config: Mapping[str, Any], path: str, found: Mapping[str, Tensor], shared: Mapping[str, Tensor]
    ) -> Piece | str:
        a, e, b = found["lora_A"], found["lora_E"], found["lora_B"]
        shapes = f"lora_A is {tuple(a.shape)}, lora_E {tuple(e.shape)} and lora_B {tuple(b.shape)}"
        if not a.ndim == b.ndim == 2 or tuple(e.shape) != (a.shape[0], 1) or a.shape[0] != b.shape[1]:
            return f"{shapes}: their ranks differ"
        left, notes = (config.get("rank_pattern") or {}).get(f"{path}.lora_E"), []
        claimed, rank = (config.get("init_r") or 12) if left is None else sum(map(bool, left)), a.shape[0]
        if rank != claimed:
            return f"{shapes}, and the config says {claimed} triplets"
        if not rank:  # pruned to nothing: one triplet of zeros changes nothing either
            a, e, b = a.new_zeros(1, a.shape[1]), e.new_zeros(1, 1), b.new_zeros(b.shape[0], 1)
            notes = [f"{path}: pruned to rank 0, read as rank 1 with zeros"]
        method: Any = self.plain(self.method(config))
        rank = a.shape[0]
        target = min(method.target_rank, rank)
        method = dataclasses.replace(method, rank=rank, target_rank=target, alpha=_scale(config) * rank)
        return Piece(method, {"lora_A": a, "lora_E": e, "lora_B": b}, None, notes)

    def unheld(self, method: Method, spec: HostSpec | None, transposed: bool) -> str | None:
        if spec is not None and spec.groups > 1:
            return "PEFT has no AdaLoRA on grouped convolutions"
        return super().unheld(method, spec, transposed)

    def options(self, methods: Mapping[str, Any], specs: Mapping[str, HostSpec | None]) -> dict[str, Any]:
        first, most = next(iter(methods.values())), max(method.rank for method in methods.values())
        scales = {method.scale for method in methods.values()}
        if max(scales) - min(scales) > 1e-9 * max(scales):
            raise ConfigError(f"scales of {', '.join(f'{s:g}' for s in sorted(scales))}: PEFT has one for all modules")
        smaller = {
            f"{path}.lora_E": [True] * method.rank + [False] * (most - method.rank)
            for path, method in methods.items()
            if method.rank < most
        }
        start, end = (int(steps) if steps >= 1 else 0 for steps in (first.tinit, first.tfinal))
        return {
            "init_r": most,
            "target_r": first.target_rank,
            "lora_alpha": _round(first.scale * (most + 1e-5)),
            "rank_pattern": smaller or None,
            "lora_dropout": first.dropout,
            "tinit": start,
            "tfinal": end,
            "total_step": start + end + 1,  # PEFT wants one that leaves a step between them
            "deltaT": first.delta_t,
            "beta1": first.beta1,
            "beta2": first.beta2,
            "orth_reg_weight": first.orth,
            "init_lora_weights": True,
        }


def _scale(config: Mapping[str, Any]) -> float:
    """PEFT divides by init_r + 1e-5; with α = 0 it takes init_r for α."""
    rank, alpha = config.get("init_r") or 12, config.get("lora_alpha", 8)
    return float(alpha or rank) / (rank + 1e-5)


def _round(alpha: float) -> float | int:
    """A whole number where it is one but for rounding."""
    return round(alpha) if abs(alpha - round(alpha)) < 1e-12 * alpha else alpha


_SHARE = one(lambda v: positive(v) and v < 1, "in (0, 1)")
ADALORA = AdaLoRAKind(
    type="ADALORA",
    label="AdaLoRA",
    names=("adalora",),
    keys={name: name for name in ("lora_A", "lora_E", "lora_B")},
    valid={
        "init_r": WHOLE,
        "target_r": WHOLE,
        "lora_alpha": one(lambda v: number(v) and v >= 0, "a number of at least 0"),
        "lora_dropout": SHARE,
        "tinit": COUNT,
        "tfinal": COUNT,
        "deltaT": WHOLE,
        "total_step": WHOLE,
        "beta1": _SHARE,
        "beta2": _SHARE,
        "orth_reg_weight": one(lambda v: number(v) and v >= 0, "a number of at least 0"),
        "rank_pattern": one(
            lambda v: isinstance(v, Mapping) and all(isinstance(left, list) for left in v.values()),
            "a table {module: list of true and false}",
        ),
        "trainable_token_indices": TOKENS,
        "bias": biases("lora_only"),
    },
    unsupported={
        **{key: what for key, what in LORA.unsupported.items() if key != "lora_bias"},
        "target_parameters": "experts as targets (target_parameters)",
    },
    # r and use_rslora are LoRA's, and mean nothing here; α of single modules does neither
    unused={*LORA.unused, "r", "use_rslora", "use_dora", "lora_bias", "alpha_pattern"},
    for_training={
        **{key: what for key, what in LORA.for_training.items() if key != "target_parameters"},
        "rank_pattern": "what earlier pruning left (rank_pattern)",
    },
    bias="lora_only",
    kernels=(0, 2),
    transposed=True,
    same=("rank", "scale"),
)
