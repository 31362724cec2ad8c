"""deltaw plan: what a run would train and learn from, before any weight is loaded."""

import dataclasses
from typing import Annotated

import typer

from deltaw.cli.app import Json, app, show
from deltaw.cli.base import parsed


@app.command()
def plan(
    config: Annotated[
        list[str], typer.Argument(help="As for train: a YAML file, section.key=value overrides, or both.")
    ],
    rows: Annotated[int, typer.Option(help="Rows to show, with what they learn.")] = 3,
    as_json: Json = False,
) -> None:
    """What would be trained; rows, drops and lengths, and the first rows as the model will see them, with what they learn marked."""
    given = parsed(config)
    from deltaw.training.outlook import outlook
    from deltaw.training.prepare import prepare

    data, planned = prepare(given), outlook(given)
    record = {
        **dataclasses.asdict(data.report),
        "held_out": len(data.held_out),
        "shown": data.previews(rows),
        "remarks": data.remarks,
    }
    notes = "".join(f"note: {remark}\n" for remark in data.remarks)
    if planned is None:
        trained = f"goes on from {given.adapter.start}, with its own targets"
    else:
        total, size = planned.base_parameters, 4 * planned.trainable  # trained tensors are fp32
        record["parameters"] = {"trainable": planned.trainable, "total": total, "adapters": len(planned)}
        record["trained_bytes"] = size
        said = f"{size / 1e6:,.2f} MB (fp32), its gradients and AdamW's moments three times that"
        trained = f"{planned}\nwhat is trained takes {said}"
    show(record, as_json, f"{trained}\n\n{data.report}\n{data.held_out_said}\n{notes}{data.shown(rows)}")
