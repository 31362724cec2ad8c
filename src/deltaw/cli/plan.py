"""deltaw plan: what a run would train and learn from, before any weight is loaded."""

from pathlib import Path
from typing import Annotated

import typer

from deltaw.cli import rows as shown
from deltaw.cli.app import Json, app, show
from deltaw.cli.base import parsed


@app.command()
def plan(
    config: Annotated[
        list[str], typer.Argument(help="As for train: a YAML file, section.key=value overrides, or both.")
    ],
    rows: Annotated[int, typer.Option(help="Rows to show, with what they learn.")] = 3,
    html: Annotated[
        Path | None, typer.Option(help="Write a page with checks, lengths and rows token by token.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """What would be trained; rows, drops, lengths and checks; the first rows as the model will see them, with what they learn."""
    shown.writable(html)
    given = parsed(config)
    from deltaw.training.outlook import outlook
    from deltaw.training.prepare import prepare

    data, planned = prepare(given), outlook(given)
    record = shown.record(data, rows)
    if planned is None:
        trained = f"goes on from {given.adapter.start}, with its own targets"
    else:
        total, size = planned.base_parameters, 4 * planned.trainable  # trained tensors are fp32
        record["parameters"] = {"trainable": planned.trainable, "total": total, "adapters": len(planned)}
        record["trained_bytes"] = size
        said = f"{size / 1e6:,.2f} MB (fp32), its gradients and AdamW's moments three times that"
        trained = f"{planned}\nwhat is trained takes {said}"
    if html is not None:
        shown.write_page(html, given.model, trained, data, rows)
    if as_json or not shown.in_colours(trained, data, rows):
        show(record, as_json, f"{trained}\n\n{shown.text(data, rows)}")
