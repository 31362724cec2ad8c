"""A run directory: nothing is written over, a crash leaves nothing half-read, checkpoints rotate."""

from pathlib import Path

import pytest

from deltaw.core.errors import FileError, UseError
from deltaw.runs.directory import RunDirectory


def test_what_is_written_reads_back(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "deep" / "run")
    config = {"model": "tiny", "data": {"train": ["à.jsonl"]}, "train": {"learning_rate": 2e-4}}
    run.create(config, "1.2.3")
    assert run.config() == config and (run.path / "config.yaml").read_text().startswith("# deltaw 1.2.3\n")
    run.log("step", step=1, loss=0.5)
    run.log("end", text="fertig ✓")
    assert [e["event"] for e in run.events()] == ["step", "end"] and run.events("step")[0]["loss"] == 0.5
    assert RunDirectory(tmp_path / "other").events() == []


def test_damaged_files_are_named(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.create({}, "1")
    assert run.plan() == {} == run.samples()
    (run.path / "samples.json").write_text('{"first":\n')
    (run.path / "plan.json").write_text("[1]")
    assert run.plan() == {}
    with pytest.raises(FileError, match=r"samples\.json, line 2: samples\.json is not JSON: .*; delete it"):
        run.samples()


def test_nothing_is_written_over(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.create({}, "1")
    with pytest.raises(UseError, match="already holds a run: give another output, or delete it"):
        run.create({}, "1")
    run.checkpoint(3).mkdir(parents=True)
    with pytest.raises(UseError, match=r"already holds a run: give another output, continue it with .*--resume"):
        run.create({}, "1")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    (tmp_path / "file").write_text("x")
    for name in ("mine", "file"):
        with pytest.raises(UseError, match="is not an empty folder"):
            RunDirectory(tmp_path / name).create({}, "1")
    (tmp_path / "empty").mkdir()
    RunDirectory(tmp_path / "empty").create({}, "1")


def test_no_run_and_a_broken_one(tmp_path: Path) -> None:
    with pytest.raises(UseError, match="holds no run"):
        RunDirectory(tmp_path / "nothing").config()
    (tmp_path / "config.yaml").write_text("a: [1")
    with pytest.raises(FileError, match=r"config\.yaml cannot be read"):
        RunDirectory(tmp_path).config()
    with pytest.raises(UseError, match="no checkpoint to continue from"):
        RunDirectory(tmp_path).last_checkpoint()


def test_an_event_cut_short_is_left_out_and_does_no_harm(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.log("step", step=1)
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"event": "step", "st')
    assert [e["step"] for e in run.events()] == [1]
    run.log("step", step=2)
    assert [e["step"] for e in run.events()] == [1, 2]


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    (run.checkpoint(2) / "adapter").mkdir(parents=True)
    with pytest.raises(FileError, match=r"is damaged, it lacks optimizer.pt, scheduler.pt"):
        run.last_checkpoint()


def test_checkpoints_rotate_by_number(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    for step in (2, 10, 9):
        run.checkpoint(step).mkdir(parents=True)
    (tmp_path / "checkpoints" / ".step-11.77.tmp").mkdir()  # left by a crash: not a checkpoint
    assert run.steps() == [2, 9, 10]
    run.rotate(2)
    assert run.steps() == [9, 10]
