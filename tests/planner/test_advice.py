"""Advice on plain facts: what is suggested follows from them, and departures are warned of where they are, not elsewhere."""

import dataclasses
from typing import Any

import pytest

from deltaw.planner.advice import Advice, Situation, advise
from deltaw.planner.arithmetic import Layer
from deltaw.planner.departures import figures, warnings

SHAPES = {
    "self_attn.q_proj": (2048, 1024), "self_attn.k_proj": (1024, 1024), "self_attn.v_proj": (1024, 1024),
    "self_attn.o_proj": (1024, 2048), "mlp.gate_proj": (3072, 1024), "mlp.up_proj": (3072, 1024), "mlp.down_proj": (1024, 3072),
}  # fmt: skip
"""A layer of Qwen3-0.6B."""
ALL = tuple(Layer(f"model.layers.{n}.{name}", out, into, 16) for n in range(28) for name, (out, into) in SHAPES.items())
GOOD = Situation(
    layers=ALL, base_parameters=596_049_920, trainable=10_092_544, learning_rate=4e-4, rows=20_000, tokens=2_000_000
)


def without(*names: str, **changes: Any) -> Situation:
    """The same with layers of these names left out of the targets."""
    kept = tuple(layer for layer in ALL if layer.path.rpartition(".")[2] not in names)
    gone = tuple(layer._replace(rank=1) for layer in ALL if layer not in kept)
    size = sum(layer.added for layer in kept)
    return dataclasses.replace(GOOD, layers=kept, left=gone, trainable=size, **changes)


def ranked(rank: int, **changes: Any) -> Situation:
    layers = tuple(layer._replace(rank=rank) for layer in ALL)
    return dataclasses.replace(GOOD, rank=rank, alpha=2.0 * rank, layers=layers, **changes)


def one(s: Situation, field: str) -> Advice:
    (found,) = [advice for advice in advise(s) if advice.field == field]
    return found


def test_a_good_run_is_left_as_it_is() -> None:
    assert warnings(GOOD) == []
    changed = {a.field: (a.given, a.suggested) for a in advise(GOOD) if a.given not in (a.suggested, None)}
    assert changed == {}


def test_every_advice_has_a_reason_a_source_and_a_kind() -> None:
    fields = [a.field for a in advise(GOOD)]
    assert fields == [
        "train.learning_rate", "adapter.targets", "train.epochs", "train.batch_size", "adapter.rank", "adapter.alpha",
        "adapter.dropout", "adapter.method", "merge",
    ]  # fmt: skip
    for method in ("lora", "dora", "full", "vera", "bottleneck", "oft"):
        for a in advise(dataclasses.replace(GOOD, method=method)):
            assert a.reason and a.source and a.kind in ("measured", "published", "rule of thumb"), a


