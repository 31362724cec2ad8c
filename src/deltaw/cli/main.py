"""The command line: parse → call → print. One file per verb; heavy imports stay inside the verbs.

Exit codes: 0 done, 1 failed, 2 wrong use or configuration. Errors are one sentence; --traceback shows where they
came from.
"""

import signal
import sys
import threading
from typing import Any

import typer

from deltaw.cli import chat, evaluate, generate, inspect, merge, mix, plan, quickstart, schema, train  # noqa: F401  the verbs
from deltaw.cli.app import app
from deltaw.core.errors import DeltawError

# typer brings its own copy of click in some versions and imports it in others: take the class it really raises.
ClickException: Any = next(cls for cls in typer.BadParameter.__mro__ if cls.__name__ == "ClickException")


INTERRUPTED = 130  # what typer makes of Ctrl-C


class Interrupt:
    """The handler of Ctrl-C. Python loses an interrupt that falls into a destructor or a weak reference's callback, so
    that it is remembered here: training asks `seen` before its first step."""

    seen = False

    def __call__(self, number: int, frame: Any) -> None:
        self.seen = True
        raise KeyboardInterrupt


def main() -> None:
    """Entry point of the `deltaw` command."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, Interrupt())
    arguments = [a for a in sys.argv[1:] if a != "--traceback"]
    wants_traceback = len(arguments) < len(sys.argv) - 1
    try:
        code = app(args=arguments, standalone_mode=False) or 0
        if code == INTERRUPTED:
            raise KeyboardInterrupt
    except ClickException as error:
        error.show()
        code = 2
    except (KeyboardInterrupt, typer.Abort):
        print("error: interrupted", file=sys.stderr)
        code = 1
    except DeltawError as error:
        if wants_traceback:
            raise
        print(f"error: {error}", file=sys.stderr)
        code = error.code
    except OSError as error:
        if wants_traceback or error.filename is None:
            raise
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        code = 1
    except Exception as error:
        if wants_traceback:
            raise
        reason = " ".join(str(error).split())
        print(f"error: {type(error).__name__}: {reason} (--traceback shows where)", file=sys.stderr)
        code = 1
    sys.exit(code)
