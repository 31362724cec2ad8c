"""IA3 and VERA in PEFT's files: trained vectors beside a layer.

IA3    ia3_l [out, 1], or [1, in] of a module that feedforward_modules names; of convolutions [1, channels, 1, …]
VERA   vera_lambda_b [out], vera_lambda_d [r]; base_model.vera_A [r, N] and base_model.vera_B [M, r], frozen and
       shared, drawn for the largest adapted layer from projection_prng_key
"""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deltaw.core.errors import ConfigError
from deltaw.core.host import HostSpec
from deltaw.core.method import Method
from deltaw.formats.peft_kind import Kind, Piece
from deltaw.formats.peft_valid import COUNT, SHARE, SWITCH, TARGETS, WHOLE, biases, number, one
from deltaw.methods.vera import projections


@dataclass(frozen=True, kw_only=True)
class IA3Kind(Kind):
    def method(self, config: Mapping[str, Any]) -> Method:
        given = config.get("feedforward_modules") or ()
        # PEFT: a string is a regular expression of the whole path, a list holds ends of it, no dot needed
        ends = (f"^(?:{given})",) if isinstance(given, str) else tuple(f".*{re.escape(name)}" for name in given)
        return self.make(config, "ia3", feedforward=ends)

    def untrainable(self, config: Mapping[str, Any]) -> list[str]:
        if config.get("feedforward_modules") is not None:
            return []
        return [
            "no feedforward_modules: PEFT would take its default for the architecture; name the modules, or none: []"
        ]

    def read(
        self, config: Mapping[str, Any], path: str, found: Mapping[str, Tensor], shared: Mapping[str, Tensor]
    ) -> Piece | str:
        scales, claimed = found["ia3_l"], _side(config.get("feedforward_modules"), path)
        if scales.ndim < 2 or scales.numel() != max(scales.shape):
            return f"ia3_l is {tuple(scales.shape)}, not a vector"
        if scales.ndim > 2:
            side: Any = claimed
        else:
            side = claimed if scales.numel() == 1 else "output" if scales.shape[1] == 1 else "input"
        if side is None:
            return "feedforward_modules is missing, which says whether inputs or outputs are scaled"
        if claimed not in (None, side):
            return f"ia3_l is {tuple(scales.shape)}, for {side}s, and feedforward_modules says {claimed}s"
        method = dataclasses.replace(self.plain(self.method(config)), side=side, feedforward=())  # type: ignore[call-arg]
        if side == "output" and scales.ndim > 2:
            scales = scales.transpose(0, 1)
        return Piece(method, {"ia3_l": scales})

    def tensors(self, method: Any, group: Mapping[str, Tensor], spec: HostSpec | None) -> dict[str, Tensor]:
        scales = group["ia3_l"]
        return {"ia3_l": scales.transpose(0, 1) if scales.ndim > 2 and method.side == "output" else scales}

    def options(self, methods: Mapping[str, Any], specs: Mapping[str, HostSpec | None]) -> dict[str, Any]:
        inputs = sorted(path for path, method in methods.items() if method.side == "input")
        return {"feedforward_modules": "|".join(map(re.escape, inputs)) or [], "init_ia3_weights": True}


def _side(feedforward: Any, path: str) -> str | None:
    """What PEFT scales of a module; None where the config leaves it to the architecture."""
    if feedforward is None:
        return None
    if isinstance(feedforward, str):
        return "input" if re.fullmatch(feedforward, path) else "output"
    return "input" if any(path.endswith(name) for name in feedforward) else "output"


A, B = "base_model.vera_A", "base_model.vera_B"


