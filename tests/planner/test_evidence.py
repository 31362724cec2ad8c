"""Claims are answered, and the numbers they are answered with are still those of the results."""

import json
from pathlib import Path
from typing import Any

from deltaw.planner import measured
from deltaw.planner.evidence import CLAIMS, VERDICTS, table, topics

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


def results(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def span(values: list[float]) -> tuple[float, float]:
    return round(min(values), 2), round(max(values), 2)


def test_every_row_of_the_popular_tables_is_answered() -> None:
    said = {topic: [claim.said for claim in table(topic)] for topic in topics()}
    tiers = "\n".join(said["rank by task"])
    for tier in ("rank 8", "rank 16 to 32", "rank 64 to 128", "rank 256 to 512"):
        assert tier in tiers
    assert [s[:6] for s in said["alpha as a multiple of rank"][:3]] == ["α = r:", "α = 2r", "α = 4r"]
    assert len(said["three remedies"]) == 3


def test_every_claim_has_a_verdict_and_its_evidence() -> None:
    kinds = {"measured", "published", "computed", "rule of thumb"}
    for claim in CLAIMS:
        assert claim.verdict in VERDICTS and claim.kind in kinds, claim.said
        assert all(claim), claim.said
    assert len({claim.said for claim in CLAIMS}) == len(CLAIMS)
    assert {claim.verdict for claim in CLAIMS} == set(VERDICTS)


def test_methods_are_as_measured() -> None:
    found = results("methods")["methods"]
    for name, cell in found.items():
        assert measured.METHODS[name] == (cell["rate"], round(cell["step_time"], 2), round(cell["loss"]["mean"], 4))
    assert set(measured.METHODS) == set(found)
    assert measured.faster("vera") == measured.faster("ia3") == measured.faster("llama_adapter") == 10


def test_costs_are_as_measured() -> None:
    decode = [cell["milliseconds"] for cell in results("lifecycle")["decode"]["bf16"]["rows"].values()]
    assert span([m["merged"] / m["base"] for m in decode]) == measured.MERGED
    assert span([m["one adapter"] / m["base"] for m in decode]) == measured.MOUNTED
    assert span([m["an adapter a row"] / m["base"] for m in decode]) == measured.EACH_ROW
    steps = [cell["seconds"] for cell in results("step").values() if isinstance(cell, dict)]
    assert span([s["ours"] / s["bound"] for s in steps]) == measured.STEP
    assert span([s["ours"] / s["full"] for s in steps]) == measured.STEP_OF_FULL
    dropped = [cell["seconds"] for cell in results("step_dropout").values() if isinstance(cell, dict)]
    assert span([s["ours"] / s["bound"] for s in dropped]) == measured.STEP_DROPOUT


def test_tasks_are_as_measured() -> None:
    scan = results("scan_spelled")
    sides = [scan[side]["exact_match"] for side in ("lora", "full")]
    assert tuple((round(s["mean"], 3), round(s["sd"], 3)) for s in sides) == measured.SCAN
    assert (scan["chosen"]["lora"], results("methods")["methods"]["lora"]["rate"]) == measured.TINY_RATES


def test_the_probe_is_as_measured() -> None:
    found, said = results("probe"), measured.PROBED
    for side in ("uniform", "pattern"):
        loss = found[side]["loss"]
        assert getattr(said, side) == (round(loss["mean"], 4), round(loss["sd"], 4))
        assert len(loss["seeds"]) == 3
    assert (said.rank, said.steps, said.verdict) == (found["rank"], found["steps"], found["verdict"])
    assert abs(found["pattern"]["parameters"] / found["uniform"]["parameters"] - 1) < 0.01
