"""The quickstart's whole path with a few steps: every figure is there and means what it says."""

import json
import subprocess
import sys
from pathlib import Path

from deltaw.lab.quickstart import new_folder, quickstart


def test_whole_path(tmp_path: Path) -> None:
    said: list[str] = []
    found = quickstart(tmp_path / "quick", said.append, steps=4, held_out=6)
    assert {"base", "tuned", "switch_ms", "merge", "adapter_bytes", "seconds", "peak_memory_bytes"} <= found.keys()
    assert found["base"]["exact_match"] == 0.0 <= found["tuned"]["exact_match"] <= 1.0
    for scores in found["tasks"].values():
        assert scores["tuned"]["loss"] < scores["base"]["loss"] and scores["tuned"]["rows"] == 6
    assert found["switch_ms"] < 5 and found["adapter_bytes"] < 2e6 and found["peak_memory_bytes"] < 2e9
    assert found["merge"]["max_logit_difference"] < 1e-3 < found["merge"]["effect"]
    assert found["mix"]["max_logit_difference"] < 1e-3
    refusals = list(found["refused"].values())
    assert "is an adapter, not a base" in refusals[0] and "another base" in refusals[1]
    assert len(refusals) == 2 and "Switching" in "\n".join(said)
    json.dumps(found)
    assert new_folder(tmp_path / "quick") == tmp_path / "quick-2"


def test_help_of_the_verb() -> None:
    done = subprocess.run([sys.executable, "-m", "deltaw", "quickstart", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "--json" in done.stdout
