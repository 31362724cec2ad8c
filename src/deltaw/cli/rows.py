"""What `deltaw plan` shows of the rows: one record, text for pipes, colours on a terminal, a page."""

import dataclasses
from pathlib import Path
from typing import Any


def writable(page: Path | None) -> None:
    """UseError where the page cannot be written: before the rows are read."""
    from deltaw.core.errors import UseError

    if page is not None and (page.is_dir() or not page.parent.is_dir()):
        raise UseError(f"--html {page} cannot be written: give a file in a folder that exists")


def record(data: Any, rows: int) -> dict[str, Any]:
    """What is found of the rows, for --json."""
    return {
        **dataclasses.asdict(data.report),
        "held_out": len(data.held_out),
        "shown": data.previews(rows),
        "remarks": data.remarks,
        "checks": [dataclasses.asdict(check) for check in data.checks],
    }


def text(data: Any, rows: int) -> str:
    """The same for people."""
    from deltaw.data.preflight import said

    return f"{data.report}\n{data.held_out_said}\n\n{said(data.checks)}\n{data.shown(rows)}"


def in_colours(trained: str, data: Any, rows: int) -> bool:
    """Print the plan with colours. False, and nothing is printed, where stdout is no terminal that shows them."""
    from rich.console import Console

    from deltaw.data.preflight import said
    from deltaw.data.preview import shows_colours

    console = Console()
    if not shows_colours(console):
        return False
    for part in (f"{trained}\n\n{data.report}\n{data.held_out_said}\n", said(data.checks), data.coloured(rows)):
        console.print(part, highlight=False, markup=False, soft_wrap=True)
    return True


def write_page(file: Path, base: str, trained: str, data: Any, rows: int) -> None:
    from deltaw.core.files import write_text
    from deltaw.data.page import page

    shown = data.first(max(rows, 1))
    write_text(
        file,
        page(
            f"A run on {base}", trained, data.report, data.held_out_said, data.checks, shown, data.tokenizer,
            data.processor,
        ),
    )  # fmt: skip
