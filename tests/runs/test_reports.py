"""Runs read side by side, and a report that a browser shows without a network."""

import json
import xml.etree.ElementTree as ET
from pathlib import Path

from deltaw.runs.directory import RunDirectory
from deltaw.runs.report import curves, html_report
from deltaw.runs.summary import find, flat, summarise, table


def made(folder: Path, rate: float, ended: bool = True) -> RunDirectory:
    run = RunDirectory(folder)
    run.create({"model": "tiny", "train": {"learning_rate": rate}, "output": str(folder)}, "1")
    run.write_plan({"steps": 4, "trainable": 100, "base_parameters": 1000, "base": "tiny", "method": "lora", "rows": 9})
    run.log("start", environment={"python": "3.x"})
    for step in range(1, 5):
        run.log("step", step=step, loss=4.0 / step)
    run.log("eval", step=4, loss=1.5)
    run.log("scores", step=4, exact_match=0.25)
    run.log("warning", text="a <b> & c")
    if ended:
        run.log("end", losses={"base": 5.0, "train": 1.0, "held_out": 1.5}, steps=4, seconds=2.5, peak_memory=10**9)
    return run


def test_runs_side_by_side(tmp_path: Path) -> None:
    made(tmp_path / "deep/a", 1e-3)
    made(tmp_path / "b", 1e-4, ended=False)
    both = [summarise(run) for run in find([tmp_path])]
    assert [(s.state, s.step, s.losses["held_out"], s.scores) for s in both] == [
        ("unfinished", 4, 1.5, {"exact_match": 0.25}),
        ("finished", 4, 1.5, {"exact_match": 0.25}),
    ]
    text = table(both)
    assert "train.learning_rate" in text and "0.001" in text and "model" not in text.splitlines()[0]
    assert flat({"a": {"b": 1}, "c": [2]}) == {"a.b": 1, "c": [2]}


def test_the_report_is_one_page_of_its_own(tmp_path: Path) -> None:
    run = made(tmp_path / "run", 1e-3)
    run.write_samples([{"prompt": "p", "answer": "<old>", "references": ["r"]}])
    run.write_samples([{"prompt": "p", "answer": "new", "references": ["r", "s"]}])
    page = html_report(run)
    assert "&lt;old&gt;" in page and "new" in page and "a &lt;b&gt; &amp; c" in page and "learning_rate: 0.001" in page
    assert "http" not in page.replace("http-equiv", "") and "<script" not in page
    svg = page[page.index("<svg") : page.index("</svg>") + 6]
    lines = [line.get("points", "").split() for line in ET.fromstring(svg).iter("polyline")]
    assert list(map(len, lines)) == [4, 1]
    assert "No step was made" in curves([], [])
    json.dumps(run.samples())
