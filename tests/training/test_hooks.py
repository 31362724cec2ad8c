"""Hooks of methods in training: a term of the loss, a call after every step, a start from data; and their resume."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import deltaw
from deltaw.config import parse
from deltaw.core import method as registry
from deltaw.core.adapter import Adapter
from deltaw.core.errors import TrainError
from deltaw.methods.lora import LoRA
from deltaw.runs.directory import RunDirectory
from deltaw.training.trainer import MEMORY


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    words = ["river", "castle", "garden", "church"]
    text = [{"prompt": f"say {a} then {b}", "completion": f"{b}, {a}"} for a in words for b in words]
    file.write_text("".join(json.dumps(row) + "\n" for row in text))
    return file


def config(rows: Path, output: Path, adapter: dict[str, Any], **train: Any) -> dict[str, Any]:
    defaults = {"max_steps": 4, "batch_size": 4, "learning_rate": 5e-3, "save_every": 2, "log_every": 1}
    return {
        "model": "tiny", "data": {"train": str(rows), "max_length": 24}, "adapter": {"targets": ["q_proj", "k_proj"], **adapter},
        "train": {**defaults, **train}, "output": str(output),
    }  # fmt: skip


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def cut_off(path: Path, step: int) -> None:
    """As if the run had been killed after its checkpoint at `step`."""
    shutil.rmtree(path / "adapter")
    for other in (path / "checkpoints").iterdir():
        if other.name != f"step-{step}":
            shutil.rmtree(other)


ADALORA = {"method": "adalora", "rank": 4, "target_rank": 2, "tinit": 1, "tfinal": 1, "dropout": 0.1}


@pytest.mark.parametrize(
    "adapter",
    [ADALORA, {"rank": 3, "init": "pissa", "dropout": 0.1}, {"rank": 2, "init": "eva"}],
    ids=["adalora", "pissa", "eva"],
)
def test_resumed_is_bit_identical(rows: Path, tmp_path: Path, adapter: dict[str, Any]) -> None:
    whole = deltaw.train(config(rows, tmp_path / "run", adapter), quiet=True)
    wanted = tensors(whole.adapter)
    assert any(bool(t.any()) for t in wanted.values())
    cut_off(whole.path, 2)
    again = deltaw.resume(whole.path, quiet=True)
    got = tensors(again.adapter)
    assert wanted.keys() == got.keys() and all(torch.equal(wanted[key], got[key]) for key in wanted)
    assert whole.plan.trainable == again.plan.trainable


def test_memory_is_in_checkpoints_only_and_needed_to_go_on(rows: Path, tmp_path: Path) -> None:
    run = deltaw.train(config(rows, tmp_path / "run", ADALORA), quiet=True)
    checkpoint = RunDirectory(run.path).checkpoint(2)
    kept = load_file(checkpoint / MEMORY)
    assert len(kept) == 2 * len(tensors(checkpoint / "adapter")) and any(bool(t.any()) for t in kept.values())
    assert not any("mean_" in key or "spread_" in key for key in tensors(run.adapter))
    assert not (run.adapter / MEMORY).exists()
    left = sum(int((t != 0).sum()) for key, t in tensors(run.adapter).items() if "lora_E" in key)
    assert left == 2 * len(run.plan)
    cut_off(run.path, 2)
    (checkpoint / MEMORY).unlink()
    with pytest.raises(TrainError, match=r"does not hold what adalora had learnt"):
        deltaw.resume(run.path, quiet=True)


def test_without_memory_it_would_be_another_adapter(rows: Path, tmp_path: Path) -> None:
    """The bits of the test above depend on it: with importance forgotten, other values are pruned."""
    run = deltaw.train(config(rows, tmp_path / "run", ADALORA), quiet=True)
    wanted = tensors(run.adapter)
    cut_off(run.path, 2)
    file = RunDirectory(run.path).checkpoint(2) / MEMORY
    save_file({key: torch.zeros_like(t) for key, t in load_file(file).items()}, file)
    got = tensors(deltaw.resume(run.path, quiet=True).adapter)
    assert any(not torch.equal(wanted[key], got[key]) for key in wanted)


@dataclass(frozen=True, kw_only=True)
class Watched(LoRA):
    """A method that notes its hooks, and whose term of the loss is 3·Σ lora_B."""

    seen: ClassVar[list[Any]] = []
    term: float = 3.0

    def penalty(self, adapters: Sequence[Adapter]) -> Tensor | None:
        return self.term * sum(adapter.lora_B.sum() for adapter in adapters) if self.term else None  # type: ignore[return-value]

    def after_step(self, adapters: Sequence[Adapter], step: int, total: int) -> None:
        there = [p.grad is not None and bool(p.grad.any()) for a in adapters for p in [a.lora_B]]
        Watched.seen.append((step, total, len(adapters), all(there), float(adapters[0].lora_B.detach().sum())))


@pytest.fixture
def watched() -> Any:
    registry.register("watched")(Watched)
    Watched.seen.clear()
    yield Watched
    del registry._METHODS["watched"]


@pytest.mark.parametrize("accumulation", [1, 3])
def test_hooks_run_once_a_step(rows: Path, tmp_path: Path, watched: Any, accumulation: int) -> None:
    """After the optimizer has moved the tensors and before the gradients go; the term counts once a step."""
    given = config(
        rows,
        tmp_path / "run",
        {"method": "watched", "rank": 2},
        max_steps=3,
        gradient_accumulation=accumulation,
        clip=0,
    )
    run = deltaw.train(given, quiet=True)
    count = len(run.plan)
    assert [one[:4] for one in watched.seen] == [(step, 3, count, True) for step in (1, 2, 3)]
    assert all(one[4] != 0 for one in watched.seen)
    norms = [event["grad_norm"] for event in RunDirectory(run.path).events("step")]
    size = sum(t.numel() for key, t in tensors(run.adapter).items() if key.endswith("lora_B"))
    assert norms[0] == pytest.approx(3.0 * size**0.5, rel=0.05)  # the gradient of the term alone is 3 everywhere


def test_a_method_without_a_term_trains_as_before(rows: Path, tmp_path: Path, watched: Any) -> None:
    runs = [
        deltaw.train(config(rows, tmp_path / name, adapter), quiet=True)
        for name, adapter in (("a", {"rank": 2}), ("b", {"method": "watched", "rank": 2, "term": 0.0}))
    ]
    a, b = (list(tensors(run.adapter).values()) for run in runs)
    assert sorted(float(t.double().sum()) for t in a) == sorted(float(t.double().sum()) for t in b)


def test_starts_are_options_of_a_configuration(rows: Path) -> None:
    record = {"model": "tiny", "data": {"train": str(rows)}, "adapter": {"init": "pissa", "niter": 4, "rank": 8}}
    assert parse.parse(record).adapter.method == LoRA(init="pissa", niter=4, rank=8)
    record["adapter"] = {"method": "adalora", "tinit": 200, "tfinal": 0.3}
    method: Any = parse.parse(record).adapter.method
    assert (method.tinit, method.tfinal) == (200, 0.3)
