"""deltaw merge: an adapter into its base, written as a plain Transformers folder and checked."""

from pathlib import Path
from typing import Annotated

import typer

from deltaw.cli.app import Json, app, show, tell
from deltaw.cli.base import Mismatch, Model, Pickle, Quantize


@app.command()
def merge(
    adapter: Annotated[Path, typer.Argument(help="Adapter folder.")],
    output: Annotated[Path, typer.Option(help="Folder of the merged model.")],
    model: Model = None,
    dtype: Annotated[str, typer.Option(help="Dtype to write: auto (that of the base's files), fp32 or bf16.")] = "auto",
    into: Annotated[
        str,
        typer.Option(
            help="Of an adapter trained on a quantised base: original weights, or dequantized (read back from the quantised)."
        ),
    ] = "original",
    quantize: Quantize = None,
    allow_base_mismatch: Mismatch = False,
    allow_pickle: Pickle = False,
    as_json: Json = False,
) -> None:
    """Write a plain Transformers model with the adapter in its weights, reload it and check its logits."""
    import dataclasses

    from deltaw.models.base import base_of_adapter
    from deltaw.ship.merge import merge_to_folder

    done = merge_to_folder(
        model or base_of_adapter(adapter), adapter, output, dtype=dtype, into=into, quantize=quantize,
        allow_base_mismatch=allow_base_mismatch, allow_pickle=allow_pickle,
    )  # fmt: skip
    tell(adapter, done.remarks)
    text = (
        f"{done.path}: {done.weights} weights merged, written in {done.dtype}, read back and checked\n"
        f"largest logit difference to the adapter {done.max_logit_difference:.3g}, effect of the adapter {done.effect:.3g}"
    )
    if done.round_trip is not None:
        text = f"{text}\n{done.round_trip}"
    record = dataclasses.asdict(done)
    del record["remarks"]  # said on stderr
    show(record, as_json, text)