@pytest.mark.parametrize(
    ("departure", "field", "words"),
    [
        (
            without("gate_proj"),
            "adapter.targets",
            ["gate_proj is left out of 28", f"{10_092_544 - 16 * 4096 * 28:,}", "10,092,544 would be all"],
        ),
        (without("up_proj"), "adapter.targets", ["up_proj is left out of 28"]),
        (
            without("k_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
            "adapter.targets",
            ["80 % of the linear", "gate_proj (28)"],
        ),
        (
            dataclasses.replace(GOOD, learning_rate=2e-5),
            "train.learning_rate",
            ["20 times below the 0.0004", "full fine-tuning"],
        ),
        (
            dataclasses.replace(GOOD, learning_rate=1e-2),
            "train.learning_rate",
            ["25 times the 0.0004", "diverge"],
        ),
        (
            dataclasses.replace(GOOD, method="vera", rank=256, alpha=None),
            "train.learning_rate",
            ["10 times below what vera wants, 0.004", "10 times LoRA's rate"],
        ),
        (dataclasses.replace(GOOD, method="ia3", rank=None, alpha=None), "train.learning_rate", ["ia3 wants"]),
        (dataclasses.replace(GOOD, method="llama_adapter", layers=()), "train.learning_rate", ["llama_adapter wants"]),
        (dataclasses.replace(GOOD, alpha=4.0), "adapter.alpha", ["α/r is 0.25", "Set alpha: 32"]),
        (dataclasses.replace(GOOD, alpha=128.0), "adapter.alpha", ["α/r is 8", "4 times"]),
        (dataclasses.replace(GOOD, alpha=128.0, rslora=True), "adapter.alpha", ["α/√r is 32", "Set alpha: 16"]),
        (dataclasses.replace(GOOD, rows=100, tokens=9_000), "train.epochs", ["13 steps are few"]),
        (dataclasses.replace(GOOD, max_steps=49), "train.max_steps", ["49 steps are few"]),
        (dataclasses.replace(GOOD, batch=128), "train.batch_size", ["128 rows a step"]),
        (dataclasses.replace(GOOD, tokens=30_000_000), "adapter.rank", ["30,000,000 supervised", "20,185,088 bits"]),
        (ranked(256), "adapter.rank", ["near the break-even rank 512", "and 55 more"]),
        (ranked(512), "adapter.rank", ["at or above the break-even rank 512", "(1024×1024)"]),
    ],
)  # fmt: skip
def test_a_departure_is_warned_of(departure: Situation, field: str, words: list[str]) -> None:
    found = warnings(departure)
    assert [warning.field for warning in found] == [field], found
    assert all(word in found[0].text for word in words), found[0].text


@pytest.mark.parametrize(
    "harmless",
    [
        ranked(255),
        dataclasses.replace(GOOD, alpha=16.0),
        dataclasses.replace(GOOD, alpha=64.0),
        dataclasses.replace(GOOD, alpha=16.0, rslora=True),
        dataclasses.replace(GOOD, max_steps=50),
        dataclasses.replace(GOOD, batch=32),
        dataclasses.replace(GOOD, method="full", layers=(), learning_rate=4e-5, rank=None, alpha=None),
        dataclasses.replace(GOOD, rows=None, tokens=None),
        without("q_proj", "k_proj", "v_proj", "o_proj", tokens=None),
    ],
)
def test_what_is_usual_is_not(harmless: Situation) -> None:
    assert warnings(harmless) == []


def test_the_rate_goes_by_method_and_size() -> None:
    def rate(**changes: Any) -> float:
        return float(one(dataclasses.replace(GOOD, **changes), "train.learning_rate").suggested)

    assert rate(method="full") == pytest.approx(rate() / 10)
    assert rate(method="vera") == rate(method="ia3") == pytest.approx(10 * rate())
    sizes = [rate(base_parameters=n) for n in (5_770_496, 125_000_000, 7_000_000_000, 70_000_000_000)]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 4


def test_the_rank_goes_by_the_data() -> None:
    def rank(**changes: Any) -> Any:
        return one(dataclasses.replace(GOOD, **changes), "adapter.rank").suggested

    assert rank(rows=500, tokens=50_000) == 8
    assert rank() == rank(rows=None, tokens=None) == 16
    assert rank(tokens=60_000_000) == 64  # 60 M bits / (2 · 22,528 · 28) = 47.6
    assert rank(tokens=10**10) == 256  # half of the break-even rank of the smallest layer
    assert one(dataclasses.replace(GOOD, tokens=10**10), "adapter.method").suggested == "full"
    small = tuple(layer._replace(out=64, into=64) for layer in ALL)
    assert rank(layers=small, tokens=10**10) == 16  # of 64 × 64: 32


def test_few_rows_want_more_passes() -> None:
    found = one(dataclasses.replace(GOOD, rows=200), "train.epochs")
    assert (found.given, found.suggested) == (1.0, 4)  # 25 steps a pass
    assert one(dataclasses.replace(GOOD, epochs=10), "train.epochs").suggested == 3


def test_alpha_goes_by_the_form_of_the_scale() -> None:
    def alpha(**changes: Any) -> Any:
        return one(dataclasses.replace(GOOD, **changes), "adapter.alpha").suggested

    assert (alpha(), alpha(rslora=True), alpha(init="pissa"), alpha(init="pissa", rslora=True)) == (32, 16, 16, 4)


def test_one_adapter_is_merged_and_several_stay_mounted() -> None:
    assert one(GOOD, "merge").suggested == "merge"
    assert one(dataclasses.replace(GOOD, adapters=3), "merge").suggested == "keep mounted"
    assert one(dataclasses.replace(GOOD, method="bottleneck", merges=False), "merge").suggested == "keep mounted"
    quantised = one(dataclasses.replace(GOOD, quantize="nf4"), "merge")
    assert quantised.suggested == "merge" and "--into dequantized" in quantised.reason


def test_figures_are_those_of_the_layers() -> None:
    found = figures(GOOD)
    assert found["break_even"] == {"rank": 512.0, "module": "model.layers.0.self_attn.k_proj", "shape": [1024, 1024]}
    assert found["unmerged_share"] == 10_092_544 / 440_401_920
    assert found["training_share"] == pytest.approx(2 / 3 + found["unmerged_share"])
    assert found["trained_bytes"] == 16 * 10_092_544 and found["steps"] == 2500 and found["scale"] == 2.0
