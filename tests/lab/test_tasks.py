"""The bundled tasks: made by their script to the byte, unseen combinations held out, no look-up solves them."""

import subprocess
import sys
from pathlib import Path

import pytest

from deltaw.core.errors import UseError
from deltaw.data.rows import read_rows
from deltaw.lab.tasks import TASKS, load_task, nearest_row_baseline

ROOT = Path(__file__).parents[2]


def test_files_are_what_the_script_draws(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, ROOT / "scripts/make_tasks.py", "--output", tmp_path], check=True, capture_output=True
    )
    for task in TASKS.values():
        for path in (task.train, task.held_out):
            assert (tmp_path / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("name", TASKS)
def test_held_out_rows_are_unseen_and_cannot_be_looked_up(name: str) -> None:
    task = load_task(name)
    train, held_out = read_rows(task.train), read_rows(task.held_out)
    assert len(train) >= 2000 and len(held_out) >= 200 and len(task.slots) >= 6
    seen = {row.messages for row in train.rows}
    assert not any(row.messages in seen for row in held_out.rows)
    found = nearest_row_baseline(task, held_out)
    assert found["exact_match"] <= 0.2 and found["slot_accuracy"] < 0.8


def test_scores() -> None:
    task = load_task("records")
    reference = read_rows(task.held_out).rows[0].messages[-1].content
    assert task.slot_accuracy(reference, reference) == 1.0
    value = task.values(reference)["place"][0]
    other = next(word for word in task.slots["place"] if word != value)
    assert task.slot_accuracy(reference.replace(value, other), reference) == pytest.approx(6 / 7)
    assert task.slot_accuracy(f"{reference} {other}", reference) == pytest.approx(6 / 7)  # two answers are none
    with pytest.raises(UseError, match="did you mean 'records'"):
        load_task("record")


def test_vocabularies_share_no_word() -> None:
    for task in TASKS.values():
        words = [word for slot in task.slots.values() for word in slot]
        assert len(words) == len(set(words))
