"""SCAN, simple split, with `tiny`: commands → actions, exact match on 500 held-out commands; LoRA, and all weights beside it.

python -m benchmarks scan [--steps 1500] [--seeds 3] [--work build/scan]
"""

import random
from pathlib import Path

from benchmarks._common import parser
from benchmarks._task import Task, table
from deltaw.config.schema import Source
from deltaw.data.rows import Rows, read_rows

PATTERN = "IN: (?P<prompt>.*) OUT: (?P<completion>.*)"
RATES = {"lora": [1e-3, 3e-3, 6e-3], "full": [3e-4, 1e-3, 2e-3]}


def held_out(folder: Path) -> Rows:
    """500 commands of the test file, always the same."""
    rows = read_rows(Source(path=str(folder / "tasks_test_simple.txt"), pattern=PATTERN))
    return Rows(rows.form, random.Random(0).sample(rows.rows, 500), rows.source, rows.parts)


def main(arguments: list[str]) -> None:
    options = parser(__doc__)
    options.add_argument("--steps", type=int, default=1500)
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--work", type=Path, default=Path("build/scan"))
    args = options.parse_args(arguments)
    folder = args.shared / "data/scan/simple_split"
    train = Source(path=str(folder / "tasks_train_simple.txt"), pattern=PATTERN)
    table(Task("scan", train, held_out(folder), "exact_match", RATES, args.steps), args.work, args.seeds)
