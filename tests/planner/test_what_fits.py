"""The table of docs/multimodal.md is that of the result file."""

import json
from pathlib import Path

from benchmarks._common import RESULTS
from benchmarks.mini_gemini import ARMS, lines

PAGE = Path(__file__).resolve().parents[2] / "docs" / "multimodal.md"


def test_the_table_is_the_result() -> None:
    result = json.loads((RESULTS / "mini_gemini.json").read_text(encoding="utf-8"))
    assert {arm["arm"] for arm in result["arms"]} == set(ARMS)
    page = PAGE.read_text(encoding="utf-8")
    assert "\n".join(lines(result)) in page
