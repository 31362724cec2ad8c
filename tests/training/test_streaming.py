"""data.streaming: tokens on disk, one row in memory at a time, and the same run to the bit."""

import dataclasses
import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import deltaw
from deltaw.config.parse import parse
from deltaw.config.schema import Source
from deltaw.core.errors import DataError
from deltaw.data.dataset import Encoder, digest
from deltaw.data.encode import IGNORE, Encoded, Policy
from deltaw.data.observed import Observed
from deltaw.data.rows import read_rows
from deltaw.data.store import Store, lengths
from deltaw.data.stream import stream
from deltaw.models.base import load_tokenizer
from deltaw.training.prepare import prepare

WORDS = ["river", "castle", "garden", "church", "mill", "bridge"]


def jsonl(folder: Path, count: int, name: str = "rows.jsonl") -> Path:
    file = folder / name
    rows = [
        {"prompt": f"say {WORDS[i % 6]} {i}", "completion": f"{WORDS[i % 5]} and " * (i % 7) + str(i)}
        for i in range(count)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def config(file: Path, output: Path, **data: Any) -> dict[str, Any]:
    answers = 0 if data.get("eval", 0.2) is None else 3
    return {
        "model": "tiny", "data": {"train": str(file), "eval": 0.2, **data}, "adapter": {"rank": 4, "dropout": 0.1},
        "train": {
            "max_steps": 4, "batch_size": 4, "learning_rate": 5e-3, "dtype": "fp32", "generate": answers, "group_by_length": True,
        },
        "output": str(output),
    }  # fmt: skip


@pytest.mark.parametrize("held_out", [0.2, "more.jsonl", None], ids=["share", "file", "none"])
def test_the_same_rows_as_in_memory(tmp_path: Path, held_out: Any) -> None:
    file = jsonl(tmp_path, 60)
    jsonl(tmp_path, 10, "more.jsonl")
    source = {"path": str(file), "weight": 1.5}
    held_out = str(tmp_path / held_out) if isinstance(held_out, str) else held_out
    sides = [
        prepare(
            parse(config(file, tmp_path / "run", train=[source, str(file)], eval=held_out, max_length=30, streaming=s))
        )
        for s in (False, True)
    ]
    memory, disk = sides
    assert isinstance(disk.encoded, Store) and not isinstance(memory.encoded, Store)
    assert digest(disk.encoded) == digest(memory.encoded) and digest(disk.held_out) == digest(memory.held_out)
    assert disk.report == memory.report and disk.held_out_report == memory.held_out_report
    assert lengths(disk.encoded) == lengths(memory.encoded) and disk.previews(2) == memory.previews(2)
    assert sum(disk.report.dropped.values()) > 0 and len(disk.held_out) == len(memory.held_out)


def test_the_same_run_to_the_bit(tmp_path: Path) -> None:
    file, runs = jsonl(tmp_path, 60), []
    for streaming in (False, True):
        runs.append(deltaw.train(config(file, tmp_path / str(streaming), streaming=streaming), quiet=True))
    a, b = (load_file(run.adapter / "adapter_model.safetensors") for run in runs)
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert runs[0].losses == runs[1].losses
    assert (runs[0].path / "samples.json").read_text() == (runs[1].path / "samples.json").read_text()


def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    tokenizer, _ = load_tokenizer("tiny")
    policy, peaks = Policy(64), []
    for count in (200, 2000):
        file = jsonl(tmp_path, count)
        tracemalloc.start()
        side, _ = stream(
            [Source(path=str(file))],
            lambda: Encoder(tokenizer, policy, seen=Observed(tokenizer, policy)),
            "sft",
            None,
        )
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(side.encoded) + sum(side.report.dropped.values()) == count
    tracemalloc.start()
    rows = read_rows(str(file))
    whole = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(rows) == 2000 and peaks[1] - peaks[0] < 0.1 * whole  # a few numbers a row and nothing else


def test_the_store_gives_back_what_it_was_given() -> None:
    rows = [Encoded([5, 6, 7], [IGNORE, 6, 7]), Encoded([9], [9], cut=3), Encoded([2, 70_000], [2, IGNORE])]
    store = Store()
    folder = Path(store._folder.name)
    store.extend(rows)
    store.close()
    assert list(store) == rows and store[-1] == rows[2] and store[1:] == rows[1:] and lengths(store) == [3, 1, 2]
    with pytest.raises(IndexError):
        store[3]
    assert all(type(number) is int for number in store[0].ids) and store._maps[0].dtype == np.int32
    del store
    assert not folder.exists()


def test_only_the_first_rows(tmp_path: Path) -> None:
    file = jsonl(tmp_path, 30)
    assert len(read_rows(Source(path=str(file), rows=7))) == 7
    with file.open("a") as more:
        more.write("not json\n")  # never reached
    source = Source(path=str(file), rows=5)
    assert (
        len(prepare(parse(config(file, tmp_path / "run", train=[dataclasses.asdict(source)], eval=None))).encoded) == 5
    )


def test_faults_are_found_before_anything_is_trained(tmp_path: Path) -> None:
    file = jsonl(tmp_path, 20)
    file.write_text(file.read_text() + "nonsense\n" + json.dumps({"prompt": "x"}) + "\n")
    with pytest.raises(DataError, match=r"line 21 is not JSON") as caught:
        prepare(parse(config(file, tmp_path / "run", streaming=True)))
    assert "line 22" in str(caught.value)
    with pytest.raises(DataError, match=r"no row is left to learn from"):
        prepare(parse(config(jsonl(tmp_path, 20), tmp_path / "run", streaming=True, max_length=3)))
    with pytest.raises(DataError, match=r"set data\.pairs to chosen"):
        (tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n")
        prepare(parse(config(tmp_path / "pairs.jsonl", tmp_path / "run", streaming=True)))
    with pytest.raises(DataError, match=r"is empty"):
        (tmp_path / "none.jsonl").write_text("\n")
        prepare(parse(config(tmp_path / "none.jsonl", tmp_path / "run", streaming=True)))
