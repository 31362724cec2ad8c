"""LORA in PEFT's files.

LORA      lora_A.weight [r, in, *kernel], lora_B.weight [out, r, *ones]; scale α/r, or α/√r with use_rslora
          lora_embedding_A [r, vocab], lora_embedding_B [dim, r]; lora_magnitude_vector [out] or [1, out, 1, …]
          on stacks of experts (target_parameters) as `peft_experts` says
          with enable_lora (PEFT 0.1 to 0.2: parts of a fused weight) lora_A.weight [n·r, in], lora_B.weight [n·out/m, n·r/2, 1],
          a convolution in two groups whatever n is: read as a plain LoRA of rank n·r (`foreign.grouped`)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from deltaw.core.errors import ConfigError
from deltaw.core.host import HostSpec
from deltaw.core.method import Method
from deltaw.formats.foreign import grouped
from deltaw.formats.peft_experts import flatten, unflatten
from deltaw.formats.peft_kind import PLAIN, Piece, Ranked, ranked_rules
from deltaw.formats.peft_valid import NAMES, SHARE, SWITCH, TOKENS, biases, one
from deltaw.methods.dora import DoRA
from deltaw.methods.lora import LoRA

INITS: Mapping[str, Literal["kaiming", "gaussian"]] = {
    "gaussian": "gaussian", "eva": "kaiming", "orthogonal": "kaiming", "true": "kaiming", "false": "kaiming"
}  # fmt: skip
"""Initialisations of LoRA that leave the base's weight alone → how we would start A."""


@dataclass(frozen=True, kw_only=True)
class LoRAKind(Ranked):
    """LoRA, rsLoRA and DoRA, one switch for all modules. use_rslora: scale α/√r."""

    def called(self, config: Mapping[str, Any]) -> str:
        return "DoRA" if config.get("use_dora") else "LoRA"

    def faults(self, config: Mapping[str, Any]) -> list[str]:
        init = _init(config)
        if init in INITS:
            return []
        return [f"initialisation {init!r} is not supported yet: it changes the base's weight or freezes a factor"]

    def untrainable(self, config: Mapping[str, Any]) -> list[str]:
        if config.get("init_lora_weights") is not False:
            return []
        return ["init_lora_weights=false starts with a random change of the base: use true"]

    def method(self, config: Mapping[str, Any], **fields: Any) -> Method:
        return self.make(
            config, "dora" if config.get("use_dora") else "lora", **{**self.ranked(config), **fields},
            dropout=float(config.get("lora_dropout") or 0.0), rslora=bool(config.get("use_rslora")), init=INITS[_init(config)],
        )  # fmt: skip

    def forms(self, config: Mapping[str, Any]) -> Sequence[set[str]]:
        return [{"lora_A", "lora_B", "magnitude"} if config.get("use_dora") else {"lora_A", "lora_B"}]

    def read(
        self, config: Mapping[str, Any], path: str, found: Mapping[str, Tensor], shared: Mapping[str, Tensor]
    ) -> Piece | str:
        group = {self.keys[end]: t.flatten() if self.keys[end] == "magnitude" else t for end, t in found.items()}
        parts = config.get("enable_lora")
        if parts is not None:
            fused = _fused(group["lora_A"], group["lora_B"], parts)
            if isinstance(fused, str):
                return fused
            group["lora_A"], group["lora_B"] = fused
        reason = _no_pair(group["lora_A"], group["lora_B"])
        if reason:
            return reason
        a, b = group["lora_A"], group["lora_B"]
        if parts is not None:  # of rank n·r in place of r: the scale stays α/r
            rank, alpha = a.shape[0], self.alpha_of(config, path) * sum(parts)
            return Piece(
                self.method(config, rank=rank, alpha=alpha, **PLAIN), group, HostSpec((b.shape[0], a.shape[1]))
            )
        method = self.method(config, rank=a.shape[0], alpha=self.alpha_of(config, path), **PLAIN)
        spec = HostSpec((b.shape[0], *a.shape[1:]), lookup="lora_embedding_A" in found)
        return Piece(method, group, spec, self.told(config, path, a.shape[0]))

    def read_stack(self, config: Mapping[str, Any], name: str, found: Mapping[str, Tensor]) -> Piece | str:
        rank = self.rank_of(config, name)
        pair = unflatten(found["lora_A.weight"], found["lora_B.weight"], rank)
        if isinstance(pair, str):
            return pair
        a, b = pair
        method = self.method(config, rank=rank, alpha=self.alpha_of(config, name), **PLAIN)
        return Piece(method, {"lora_A": a, "lora_B": b}, HostSpec((b.shape[1], a.shape[2]), stack=len(a)))

    def unheld(self, method: Method, spec: HostSpec | None, transposed: bool) -> str | None:
        if spec is None:
            return "the kind of layer is not known: load the adapter into its model first"
        if spec.groups > 1:
            return "PEFT's grouped convolution is another function (it has no ΔW of the weight's shape)"
        return super().unheld(method, spec, transposed)

    def tensors(self, method: Method, group: Mapping[str, Tensor], spec: HostSpec | None) -> dict[str, Tensor]:
        assert spec is not None
        if spec.stack is not None:
            flat = flatten(group["lora_A"], group["lora_B"])
            return {f"lora_{which}.weight": tensor for which, tensor in zip("AB", flat, strict=True)}
        form = "lora_embedding_{}" if spec.lookup else "lora_{}.weight"
        tensors = {form.format(which): group[f"lora_{which}"] for which in "AB"}
        if "magnitude" in group:
            kernel, magnitude = len(spec.shape) - 2, group["magnitude"]
            tensors["lora_magnitude_vector"] = magnitude.view(1, -1, *[1] * kernel) if kernel else magnitude
        return tensors

    def options(self, methods: Mapping[str, Any], specs: Mapping[str, HostSpec | None]) -> dict[str, Any]:
        if len({type(method) for method in methods.values()}) > 1:
            raise ConfigError("LoRA and DoRA in one adapter: PEFT has one switch for all modules")
        first: Any = next(iter(methods.values()), LoRA(rank=8, alpha=8.0))
        rslora = all(method.rslora for method in methods.values()) and bool(methods)
        # scale · r where the modules disagree on rsLoRA: PEFT has one switch
        alphas = {p: float(m.alpha) if m.rslora == rslora else m.scale * m.rank for p, m in methods.items()}
        return {
            **self.patterned({path: method.rank for path, method in methods.items()}, alphas),
            "lora_dropout": 0.0
            if any(spec and spec.stack for spec in specs.values())
            else first.dropout,  # PEFT refuses both
            "use_rslora": rslora,
            "use_dora": isinstance(first, DoRA),
            "init_lora_weights": True,
        }


