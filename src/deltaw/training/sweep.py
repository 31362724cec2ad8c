"""A sweep: one configuration with some values varied, several seeds each, on one loaded base; resumable cell by cell.

    {train.learning_rate: [1e-4, 1e-3], adapter.rank: [4, 16]} × seeds 0, 1, 2  →  a ranked table with mean ± sd

Cells are ordinary runs in folders below the output. A finished cell is read, an interrupted one goes on.
"""

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltaw.config import parse
from deltaw.config.schema import Config
from deltaw.core.errors import ConfigError
from deltaw.runs.directory import RunDirectory
from deltaw.runs.summary import summarise
from deltaw.training.run import Shelf, resume, train


@dataclass(frozen=True)
class Ranked:
    """One combination of values over its seeds. `values` are the measured ones, lower is better for a loss."""

    settings: Mapping[str, Any]
    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def sd(self) -> float:
        return statistics.stdev(self.values) if len(self.values) > 1 else math.nan


def combinations(axes: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Every combination of the values, the last axis fastest."""
    empty = [key for key, values in axes.items() if not values]
    if empty:
        raise ConfigError(f"the sweep gives no value for {empty[0]}")
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def sweep(
    record: Mapping[str, Any],
    axes: Mapping[str, Sequence[Any]],
    seeds: int = 1,
    measure: str = "held_out",
    quiet: bool = False,
) -> list[Ranked]:
    """Train every cell that is not finished, and rank the combinations by `measure`: held_out (loss) or a metric's name.

    record: a configuration as plain data. All cells are validated before the first one is trained.
    """
    output = Path(str(record.get("output") or Config.output))
    cells: list[tuple[dict[str, Any], Config]] = []
    for settings in combinations(axes):
        for seed in range(seeds):
            overrides = [f"{key}={_text(value)}" for key, value in settings.items()]
            folder = output / "_".join([*(_slug(k, v) for k, v in settings.items()), f"seed-{seed}"])
            whole = parse.override(dict(record), [*overrides, f"train.seed={seed}"])
            cells.append((settings, parse.parse({**whole, "output": str(folder)})))
    if any(config.data.eval is None for _, config in cells):
        raise ConfigError("a sweep goes by held-out rows: set data.eval")
    shelf, found = Shelf(), {}
    for settings, config in cells:
        run = RunDirectory(config.output)
        if not run.adapter.exists():
            if run.steps():
                resume(run.path, quiet=quiet, shelf=shelf)
            else:
                run.remove_unfinished()
                train(config, quiet=quiet, shelf=shelf)
        summary = summarise(run)
        values = {**summary.losses, **summary.scores}
        if measure not in values:
            raise ConfigError(f"the runs measured no {measure!r}, they have {', '.join(values)}")
        found.setdefault(_text(settings), (settings, []))[1].append(values[measure])
    lower = measure in ("held_out", "train", "base")
    ranked = [Ranked(settings, tuple(values)) for settings, values in found.values()]
    return sorted(ranked, key=lambda r: r.mean if lower else -r.mean)


def table(ranked: Sequence[Ranked]) -> str:
    """The ranking as text; combinations within the first one's spread are marked, the difference may be noise."""
    first = ranked[0]
    keys = list(first.settings)
    rows = [[*keys, "mean", "sd", "seeds", ""]]
    for r in ranked:
        spread = max(first.sd if first.sd == first.sd else 0.0, r.sd if r.sd == r.sd else 0.0)
        near = r is not first and spread > 0 and abs(r.mean - first.mean) <= spread
        sd = "–" if math.isnan(r.sd) else f"{r.sd:.4f}"
        rows.append(
            [
                *(str(r.settings[k]) for k in keys),
                f"{r.mean:.4f}",
                sd,
                str(len(r.values)),
                "as good as the first" if near else "",
            ]
        )
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _text(value: Any) -> str:
    return parse.dump(value)


def _slug(key: str, value: Any) -> str:
    kept = "".join(c if c.isalnum() or c in ".-" else "-" for c in _text(value))
    return f"{key.rpartition('.')[2]}-{kept}"[:60]
