"""SCAN, simple split, with `tiny`: commands → actions, exact match on 500 held-out commands; LoRA, and all weights beside it.

    python -m benchmarks scan [--steps 1000] [--seeds 3] [--spelled] [--work build/scan]

The six actions (I_TURN_RIGHT, …) are new tokens of the vocabulary, whose rows are trained on both sides: rows are three times
as short as with the base's own pieces (`--spelled`).
"""

import random
from pathlib import Path

from benchmarks._common import parser
from benchmarks._task import Task, table
from deltaw.config.schema import Source
from deltaw.data.rows import Rows, read_rows

PATTERN = "IN: (?P<prompt>.*) OUT: (?P<completion>.*)"
ACTIONS = ("I_TURN_RIGHT", "I_TURN_LEFT", "I_JUMP", "I_RUN", "I_WALK", "I_LOOK")
RATES = {"lora": [1e-3, 3e-3, 6e-3], "full": [3e-4, 1e-3, 2e-3]}


def held_out(folder: Path) -> Rows:
    """500 commands of the test file, always the same."""
    rows = read_rows(Source(path=str(folder / "tasks_test_simple.txt"), pattern=PATTERN))
    return Rows(rows.form, random.Random(0).sample(rows.rows, 500), rows.source, rows.parts)


def main(arguments: list[str]) -> None:
    options = parser(__doc__)
    options.add_argument("--steps", type=int, default=1000)
    options.add_argument("--spelled", action="store_true", help="the base's own tokens, nothing added")
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--work", type=Path, default=Path("build/scan"))
    args = options.parse_args(arguments)
    folder = args.shared / "data/scan/simple_split"
    train = Source(path=str(folder / "tasks_train_simple.txt"), pattern=PATTERN)
    task = Task(
        "scan_spelled" if args.spelled else "scan", train, held_out(folder), "exact_match", RATES, args.steps,
        tokens=() if args.spelled else ACTIONS,
    )  # fmt: skip
    table(task, args.work / task.name, args.seeds)
