"""What benchmarks share: where inputs lie and where results go."""

import argparse
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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


def resident(word: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{word}:")))


@contextlib.contextmanager
def highest() -> Iterator[list[int]]:
    """At the end it holds by how much the resident size of this process rose in the block at most, in bytes."""
    found: list[int] = []
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the highest size so far is forgotten
    yield found
    found.append(resident("VmHWM") - before)
