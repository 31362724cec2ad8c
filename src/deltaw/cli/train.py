"""deltaw train: a configuration file, overrides, or both; or --resume."""

from pathlib import Path
from typing import Annotated

import typer

from deltaw.cli.app import Json, app, show
from deltaw.cli.base import parsed


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
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress on stderr.")] = False,
    as_json: Json = False,
) -> None:
    """Train an adapter on rows of prompt/completion, messages or alpaca form."""
    from deltaw.core.errors import UseError

    given = config or []
    if resume is not None and given:
        raise UseError("--resume continues a run with its own configuration: leave the file and the overrides out")
    if resume is None and not given:
        raise UseError("nothing to train: give a configuration file, or model=… data.train=… output=…")
    config_given = parsed(given) if resume is None else None
    from deltaw.training import run as training

    done = training.resume(resume, quiet=quiet) if resume is not None else training.train(config_given, quiet=quiet)
    record = {
        "run": str(done.path), "adapter": str(done.adapter), "steps": done.steps, "seconds": done.seconds,
        "trainable": done.plan.trainable, "losses": dict(done.losses),
    }  # fmt: skip
    losses = "  ".join(f"{name} {value:.4f}" for name, value in done.losses.items())
    show(record, as_json, f"{done.steps} steps in {done.seconds:.0f} s   loss: {losses}\nadapter: {done.adapter}")
