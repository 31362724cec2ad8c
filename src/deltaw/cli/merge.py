"""deltaw merge: one adapter or several into their base, written as a plain Transformers folder and checked."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer

from deltaw.cli.app import Json, app, show, tell
from deltaw.cli.base import Mismatch, Model, Pickle, Quantize, with_strength
from deltaw.core.text import counted


@app.command()
def merge(
    parts: Annotated[
        list[str],
        typer.Argument(help="Adapter folder, or several with strengths: runs/a/adapter=0.7 runs/b/adapter=-0.3"),
    ],
    output: Annotated[Path, typer.Option(help="Folder of the merged model.")],
    model: Model = None,
    dtype: Annotated[
        str, typer.Option(help="Dtype to write: auto (that of the base's files), fp32, bf16 or fp16.")
    ] = "auto",
    into: Annotated[
        str,
        typer.Option(
            help="Of an adapter trained on a quantised base: original weights, or dequantized (read back from the quantised)."
        ),
    ] = "original",
    quantize: Quantize = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="Text file, a prompt to a line, to compare logits on. Default: fixed ids.", show_default=False
        ),
    ] = None,
    check: Annotated[
        bool,
        typer.Option(
            "--check/--no-check",
            help="Compare the logits of what was written, read back, with the adapters' (loads the model).",
        ),
    ] = True,
    allow_base_mismatch: Mismatch = False,
    allow_pickle: Pickle = False,
    as_json: Json = False,
) -> None:
    """Write a plain Transformers model with the adapters in its weights, shard by shard, read it back and check its logits."""
    import dataclasses

    from deltaw.core.errors import MergeError
    from deltaw.models.base import base_of_adapter
    from deltaw.ship.merge import merge_to_folder

    pairs = [with_strength(part) for part in parts]
    texts = [] if prompts is None else _prompts(prompts)
    try:
        with _bar() as told:
            done = merge_to_folder(
                model or base_of_adapter(Path(pairs[0][0])), pairs, output, dtype=dtype, into=into, quantize=quantize,
                allow_base_mismatch=allow_base_mismatch, allow_pickle=allow_pickle, prompts=texts, check=check, told=told,
            )  # fmt: skip
    except KeyboardInterrupt:
        raise MergeError(f"interrupted: {output} was not written") from None
    tell(" + ".join(folder for folder, _ in pairs), done.remarks)
    compared = "read back and checked" if check else "its logits NOT compared with the adapter's"
    text = f"{done.path}: {counted(done.weights, 'weight')} merged, written in {done.dtype}, {compared}"
    if done.max_logit_difference is not None:
        text += (
            f"\nlargest logit difference to the adapter {done.max_logit_difference:.3g}, "
            f"effect of the adapter {done.effect:.3g}"
        )
    if done.round_trip is not None:
        text = f"{text}\n{done.round_trip}"
    record = dataclasses.asdict(done)
    del record["remarks"]  # said on stderr
    show(record, as_json, text)


def _prompts(file: Path) -> list[str]:
    from deltaw.core.errors import UseError

    try:
        found = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError:
        found = []
    if not found:
        raise UseError(f"{file} holds no prompt: give a text file (UTF-8) with one to a line")
    return found


@contextlib.contextmanager
def _bar() -> Iterator[Callable[[int, int], None]]:
    """A progress bar for people, on stderr."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("merging"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("merging", total=None, visible=False)
        yield lambda done, total: bar.update(task, completed=done, total=total, visible=True)
