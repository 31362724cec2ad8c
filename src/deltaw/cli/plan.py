"""deltaw plan: what a run would train and learn from, before any weight is loaded."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

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

    found, with_data = without_rows(plain(config) or {})
    given = parse.parse(found)
    from deltaw.core.errors import UseError
    from deltaw.training.stages import ahead

    if html is not None and (not with_data or given.stages):
        why = (
            "it is of one run, and the configuration has stages" if given.stages else "the configuration names no rows"
        )
        raise UseError(f"--html shows rows, and {why}: {'leave it out' if given.stages else 'add data.train'}")
    stages = ahead(given, with_data)
    records, texts = zip(*(_planned(stage, device or ["here"], rows) for stage in stages), strict=True)
    if given.stages:
        listed = list(zip(stages, records, texts, strict=True))
        whole = {"stages": [{"name": s.name, "output": s.config.output, **record} for s, record, _ in listed]}
        said = [f"{s.name} → {s.config.output}\n\n{_text(text, s.data, rows)}" for s, _, text in listed]
        show(whole, as_json, "\n\n\n".join(said))
        return
    record, trained, data = records[0], texts[0], stages[0].data
    if html is not None and data is not None:
        shown.write_page(html, given.model, trained, data, rows)
    if as_json or data is None or not shown.in_colours(trained, data, rows):
        show(record, as_json, _text(trained, data, rows))


def _text(trained: str, data: Any, rows: int) -> str:
    return trained if data is None else f"{trained}\n\n{shown.text(data, rows)}"


def _planned(stage: Any, devices: list[str], rows: int) -> tuple[dict[str, Any], str]:
    """What one run would train and take, as plain data and for people."""
    from deltaw.training.forecast import costs
    from deltaw.training.parts import said, table

    config, data, look = stage.config, stage.data, stage.look
    record: dict[str, Any] = {} if data is None else shown.record(data, rows)
    if look is None:
        return record, f"goes on from {config.adapter.start}, with its own targets; what it takes is not predicted"
    size = 4 * look.plan.trainable  # trained tensors are fp32
    record["parameters"] = {
        "trainable": look.plan.trainable, "total": look.plan.base_parameters, "adapters": len(look.plan),
    }  # fmt: skip
    record["trained_bytes"] = size
    lines = [str(look.plan), f"its file takes {size / 1e6:,.2f} MB"]
    if look.by_part is not None:
        parts = table(look.model, config.adapter, look.by_part, config.train.learning_rate)
        record["parts"] = [dataclasses.asdict(part) for part in parts]
        lines = [*lines, "", said(parts), *look.by_part.remarks]
    found = costs(config, look, data, devices)
    text = "\n".join([*lines, "", found.pop("text")])
    return record | found, text
