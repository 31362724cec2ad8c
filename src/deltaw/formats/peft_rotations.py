"""OFT and BOFT in PEFT's files: block-diagonal rotations of a layer's inputs, one skew matrix per block.

    OFT    oft_R.weight [n/b, b(b−1)/2], or [1, …] with block_share: upper triangles of Q. R = (I − Q)(I + Q)⁻¹, the
           inverse of ours, so that Q changes its sign; or with use_cayley_neumann a series with the sign of ours
    BOFT   boft_R [k, n/b, b, b]: X with Q = ½(X − Xᵀ), again the inverse of ours; boft_s [out, 1]

Sizes of blocks are read from the tensors. PEFT has one size for all modules and, for OFT, takes the nearest divisor of
a layer's inputs where it does not divide them.
"""

import dataclasses
import math
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
from deltaw.formats.peft_valid import COUNT, POSITIVE, SHARE, SWITCH, WHOLE, biases

DROPOUT = "dropout of whole blocks ({})"


@dataclass(frozen=True, kw_only=True)
class OFTKind(Kind):
    def faults(self, config: Mapping[str, Any]) -> list[str]:
        r, block = config.get("r") or 0, config.get("oft_block_size", 32) or 0
        found = []
        if "oft_block_size" not in config:
            found.append("oft_block_size is missing: PEFT before 0.14 wrote another OFT, which no longer can be read")
        elif bool(r) == bool(block):
            found.append(f"r={r} and oft_block_size={block}: exactly one of them must be above 0")
        if _series(config) in (1, 2):
            found.append(f"num_cayley_neumann_terms={_series(config)}: a series of less than 3 terms is not supported")
        return found

    def notes(self, config: Mapping[str, Any]) -> list[str]:
        version = re.match(r"(\d+)\.(\d+)", str(config.get("peft_version") or "0.0"))
        if _series(config) is None or (version and tuple(map(int, version.groups())) >= (0, 18)):
            return []
        return [
            "use_cayley_neumann in a file from before PEFT 0.18, whose series differs in its last term: read as "
            "PEFT reads it today"
        ]

    def method(self, config: Mapping[str, Any]) -> Method:
        terms = _series(config)
        return self.make(
            config, "oft", block=config.get("oft_block_size", 32) or None, share=bool(config.get("block_share")),
            coft=bool(config.get("coft")), eps=config.get("eps") or 6e-5, terms=terms and max(terms, 4),
        )  # fmt: skip

    def untrainable(self, config: Mapping[str, Any]) -> list[str]:
        return ["r counts blocks per layer, which depends on it: give oft_block_size"] if config.get("r") else []

    def read(
        self, config: Mapping[str, Any], path: str, found: Mapping[str, Tensor], shared: Mapping[str, Tensor]
    ) -> Piece | str:
        upper = found["oft_R.weight"]
        block = _side(upper)
        if block is None:
            return f"oft_R is {tuple(upper.shape)}: not upper triangles of square blocks"
        method: Any = self.plain(self.method(config))
        if method.share and upper.shape[0] != 1:
            return f"oft_R holds {upper.shape[0]} blocks, and the config says block_share, one for all"
        method = dataclasses.replace(method, block=block)
        return Piece(method, {"oft_R": -upper if method.terms is None else upper})

    def unheld(self, method: Method, spec: HostSpec | None, transposed: bool) -> str | None:
        if spec is not None and len(spec.shape) > 2:
            return "PEFT's OFT on convolutions computes another function than it merges: patches overlap"
        return super().unheld(method, spec, transposed)

    def tensors(self, method: Any, group: Mapping[str, Tensor], spec: HostSpec | None) -> dict[str, Tensor]:
        upper = group["oft_R"]
        return {"oft_R.weight": -upper if method.terms is None else upper}

    def options(self, methods: Mapping[str, Any], specs: Mapping[str, HostSpec | None]) -> dict[str, Any]:
        first = next(iter(methods.values()))
        for field in ("share", "coft", "eps", "terms"):
            if len({getattr(method, field) for method in methods.values()}) > 1:
                raise ConfigError(f"modules differ in {field}: PEFT has one for all")
        blocks = {method.block for method in methods.values()}
        layers = [(method.block, specs[path]) for path, method in methods.items()]
        size = next((b for b in sorted(blocks) if len(blocks) == 1 or all(_fits(b, *layer) for layer in layers)), None)
        if size is None:
            said = f"blocks of {', '.join(map(str, sorted(blocks)))}: PEFT has one size for all modules"
            unknown = any(spec is None for spec in specs.values())
            raise ConfigError(said + ("; load the adapter into its model first, for their inputs" if unknown else ""))
        return {
            "r": 0,
            "oft_block_size": size,
            "block_share": first.share,
            "coft": first.coft,
            "eps": first.eps,
            "use_cayley_neumann": first.terms is not None,
            "num_cayley_neumann_terms": first.terms or 5,
            "module_dropout": 0.0,
            "init_weights": True,
        }


def _series(config: Mapping[str, Any]) -> int | None:
    """Terms of the series, or None where the config has Cayley's exact form."""
    return config.get("num_cayley_neumann_terms", 5) if config.get("use_cayley_neumann", True) else None


def _side(upper: Tensor) -> int | None:
    """b from upper triangles [blocks, b(b−1)/2]."""
    if upper.ndim != 2 or 0 in upper.shape:
        return None
    block = (1 + math.isqrt(1 + 8 * upper.shape[1])) // 2
    return block if block * (block - 1) // 2 == upper.shape[1] else None