def _parts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(on, bool) for on in value) and any(value)


def _init(config: Mapping[str, Any]) -> str:
    value = config.get("init_lora_weights")
    return "true" if value is None else str(value).lower()


def _no_pair(a: Tensor, b: Tensor) -> str | None:
    """Why A and B are no pair of factors, or None."""
    shapes = f"A is {tuple(a.shape)} and B is {tuple(b.shape)}"
    if a.ndim < 2 or b.ndim < 2 or 0 in (*a.shape, *b.shape):
        return f"{shapes}: not two matrices; were they gathered before saving from a sharded run?"
    if a.ndim > 2 and a.shape[0] != b.shape[1] and a.shape[0] % b.shape[1] == 0:
        return f"{shapes}: PEFT's grouped convolution is not supported yet (it has no ΔW of the weight's shape)"
    return f"{shapes}: their ranks differ" if a.shape[0] != b.shape[1] else None


def _fused(a: Tensor, b: Tensor, parts: Sequence[bool]) -> tuple[Tensor, Tensor] | str:
    """The factors of a fused weight, of which some parts are adapted, or why these are none."""
    n = sum(parts)
    if a.ndim == 2 and b.ndim == 3 and b.shape[2] == 1 and 0 not in b.shape:
        groups, rest = divmod(a.shape[0], b.shape[1])
        if not rest and groups and b.shape[0] % groups == 0 and b.shape[0] % n == 0 and a.shape[0] % n == 0:
            return grouped(a, b, list(parts))
    return (
        f"A is {tuple(a.shape)} and B is {tuple(b.shape)}: not the factors of {n} of {len(parts)} parts (enable_lora)"
    )


LORA = LoRAKind(
    type="LORA",
    label="LoRA",
    names=("lora", "dora"),
    keys={
        "lora_A.weight": "lora_A",
        "lora_B.weight": "lora_B",
        "lora_embedding_A": "lora_A",
        "lora_embedding_B": "lora_B",
        "lora_magnitude_vector": "magnitude",
        "lora_magnitude_vector.weight": "magnitude",
    },
    unread={"lora_A.bias": "a bias on A", "lora_B.bias": "a bias on B (lora_bias)"},
    alpha="lora_alpha",
    valid={
        **ranked_rules("lora_alpha"),
        "lora_dropout": SHARE,
        "use_rslora": SWITCH,
        "use_dora": SWITCH,
        "trainable_token_indices": TOKENS,
        "target_parameters": NAMES,
        "bias": biases("lora_only"),
        "enable_lora": one(_parts, "a list of true and false, with a true one"),
    },
    unsupported={
        "lora_bias": "a bias on B (lora_bias)",
        "use_qalora": "QA-LoRA (use_qalora)",
        "use_bdlora": "BD-LoRA (use_bdlora)",
        "alora_invocation_tokens": "activated LoRA (alora_invocation_tokens)",
        "layer_replication": "layer replication (layer_replication)",
        "kasa_config": "KaSA (kasa_config)",
        "velora_config": "VeLoRA (velora_config)",
        "monteclora_config": "MonteCLoRA (monteclora_config)",
        "arrow_config": "Arrow routing (arrow_config)",
        "megatron_config": "Megatron layers (megatron_config)",
    },
    unused={
        "init_lora_weights",
        "qalora_group_size",
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
        "megatron_core",
        "merge_weights",
    },
    for_training={
        "trainable_token_indices": "token rows (attach TokenRows under the same name)",
        "target_parameters": "experts as targets (target_parameters: name their modules in targets)",
        "ensure_weight_tying": "adapters shared by tied modules (ensure_weight_tying)",
        "enable_lora": "LoRA on parts of a fused weight (enable_lora)",
    },
    bias="lora_only",
    token_rows=True,
    kernels=(0, 1, 2, 3),
    lookup=True,
    transposed=True,
    stacks=True,
)
