"""Where a configuration departs from advice far enough to be told so: warnings, and the figures behind them.

A warning never refuses anything: every value here has been used by somebody with success, seldom by accident.
"""

import math
from collections import Counter
from typing import Any, NamedTuple

from deltaw.planner.advice import (
    BITS_PER_PARAMETER,
    BITS_PER_TOKEN,
    FEW_STEPS,
    Situation,
    learning_rate,
    mlps_alone,
    needed,
)
from deltaw.planner.arithmetic import Layer, share, training_bytes, training_share, unmerged_share
from deltaw.planner.measured import faster

NEAR = 0.5
"""From this share of the break-even rank on, a rank is called near it."""


class Departure(NamedTuple):
    field: str
    text: str


def warnings(s: Situation) -> list[Departure]:
    """All of them, in the order of the settings."""
    found = [*_rate(s), *_gates(s), *_left(s), *_steps(s), *_batch(s), *_rank(s), *_capacity(s), *_alpha(s)]
    return [Departure(*one) for one in found]


def _rate(s: Situation) -> list[tuple[str, str]]:
    field, wanted = "train.learning_rate", learning_rate(s).suggested
    ratio = s.learning_rate / wanted
    if s.method != "full" and ratio <= 1 / 3 and faster(s.method) >= 10:
        said = f"{s.method} learns slowly: it took {faster(s.method):g} times LoRA's rate on the bundled task"
        return [
            (field, f"{s.learning_rate:g} is {1 / ratio:.3g} times below what {s.method} wants, {wanted:g}. {said}")
        ]
    if s.method != "full" and ratio <= 1 / 4:
        said = "LoRA takes about ten times the rate of full fine-tuning, on a small base more"
        return [(field, f"{s.learning_rate:g} is {1 / ratio:.3g} times below the {wanted:g} that fits here: {said}")]
    if ratio >= 5:
        said = "training may diverge, or forget what the base knows"
        return [(field, f"{s.learning_rate:g} is {ratio:.3g} times the {wanted:g} that fits here: {said}")]
    return []


def parent(layer: Layer) -> str:
    return layer.path.rpartition(".")[0]


def gates(s: Situation) -> list[Layer]:
    """Layers left out of a gated MLP of which others are adapted: two of one shape and one of its transpose."""
    adapted = {parent(layer) for layer in s.layers}
    shapes: dict[str, list[tuple[int, int]]] = {}
    for layer in (*s.layers, *s.left):
        shapes.setdefault(parent(layer), []).append((layer.out, layer.into))

    def gated(path: str) -> bool:
        counts = Counter(shapes[path])
        inside = len(shapes[path]) == 3 and max(counts.values()) == 2
        return inside and all((into, out) in counts for out, into in counts)

    return [layer for layer in s.left if parent(layer) in adapted and gated(parent(layer))]


def _gates(s: Situation) -> list[tuple[str, str]]:
    missing = gates(s)
    if not missing:
        return []
    names = " and ".join(dict.fromkeys(layer.path.rpartition(".")[2] for layer in missing))
    text = (
        f"a gated MLP has three linear layers, and {names} is left out of {len({parent(m) for m in missing})} of them"
    )
    more = sum(m.stack * (s.rank or 0) * (m.out + m.into) for m in missing)
    if s.method == "lora" and more:
        text += f": {s.trainable:,} parameters where {s.trainable + more:,} would be all"
    return [("adapter.targets", f"{text}; targets: all-linear takes them")]


def _left(s: Situation) -> list[tuple[str, str]]:
    missing = set(s.left) - set(gates(s))
    if not missing or not s.layers or mlps_alone(s):
        return []
    weights, all_ = sum(m.weights for m in missing), sum(m.weights for m in (*s.layers, *s.left))
    names = Counter(m.path.rpartition(".")[2] for m in missing)
    listed = ", ".join(f"{name} ({count})" for name, count in names.most_common(8))
    text = f"{share(weights, all_):.3g} % of the linear layers' weights are left out: {listed}"
    return [("adapter.targets", f"{text}. At equal size all-linear or mlp learns at least as well")]


def _steps(s: Situation) -> list[tuple[str, str]]:
    if s.steps is None or s.steps >= FEW_STEPS:
        return []
    field = "train.epochs" if s.max_steps is None else "train.max_steps"
    return [(field, f"{s.steps} steps are few: an adapter that starts at nothing has hardly begun by {FEW_STEPS}")]


def _batch(s: Situation) -> list[tuple[str, str]]:
    if s.batch <= 32:
        return []
    return [("train.batch_size", f"{s.batch} rows a step: LoRA falls behind all weights as batches grow past 32")]


def _rank(s: Situation) -> list[tuple[str, str]]:
    if not s.low_rank:
        return []
    near = [layer for layer in s.layers if layer.rank and layer.rank >= NEAR * layer.break_even]
    if not near:
        return []
    worst = max(near, key=lambda layer: (layer.rank or 0) / layer.break_even)
    above = (worst.rank or 0) >= worst.break_even
    text = (
        f"rank {worst.rank} is {'at or above' if above else 'near'} the break-even rank {worst.break_even:.4g} of {worst.path} "
        f"({worst.out}×{worst.into}){f' and {len(near) - 1} more' if len(near) > 1 else ''}"
    )
    said = "the factors are no smaller than the weight" if above else "the factors are more than half of the weight"
    return [("adapter.rank", f"{text}: {said}; method: full on those layers costs no more, or take a lower rank")]


def _capacity(s: Situation) -> list[tuple[str, str]]:
    need = needed(s) if s.low_rank else None
    if need is None or s.rank is None or need <= s.rank:
        return []
    held = BITS_PER_PARAMETER * s.trainable
    text = f"{s.tokens:,} supervised tokens, about a bit each, are more than {s.trainable:,} parameters hold ({held:,.0f} bits)"
    return [("adapter.rank", f"{text}: rank {need} would")]


def _alpha(s: Situation) -> list[tuple[str, str]]:
    scale = s.scale
    if scale is None or s.method not in ("lora", "dora"):
        return []
    form, high = ("α/√r", 2 * math.sqrt(s.rank or 1)) if s.rslora else ("α/r", 4.0)
    if 1 <= scale <= high:
        return []
    text = f"{form} is {scale:.4g}, usual is 1 to {high:.3g}: it acts about as a learning rate {scale / 2:.3g} times that at 2"
    return [("adapter.alpha", f"{text}. Set alpha: {s.rank if s.rslora else 2 * (s.rank or 0)} and tune the rate")]


def figures(s: Situation) -> dict[str, Any]:
    """What warnings and reasons count with."""
    found: dict[str, Any] = {
        "base_parameters": s.base_parameters, "trainable": s.trainable, "adapters": len(s.layers), "rows": s.rows,
        "supervised_tokens": s.tokens, "steps": s.steps, "scale": s.scale, "trained_bytes": training_bytes(s.trainable),
        "capacity_bits": BITS_PER_PARAMETER * s.trainable,
        "data_bits": None if s.tokens is None else BITS_PER_TOKEN * s.tokens,
    }  # fmt: skip
    lowest = s.lowest
    if lowest is not None and s.low_rank:
        found["break_even"] = {"rank": lowest.break_even, "module": lowest.path, "shape": [lowest.out, lowest.into]}
        found["unmerged_share"] = unmerged_share(s.layers)
        found["training_share"] = training_share(s.layers)
    return found
