"""Real short runs say what is true of them: a good one nothing, one at a far too high rate, one that forgets, one that over-fits."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import deltaw
from deltaw.config.parse import parse
from deltaw.core.errors import ConfigError, DataError, Interrupted
from deltaw.data.rows import read_rows
from deltaw.lab.tasks import load_task
from deltaw.runs.directory import RunDirectory
from deltaw.runs.summary import summarise
from deltaw.training import callbacks
from deltaw.training import run as training
from deltaw.training.general import TOKENS
from deltaw.training.prepare import prepare

PROSE = """The evening had grown cold, and the old gentleman drew his chair nearer to the fire. He had not spoken since
dinner, and his niece, who knew his moods, went on quietly with her sewing. Outside the wind was rising; it shook the
windows and sighed in the chimney like some unhappy creature that wished to be let in. At last he raised his head, and
said that he had had a letter from London that morning, and that he must go there before the end of the week.
"""


@pytest.fixture
def prose(tmp_path: Path) -> str:
    file = tmp_path / "prose.txt"
    file.write_text(PROSE)
    return str(file)


def records(output: Path, general: Any = None, **train: Any) -> dict[str, Any]:
    task = load_task("records")
    return {
        "model": "tiny",
        "data": {"train": str(task.train), "eval": {"path": str(task.held_out), "rows": 8}, "general": general},
        "adapter": {"rank": 8, "alpha": 16},
        "train": {"max_steps": 12, "batch_size": 4, "learning_rate": 3e-3, "log_every": 1, **train},
        "output": str(output),
    }


def wrong(run: training.Run) -> dict[str, str]:
    return {finding.name: str(finding) for finding in run.findings if finding.wrong}


def test_a_good_run(tmp_path: Path) -> None:
    done = deltaw.train(records(tmp_path / "run", max_steps=50, batch_size=8, learning_rate=6e-3), quiet=True)
    assert wrong(done) == {} and done.losses["held_out"] < 0.2 < 4 < done.losses["base"]
    (event,) = RunDirectory(done.path).events("diagnosis")
    assert [one["name"] for one in event["findings"]] == [finding.name for finding in done.findings]
    assert summarise(RunDirectory(done.path)).findings == done.findings


def test_a_rate_that_is_far_too_high(tmp_path: Path, capsys: Any) -> None:
    done = deltaw.train(records(tmp_path / "run", learning_rate=0.3))
    found = wrong(done)
    assert {"not_falling", "unstable"} <= found.keys() and "under_trained" not in found
    assert "lower train.learning_rate, now 0.3," in found["not_falling"]
    said = capsys.readouterr().err
    assert f"note: {found['unstable']}" in said and "note: over fitting" not in said


def test_a_run_that_forgets(tmp_path: Path, prose: str, capsys: Any) -> None:
    """Measured of the base and of the adapter, which a smaller strength shows to be the cause; nothing else changes."""
    done = deltaw.train(records(tmp_path / "run", prose, learning_rate=1e-2))
    assert "forgetting" in wrong(done)
    base, full, half = RunDirectory(done.path).events("general")
    assert (base["step"], base["strength"], full["step"], full["strength"], half["strength"]) == (0, 0, 12, 1, 0.5)
    assert full["loss"] > base["loss"] + 0.1 and half["loss"] < full["loss"] and half["held_out"] < done.losses["base"]
    assert f"{base['loss']:.4f} → {full['loss']:.4f}, {half['loss']:.4f} at strength 0.5" in (
        done.path / "report.html"
    ).read_text(encoding="utf-8")
    assert f"general  {base['tokens']:,} tokens, measured before and after" in capsys.readouterr().err

    own = deltaw.load_base("tiny")
    measured = deltaw.evaluate(own.model, own.tokenizer, read_rows(prose), generations=0)
    assert base["loss"] == pytest.approx(measured.loss, rel=1e-5)
    without = deltaw.train(records(tmp_path / "without", learning_rate=1e-2), quiet=True)
    ours, theirs = (load_file(one.adapter / "adapter_model.safetensors") for one in (done, without))
    assert all(ours[key].equal(theirs[key]) for key in theirs)
    assert "forgetting" not in wrong(without)


def test_a_run_that_over_fits(tmp_path: Path) -> None:
    """Answers that nothing could tell from their prompts can only be learnt by heart."""
    draw, words = random.Random(0), ["river", "castle", "garden", "church", "mill", "bridge", "tower", "forest", "wood"]
    rows = [{"prompt": f"word {n}", "completion": " ".join(draw.choices(words, k=4))} for n in range(40)]
    for name, some in (("train", rows[:24]), ("eval", rows[24:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    config = records(tmp_path / "run", max_steps=40, learning_rate=1e-2)
    config["data"] = {"train": str(tmp_path / "train.jsonl"), "eval": str(tmp_path / "eval.jsonl")}
    done = deltaw.train(config, quiet=True)
    best = min(RunDirectory(done.path).events("eval"), key=lambda event: event["loss"])
    assert f"best at step {best['step']} ({best['loss']:.4f})" in wrong(done)["over_fitting"]
    assert "not_falling" not in wrong(done)


def test_the_base_is_measured_once(tmp_path: Path, prose: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed run keeps what was measured before its first step, and ends with the same findings."""
    config = records(tmp_path / "whole", prose, max_steps=4, save_every=2)
    whole = deltaw.train(config, quiet=True)
    stop = callbacks.CleanStop.on_step_end

    def at_two(self: Any, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self.interrupted |= state.global_step == 2
        stop(self, args, state, control, **rest)

    monkeypatch.setattr(callbacks.CleanStop, "on_step_end", at_two)
    with pytest.raises(Interrupted):
        deltaw.train({**config, "output": str(tmp_path / "cut")}, quiet=True)
    monkeypatch.undo()
    cut = deltaw.resume(tmp_path / "cut", quiet=True)
    both = [RunDirectory(run.path).events("general") for run in (whole, cut)]
    ours, theirs = ([(e["step"], e["strength"], e["loss"]) for e in one] for one in both)
    assert ours == theirs and ours[0][:2] == (0, 0.0)
    assert cut.findings == whole.findings


def test_general_rows_are_read_as_the_base_reads_them(tmp_path: Path, prose: str) -> None:
    """Whatever data.train takes, without the columns of data and the tokens of the run; no more of it than is needed."""
    config = parse(records(tmp_path / "run"))
    rows = load_task("commands").held_out
    given = {"model": "tiny", "data": {"train": str(rows), "eval": None, "tokens": ["letter from"]}}
    found = prepare(parse({**given, "data": {**given["data"], "general": [prose, {"path": str(rows), "rows": 3}]}}))
    assert len(found.general) == 4 and max(max(row.ids) for row in found.general) < 4096
    assert "general  " in found.general_said[0] and prepare(config).general_said == []
    (tmp_path / "long.txt").write_text(PROSE * 700)
    long = prepare(parse({**given, "data": {**given["data"], "general": str(tmp_path / "long.txt")}})).general
    assert TOKENS <= sum(len(row.ids) for row in long) < TOKENS + 512
    with pytest.raises(DataError, match=r"no file 'nowhere\.txt'"):
        prepare(parse({**given, "data": {**given["data"], "general": "nowhere.txt"}}))
    with pytest.raises(ConfigError, match=r"data\.general\.weight=0\.0 must be above 0"):
        parse({**given, "data": {**given["data"], "general": {"path": prose, "weight": 0.0}}})
    with pytest.raises(ConfigError, match=r"data\.general is empty"):
        parse({**given, "data": {**given["data"], "general": ""}})
