"""The command line: parse → call → print. One file per verb; heavy imports stay inside the verbs.

Exit codes: 0 done, 1 failed, 2 wrong use or configuration. Errors are one sentence; --traceback shows where they
came from.
"""

import logging
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer

from deltaw.cli import (  # noqa: F401  the verbs
    adapters,
    advise,
    assemble,
    chat,
    compare,
    convert,
    doctor,
    evaluate,
    export,
    generate,
    inspect,
    merge,
    mix,
    plan,
    quickstart,
    runs,
    schema,
    train,
)
from deltaw.cli.app import app
from deltaw.core.errors import DeltawError

# typer brings its own copy of click in some versions and imports it in others: take the class it really raises.
ClickException: Any = next(cls for cls in typer.BadParameter.__mro__ if cls.__name__ == "ClickException")


INTERRUPTED = 130  # what typer makes of Ctrl-C


class Interrupt:
    """The handler of Ctrl-C, and of SIGTERM: what was half done is taken away. Python loses an interrupt that falls into a
    destructor or a weak reference's callback, so that it is remembered here: training asks `seen` before its first step."""

    seen = False

    def __call__(self, number: int, frame: Any) -> None:
        self.seen = True
        raise KeyboardInterrupt


def _unraisable(found: Any) -> None:
    if not isinstance(found.exc_value, KeyboardInterrupt):  # a lost interrupt is remembered, not reported
        sys.__unraisablehook__(found)


@contextmanager
def _interruptible() -> Iterator[Interrupt]:
    """The handler in place for one command; what was there before is put back, since a caller may go on in its process."""
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return
    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    hook, sys.unraisablehook = sys.unraisablehook, _unraisable
    try:
        yield interrupt
    finally:
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, handler)


def main() -> None:
    """Entry point of the `deltaw` command."""
    with _interruptible() as interrupt:
        code = _run(interrupt)
    sys.exit(code)


def _run(interrupt: Interrupt) -> int:
    """Exit code of the command in sys.argv; errors are printed as one sentence."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # warns of kernels while it is imported, quantised or not
    arguments = [a for a in sys.argv[1:] if a != "--traceback"]
    wants_traceback = len(arguments) < len(sys.argv) - 1
    try:
        code = int(app(args=arguments, standalone_mode=False) or 0)
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
        lost = interrupt.seen and "interrupted" not in str(error)
        print(f"error: {'interrupted' if lost else error}", file=sys.stderr)
        code = 1 if lost else error.code
    except Exception as error:
        if wants_traceback:
            raise
        if interrupt.seen:  # libraries make other errors of an interrupt, above all while they are imported
            reason = "interrupted"
        elif isinstance(error, OSError) and error.filename is not None:
            reason = f"{error.filename}: {error.strerror}"
        else:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())} (--traceback shows where)"
        print(f"error: {reason}", file=sys.stderr)
        code = 1
    return code
