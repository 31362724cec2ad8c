"""deltaw inspect: what is in an adapter."""

from pathlib import Path
from typing import Annotated

import typer

from deltaw.cli.app import Json, app, show
from deltaw.cli.base import Pickle


@app.command()
def inspect(
    adapter: Annotated[Path, typer.Argument(help="Adapter folder.")],
    allow_pickle: Pickle = False,
    as_json: Json = False,
) -> None:
    """What is in an adapter: modules, ranks, scales, the size of the change, its base and how it was trained."""
    from deltaw.analysis.describe import describe, table
    from deltaw.formats import directory

    stored = directory.open_directory(adapter, allow_pickle=allow_pickle)
    state, sites = stored.state, describe(stored.state)
    base = None if state.base is None else {"name": state.base.name, "class": state.base.layer}
    record = {"parameters": state.parameters, "base": base, "sites": sites, "meta": dict(state.meta)}
    known = f"{state.base.name} ({state.base.layer})" if state.base else "not recorded"
    named = "" if state.base else f", the file names {stored.base_name or 'none'}"
    lines = [table(sites), f"{len(sites)} adapters, {state.parameters:,} parameters", f"base: {known}{named}"]
    lines += [f"measured: {state.meta['metrics']}"] if state.meta.get("metrics") else []
    show({**record, "notes": stored.notes}, as_json, "\n".join([*lines, *stored.notes]))
