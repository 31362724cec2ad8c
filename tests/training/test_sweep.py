"""A sweep is ordinary runs on one loaded base: equal to single runs, resumable cell by cell, ranked with its spread."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import deltaw
from deltaw.cli import main as cli
from deltaw.core.errors import ConfigError, Interrupted, TrainError, UseError
from deltaw.data.template import TEMPLATES
from deltaw.runs.directory import RunDirectory
from deltaw.training import run as training
from deltaw.training.run import resume
from deltaw.training.sweep import Ranked, combinations, sweep, table


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("sweep")
    words = ["river", "castle", "garden", "church", "mill", "bridge"]
    rows = [{"prompt": f"say {a} {b}", "completion": f"{b} {a}"} for a in words for b in words]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = {"max_steps": 3, "batch_size": 4, "learning_rate": 5e-3, "save_every": 3}
    return {"model": "tiny", "data": {"train": str(folder / "rows.jsonl"), "eval": 0.2}, "adapter": {"rank": 2},
            "train": train, "output": str(folder / "out")}  # fmt: skip


def test_cells_are_what_single_runs_are(
    record: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = []
    real = training.load_base
    monkeypatch.setattr(training, "load_base", lambda *a, **k: loads.append(1) or real(*a, **k))
    axes = {"train.learning_rate": [1e-4, 1e-2], "adapter.rank": [2, 4]}
    ranked = sweep({**record, "output": str(tmp_path / "out")}, axes, seeds=2, quiet=True).ranking
    assert len(loads) == 1 and len(ranked) == 4 and all(len(r.values) == 2 for r in ranked)
    assert ranked[0].settings["train.learning_rate"] == 1e-2
    folder = tmp_path / "out" / "learning_rate-0.01_rank-4_seed-1"
    whole = {**record, "adapter": {"rank": 4}, "train": {**record["train"], "learning_rate": 1e-2, "seed": 1}}
    alone = deltaw.train({**whole, "output": str(tmp_path / "alone")}, quiet=True)
    mine, theirs = (load_file(f / "adapter" / "adapter_model.safetensors") for f in (folder, alone.path))
    assert all(torch.equal(mine[k], theirs[k]) for k in theirs)
    # finished cells are read; one that stopped goes on or starts anew
    shutil.rmtree(folder / "adapter")
    other = tmp_path / "out" / "learning_rate-0.01_rank-2_seed-0"
    shutil.rmtree(other / "adapter")
    shutil.rmtree(other / "checkpoints")
    trained = []
    one = training.train
    monkeypatch.setattr("deltaw.training.sweep.train", lambda *a, **k: trained.append(1) or one(*a, **k))
    again = sweep({**record, "output": str(tmp_path / "out")}, axes, seeds=2, quiet=True).ranking
    assert len(trained) == 1 and [r.values for r in again] == [r.values for r in ranked]


def test_the_shelf_knows_what_the_rows_were_made_by(record: dict[str, Any], tmp_path: Path) -> None:
    """The rows of one run are not taken for another's whose template or streamed answers differ."""
    shelf, short = training.Shelf(), {**record["train"], "max_steps": 1}
    for answers in (0, 2):
        streamed = {**record, "data": {**record["data"], "streaming": True}, "output": str(tmp_path / f"s{answers}")}
        run = training.train({**streamed, "train": {**short, "generate": answers}}, quiet=True, shelf=shelf)
        scores = RunDirectory(run.path).events("scores")
        assert all("exact_match" in event for event in scores) and len(scores) == answers
    digests = []
    for name in ("plain", "tiny"):
        parent = tmp_path / name
        shutil.copytree(run.adapter, parent)
        (parent / "chat_template.jinja").write_text(TEMPLATES[name])
        more = {**record, "adapter": {"from": str(parent)}, "train": short, "output": str(tmp_path / f"{name}-run")}
        child = training.train(more, quiet=True, shelf=shelf)
        digests.append(RunDirectory(child.path).plan()["digest"]["rows"])
    assert digests[0] != digests[1]