@dataclass(frozen=True, kw_only=True)
class VeRAKind(Kind):
    def faults(self, config: Mapping[str, Any]) -> list[str]:
        if config.get("save_projection", True):
            return []
        return [
            "save_projection=false: nothing in the file says how large vera_A and vera_B are drawn; save it with "
            "save_projection=true"
        ]

    def method(self, config: Mapping[str, Any]) -> Method:
        return self.make(
            config, "vera", rank=config.get("r") or 256, seed=config.get("projection_prng_key") or 0,
            d_initial=config.get("d_initial") or 0.1, dropout=float(config.get("vera_dropout") or 0.0),
        )  # fmt: skip

    def untrainable(self, config: Mapping[str, Any]) -> list[str]:
        return ["d_initial=0 gives b and d no gradient: use 0.1"] if config.get("d_initial") == 0 else []

    def read(
        self, config: Mapping[str, Any], path: str, found: Mapping[str, Tensor], shared: Mapping[str, Tensor]
    ) -> Piece | str:
        if shared.keys() != {A, B}:
            return f"{' and '.join(sorted({A, B} - shared.keys()))} is not in the file"
        a, b, d = shared[A], shared[B], found["vera_lambda_d"]
        if a.ndim != 2 or b.ndim != 2 or d.ndim != 1 or not a.shape[0] == b.shape[1] == d.shape[0]:
            return (
                f"vera_A is {tuple(a.shape)}, vera_B {tuple(b.shape)} and vera_lambda_d {tuple(d.shape)}: ranks differ"
            )
        method: Any = dataclasses.replace(
            self.plain(self.method(config)), rank=a.shape[0], in_features=a.shape[1], out_features=b.shape[0]
        )  # type: ignore[call-arg]
        drawn = projections(method.seed, method.rank, a.shape[1], b.shape[0])
        if not (torch.equal(drawn.a, a.float()) and torch.equal(drawn.b, b.float())):
            return (
                f"vera_A and vera_B are not those of projection_prng_key={method.seed}: drawn by another generator, or "
                "saved in half precision"
            )
        return Piece(method, dict(found))

    def common(self, methods: Mapping[str, Any], specs: Mapping[str, HostSpec | None]) -> dict[str, Tensor]:
        first = next(iter(methods.values()))
        drawn = projections(first.seed, first.rank, first.in_features, first.out_features)
        return {A: drawn.a, B: drawn.b}

    def options(self, methods: Mapping[str, Any], specs: Mapping[str, HostSpec | None]) -> dict[str, Any]:
        first = next(iter(methods.values()))
        for field in ("seed", "rank", "in_features", "out_features"):
            if len({getattr(method, field) for method in methods.values()}) > 1:
                raise ConfigError(f"modules differ in {field}: PEFT has one for all")
        known = [spec for spec in specs.values() if spec is not None]
        for field, sizes in (("in_features", {s.fan_in for s in known}), ("out_features", {s.shape[0] for s in known})):
            if len(known) == len(specs) and getattr(first, field) != max(sizes):
                raise ConfigError(f"{field}={getattr(first, field)}: PEFT draws for the largest module, {max(sizes)}")
        return {
            "r": first.rank,
            "projection_prng_key": first.seed,
            "save_projection": True,
            "d_initial": first.d_initial,
            "vera_dropout": first.dropout,
            "init_weights": True,
        }


IA3 = IA3Kind(
    type="IA3",
    label="IA3",
    names=("ia3",),
    keys={"ia3_l": "ia3_l"},
    valid={"feedforward_modules": TARGETS},
    unused={"init_ia3_weights"},
    kernels=(0, 2, 3),
    transposed=True,
    same=("side",),
)
VERA = VeRAKind(
    type="VERA",
    label="VeRA",
    names=("vera",),
    keys={"vera_lambda_b": "vera_lambda_b", "vera_lambda_d": "vera_lambda_d"},
    shared={A, B},
    valid={
        "r": WHOLE,
        "projection_prng_key": COUNT,
        "save_projection": SWITCH,
        "vera_dropout": SHARE,
        "d_initial": one(number, "a number"),
        "bias": biases("vera_only"),
    },
    unused={"init_weights"},
    bias="vera_only",
    transposed=True,
    same=("seed", "rank", "in_features", "out_features"),
)
