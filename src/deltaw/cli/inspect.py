"""deltaw inspect: what is in an adapter, what it does to its base, and whether a smaller rank would do."""

from pathlib import Path
from typing import Annotated, Any

import typer

from deltaw.cli.app import Json, app, show, tell
from deltaw.cli.base import Mismatch, Pickle, load_all
from deltaw.cli.rows import writable
from deltaw.core.text import counted

Base = Annotated[
    str | None,
    typer.Option(
        "--model",
        "--base",
        help="The base: folder, hub id or `tiny`. Weights are read one at a time.",
        show_default=False,
    ),
]
Dense = Annotated[
    bool,
    typer.Option(
        "--dense", help="Decompose changes of high rank, or of none, however long that takes (default: up to a minute)."
    ),
]
Html = Annotated[
    Path | None, typer.Option("--html", help="Write a page with figures to this file.", show_default=False)
]
PATIENCE = 60.0
"""Seconds of decompositions that nobody has to ask for."""


@app.command()
def inspect(
    adapter: Annotated[Path, typer.Argument(help="Adapter folder.")],
    base: Base = None,
    intruders: Annotated[
        int, typer.Option(help="Count intruder dimensions of so many modules, those that change most.", min=0)
    ] = 0,
    truncate: Annotated[
        str | None,
        typer.Option(help="Held-out rows: loss of the adapter cut to smaller and smaller ranks.", show_default=False),
    ] = None,
    dense: Dense = False,
    html: Html = None,
    allow_base_mismatch: Mismatch = False,
    allow_pickle: Pickle = False,
    as_json: Json = False,
) -> None:
    """What is in an adapter: modules, ranks, spectra, its base and how it was trained; with --model what it does to that."""
    from deltaw.analysis import page
    from deltaw.analysis.describe import describe, intruder_seconds
    from deltaw.analysis.history import history
    from deltaw.analysis.tables import table
    from deltaw.core.errors import UseError
    from deltaw.formats import directory

    drawable(html)
    stored = directory.open_directory(adapter, allow_pickle=allow_pickle)
    if (intruders or truncate) and base is None:
        raise UseError(f"{'--intruders' if intruders else '--truncate'} looks at the base too: give it with --model")
    rows = None if truncate is None else _rows(truncate)
    state, weights = on_base(stored.state, base, allow_base_mismatch, adapter)
    if intruders:
        tell(adapter, [f"intruder dimensions: about {lasting(intruder_seconds(state, intruders))}"])
    work = affordable(adapter, state, base is not None, dense)
    records = describe(state, weights, work=work, count_intruders=intruders, watch=progress)
    cuts = None if rows is None else _cuts(str(base), adapter, rows, allow_base_mismatch, allow_pickle)
    known = f"{state.base.name} ({state.base.layer})" if state.base else "not recorded"
    known += "" if state.base else f", the file names {stored.base_name or 'none'}"
    about = {"base": known, **dict(history(state.meta))}
    whole = {"base": known, **dict(history(state.meta, whole=True))}
    head = f"{counted(len(records), 'adapter')}, {counted(state.parameters, 'parameter')}"
    if html is not None:
        shown = None if cuts is None else {**cuts.to_dict(), "rows": cuts.table}
        write_page(html, page.inspected(str(adapter), {"adapters": head, **whole}, records, shown))
    lines = [table(records), head, *maps(records), *(f"{name}: {text}" for name, text in about.items())]
    lines += [] if cuts is None else [str(cuts)]
    record: dict[str, Any] = {
        "parameters": state.parameters,
        "base": None if state.base is None else {"name": state.base.name, "class": state.base.layer},
        "sites": records, "meta": dict(state.meta), "notes": stored.notes,
        "truncation": None if cuts is None else cuts.to_dict(),
    }  # fmt: skip
    show(record, as_json, "\n".join([*lines, *stored.notes]))


def drawable(html: Path | None) -> None:
    """UseError where the page cannot be written or drawn: before anything is read."""
    from deltaw.analysis.figures import require

    writable(html)
    if html is not None:
        require()


def on_base(state: Any, base: str | None, allow_base_mismatch: bool, adapter: Path) -> tuple[Any, Any]:
    """The state with the shapes of the base, and its weights; as it is, and None, where no base is given."""
    if base is None:
        return state, None
    import dataclasses

    from deltaw.models.weights import BaseWeights

    weights = BaseWeights(base, state, allow_base_mismatch=allow_base_mismatch)
    tell(adapter, weights.remarks)
    return dataclasses.replace(state, specs={**state.specs, **weights.specs}), weights


def affordable(adapter: Path, state: Any, with_base: bool, dense: bool) -> Any:
    """The long decompositions to do; None, and a note, where they would take long and nobody asked for them."""
    from deltaw.analysis.describe import costly

    work = costly(state, with_base)
    if work.seconds <= PATIENCE:
        return work
    said = f"spectra of {len(work.sites)} changes of no or high rank: about {lasting(work.seconds)}"
    tell(adapter, [said if dense else f"{said}, left out: ask for them with --dense"])
    return work if dense else None


def progress(sites: Any) -> Any:
    """A bar with the time that is left, on stderr and on a terminal alone; nothing where there is nothing to wait for."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return track(sites, "modules", console=console, transient=True, disable=not console.is_terminal or not sites)


def lasting(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def maps(records: Any) -> list[str]:
    """The size of the change layer by layer, in characters; beside the weight where that is known."""
    from deltaw.analysis.layers import grid

    measure, name = ("of_base", "‖ΔW‖ / ‖W‖") if any(r["of_base"] for r in records) else ("norm", "‖ΔW‖")
    found = grid(records, measure)
    if len(found.layers) < 2:
        return []
    return [
        f"{name} by layer {found.layers[0]} … {found.layers[-1]}, {min(found.known):.3g} … {max(found.known):.3g}:",
        str(found),
    ]


def write_page(file: Path, text: str) -> None:
    from deltaw.core.files import write_text

    write_text(file, text)
    tell(file, ["written"])


def _rows(data: str) -> Any:
    from deltaw.config.schema import Source
    from deltaw.data.rows import read_rows

    return read_rows(Source(path=data))


def _cuts(base: str, adapter: Path, rows: Any, allow_base_mismatch: bool, allow_pickle: bool) -> Any:
    from deltaw.infer.truncate import truncation

    loaded, _, own = load_all(base, [str(adapter)], "auto", allow_base_mismatch, allow_pickle)
    return truncation(
        loaded.model, loaded.tokenizer, rows, name="adapter0", own=own, max_length=loaded.max_length,
        say=lambda text: tell(adapter, [f"held-out loss: {text}"]),
    )  # fmt: skip
