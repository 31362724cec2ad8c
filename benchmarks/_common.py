"""What benchmarks share: where inputs lie and where results go."""

import argparse
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deltaw.training.watch import CLEAR, resident

RESULTS = Path(__file__).parent / "results"


def parser(about: str | None) -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--shared", type=Path, default=Path(__file__).parent.parent.parent / "shared")
    return found


def keep(name: str, result: dict[str, Any]) -> None:
    """Write results/NAME.json and print it."""
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps(result, indent=2, ensure_ascii=False)
    (RESULTS / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    print(text)


@contextlib.contextmanager
def highest() -> Iterator[list[int]]:
    """At the end it holds by how much the resident size of this process rose in the block at most, in bytes."""
    found: list[int] = []
    before = resident("VmRSS")
    CLEAR.write_text("5", encoding="utf-8")  # the highest size so far is forgotten
    yield found
    found.append(resident("VmHWM") - before)
