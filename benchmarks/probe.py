"""Does a rank_pattern from gradients beat one rank for all? The bundled task on `tiny`, both at equal parameters.

    python -m benchmarks probe [--rank 4] [--steps 60] [--seeds 3] [--work build/probe]

The pattern is what `deltaw advise --probe` suggests from the first batches on the frozen base, before any training. Each side
is `deltaw train` itself: the rate is the best of three on seed 0, then every seed runs at it. Cells are resumable one by one.
"""

import math
import statistics
from pathlib import Path
from typing import Any

from benchmarks._common import keep, parser
from deltaw.config import parse
from deltaw.lab.tasks import load_task
from deltaw.training.probe import probe
from deltaw.training.sweep import sweep

TASK, BATCH, BATCHES = "records", 16, 4
RATES = (3e-3, 1e-2, 2e-2)


def main(arguments: list[str]) -> None:
    options = parser(__doc__)
    options.add_argument("--rank", type=int, default=4)
    options.add_argument("--steps", type=int, default=60)
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--work", type=Path, default=Path("build/probe"))
    args = options.parse_args(arguments)
    record: dict[str, Any] = {
        "model": "tiny", "data": {"train": str(load_task(TASK).train), "eval": str(load_task(TASK).held_out)},
        "adapter": {"method": "lora", "rank": args.rank},
        "train": {
            "max_steps": args.steps, "batch_size": BATCH, "dtype": "fp32", "eval_every": args.steps, "save_every": args.steps,
            "keep": 1,
        },
    }  # fmt: skip
    found = probe(parse.parse(record), BATCHES)
    fields = {"uniform": {"rank": args.rank}, "pattern": found.adapter}
    sides = {
        name: side({**record, "adapter": {"method": "lora", **own}, "output": str(args.work / name)}, args.seeds)
        for name, own in fields.items()
    }
    for number, name in enumerate(sides):
        sides[name] |= {"parameters": found.sizes[number], "energy": round(found.energy[number], 4)}
    verdict = compare(sides["uniform"], sides["pattern"])
    keep(
        "probe",
        {
            "task": TASK, "steps": args.steps, "batch": BATCH, "probed_batches": BATCHES, "rank": args.rank, "rates": list(RATES),
            "ranks": dict(found.ranks), **sides, "verdict": verdict,
        },
    )  # fmt: skip
    said = {"better": "beats", "worse": "loses to", "no better": "is no better than"}[verdict]
    print(f"the pattern {said} one rank for all")


def side(record: dict[str, Any], seeds: int) -> dict[str, Any]:
    """The best of the rates on seed 0, and the held-out losses of every seed at it."""
    first = sweep(record, {"train.learning_rate": list(RATES)}, 1)
    tried = {r.settings["train.learning_rate"]: r.mean for r in first.ranking}
    rate = first.ranking[0].settings["train.learning_rate"]
    best = sweep(record, {"train.learning_rate": [rate]}, seeds).ranking[0]
    return {
        "rate": rate, "tried": {f"{rate:g}": tried[rate] for rate in sorted(tried)}, "failed": dict(first.failed),
        "loss": {"mean": best.mean, "sd": best.sd, "seeds": list(best.values)},
    }  # fmt: skip


def compare(uniform: dict[str, Any], pattern: dict[str, Any]) -> str:
    """Over paired seeds: a mean difference within two of its standard errors is none."""
    pairs = zip(pattern["loss"]["seeds"], uniform["loss"]["seeds"], strict=True)
    differences = [ours - theirs for ours, theirs in pairs]
    mean = statistics.fmean(differences)
    error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else math.inf
    if abs(mean) <= 2 * error:
        return "no better"
    return "better" if mean < 0 else "worse"
