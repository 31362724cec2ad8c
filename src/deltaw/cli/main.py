"""The command line: parse → call → print. One file per verb; heavy imports stay inside the verbs.

Exit codes: 0 done, 1 failed, 2 wrong use or configuration. Results go to stdout, progress and errors to stderr;
--json prints one object on stdout. Errors are one sentence; --traceback shows where they came from.
"""

import json
import sys
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="deltaw",
    help="LoRA adapters through their whole life: train, evaluate, switch, mix, merge, inspect.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    epilog="Add --traceback to any verb to see where an error came from.",
)

Json = Annotated[bool, typer.Option("--json", help="Print one machine-readable object on stdout.")]


def show(record: dict[str, Any], as_json: bool, text: str) -> None:
    """Print a result: the record as JSON, or the text for people."""
    print(json.dumps(record, ensure_ascii=False, default=str) if as_json else text)


# typer brings its own copy of click in some versions and imports it in others: take the class it really raises.
ClickException: Any = next(cls for cls in typer.BadParameter.__mro__ if cls.__name__ == "ClickException")


def main() -> None:
    """Entry point of the `deltaw` command."""
    from deltaw.cli import adapters, ask, quickstart, schema, train  # noqa: F401  registers the verbs
    from deltaw.core.errors import DeltawError

    arguments = [a for a in sys.argv[1:] if a != "--traceback"]
    wants_traceback = len(arguments) < len(sys.argv) - 1
    try:
        code = app(args=arguments, standalone_mode=False) or 0
    except ClickException as error:
        error.show()
        code = 2
    except (KeyboardInterrupt, typer.Abort):
        print("error: interrupted", file=sys.stderr)
        code = 1
    except Exception as error:
        if wants_traceback:
            raise
        known = isinstance(error, DeltawError)
        reason = (
            str(error) if known else f"{type(error).__name__}: {' '.join(str(error).split())} (--traceback shows where)"
        )
        print(f"error: {reason}", file=sys.stderr)
        code = error.code if isinstance(error, DeltawError) else 1
    sys.exit(code)
