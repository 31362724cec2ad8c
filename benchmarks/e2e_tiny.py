"""E2E restaurant descriptions with `tiny`: BLEU (sacrebleu, lower-cased, all references) of LoRA, all weights and the base.

    python -m benchmarks e2e_tiny [--steps 400] [--seeds 3] [--work build/e2e_tiny]

Trained on the validation file (4,672 rows), scored on all rows of 100 inputs of the test file.
"""

from pathlib import Path

from benchmarks._common import parser
from benchmarks._task import Task, table
from deltaw.config.schema import Source
from deltaw.data.rows import Rows, read_rows

PATTERN = r"(?P<prompt>.*?) ?\|\| ?(?P<completion>.*)"
RATES = {"lora": [1e-3, 3e-3, 6e-3], "full": [3e-4, 1e-3, 2e-3]}
INPUTS = 100


def held_out(file: Path) -> Rows:
    """All rows of the first inputs of the test file: every reference of each."""
    rows = read_rows(Source(path=str(file), pattern=PATTERN))
    inputs = list(dict.fromkeys(row.messages[0].content for row in rows.rows))[:INPUTS]
    chosen = [row for row in rows.rows if row.messages[0].content in set(inputs)]
    return Rows(rows.form, chosen, rows.source, rows.parts)


def main(arguments: list[str]) -> None:
    options = parser(__doc__)
    options.add_argument("--steps", type=int, default=400)
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--work", type=Path, default=Path("build/e2e_tiny"))
    args = options.parse_args(arguments)
    folder = args.shared / "data/e2e"
    train = Source(path=str(folder / "valid.txt"), pattern=PATTERN)
    table(
        Task("e2e_tiny", train, held_out(folder / "test.txt"), "bleu", RATES, args.steps, eval=0.05),
        args.work,
        args.seeds,
    )
