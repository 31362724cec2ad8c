"""LOHA and LOKR in PEFT's files. Scale α/r, also where LoKr holds no factor of rank r.

    LOHA   hada_w1_a [out, r], hada_w1_b [r, fan_in], hada_w2_a, hada_w2_b the same
    LOKR   lokr_w1 [a, b] or lokr_w1_a [a, r], lokr_w1_b [r, b]; lokr_w2 [c, d, *kernel] or lokr_w2_a [c, r],
           lokr_w2_b [r, d × kernel]

hada_t1, hada_t2 and lokr_t2 are the core tensors of use_effective_conv2d, another decomposition of a convolution.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from deltaw.core.errors import ConfigError
from deltaw.core.host import HostSpec
from deltaw.core.method import Method
from deltaw.formats.peft_kind import Piece, Ranked, ranked_rules
from deltaw.formats.peft_valid import SHARE, SWITCH, one, whole

EFFECTIVE = "a core tensor of convolutions (use_effective_conv2d)"
FOR_TRAINING = {
    "use_effective_conv2d": EFFECTIVE,
    "rank_dropout": "dropout of rows of the change (rank_dropout)",
    "module_dropout": "dropout of whole modules (module_dropout)",
}


@dataclass(frozen=True, kw_only=True)
class LoHaKind(Ranked):
    def method(self, config: Mapping[str, Any]) -> Method:
        return self.make(config, "loha", **self.ranked(config))

    def read(
        self, config: Mapping[str, Any], path: str, found: Mapping[str, Tensor], shared: Mapping[str, Tensor]
    ) -> Piece | str:
        ranks = {found[f"hada_w{i}_a"].shape[-1] for i in "12"} | {found[f"hada_w{i}_b"].shape[0] for i in "12"}
        if len(ranks) != 1:
            return f"its factors have ranks {', '.join(map(str, sorted(ranks)))}"
        rank = ranks.pop()
        method = dataclasses.replace(self.plain(self.method(config)), rank=rank, alpha=self.alpha_of(config, path))  # type: ignore[call-arg]
        return Piece(method, dict(found), None, self.told(config, path, rank))

    def options(self, methods: Mapping[str, Any], specs: Mapping[str, HostSpec | None]) -> dict[str, Any]:
        ranks, alphas = ({p: getattr(m, field) for p, m in methods.items()} for field in ("rank", "alpha"))
        return {**self.patterned(ranks, alphas), **OPTIONS}


OPTIONS = {"use_effective_conv2d": False, "rank_dropout": 0.0, "module_dropout": 0.0, "init_weights": True}
LOHA = LoHaKind(
    type="LOHA",
    label="LoHa",
    names=("loha",),
    keys={name: name for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")},
    unread={"hada_t1": EFFECTIVE, "hada_t2": EFFECTIVE},
    valid={**ranked_rules("alpha"), "use_effective_conv2d": SWITCH, "rank_dropout": SHARE, "module_dropout": SHARE},
    unused={"init_weights"},
    for_training=FOR_TRAINING,
    kernels=(0, 1, 2),
)


@dataclass(frozen=True, kw_only=True)
class LoKrKind(Ranked):
    def method(self, config: Mapping[str, Any]) -> Method:
        return self.make(
            config, "lokr", **self.ranked(config), decompose_both=bool(config.get("decompose_both")),
            decompose_factor=config.get("decompose_factor") or -1,
        )  # fmt: skip

    def forms(self, config: Mapping[str, Any]) -> Sequence[set[str]]:
        small, large = ([{f"lokr_w{i}"}, {f"lokr_w{i}_a", f"lokr_w{i}_b"}] for i in "12")
        return [a | b for a in small for b in large]

    def read(
        self, config: Mapping[str, Any], path: str, found: Mapping[str, Tensor], shared: Mapping[str, Tensor]
    ) -> Piece | str:
        if "lokr_w2" in found and found["lokr_w2"].ndim == 3:
            return WRONG_KRON
        rank, alpha, notes = self.rank_of(config, path), self.alpha_of(config, path), []
        told = {
            t.shape[axis] for name, t in found.items() for end, axis in (("_a", 1), ("_b", 0)) if name.endswith(end)
        }
        if len(told) > 1:
            return f"its factors have ranks {', '.join(map(str, sorted(told)))}"
        for true in told:
            notes, rank = self.told(config, path, true), true
        if (
            not told
        ):  # no factor has the rank: all that is left of it is the scale, and it may be above the layer's sizes
            one, two = found["lokr_w1"], found["lokr_w2"].flatten(1)
            most = max(one.shape[0] * two.shape[0], one.shape[1] * two.shape[1])
            rank, alpha = min(rank, most), alpha * min(rank, most) / rank
        method = dataclasses.replace(self.plain(self.method(config)), rank=rank, alpha=alpha)  # type: ignore[call-arg]
        return Piece(method, dict(found), None, notes)

    def tensors(self, method: Method, group: Mapping[str, Tensor], spec: HostSpec | None) -> dict[str, Tensor]:
        if "lokr_w2" in group and group["lokr_w2"].ndim == 3:
            raise ConfigError(WRONG_KRON)
        return super().tensors(method, group, spec)

    def options(self, methods: Mapping[str, Any], specs: Mapping[str, HostSpec | None]) -> dict[str, Any]:
        for field in ("decompose_factor", "decompose_both"):
            if len({getattr(method, field) for method in methods.values()}) > 1:
                raise ConfigError(f"modules differ in {field}: PEFT has one for all")
        first = next(iter(methods.values()))
        ranks, alphas = ({p: getattr(m, field) for p, m in methods.items()} for field in ("rank", "alpha"))
        both = {"decompose_factor": first.decompose_factor, "decompose_both": first.decompose_both}
        return {**self.patterned(ranks, alphas), **OPTIONS, **both, "rank_dropout_scale": False}


WRONG_KRON = "PEFT 0.21 multiplies a full lokr_w2 of a Conv1d over the wrong dimensions: it is another change there"
LOKR = LoKrKind(
    type="LOKR",
    label="LoKr",
    names=("lokr",),
    keys={name: name for name in ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")},
    unread={"lokr_t2": EFFECTIVE},
    valid={
        **LOHA.valid,
        "decompose_both": SWITCH,
        "decompose_factor": one(lambda v: v == -1 or whole(v), "-1 or a whole number of at least 1"),
    },
    unused={"init_weights", "rank_dropout_scale"},
    for_training=FOR_TRAINING,
    kernels=(0, 1, 2),
    same=("scale", "decompose_factor", "decompose_both"),
)
