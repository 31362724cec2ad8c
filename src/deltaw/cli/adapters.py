"""deltaw adapters: a directory of adapters as a collection. See `deltaw.library.store`."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from deltaw.cli.app import Json, app, show, tell
from deltaw.cli.base import Pickle
from deltaw.core.text import counted

adapters = typer.Typer(
    name="adapters",
    help="A directory of adapters as a collection: content by digest, names with a history, nothing lost by a change.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(adapters)

Where = Annotated[
    Path, typer.Option("--library", envvar="DELTAW_LIBRARY", help="The library's folder; `add` makes it.")
]
Which = Annotated[str, typer.Argument(help="A name, name@generation, or sha256:… (at least eight digits).")]
Expected = Annotated[
    int | None,
    typer.Option("--expect", help="Only if the name is at this generation; 0: only if it is new.", show_default=False),
]
HERE = Path("library")


def _opened(where: Path) -> Any:
    """A library that is there."""
    from deltaw.core.errors import NotFoundError
    from deltaw.library.store import Library

    library = Library(where)
    if not library.there:
        raise NotFoundError(
            f"no library at {where}: `deltaw adapters add FOLDER --name NAME` makes one, --library names another"
        )
    return library


def _record(entry: Any) -> dict[str, Any]:
    """An entry as plain data."""
    return {
        "name": entry.name, "generation": entry.generation, "folder": str(entry.folder), **dataclasses.asdict(entry.record),
    }  # fmt: skip


def _at(entry: Any) -> str:
    from deltaw.library.names import short

    return f"{entry.name}@{entry.generation}  {short(entry.digest)}" if entry.name else entry.digest


@adapters.command()
def add(
    folder: Annotated[Path, typer.Argument(help="Adapter folder, ours or PEFT's own.")],
    name: Annotated[str, typer.Option(help="What to call it: lower-case letters, digits and . _ -")],
    expect: Expected = None,
    where: Where = HERE,
    allow_pickle: Pickle = False,
    as_json: Json = False,
) -> None:
    """Copy an adapter into the library, checked, and point a name to it; the same content is kept once."""
    from deltaw.library.store import Library

    added = Library(where).add(folder, name, allow_pickle=allow_pickle, expected=expect)
    tell(folder, added.remarks)
    said = "" if added.new else "; the content was there already"
    show({**_record(added.entry), "new": added.new, "remarks": added.remarks}, as_json, f"{_at(added.entry)}{said}")


@adapters.command("list")
def list_(where: Where = HERE, as_json: Json = False) -> None:
    """Every name, and what it points to now: method, size, base and what was measured; exit code 1 for one that is damaged."""
    from deltaw.core.errors import FileError
    from deltaw.core.text import columns
    from deltaw.library.names import short

    library, entries, damaged = _opened(where), [], []
    for name in library.names():
        try:
            entries.append(library.resolve(name))
        except FileError as error:
            damaged.append({"name": name, "fault": str(error)})
    rows = [("name", "generation", "content", "methods", "parameters", "base", "measured")]
    for entry in entries:
        facts = entry.record
        rows.append(
            (
                entry.name, str(entry.generation), short(entry.digest), _methods(facts), f"{facts.parameters:,}",
                facts.base or "not recorded", _measured(facts),
            )
        )  # fmt: skip
    text = columns(rows) if entries else f"no adapter in {where}"
    record = {"library": str(where), "adapters": [_record(entry) for entry in entries], "damaged": damaged}
    show(record, as_json, "\n".join([text, *(f"damaged: {one['fault']}" for one in damaged)]))
    if damaged:
        raise typer.Exit(1)


def _methods(facts: Any) -> str:
    ranks = sorted({facts.ranks[0], facts.ranks[-1]}) if facts.ranks else []
    return f"{', '.join(facts.methods)}{' r ' if ranks else ''}{'–'.join(map(str, ranks))}"


def _measured(facts: Any) -> str:
    """The first four numbers, losses before all."""
    found = facts.meta.get("metrics")
    found = found if isinstance(found, Mapping) else {}
    losses = found.get("losses")
    found = {**(losses if isinstance(losses, Mapping) else {}), **found}
    numbers = {key: value for key, value in found.items() if isinstance(value, int | float)}
    return ", ".join(f"{key.replace('_', '-')} {value:.4g}" for key, value in list(numbers.items())[:4])


@adapters.command("show")
def show_(which: Which, where: Where = HERE, as_json: Json = False) -> None:
    """All that is known of one adapter: content, names, history, base, recipe, and what it was made from."""
    from deltaw.library import lineage
    from deltaw.library.names import short

    library = _opened(where)
    entry = library.resolve(which)
    facts, records = entry.record, library.records(damaged=True)
    histories = [library.history(name) for name in library.names()]
    points = [f"{h.name}@{one.number}" for h in histories for one in h.generations if one.digest == entry.digest]
    current = {h.current.digest: h.name for h in reversed(histories)}
    label = {
        digest: f"{current[digest]}  {short(digest)}" if digest in current else short(digest) for digest in records
    }
    tree = lineage.tree(entry.digest, records)
    made = [label[digest] for digest in lineage.children(entry.digest, records)]
    history = library.history(entry.name).generations if entry.name else ()
    record = {
        **_record(entry), "points": points, "history": [dataclasses.asdict(one) for one in history],
        "lineage": dataclasses.asdict(tree), "children": lineage.children(entry.digest, records),
    }  # fmt: skip
    change = "depends on the base" if facts.change is None else f"{facts.change:.4g}"
    held = f", {facts.quantized}" if facts.quantized else ""
    lines = [
        _at(entry),
        f"folder      {entry.folder}",
        f"content     {entry.digest}, added {facts.added}",
        f"named by    {', '.join(points) or 'nothing'}",
        f"methods     {_methods(facts)}: {counted(facts.sites, 'site')}, "
        f"{counted(facts.parameters, 'parameter')}, {facts.bytes:,} bytes",
        f"change      ‖ΔW‖ {change}",
        f"base        {facts.base or 'not recorded'} ({facts.layer or 'no fingerprint'}{held})",
        *(f"measured    {_measured(facts)}" for _ in [0] if _measured(facts)),
        *(f"generation  {g.number}  {short(g.digest)}  {g.time}  {g.how}" for g in history),
        *(["made from"] + [f"  {line}" for line in lineage.drawn(tree, label)] if tree.parents else []),
        *(f"went into   {one}" for one in made),
    ]
    show(record, as_json, "\n".join(lines))


@adapters.command()
def verify(where: Where = HERE, as_json: Json = False) -> None:
    """Take every digest again, follow every name and parent, find what does not belong; exit code 1 for a fault."""
    from deltaw.library.audit import audit

    found = audit(_opened(where), _progress)
    size = f"{counted(found.adapters, 'adapter')} under {counted(found.names, 'name')}, {found.bytes / 1e6:,.1f} MB"
    lines = [*(f"fault: {one}" for one in found.faults), *(f"note: {one}" for one in found.remarks)]
    verdict = counted(len(found.faults), "fault") if found.faults else "all is as it was put in"
    show(dataclasses.asdict(found), as_json, "\n".join([*lines, f"{size}: {verdict}"]))
    if found.faults:
        raise typer.Exit(1)


def _progress(done: int, total: int) -> None:
    import sys

    if sys.stderr.isatty():
        print(f"\r{done} of {total} adapters", end="\n" if done == total else "", file=sys.stderr, flush=True)


@adapters.command()
def rollback(
    name: Annotated[str, typer.Argument(help="The name to roll back.")],
    to: Annotated[
        int | None, typer.Option(help="Generation to go to. Default: what it pointed to before.", show_default=False)
    ] = None,
    expect: Expected = None,
    where: Where = HERE,
    as_json: Json = False,
) -> None:
    """Point a name to what it pointed to before, as a new generation; nothing is deleted."""
    entry = _opened(where).rollback(name, to, expected=expect)
    show(_record(entry), as_json, _at(entry))


@adapters.command()
def alias(
    name: Annotated[str, typer.Argument(help="The name to point, new or not.")],
    which: Which,
    expect: Expected = None,
    where: Where = HERE,
    as_json: Json = False,
) -> None:
    """Point a name to what another name, generation or digest means now: `deltaw adapters alias prod sql@3`."""
    entry = _opened(where).alias(name, which, expected=expect)
    show(_record(entry), as_json, _at(entry))


@adapters.command()
def remove(
    which: Annotated[str, typer.Argument(help="A name, with its history; or name@generation, an earlier one.")],
    expect: Expected = None,
    where: Where = HERE,
    as_json: Json = False,
) -> None:
    """Take away a name or an earlier generation, and the content that no name, generation or lineage reaches any more."""
    from deltaw.library.names import short

    gone = _opened(where).remove(which, expected=expect)
    said = (
        f"deleted {', '.join(map(short, gone))}"
        if gone
        else "its content stays: other names, generations or mixes reach it"
    )
    show({"removed": which, "deleted": gone}, as_json, f"{which} is removed; {said}")
