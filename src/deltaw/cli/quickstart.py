"""deltaw quickstart: see `deltaw.lab.quickstart`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from deltaw.cli.app import Json, app, show


@app.command()
def quickstart(
    output: Annotated[Path, typer.Option(help="Folder for the runs; a number is added where it exists.")] = Path(
        "runs/quickstart"
    ),
    as_json: Json = False,
) -> None:
    """Train two adapters on the bundled base, compare, switch, mix, merge: about two minutes, offline."""
    from deltaw.lab import quickstart as lab

    def say(text: str) -> None:
        print(text, file=sys.stderr if as_json else sys.stdout, flush=True)

    result = lab.quickstart(lab.new_folder(output), say)
    if as_json:
        show(result, True, "")
