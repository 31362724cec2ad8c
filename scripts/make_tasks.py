"""Draw the rows of the bundled tasks and write them as .jsonl; the same bytes on every machine.

    python scripts/make_tasks.py

Every combination of slot values is drawn once; the last ones are held out, so no training row has them, while each
single value is in the training rows. The score of looking the answer up in the nearest training row is printed: a task
that could be solved that way would say nothing about learning.
"""

import argparse
import random
from pathlib import Path

from deltaw.data.rows import read_rows
from deltaw.lab.tasks import TASKS, Task, nearest_row_baseline

TRAIN, HELD_OUT = 2000, 200
MOST = 0.20  # of exact match by look-up


def draw(task: Task) -> list[dict[str, str]]:
    """TRAIN + HELD_OUT different combinations of slot values, in an order that depends on the task's name only."""
    rng = random.Random(task.name)
    drawn: dict[tuple[str, ...], None] = {}
    while len(drawn) < TRAIN + HELD_OUT:
        # Python promises the sequence of random() across versions, but not that of choice() or sample().
        drawn[tuple(words[int(rng.random() * len(words))] for words in task.slots.values())] = None
    rows = [dict(zip(task.slots, values, strict=True)) for values in drawn]
    for slot, words in task.slots.items():
        assert {row[slot] for row in rows[:TRAIN]} == set(words), f"{task.name}: a value of {slot} is never trained"
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent.parent / "src/deltaw/lab/tasks")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    for task in TASKS.values():
        rows = draw(task)
        for path, part in ((task.train, rows[:TRAIN]), (task.held_out, rows[TRAIN:])):
            text = "".join(task.row(values) + "\n" for values in part)
            (args.output / path.name).write_text(text, encoding="utf-8", newline="\n")
    for task in TASKS.values():
        train, held_out = (read_rows(args.output / path.name) for path in (task.train, task.held_out))
        found = nearest_row_baseline(task, held_out, train)
        print(
            f"{task.name}: nearest training row {found['exact_match']:.1%} exact, {found['slot_accuracy']:.1%} of slots"
        )
        assert found["exact_match"] <= MOST, f"{task.name} can be looked up"


if __name__ == "__main__":
    main()
