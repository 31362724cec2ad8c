"""deltaw compare: do two adapters do the same?"""

from pathlib import Path
from typing import Annotated

import typer

from deltaw.cli.app import Json, app, show
from deltaw.cli.base import Mismatch, Pickle
from deltaw.cli.inspect import Base, Dense, Html, affordable, drawable, on_base, write_page
from deltaw.core.text import counted


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(help="Adapter folder.")],
    b: Annotated[Path, typer.Argument(help="Adapter folder.")],
    base: Base = None,
    top: Annotated[int, typer.Option(help="How many first directions to compare, beside all of them.", min=1)] = 4,
    dense: Dense = False,
    html: Html = None,
    allow_base_mismatch: Mismatch = False,
    allow_pickle: Pickle = False,
    as_json: Json = False,
) -> None:
    """Two adapters side by side: cosine of their changes and shared directions, layer by layer, with what chance gives."""
    from deltaw.analysis import comparison, page
    from deltaw.core.errors import BaseMismatchError
    from deltaw.formats import directory

    drawable(html)
    states = [directory.open_directory(folder, allow_pickle=allow_pickle).state for folder in (a, b)]
    bases = [state.base for state in states]
    why = bases[0].difference(bases[1]) if bases[0] and bases[1] else None
    if why and not allow_base_mismatch:
        raise BaseMismatchError(
            f"{a} and {b} were trained on two bases, {bases[0].name!r} and {bases[1].name!r}: {why}. Directions of two "
            "bases have nothing in common; --allow-base-mismatch compares them all the same"
        )
    pairs = [on_base(s, base, allow_base_mismatch, folder) for s, folder in zip(states, (a, b), strict=True)]
    one, other = (state for state, _ in pairs)
    work = [affordable(f, s, base is not None, dense) for s, f in ((one, a), (other, b))]
    weights = None if base is None else (pairs[0][1], pairs[1][1])
    found = comparison.compare(one, other, weights, work=(work[0], work[1]), top=top)
    about = {
        name: f"{folder}: {counted(len(state.methods), 'adapter')}, {counted(state.parameters, 'parameter')}"
        for name, folder, state in (("A", a, one), ("B", b, other))
    }
    if html is not None:
        write_page(html, page.compared(f"{a.name} and {b.name}", about, found))
    record = {
        "a": str(a), "b": str(b), "cosine": found.cosine, "norm_ratio": found.ratio, "sites": found.sites,
        "only_a": found.only_a, "only_b": found.only_b, "left_out": dict(found.left_out), "zero": found.zero,
        "top": top,
    }  # fmt: skip
    show(record, as_json, "\n".join([*(f"{name}: {text}" for name, text in about.items()), str(found)]))
