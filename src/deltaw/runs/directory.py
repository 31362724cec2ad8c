"""A run directory: all that one training run leaves behind. Whoever shows or continues a run reads this and nothing else.

config.yaml             the resolved configuration; `deltaw train config.yaml output=…` repeats the run
plan.json               what was predicted before the first step
events.jsonl            append-only: start, general, step, eval, scores, checkpoint, warning, stopped, interrupted, resume,
                        diagnosis, end
samples.json            answers to held-out prompts at the first evaluation and at the latest, where asked for
checkpoints/step-N/     adapter, optimizer, schedule, RNG; each whole or not there
best/                   the adapter of the best evaluation, where train.best asks for it
adapter/                the finished adapter
report.html             curves, answers, settings and environment of a finished run
"""

import contextlib
import json
import re
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from deltaw.core.errors import FileError, UseError
from deltaw.core.files import must_be_free, read_json, write_text

CONFIG, PLAN, EVENTS, SAMPLES = "config.yaml", "plan.json", "events.jsonl", "samples.json"

WHOLE = ("adapter", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")
"""What a checkpoint holds; without any of it a run could go on, but not as it was."""


class RunDirectory:
    """View of one run directory; makes nothing until `create`."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.adapter = self.path / "adapter"
        self.best = self.path / "best"

    def exists(self) -> bool:
        """Has a run begun here?"""
        return (self.path / CONFIG).exists()

    def must_be_free(self) -> None:
        """UseError where the folder cannot become a new run: nothing is ever written over."""
        if self.exists():
            begun = self.steps() or any(self.path.glob(f"*/{CONFIG}"))
            more = f"continue it with `deltaw train --resume {self.path}`, " if begun else ""
            raise UseError(f"{self.path} already holds a run: give another output, {more}or delete it")
        must_be_free(self.path)

    def create(self, config: Mapping[str, Any], version: str) -> None:
        """Make the folder, with the configuration in it."""
        self.must_be_free()
        text = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True, width=120)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_text(self.path / CONFIG, f"# deltaw {version}\n{text}")
        except OSError as error:
            raise FileError(f"the run cannot be written to {self.path}: {error.strerror or error}") from None

    def withdraw(self) -> None:
        """Delete a run that stopped before its first step and checkpoint: it could neither be continued nor read."""
        if not self.steps() and not self.events("step") and not self.adapter.exists():
            shutil.rmtree(self.path, ignore_errors=True)

    def remove_unfinished(self) -> None:
        """Delete a run that has neither a checkpoint nor an adapter, so that it can be started anew."""
        if self.exists() and not self.steps() and not self.adapter.exists():
            shutil.rmtree(self.path)

    def config(self) -> Any:
        """The configuration of the run, plain data."""
        try:
            return yaml.safe_load((self.path / CONFIG).read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            below = sorted(path.parent.name for path in self.path.glob(f"*/{CONFIG}"))
            hint = f"; it is a sweep ({below[0]}, …): give its command again, finished cells are kept" if below else ""
            raise UseError(f"{self.path} holds no run: there is no {CONFIG} in it{hint}") from None
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise FileError(f"{self.path / CONFIG} cannot be read: {' '.join(str(error).split())}") from None

    def plan(self) -> dict[str, Any]:
        """The plan of the run; empty where there is none."""
        with contextlib.suppress(FileError):
            return read_json(self.path / PLAN, "")
        return {}

    def write_plan(self, plan: Mapping[str, Any]) -> None:
        write_text(self.path / PLAN, json.dumps(dict(plan), indent=2, ensure_ascii=False) + "\n")

    def write_samples(self, samples: list[dict[str, Any]]) -> None:
        """Keep the answers of the first evaluation (the base's, where the adapter is fresh) and of the latest one."""
        kept = self.samples()
        write_text(
            self.path / SAMPLES, json.dumps({"first": kept.get("first", samples), "last": samples}, ensure_ascii=False)
        )

    def samples(self) -> dict[str, list[dict[str, Any]]]:
        file = self.path / SAMPLES
        return read_json(file, "delete it, the next evaluation writes it anew") if file.exists() else {}

    def log(self, event: str, **facts: Any) -> None:
        """Append one event, with the time in seconds since 1970."""
        line = json.dumps({"event": event, "time": round(time.time(), 3), **facts}, ensure_ascii=False)
        with (self.path / EVENTS).open("ab+") as file:
            if file.seek(0, 2) > 0:
                file.seek(-1, 2)
                if file.read(1) != b"\n":  # a crash cut the last line short
                    file.write(b"\n")
            file.write(line.encode() + b"\n")

    def events(self, event: str | None = None) -> list[dict[str, Any]]:
        """Events in order, all or those of one kind. A line that a crash cut short is left out."""
        try:
            lines = (self.path / EVENTS).read_text(encoding="utf-8", errors="replace").split("\n")
        except FileNotFoundError:
            return []
        read = []
        for line in filter(None, lines):
            with contextlib.suppress(json.JSONDecodeError):
                read.append(json.loads(line))
        return [entry for entry in read if isinstance(entry, dict) and event in (None, entry.get("event"))]

    def checkpoint(self, step: int) -> Path:
        return self.path / "checkpoints" / f"step-{step}"

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, ascending. Checkpoints are renamed into place: what is there is whole."""
        found = (re.fullmatch(r"step-(\d+)", path.name) for path in self.path.glob("checkpoints/*"))
        return sorted(int(match.group(1)) for match in found if match)

    def last_checkpoint(self) -> Path:
        """The newest checkpoint; UseError where there is none."""
        steps = self.steps()
        if not steps:
            raise UseError(f"{self.path} has no checkpoint to continue from: start the run anew with another output")
        folder = self.checkpoint(steps[-1])
        missing = [name for name in WHOLE if not (folder / name).exists()]
        if missing:
            raise FileError(
                f"{folder} is damaged, it lacks {', '.join(missing)}: delete it to go on from the one before it"
            )
        return folder

    def rotate(self, keep: int) -> None:
        """Delete all checkpoints but the newest `keep`."""
        for step in self.steps()[:-keep]:
            shutil.rmtree(self.checkpoint(step))
