"""Training on what others made: a real pretrained Llama of 260 k parameters, on real restaurant descriptions."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import deltaw


@pytest.mark.shared
def test_stories_learns_restaurants_from_the_command_line(shared: Path, tmp_path: Path) -> None:
    for name, source, count in (("train", "valid", 400), ("held", "test", 60)):
        lines = (shared / f"data/e2e/{source}.txt").read_text(encoding="utf-8").splitlines()[:: 4000 // count][:count]
        pairs = [line.partition("||") for line in lines]
        rows = [
            json.dumps({"prompt": f"{meaning.strip()} =>", "completion": f" {text.strip()}"})
            for meaning, _, text in pairs
        ]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    done = subprocess.run(
        [
            sys.executable, "-m", "deltaw", "train", "--json", f"model={shared / 'models/stories260K'}",
            "data.train=train.jsonl", "data.eval=held.jsonl", "adapter.rank=8", "train.max_steps=12",
            "train.learning_rate=1e-2", "output=run",
        ],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["losses"]["held_out"] < record["losses"]["base"] - 1.0
    assert "learnt between ⟦ and ⟧" in done.stderr

    base = deltaw.load_base(str(shared / "models/stories260K"), dtype="fp32")
    assert deltaw.load(base.model, tmp_path / "run/adapter").base == "match"
    manifest = json.loads((tmp_path / "run/adapter/deltaw.json").read_text())
    assert manifest["base"]["name"] == str(shared / "models/stories260K")  # as written: how eval and chat find it
