"""A run in stages: ordinary runs in folders below the output, each going on from the adapter of the one before.

output/config.yaml     the whole configuration
output/1-align/        a run directory; a finished stage is not repeated
output/2-instruct/     from: output/1-align/adapter
output/adapter/        a copy of the last one's
"""

import dataclasses
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import deltaw
from deltaw.config import parse
from deltaw.config.schema import Config
from deltaw.core.errors import DeltawError, Interrupted, TrainError
from deltaw.core.files import whole_folder
from deltaw.core.parts import SEEING
from deltaw.core.plan import Target
from deltaw.runs.directory import RunDirectory
from deltaw.training.forecast import foreseen
from deltaw.training.outlook import Outlook, outlook
from deltaw.training.prepare import Prepared, prepare

Done = TypeVar("Done")


@dataclass(frozen=True)
class Ahead:
    """A stage before any is trained: what it would learn from, and what it would train."""

    name: str
    """stage 1 of 2, align; empty where the run has no stages."""
    config: Config
    data: Prepared | None
    look: Outlook | None
    """None where it goes on from a whole adapter that was not made here."""


def ahead(config: Config, rows: bool = True) -> list[Ahead]:
    """Every stage of a configuration, in order; one where it has none. Raises what any of them would stop at.

    rows: are there any to prepare?
    """
    found: list[Ahead] = []
    runs, carried = parse.stages(config), None
    for number, one in enumerate(runs, 1):
        name = f"stage {number} of {len(runs)}, {config.stages[number - 1].name}" if config.stages else ""
        try:
            data = prepare(_alone(one, runs[0]) if number > 1 else one) if rows else None
            look = outlook(one, carried)
            _reached(data, look)
        except DeltawError as error:
            if name:
                error.args = (f"{name}: {error}",)
            raise
        found.append(Ahead(name, one, data, look))
        carried = _after(look)
    return found


def _reached(data: Prepared | None, look: Outlook | None) -> None:
    """TrainError where a part that sees is trained, and no row has an image."""
    if data is None or data.report.with_images or look is None or look.by_part is None:
        return
    trained = {look.by_part.parts.of(target.site.path) for target in look.plan.targets}
    if found := [part for part in SEEING if part in trained]:
        raise TrainError(
            f"adapter.parts: no row has an image, so no gradient would reach {' and '.join(found)}: give rows with images, or "
            f"freeze what sees ({found[0]}: frozen)"
        )


def _alone(stage: Config, first: Config) -> Config:
    """A stage whose adapter is not there yet: with the tokens and the template that it will bring."""
    template = stage.data.template or first.data.template
    data = dataclasses.replace(stage.data, tokens=first.data.tokens, template=template)
    return dataclasses.replace(stage, data=data, adapter=dataclasses.replace(stage.adapter, start=None))


def _after(look: Outlook | None) -> Sequence[Target] | None:
    """What the adapter of a stage will hold."""
    return None if look is None else (*look.plan.targets, *look.kept)


def warnings(stages: Sequence[Ahead]) -> list[str]:
    """What there is to warn of before the first stage starts."""
    found = []
    for stage in stages:
        said = [] if stage.look is None or stage.data is None else foreseen(stage.config, stage.look, stage.data)[1]
        found += [f"{stage.name}: {one}" for one in (*said, *(() if stage.data is None else stage.data.remarks))]
    return found


def in_order(
    config: Config,
    run: RunDirectory,
    quiet: bool,
    train: Callable[[Config], Done],
    resume: Callable[[RunDirectory], Done],
) -> Done | None:
    """Train the stages that are not finished and keep the last one's adapter; what the last one gave, if it was not there."""
    if not run.exists():
        run.create(config.to_dict(), deltaw.__version__)
    runs, done = parse.stages(config), None
    for number, (stage, one) in enumerate(zip(config.stages, runs, strict=True), 1):
        here, name = RunDirectory(one.output), f"stage {number} of {len(runs)}, {stage.name}"
        if here.adapter.exists():
            continue
        if not quiet:
            print(name, file=sys.stderr)
        try:
            done = _go_on(here, one, train, resume)
        except Interrupted as error:
            why = str(error).partition(";")[0]
            raise Interrupted(f"{name}: {why}; continue with: deltaw train --resume {run.path}") from None
        except BaseException:
            if not any(RunDirectory(other.output).exists() for other in runs):  # nothing to go on with
                shutil.rmtree(run.path, ignore_errors=True)
            raise
    with whole_folder(run.adapter) as draft:
        shutil.copytree(RunDirectory(runs[-1].output).adapter, draft, dirs_exist_ok=True)
    return done


def _go_on(
    here: RunDirectory, one: Config, train: Callable[[Config], Done], resume: Callable[[RunDirectory], Done]
) -> Done:
    if here.steps():
        return resume(here)
    here.remove_unfinished()
    return train(one)
