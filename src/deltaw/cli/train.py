"""deltaw train: a configuration file, overrides, or both; --resume; or a sweep over values and seeds."""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from deltaw.cli.app import Json, app, show, tell
from deltaw.cli.base import parsed, record


@app.command()
def train(
    config: Annotated[
        list[str] | None,
        typer.Argument(
            help="A YAML file, then section.key=value overrides; overrides alone are enough.", show_default=False
        ),
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Continue this run directory from its newest checkpoint.", show_default=False)
    ] = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(help="Try several values: train.learning_rate=1e-4,1e-3; may be repeated.", show_default=False),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Seeds per combination of a sweep.", min=1)] = 1,
    measure: Annotated[str, typer.Option(help="What a sweep ranks by: held_out, or a metric's name.")] = "held_out",
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress on stderr.")] = False,
    as_json: Json = False,
) -> None:
    """Train an adapter. The configuration says on what; `deltaw schema` says what it may hold."""
    from deltaw.core.errors import UseError

    given = config or []
    if resume is not None and (given or sweep):
        raise UseError("--resume continues a run with its own configuration: leave the file and the overrides out")
    if resume is None and not given:
        raise UseError("nothing to train: give a configuration file, or model=… data.train=… output=…")
    if sweep or seeds > 1:
        _sweep(record(given), sweep or [], seeds, measure, quiet, as_json)
        return
    config_given = parsed(given) if resume is None else None
    from deltaw.training import run as training

    done = (
        training.resume(resume, quiet=quiet)
        if resume is not None
        else training.train(config_given, quiet=quiet, ask=None if quiet or as_json else _ask)
    )
    found = {
        "run": str(done.path), "adapter": str(done.adapter), "steps": done.steps, "seconds": done.seconds,
        "trainable": done.plan.trainable, "losses": dict(done.losses),
        "findings": [dataclasses.asdict(finding) for finding in done.findings],
    }  # fmt: skip
    losses = "  ".join(f"{name} {value:.4f}" for name, value in done.losses.items())
    show(found, as_json, f"{done.steps} steps in {done.seconds:.0f} s   loss: {losses}\nadapter: {done.adapter}")
    if quiet:  # else said already, with the progress
        tell(done.path, (str(finding) for finding in done.findings if finding.wrong))


def _ask(warnings: list[str]) -> bool:
    """Where somebody is there to be asked: start in spite of these?"""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return True
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    return typer.confirm("start?", default=True, err=True)


def _sweep(given: Any, axes: list[str], seeds: int, measure: str, quiet: bool, as_json: bool) -> None:
    from deltaw.config import parse

    found = {}
    for axis in axes:
        key, _, values = axis.partition("=")
        found[key] = parse.values(values, axis)
    from deltaw.training import sweep as training

    done = training.sweep(given, found, seeds, measure, quiet)
    ranked = [
        {"settings": dict(r.settings), "mean": r.mean, "sd": r.sd, "values": list(r.values)} for r in done.ranking
    ]
    failed = [f"failed: {folder}: {why}" for folder, why in done.failed.items()]
    record = {"measure": measure, "ranking": ranked, "failed": dict(done.failed)}
    show(record, as_json, "\n".join([training.table(done.ranking), *failed]))
    if failed:
        raise typer.Exit(1)
