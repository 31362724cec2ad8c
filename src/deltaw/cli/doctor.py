"""deltaw doctor: see `deltaw.lab.doctor`."""

import dataclasses
from typing import Annotated

import typer

from deltaw import __version__
from deltaw.cli.app import Json, app, show


@app.command()
def doctor(
    test: Annotated[
        bool, typer.Option("--test/--no-test", help="Train an adapter for some seconds, and check it.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Is this installation sound? Versions, devices, hub, conflicts and a self-test, each fault with its fix; exit code 1 for one."""
    from deltaw.lab import doctor as lab
    from deltaw.models.machine import look

    machine = look(__version__)
    checks = [*lab.examine(machine), *(lab.tested() if test else [])]
    verdict = lab.worst(checks)
    counted = {kind: sum(one.verdict == kind for one in checks) for kind in ("fault", "warning", "ok")}
    said = ", ".join(f"{count} {kind}{'s' if count != 1 and kind != 'ok' else ''}" for kind, count in counted.items())
    record = {
        "verdict": verdict,
        "checks": [dataclasses.asdict(one) for one in checks],
        "machine": dataclasses.asdict(machine),
    }
    show(record, as_json, f"{lab.table(checks)}\n\n{said}")
    if verdict == "fault":
        raise typer.Exit(1)
