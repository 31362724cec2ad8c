"""Runs in stages: each goes on from the one before, a cut-off one goes on where it stopped, plan shows all of them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pictured
import pytest
import torch
from safetensors.torch import load_file

import deltaw
from deltaw.cli.main import main
from deltaw.config import parse
from deltaw.core.errors import ConfigError, Interrupted, TargetError, TrainError, UseError
from deltaw.runs.directory import RunDirectory
from deltaw.runs.summary import find, summarise, table
from deltaw.training import run as running
from deltaw.training.stages import ahead
from deltaw.training.sweep import sweep

ALIGN = {"name": "align", "parts": {"projector": "full"}, "train": {"learning_rate": 1e-2}}
INSTRUCT = {"name": "instruct", "parts": {"projector": "full", "language": {"rank": 2, "targets": "attention"}}}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictured.base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictured.rows(tmp_path_factory.mktemp("rows"))


def staged(base: Path, rows: Path, output: Path, *stages: Any, **train: Any) -> dict[str, Any]:
    record = pictured.config(base, rows, output, None, **{"max_steps": 2, "save_every": 1, **train})
    return {**record, "adapter": {}, "stages": list(stages or (ALIGN, INSTRUCT))}


@pytest.fixture(scope="module")
def finished(base: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> running.Run:
    return deltaw.train(staged(base, rows, tmp_path_factory.mktemp("runs") / "both"), quiet=True)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def same(one: Path, other: Path) -> bool:
    ours, theirs = weights(one), weights(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_each_stage_goes_on_from_the_one_before(finished: running.Run) -> None:
    path = finished.path
    assert sorted(p.name for p in path.iterdir()) == ["1-align", "2-instruct", "adapter", "config.yaml"]
    assert finished.adapter == path / "adapter" and same(path / "adapter", path / "2-instruct/adapter")
    first, second = (deltaw.formats.directory.read(path / f"{name}/adapter")[0] for name in ("1-align", "2-instruct"))
    assert {s.path.split(".")[1] for s in first.methods} == {"multi_modal_projector"}
    assert {s.path.split(".")[1] for s in second.methods} == {"multi_modal_projector", "language_model"}
    assert first.methods.items() <= second.methods.items()
    plans = [RunDirectory(path / name).plan() for name in ("1-align", "2-instruct")]
    assert plans[1]["parents"] == [json.loads((path / "1-align/adapter/deltaw.json").read_text())["digest"]]
    assert [plan["config"]["train"]["learning_rate"] for plan in plans] == [1e-2, 1e-2]
    assert plans[1]["predicted"]["memory"]["increment_bytes"] > 0  # of an adapter that it goes on from, too
    assert finished.plan.trainable == plans[1]["trainable"]


def test_runs_show_the_whole_and_its_stages(finished: running.Run, tmp_path: Path) -> None:
    path = tmp_path / "cut"
    shutil.copytree(finished.path, path)
    whole, first, second = map(summarise, find([path]))
    assert (whole.path, whole.state, whole.step, whole.steps) == (str(path), "finished", 4, 4)
    assert whole.seconds == pytest.approx(first.seconds + second.seconds) and "stages" not in whole.settings
    assert table([whole, first, second]).splitlines()[1].split()[1:3] == ["finished", "4/4"]
    shutil.rmtree(path / "adapter")
    shutil.rmtree(path / "2-instruct/adapter")
    (path / "2-instruct/events.jsonl").write_text("")
    assert [one.state for one in map(summarise, find([path]))] == [
        "unfinished, 1 of 2 stages",
        "finished",
        "unfinished",
    ]


def test_a_finished_one_is_refused(finished: running.Run, base: Path, rows: Path) -> None:
    with pytest.raises(UseError, match="is finished, its adapter is"):
        running.resume(finished.path)
    with pytest.raises(UseError, match=r"already holds a run: .*continue it with `deltaw train --resume"):
        deltaw.train(staged(base, rows, finished.path), quiet=True)


@pytest.mark.parametrize("gone", ["second", "half", "copy"])
def test_it_goes_on_where_it_stopped(finished: running.Run, tmp_path: Path, gone: str, capsys: Any) -> None:
    """After the first stage, in the middle of the second, and before the adapter was copied: the bits of a whole run."""
    path = tmp_path / "cut"
    shutil.copytree(finished.path, path)
    for file in path.glob("**/config.yaml"):
        file.write_text(file.read_text().replace(str(finished.path), str(path)))
    for file in path.glob("**/plan.json"):
        file.write_text(file.read_text().replace(str(finished.path), str(path)))
    shutil.rmtree(path / "adapter")
    before = (path / "1-align/events.jsonl").read_text()
    if gone == "second":
        shutil.rmtree(path / "2-instruct")
    if gone == "half":
        shutil.rmtree(path / "2-instruct/adapter")
        shutil.rmtree(path / "2-instruct/checkpoints/step-2")
    done = running.resume(path, quiet=True)
    assert (path / "1-align/events.jsonl").read_text() == before
    assert (done.path, done.adapter, done.steps) == (path, path / "adapter", 2)
    assert same(path / "adapter", finished.adapter) and done.plan.trainable == finished.plan.trainable


def test_an_interrupted_stage_names_the_whole(
    base: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = running._train

    def stops(config: Any, *args: Any, **options: Any) -> Any:
        if config.output.endswith("2-instruct"):
            raise Interrupted("interrupted at step 1 of 2; continue with: deltaw train --resume elsewhere")
        return real(config, *args, **options)

    monkeypatch.setattr(running, "_train", stops)
    with pytest.raises(Interrupted) as caught:
        deltaw.train(staged(base, rows, tmp_path / "run"), quiet=True)
    said = "stage 2 of 2, instruct: interrupted at step 1 of 2; continue with: deltaw train --resume"
    assert str(caught.value) == f"{said} {tmp_path / 'run'}"
    monkeypatch.undo()
    assert running.resume(tmp_path / "run", quiet=True).adapter.exists()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"data": {"train": "nowhere.jsonl"}}, UseError, ["stage 2 of 2, instruct: ", "nowhere.jsonl"]),
        ({"parts": {"visoin": "full"}}, TargetError, ["stage 2 of 2, instruct: ", "did you mean 'vision'"]),
        (
            {"parts": {"projector": {"method": "lora"}}},
            TargetError,
            [
                "stage 2 of 2",
                "projector carries full from",
                "1-align/adapter, and lora is asked: write projector: full",
            ],
        ),
        ({"train": {"clip": -1}}, ConfigError, ["stages[1] (instruct): train.clip=-1"]),
    ],
)
def test_a_fault_of_the_last_is_said_before_the_first_is_paid_for(
    base: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any, error: type, words: list[str]
) -> None:
    monkeypatch.setattr(running, "load_base", lambda *_, **__: pytest.fail("the base was loaded"))
    with pytest.raises(error) as caught:
        deltaw.train(staged(base, rows, tmp_path / "run", ALIGN, {**INSTRUCT, **change}), quiet=True)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_part_that_sees_wants_images_before_a_run(base: Path, tmp_path: Path) -> None:
    config = pictured.config(
        base, pictured.rows(tmp_path, pictured=0, plain=8), tmp_path / "run", {"projector": "full"}
    )
    with pytest.raises(
        TrainError, match=r"no row has an image, so no gradient would reach projector: give rows with images"
    ):
        ahead(parse.parse(config))
    config["adapter"]["parts"] = {"language": "lora"}
    assert len(ahead(parse.parse(config))) == 1


def test_what_stops_in_the_first_steps_leaves_nothing(base: Path, tmp_path: Path) -> None:
    text = pictured.rows(tmp_path / "rows", pictured=0, plain=4)
    with pytest.raises(TrainError, match="no row has an image"):
        deltaw.train(staged(base, text, tmp_path / "run"), quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_text_model_in_stages(rows: Path, tmp_path: Path) -> None:
    """Without parts the whole adapter is trained further, with the tokens that it brought."""
    text = pictured.rows(tmp_path / "rows", pictured=0, plain=6)
    record = {
        "model": "tiny", "data": {"train": str(text), "eval": None, "tokens": ["<|x|>"]}, "adapter": {"rank": 2},
        "train": {"max_steps": 1, "batch_size": 2}, "output": str(tmp_path / "run"),
        "stages": [{"name": "a"}, {"name": "b", "train": {"max_steps": 2, "seed": 1}}],
    }  # fmt: skip
    run = deltaw.train(record, quiet=True)
    assert run.steps == 2 and (run.adapter / "tokens.json").exists()
    assert not same(run.path / "1-a/adapter", run.adapter)


def test_plan_shows_every_stage(
    base: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps(staged(base, rows, tmp_path / "run")), encoding="utf-8")
    outputs = {}
    for flags in ((), ("--json",)):
        monkeypatch.setattr("sys.argv", ["deltaw", "plan", str(file), *flags])
        with pytest.raises(SystemExit) as done:
            main()
        assert done.value.code == 0
        outputs[flags] = capsys.readouterr().out
    text, found = outputs[()], json.loads(outputs[("--json",)])["stages"]
    assert f"stage 1 of 2, align → {tmp_path / 'run'}/1-align" in text and "stage 2 of 2, instruct → " in text
    assert [one["name"] for one in found] == ["stage 1 of 2, align", "stage 2 of 2, instruct"]
    assert [{p["part"]: p["method"] for p in one["parts"]}["language"] for one in found] == ["frozen", "lora"]
    assert found[1]["parameters"]["trainable"] > found[0]["parameters"]["trainable"] > 0
    assert all(one["memory"]["peak_bytes"] > 0 and one["rows"] == 8 for one in found)
    monkeypatch.setattr("sys.argv", ["deltaw", "plan", str(file), "--html", str(tmp_path / "page.html")])
    with pytest.raises(SystemExit):
        main()
    assert "the configuration has stages: leave it out" in capsys.readouterr().err


def test_a_sweep_is_of_single_runs(base: Path, rows: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a sweep varies single runs: leave stages out"):
        sweep(staged(base, rows, tmp_path / "run"), {"train.learning_rate": [1e-3]}, quiet=True)


def test_it_asks_once(base: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "load_base", lambda *_, **__: pytest.fail("the base was loaded"))
    monkeypatch.setattr("deltaw.training.stages.foreseen", lambda *_: ({}, ["it will not fit"]))
    asked: list[str] = []
    with pytest.raises(TrainError, match="not started"):
        deltaw.train(staged(base, rows, tmp_path / "run"), quiet=True, ask=lambda said: bool(asked.extend(said)))
    assert "stage 1 of 2, align: it will not fit" in asked and "stage 2 of 2, instruct: it will not fit" in asked
    assert not (tmp_path / "run").exists()
