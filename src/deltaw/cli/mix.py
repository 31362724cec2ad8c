"""deltaw mix: several adapters into one file."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from deltaw.cli.app import Json, app, show
from deltaw.cli.base import Pickle, with_strength


@app.command()
def mix(
    parts: Annotated[
        list[str], typer.Argument(help="Adapter folders with weights: runs/a/adapter=0.7 runs/b/adapter=0.3")
    ],
    output: Annotated[Path, typer.Option(help="Folder of the new adapter.")],
    rank: Annotated[
        int | None, typer.Option(help="Cut the sum to this rank, by SVD; the error is reported. Default: exact.")
    ] = None,
    allow_pickle: Pickle = False,
    as_json: Json = False,
) -> None:
    """Several adapters into one: the exact weighted sum of their changes (its rank is the sum of theirs), or in a given rank."""
    import dataclasses

    from deltaw.analysis.norms import norms
    from deltaw.core.errors import UseError
    from deltaw.core.files import must_be_free
    from deltaw.data.kept import read_kept, together
    from deltaw.formats import directory
    from deltaw.mixing.exact import exact
    from deltaw.mixing.svd import svd

    must_be_free(output)
    pairs = [with_strength(part) for part in parts]
    stored = [directory.open_directory(folder, allow_pickle=allow_pickle) for folder, _ in pairs]
    kept = together([read_kept(Path(folder)) for folder, _ in pairs])
    weights = [weight for _, weight in pairs]
    states = [one.state for one in stored]
    mixed, cut = (exact(states, weights), None) if rank is None else svd(states, weights, rank)
    if all(norm == 0 for norm in norms(mixed).values()):
        raise UseError("the mix would change nothing at all: every weight, or every adapter's change, is zero")
    meta = _shared([one.state.meta for one in stored])
    meta |= {"parents": [one.digest for one in stored], "weights": weights}
    meta |= {} if cut is None else {"cut": {"rank": rank, "relative_error": cut.error}}
    directory.write(dataclasses.replace(mixed, meta=meta), output, beside=kept.files)
    record: dict[str, Any] = {
        "adapter": str(output),
        "parts": [{"adapter": folder, "weight": weight} for folder, weight in pairs],
        "parameters": mixed.parameters,
    }
    said = f"{output}: {' + '.join(f'{w:g} × {f}' for f, w in pairs)}, {mixed.parameters:,} parameters"
    if cut is not None:
        record |= {"rank": rank, "error": cut.error}
        said += f"; cut to rank {rank}, at most {cut.error:.2%} of a module's change is lost"
    show(record, as_json, said)


def _shared(metas: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What is as true of a mix as of each of its parts."""
    known = {key: metas[0].get(key) for key in ("task_type", "chat_template", "mask")}
    return {k: v for k, v in known.items() if v is not None and all(meta.get(k) == v for meta in metas)}