def test_a_wrong_cell_stops_before_the_first(record: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="rank=0"):
        sweep({**record, "output": str(tmp_path / "out")}, {"adapter.rank": [2, 0]}, quiet=True)
    with pytest.raises(ConfigError, match=r"set data\.eval"):
        sweep({**record, "data": {**record["data"], "eval": None}}, {"adapter.rank": [2]}, quiet=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("out of memory"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=["device", "python", "cpu"],
)
def test_a_cell_without_enough_memory_is_listed(
    record: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def train(config: Any, **_: Any) -> None:
        if config.adapter.method.rank == 4:
            raise error
        (Path(config.output) / "adapter").mkdir(parents=True)

    monkeypatch.setattr("deltaw.training.sweep.train", train)
    monkeypatch.setattr(
        "deltaw.training.sweep.summarise", lambda _: SimpleNamespace(losses={"held_out": 1.0}, scores={})
    )
    done = sweep({**record, "output": str(tmp_path / "out")}, {"adapter.rank": [4, 2]}, quiet=True)
    assert [r.settings for r in done.ranking] == [{"adapter.rank": 2}]
    assert list(done.failed.values()) == [str(error) or "MemoryError"]


def test_an_interrupt_ends_the_sweep_and_a_failed_cell_its_exit_code(
    record: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    errors: list[Exception] = [
        Interrupted("interrupted at step 3 of 9; continue with: …"),
        TrainError("the loss is nan"),
    ]

    def train(config: Any, **_: Any) -> None:
        if config.adapter.method.rank == 4:
            raise errors[0]
        (Path(config.output) / "adapter").mkdir(parents=True, exist_ok=True)

    monkeypatch.setattr("deltaw.training.sweep.train", train)
    monkeypatch.setattr(
        "deltaw.training.sweep.summarise", lambda _: SimpleNamespace(losses={"held_out": 1.0}, scores={})
    )
    with pytest.raises(Interrupted, match=r"^cell 1 of 2 was interrupted at step 3 of 9; the same command goes on"):
        sweep({**record, "output": str(tmp_path / "out")}, {"adapter.rank": [4, 2]}, quiet=True)
    assert not (tmp_path / "out").exists()
    del errors[0]
    (tmp_path / "config.json").write_text(json.dumps({**record, "output": str(tmp_path / "out")}))
    monkeypatch.setattr("sys.argv", ["deltaw", "train", str(tmp_path / "config.json"), "--sweep", "adapter.rank=4,2"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    captured = capsys.readouterr()
    assert "the loss is nan" in captured.out and "cell 2 of 2: adapter.rank=2 seed 0" in captured.err


def test_a_sweep_is_no_run_to_resume(tmp_path: Path) -> None:
    (tmp_path / "rank-4_seed-0").mkdir()
    (tmp_path / "rank-4_seed-0/config.yaml").write_text("model: tiny\n")
    with pytest.raises(UseError, match=r"holds no run.*it is a sweep \(rank-4_seed-0, …\): give its command again"):
        resume(tmp_path)


def test_ranking_says_when_it_may_be_noise() -> None:
    ranked = [Ranked({"a": 1}, (1.0, 1.2)), Ranked({"a": 2}, (1.1, 1.2)), Ranked({"a": 3}, (3.0, 3.1))]
    lines = table(ranked).splitlines()
    assert "as good as the first" in lines[2] and "as good" not in lines[1] + lines[3]
    assert combinations({"a": [1, 2], "b": [3]}) == [{"a": 1, "b": 3}, {"a": 2, "b": 3}]


def test_from_the_command_line(
    record: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**record, "output": str(tmp_path / "out")}))
    given = [
        "deltaw",
        "train",
        str(tmp_path / "config.json"),
        "--sweep",
        "train.learning_rate=1e-4,1e-2",
        "--quiet",
        "--json",
    ]
    monkeypatch.setattr("sys.argv", given)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    out = capsys.readouterr().out
    ranking = json.loads(out)["ranking"]
    assert "NaN" not in out and [cell["sd"] for cell in ranking] == [None, None]  # of one seed
    assert [cell["settings"] for cell in ranking] == [{"train.learning_rate": 0.01}, {"train.learning_rate": 0.0001}]
