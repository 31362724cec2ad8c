"""A sweep: one configuration with some values varied, several seeds each, on one loaded base; resumable cell by cell.

    {train.learning_rate: [1e-4, 1e-3], adapter.rank: [4, 16]} × seeds 0, 1, 2  →  a ranked table with mean ± sd

Cells are ordinary runs in folders below the output. A finished cell is read, an interrupted one goes on.
"""

import gc
import hashlib
import itertools
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deltaw.config import parse
from deltaw.config.schema import Config
from deltaw.core.errors import ConfigError, DeltawError, Interrupted, TrainError, faults
from deltaw.core.text import columns
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


@dataclass(frozen=True)
class Sweep:
    """The combinations, best first; and the cells that failed: {folder: why}."""

    ranking: list[Ranked]
    failed: Mapping[str, str]


LOSSES = ("held_out", "train", "base")


def combinations(axes: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Every combination of the values, the last axis fastest."""
    found = [f"no value for {key}" for key, values in axes.items() if not values]
    found += [
        f"{key} is the sweep's own: --seeds and output give it" for key in ("train.seed", "output") if key in axes
    ]
    if found:
        raise faults(ConfigError, "sweep", found)
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def sweep(
    record: Mapping[str, Any],
    axes: Mapping[str, Sequence[Any]],
    seeds: int = 1,
    measure: str = "held_out",
    quiet: bool = False,
) -> Sweep:
    """Train every cell that is not finished, and rank the combinations by `measure`: held_out (loss) or a metric's name.

    record: a configuration as plain data. All cells are validated before the first one is trained.
    """
    if record.get("stages"):
        raise ConfigError("a sweep varies single runs: leave stages out")
    output = Path(str(record.get("output") or Config.output))
    cells: list[tuple[dict[str, Any], Config]] = []
    for settings in combinations(axes):
        for seed in range(seeds):
            overrides = [f"{key}={parse.dump(value)}" for key, value in settings.items()]
            folder = output / "_".join([*(_slug(k, v) for k, v in settings.items()), f"seed-{seed}"])
            whole = parse.override(dict(record), [*overrides, f"train.seed={seed}"])
            cells.append((settings, parse.parse({**whole, "output": str(folder)})))
    scores = {name for _, config in cells for name in config.train.metrics if config.train.generate}
    if measure not in LOSSES and measure not in scores:
        raise ConfigError(
            f"the runs will not measure {measure!r}: held_out, or with train.generate one of train.metrics"
        )
    if any(config.data.eval is None for _, config in cells):
        raise ConfigError("a sweep goes by held-out rows: set data.eval")
    _fresh(cells)
    shelf, found, failed = Shelf(), {}, {}
    for number, (settings, config) in enumerate(cells, 1):
        if not quiet:
            chosen = ", ".join(f"{key}={value}" for key, value in settings.items())
            print(f"cell {number} of {len(cells)}: {chosen} seed {config.train.seed}", file=sys.stderr)
        try:
            value = _cell(config, measure, quiet, shelf)
        except Interrupted as error:
            said = str(error).partition(";")[0]
            raise Interrupted(
                f"cell {number} of {len(cells)} was {said}; the same command goes on from there"
            ) from None
        except Exception as error:
            if not isinstance(error, DeltawError) and not _out_of_memory(error):
                raise
            # the other cells still say something
            failed[config.output] = str(error) or type(error).__name__
        else:
            found.setdefault(parse.dump(settings), (settings, []))[1].append(value)
        gc.collect()  # a trainer is a circle of references, and the next cell wants its memory
    if not found:
        raise faults(TrainError, "no cell of the sweep came to its end", [f"{k}: {v}" for k, v in failed.items()])
    ranked = [Ranked(settings, tuple(values)) for settings, values in found.values()]
    return Sweep(sorted(ranked, key=lambda r: r.mean if measure in LOSSES else -r.mean), failed)


def _out_of_memory(error: Exception) -> bool:
    """Of the device, of Python, or of torch on the CPU, which has no class for it."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def _cell(config: Config, measure: str, quiet: bool, shelf: Shelf) -> float:
    run = RunDirectory(config.output)
    if not run.adapter.exists():
        if run.steps():
            resume(run.path, quiet=quiet, shelf=shelf)
        else:
            run.remove_unfinished()
            train(config, quiet=quiet, shelf=shelf)
    summary = summarise(run)
    return {**summary.losses, **summary.scores}[measure]


def _fresh(cells: Sequence[tuple[Mapping[str, Any], Config]]) -> None:
    """Every cell has a folder of its own, and what stands there already is of the same configuration."""
    folders = [config.output for _, config in cells]
    twice = next((folder for number, folder in enumerate(folders) if folder in folders[:number]), None)
    if twice:
        raise ConfigError(f"the sweep gives two cells the folder {twice}: give each value once")
    for _, config in cells:
        run = RunDirectory(config.output)
        if (run.path / "config.yaml").exists() and parse.parse(run.config()) != config:
            raise ConfigError(f"{run.path} holds a run of another configuration: give the sweep another output")


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
    return columns(rows)


def _slug(key: str, value: Any) -> str:
    text = parse.dump(value)
    kept = "".join(c if c.isalnum() or c in ".-+" else "-" for c in text)[:40]
    short = f"{key.rpartition('.')[2]}-{kept}"
    return short if kept == text else f"{short}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"
