"""deltaw export: an adapter in a form that serving engines read, and what they make of one."""

from pathlib import Path
from typing import Annotated, Any

import typer

from deltaw.cli.app import Json, app, show, tell
from deltaw.cli.base import Mismatch, Model, Pickle
from deltaw.core.text import counted


@app.command()
def export(
    adapter: Annotated[Path, typer.Argument(help="Adapter folder.")],
    output: Annotated[
        Path | None,
        typer.Option(help="Folder to write. Without it, and with --check, nothing is written.", show_default=False),
    ] = None,
    profile: Annotated[
        str,
        typer.Option(
            help="portable: plain LoRA that every engine reads with the right scale; peft: all that PEFT's format holds; "
            "kohya, diffusers: one file, for image models."
        ),
    ] = "portable",
    check: Annotated[
        bool, typer.Option("--check", help="Say which serving engines take the file, and why others do not.")
    ] = False,
    engine: Annotated[
        list[str] | None,
        typer.Option(
            help="Check for this engine, and end with 1 where it does not take the file; may be repeated.",
            show_default=False,
        ),
    ] = None,
    model: Model = None,
    rank: Annotated[
        int | None, typer.Option(help="Rank of the file; what has more is cut, by SVD.", show_default=False)
    ] = None,
    max_rank: Annotated[
        int | None, typer.Option(help="No rank above this (KServe: 64), by SVD.", show_default=False)
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="bf16 (default), fp16 or fp32; of portable.", show_default=False)
    ] = None,
    fill: Annotated[
        bool, typer.Option("--fill/--no-fill", help="Add zeros for modules and layers that engines expect.")
    ] = True,
    allow_base_mismatch: Mismatch = False,
    allow_pickle: Pickle = False,
    as_json: Json = False,
) -> None:
    """An adapter as serving engines take it, read back and compared; or (--check) which of them take a folder as it is."""
    import dataclasses

    from deltaw.core.errors import UseError
    from deltaw.ship import acceptance, engines
    from deltaw.ship.export import export as write
    from deltaw.ship.look import look

    asked = engine or []
    engines.known(asked)
    if output is None and not (check or asked):
        raise UseError("give a folder to write with --output, or ask what engines make of this one with --check")
    record: dict[str, Any] = {}
    texts: list[str] = []
    if output is not None:
        done = write(
            adapter, output, profile, model=model, rank=rank, max_rank=max_rank, dtype=dtype, fill=fill,
            allow_base_mismatch=allow_base_mismatch, allow_pickle=allow_pickle,
        )  # fmt: skip
        tell(adapter, done.remarks)
        record = {**dataclasses.asdict(done), "error": done.error}
        texts.append(_told(done))
    opinions = []
    if check or asked:
        folder = output or adapter
        seen = look(folder, model)
        tell(folder, [seen.remark] if seen.remark and output is None else [])
        opinions = engines.check(acceptance.read_facts(folder, seen.base, allow_pickle=allow_pickle), asked)
        record["engines"] = {one.engine: {**dataclasses.asdict(one), "takes": one.takes} for one in opinions}
        texts.append(acceptance.table(opinions))
        hint = ["Whether an engine has LoRA for the base's architecture at all was not looked at."]
        texts.append("\n".join([*hint, *(acceptance.way_out(opinions, adapter) if output is None else [])]))
    show(record, as_json, "\n\n".join(texts))
    if asked and not all(one.takes for one in opinions):
        raise typer.Exit(1)


def _told(done: Any) -> str:
    """What was written, and what it cost."""
    form = f"rank {done.rank} and scale 1, {done.dtype}" if done.rank else done.dtype
    cut = sum(one.how == "svd" for one in done.modules.values())
    lines = [
        f"{done.path}: {done.profile}, {counted(len(done.modules), 'module')}, {form}, {done.bytes:,} bytes; read back and compared"
    ]
    lines.append(
        f"largest relative error of a module's change {done.error:.2g}" + (f", {cut} cut by SVD" if cut else "")
    )
    if done.filled:
        lines.append(
            f"{counted(done.filled, 'module')} added with zeros: {done.filled_bytes:,} bytes of it (--no-fill leaves them out)"
        )
    if cut:
        shown = sorted(done.modules.items(), key=lambda item: -item[1].error)[:8]
        lines += [f"  {site}: {one.how}, rank {one.rank}, relative error {one.error:.3g}" for site, one in shown]
        lines += (
            [f"  … and {len(done.modules) - len(shown)} more, all in --json"] if len(done.modules) > len(shown) else []
        )
        lines.append("  a higher --rank loses less; deltaw merge, into the weights, loses nothing")
    return "\n".join(lines)
