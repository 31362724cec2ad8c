"""deltaw eval: held-out numbers of a base, with and without adapters on it."""

from typing import Annotated, Any

import typer

from deltaw.cli.app import Json, app, show
from deltaw.cli.base import Adapters, Dtype, Mismatch, Model, Pickle, Quantize, load_all


@app.command("eval")
def evaluate(
    data: Annotated[str, typer.Option(help="Held-out rows: whatever data.train takes.")],
    model: Model = None,
    adapter: Adapters = None,
    generations: Annotated[
        int | None,
        typer.Option(
            help="Rows to generate answers for (exact match); default all, 0 none.", show_default=False, min=0
        ),
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(help="exact_match (default), rouge_l or bleu; may be repeated.", show_default=False),
    ] = None,
    columns: Annotated[
        list[str] | None,
        typer.Option(
            help="Other names of fields, as data.columns: prompt=question; may be repeated.", show_default=False
        ),
    ] = None,
    images: Annotated[
        str | None,
        typer.Option(
            help="Folder that the names of images are seen from; default that of the rows.", show_default=False
        ),
    ] = None,
    allow_base_mismatch: Mismatch = False,
    allow_pickle: Pickle = False,
    dtype: Dtype = "auto",
    quantize: Quantize = None,
    as_json: Json = False,
) -> None:
    """Held-out loss, perplexity and exact match: the base and the tuned model side by side."""
    from deltaw.config.schema import Source
    from deltaw.core.errors import UseError
    from deltaw.data.rows import read_rows
    from deltaw.infer.metrics import metrics

    chosen = list(metrics(metric or ["exact_match"]))
    pairs = [text.partition("=") for text in columns or []]
    if wrong := next(
        (text for text, (ours, _, theirs) in zip(columns or [], pairs, strict=True) if not ours or not theirs), None
    ):
        raise UseError(f"--columns {wrong!r} is no pair of names: write prompt=question")
    rows = read_rows(Source(path=data, columns={ours: theirs for ours, _, theirs in pairs}, images=images))
    from deltaw.core.route import use
    from deltaw.infer import evaluate as infer

    base, route, own = load_all(model, adapter or [], dtype, allow_base_mismatch, allow_pickle, quantize)
    result: dict[str, Any] = {"model": base.name, "rows": len(rows.rows)}
    for name, live in {"base": {}, "tuned": route}.items():
        if name == "base" or route:
            with use(base.model, live):
                found = infer.evaluate(
                    base.model,
                    own if name == "base" else base.tokenizer,
                    rows,
                    max_length=base.max_length,
                    generations=generations,
                    metric=chosen,
                    processor=base.processor,
                )
            result[name] = found.to_dict()
    sides = [name for name in ("base", "tuned") if name in result]
    lines = [f"{'':12}" + "".join(f"{name:>12}" for name in sides)]
    for key in ("loss", "perplexity", *chosen):
        if key in result["base"]:
            lines.append(f"{key:12}" + "".join(f"{result[name][key]:12.4f}" for name in sides))
    if generations is not None and generations < len(rows):
        lines.append(
            f"answers to the first {generations} rows of {len(rows)}" if generations else "no answers generated"
        )
    if result["base"]["dropped"]:
        lines.append(
            "left out: " + ", ".join(f"{reason}: {count:,}" for reason, count in result["base"]["dropped"].items())
        )
    show(result, as_json, "\n".join(lines))
