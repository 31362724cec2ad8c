"""deltaw runs: runs side by side."""

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from deltaw.cli.app import Json, app, show


@app.command()
def runs(
    folders: Annotated[
        list[Path] | None, typer.Argument(help="Folders with runs in or below them; default runs/.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List and compare runs: how far they came, their losses and scores, and in what their settings differ."""
    from deltaw.core.errors import UseError
    from deltaw.runs.summary import find, summarise, table

    given = folders or [Path("runs")]
    found = [summarise(run) for run in find(given)]
    if not found:
        raise UseError(f"no run in {', '.join(map(str, given))}")
    show({"runs": [dataclasses.asdict(summary) for summary in found]}, as_json, table(found))
