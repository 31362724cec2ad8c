"""deltaw assemble: an image-text model of a vision tower, a new projector and a language model, in a folder like any base's."""

from pathlib import Path
from typing import Annotated

import typer

from deltaw.cli.app import Json, app, show, tell


@app.command()
def assemble(
    vision: Annotated[str, typer.Option(help="Folder or hub id of a CLIP or SigLIP model: its vision tower is taken.")],
    language: Annotated[
        str, typer.Option(help="Folder or hub id of a Llama, Mistral, Gemma or Qwen model; or tiny, the bundled one.")
    ],
    output: Annotated[Path, typer.Option(help="Folder of the image-text model.")],
    projector: Annotated[
        str, typer.Option(help="linear, mlp (LLaVA's), or mining (Mini-Gemini's, with a second tower).")
    ] = "mlp",
    detail: Annotated[
        str | None,
        typer.Option(help="For mining: folder or hub id of a ConvNeXt, the second tower.", show_default=False),
    ] = None,
    detail_size: Annotated[
        int | None,
        typer.Option(
            help="For mining: pixels on a side that the second tower sees. Default: 32 a patch.", show_default=False
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the projector's start values.")] = 0,
    weights: Annotated[
        bool, typer.Option("--weights/--no-weights", help="Without them the folder is enough for deltaw plan.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Put a vision tower, a new projector and a language model together: a base whose projector is to be trained first."""
    import dataclasses

    from deltaw.models.assemble import assemble as put_together

    done = put_together(
        vision,
        language,
        output,
        projector=projector,
        detail=detail,
        detail_size=detail_size,
        seed=seed,
        weights=weights,
    )
    tell(str(output), done.remarks)
    sizes = ", ".join(f"{name} {count / 1e6:,.1f} M" for name, count in done.parameters.items())
    text = f"{done.path}: {sizes} parameters; an image takes {done.image_tokens} tokens"
    if done.detail_size is not None:
        text += f" and is seen at {done.detail_size} x {done.detail_size} by the second tower"
    if not weights:
        text += "; no weights were written"
    record = dataclasses.asdict(done)
    del record["remarks"]  # said on stderr
    show(record, as_json, text)
