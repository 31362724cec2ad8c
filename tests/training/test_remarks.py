"""What is allowed and seldom meant is said: no template, held-out rows that are trained on, a loss that rose, settings of no use."""

import json
from pathlib import Path
from typing import Any

import pytest

import deltaw
from deltaw.cli import main as cli
from deltaw.config.parse import parse
from deltaw.core.errors import ConfigError
from deltaw.runs.directory import RunDirectory
from deltaw.training.prepare import prepare


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    file = tmp_path / "rows.jsonl"
    words = ["river", "castle", "garden", "mill"]
    text = [{"prompt": f"say {a} then {b}", "completion": f"{b}, {a}."} for a in words for b in words]
    file.write_text("".join(json.dumps(row) + "\n" for row in text))
    return file


def config(rows: Path, **data: Any) -> dict[str, Any]:
    return {"model": "tiny", "data": {"train": str(rows), "eval": None, **data}}


def test_nothing_is_said_of_what_is_well(rows: Path) -> None:
    assert prepare(parse(config(rows, eval=0.25))).remarks == []


def test_held_out_rows_that_are_trained_on(rows: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    half = tmp_path / "half.jsonl"
    half.write_text("".join(rows.read_text().splitlines(keepends=True)[:5]))
    monkeypatch.setattr("sys.argv", ["deltaw", "plan", "model=tiny", f"data.train={rows}", f"data.eval={half}"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    assert "5 of the held-out rows are trained on too: their loss says nothing" in capsys.readouterr().out


@pytest.mark.shared
def test_a_base_without_a_chat_template(rows: Path, shared: Path) -> None:
    given = {**config(rows), "model": str(shared / "models/stories260K")}
    assert prepare(parse(given)).remarks == [
        "the base has no chat template: an answer follows its prompt directly; data.template: plain marks both"
    ]
    assert prepare(parse({**given, "data": {**given["data"], "template": "plain"}})).remarks == []
    text = rows.with_name("text.jsonl")
    text.write_text(json.dumps({"text": "a text by itself"}) + "\n")
    raw = {**config(text), "model": given["model"], "train": {"objective": "text"}}
    assert prepare(parse(raw)).remarks == []  # nothing to mark


def test_a_cut_row_is_shown(rows: Path) -> None:
    long = {"prompt": "say " + "river " * 60, "completion": "no."}
    rows.write_text(rows.read_text() + json.dumps(long) + "\n")
    found = prepare(parse(config(rows, max_length=40, overflow="cut")))
    shown = found.previews(2)
    assert found.report.cut == 1 and len(shown) == 3 and "⟦no." in shown[2]


def test_a_loss_that_rose(rows: Path, tmp_path: Path) -> None:
    given = {
        **config(rows, eval=0.25), "output": str(tmp_path / "run"),
        "train": {"max_steps": 3, "batch_size": 4, "learning_rate": 0.3, "warmup": 0.0, "schedule": "constant"},
    }  # fmt: skip
    done = deltaw.train(given, quiet=True)
    assert done.losses["held_out"] > done.losses["base"]
    (said,) = (one for one in done.findings if one.name == "not_falling")
    assert said.verdict == "fault" and said.evidence.startswith("the held-out loss went from ")
    assert "lower train.learning_rate, now 0.3," in said.next


def test_the_last_loss_is_that_of_the_last_step(rows: Path, tmp_path: Path) -> None:
    given = {
        **config(rows), "output": str(tmp_path / "run"),
        "train": {"max_steps": 3, "batch_size": 4, "learning_rate": 0.01, "log_every": 100},
    }  # fmt: skip
    done = deltaw.train(given, quiet=True)
    steps = RunDirectory(done.path).events("step")
    assert steps[-1]["step"] == 3 and done.losses["train"] == steps[-1]["loss"] != steps[0]["loss"]


def test_answers_without_rows_to_answer(rows: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.generate answers held-out rows: set data\.eval"):
        parse({**config(rows), "train": {"generate": 3}})