def _fits(size: int, block: int, spec: HostSpec | None) -> bool:
    """Would PEFT make this block of the size in the config? It takes the nearest divisor, the smaller of two."""
    if spec is None:
        return False
    divisors = (b for b in range(1, spec.fan_in + 1) if spec.fan_in % b == 0)
    return block == min(divisors, key=lambda b: (abs(b - min(size, spec.fan_in)), b))


@dataclass(frozen=True, kw_only=True)
class BOFTKind(Kind):
    def faults(self, config: Mapping[str, Any]) -> list[str]:
        size, number = config.get("boft_block_size", 4), config.get("boft_block_num", 0)
        if bool(size) != bool(number):
            return []
        return [f"boft_block_size={size} and boft_block_num={number}: exactly one of them must be above 0"]

    def method(self, config: Mapping[str, Any]) -> Method:
        return self.make(
            config, "boft", block=config.get("boft_block_size", 4) or None, levels=config.get("boft_n_butterfly_factor") or 1
        )  # fmt: skip

    def untrainable(self, config: Mapping[str, Any]) -> list[str]:
        if not config.get("boft_block_num"):
            return []
        return ["boft_block_num counts blocks per layer, which depends on it: give boft_block_size"]

    def read(
        self, config: Mapping[str, Any], path: str, found: Mapping[str, Tensor], shared: Mapping[str, Tensor]
    ) -> Piece | str:
        full, scales = found["boft_R"], found["boft_s"]
        if full.ndim != 4 or full.shape[2] != full.shape[3] or full.shape[2] < 2:
            return f"boft_R is {tuple(full.shape)}: not square blocks [factors, blocks, b, b]"
        if scales.ndim != 2 or scales.shape[1] != 1:
            return f"boft_s is {tuple(scales.shape)}, that of a convolution, which is not supported yet: {_ONE_SIDE}"
        levels, claimed = full.shape[0], config.get("boft_n_butterfly_factor") or 1
        notes = [
            f"{path}: of {levels} butterfly factor by its tensors and {claimed} by the config (PEFT without its CUDA "
            "extension trains one); the tensors count"
        ] if levels != claimed else []  # fmt: skip
        method: Any = dataclasses.replace(self.plain(self.method(config)), block=full.shape[2], levels=levels)  # type: ignore[call-arg]
        row, column = torch.triu_indices(full.shape[2], full.shape[2], 1)
        upper = 0.5 * (full.mT - full).float()[..., row, column]
        return Piece(method, {"boft_R": upper, "boft_s": scales}, None, notes)

    def unheld(self, method: Method, spec: HostSpec | None, transposed: bool) -> str | None:
        if spec is not None and len(spec.shape) > 2:
            return f"PEFT's BOFT on convolutions is not written: {_ONE_SIDE}"
        return super().unheld(method, spec, transposed)

    def tensors(self, method: Any, group: Mapping[str, Tensor], spec: HostSpec | None) -> dict[str, Tensor]:
        upper, block = group["boft_R"], method.block
        row, column = torch.triu_indices(block, block, 1)
        full = upper.new_zeros(*upper.shape[:2], block, block)
        full[..., row, column] = -upper  # ½(Xᵀ − X) is the upper triangle again, to the bit
        return {"boft_R": full - full.mT, "boft_s": group["boft_s"]}

    def options(self, methods: Mapping[str, Any], specs: Mapping[str, HostSpec | None]) -> dict[str, Any]:
        levels, blocks = ({getattr(m, field) for m in methods.values()} for field in ("levels", "block"))
        if len(levels) > 1 or len(blocks) > 1:
            said = ", ".join(
                f"{m.levels}×{m.block}" for m in {(m.levels, m.block): m for m in methods.values()}.values()
            )
            raise ConfigError(f"levels × blocks of {said}: PEFT has one pair for all modules")
        return {
            "boft_block_size": blocks.pop(),
            "boft_block_num": 0,
            "boft_n_butterfly_factor": levels.pop(),
            "boft_dropout": 0.0,
            "init_weights": True,
        }


_ONE_SIDE = "there it reads one side of kernel, stride and padding only"
OFT = OFTKind(
    type="OFT",
    label="OFT",
    names=("oft",),
    keys={"oft_R.weight": "oft_R"},
    unread={"oft_embedding_R.weight": "OFT of embeddings, which rotates the outputs,"},
    valid={
        "r": COUNT,
        "oft_block_size": COUNT,
        "use_cayley_neumann": SWITCH,
        "num_cayley_neumann_terms": WHOLE,
        "coft": SWITCH,
        "eps": POSITIVE,
        "block_share": SWITCH,
        "module_dropout": SHARE,
        "bias": biases("oft_only"),
    },
    unused={"init_weights"},
    for_training={"module_dropout": DROPOUT.format("module_dropout")},
    bias="oft_only",
    same=("block", "share", "coft", "eps", "terms"),
)
BOFT = BOFTKind(
    type="BOFT",
    label="BOFT",
    names=("boft",),
    keys={"boft_R": "boft_R", "boft_s": "boft_s"},
    valid={
        "boft_block_size": COUNT,
        "boft_block_num": COUNT,
        "boft_n_butterfly_factor": WHOLE,
        "boft_dropout": SHARE,
        "bias": biases("boft_only"),
    },
    unused={"init_weights"},
    for_training={"boft_dropout": DROPOUT.format("boft_dropout")},
    bias="boft_only",
    same=("block", "levels"),
)
