"""What every verb shares: the application, the option --json, and how results are printed.

Results go to stdout, progress and errors to stderr; --json prints one object on stdout.
"""

import json
import math
import sys
from collections.abc import Iterable
from typing import Annotated, Any

import typer

from deltaw import __version__

app = typer.Typer(
    name="deltaw",
    help="LoRA adapters through their whole life: train, evaluate, switch, mix, merge, inspect.",
    no_args_is_help=True,
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    epilog="Add --traceback to any verb to see where an error came from.",
)


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.", is_eager=True)] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit


Json = Annotated[bool, typer.Option("--json", help="Print one machine-readable object on stdout.")]


def show(record: dict[str, Any], as_json: bool, text: str) -> None:
    """Print a result: the record as JSON, or the text for people."""
    print(json.dumps(_finite(record), ensure_ascii=False, default=str, allow_nan=False) if as_json else text)


def _finite(value: Any) -> Any:
    """JSON has no NaN: what is not known is null."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def tell(subject: object, remarks: Iterable[str]) -> None:
    """Remarks for people on stderr: never part of a result."""
    for remark in remarks:
        print(f"note: {subject}: {remark}", file=sys.stderr)
