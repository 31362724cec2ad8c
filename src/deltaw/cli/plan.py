"""deltaw plan: what a run would train and learn from, before any weight is loaded."""

from pathlib import Path
from typing import Annotated

import typer

from deltaw.cli import rows as shown
from deltaw.cli.app import Json, app, show
from deltaw.cli.base import record as plain
from deltaw.cli.base import without_rows


@app.command()
def plan(
    config: Annotated[
        list[str],
        typer.Argument(help="As for train: a YAML file, section.key=value overrides, or both; data may be left out."),
    ],
    device: Annotated[
        list[str] | None,
        typer.Option(
            help="For which device: here, cpu-24g, or a card (rtx4090-24g, a100-80g, h200-141g …); may be repeated.",
            show_default="here",
        ),
    ] = None,
    rows: Annotated[int, typer.Option(help="Rows to show, with what they learn.")] = 3,
    html: Annotated[
        Path | None, typer.Option(help="Write a page with checks, lengths and rows token by token.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """What would be trained, the memory and time it takes and whether it fits; rows, lengths and checks, as the model will see them."""
    shown.writable(html)
    from deltaw.config import parse

    whole, with_data = without_rows(plain(config) or {})
    given = parse.parse(whole)
    from deltaw.core.errors import UseError
    from deltaw.training.forecast import costs
    from deltaw.training.outlook import outlook
    from deltaw.training.prepare import prepare

    if html is not None and not with_data:
        raise UseError("--html shows rows, and the configuration names none: add data.train")
    data, planned = prepare(given) if with_data else None, outlook(given)
    record = {} if data is None else shown.record(data, rows)
    if planned is None:
        trained = f"goes on from {given.adapter.start}, with its own targets; what it takes is not predicted"
    else:
        total, size = planned.plan.base_parameters, 4 * planned.plan.trainable  # trained tensors are fp32
        record["parameters"] = {"trainable": planned.plan.trainable, "total": total, "adapters": len(planned.plan)}
        record["trained_bytes"] = size
        found = costs(given, planned, data, device or ["here"])
        trained = f"{planned.plan}\nits file takes {size / 1e6:,.2f} MB\n\n{found.pop('text')}"
        record |= found
    if html is not None and data is not None:
        shown.write_page(html, given.model, trained, data, rows)
    if data is None:
        show(record, as_json, trained)
    elif as_json or not shown.in_colours(trained, data, rows):
        show(record, as_json, f"{trained}\n\n{shown.text(data, rows)}")
