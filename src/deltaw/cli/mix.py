"""deltaw mix: several adapters into one file."""

from pathlib import Path
from typing import Annotated

import typer

from deltaw.cli.app import Json, app, show
from deltaw.cli.base import Pickle, with_strength


@app.command()
def mix(
    parts: Annotated[
        list[str], typer.Argument(help="Adapter folders with weights: runs/a/adapter=0.7 runs/b/adapter=0.3")
    ],
    output: Annotated[Path, typer.Option(help="Folder of the new adapter.")],
    allow_pickle: Pickle = False,
    as_json: Json = False,
) -> None:
    """Several adapters into one, the exact weighted sum of their changes (its rank is the sum of theirs)."""
    from deltaw.analysis.norms import norms
    from deltaw.core.errors import UseError
    from deltaw.core.files import must_be_free
    from deltaw.formats import directory
    from deltaw.mixing.exact import exact

    must_be_free(output)
    pairs = [with_strength(part) for part in parts]
    states = [directory.read(folder, allow_pickle=allow_pickle)[0] for folder, _ in pairs]
    mixed = exact(states, [weight for _, weight in pairs])
    if all(norm == 0 for norm in norms(mixed).values()):
        raise UseError("the mix would change nothing at all: every weight, or every adapter's change, is zero")
    directory.write(mixed, output)
    record = {
        "adapter": str(output),
        "parts": [{"adapter": folder, "weight": weight} for folder, weight in pairs],
        "parameters": mixed.parameters,
    }
    show(record, as_json, f"{output}: {' + '.join(f'{w:g} × {f}' for f, w in pairs)}, {mixed.parameters:,} parameters")
