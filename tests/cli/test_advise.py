"""deltaw advise: on configurations with and without rows, as text and as JSON; claims; wrong use."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deltaw.cli import main as cli

RECORDS = Path(__file__).resolve().parents[2] / "src" / "deltaw" / "lab" / "tasks" / "records.train.jsonl"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["deltaw", "advise", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    return call


def advised(run: Run, *arguments: object) -> dict[str, Any]:
    code, out, err = run(*arguments, "--json")
    assert code == 0, err
    found: dict[str, Any] = json.loads(out)
    for one in found["advice"]:
        assert one.keys() == {"field", "given", "suggested", "reason", "source", "kind"}
    return found


def test_rows_of_a_configuration_are_read(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(f"model: tiny\ndata: {{train: {RECORDS}, eval: null}}\ntrain: {{learning_rate: 3e-3}}\n")
    found = advised(run, file, "adapter.rank=4", "train.epochs=2")
    assert found["figures"]["rows"] == 2000 and found["figures"]["steps"] == 500
    assert found["figures"]["supervised_tokens"] > 10 * 2000
    assert found["figures"]["trainable"] == 116_736 and found["warnings"] == []
    assert found["figures"]["break_even"]["rank"] == pytest.approx(128 * 256 / 384)
    given = {one["field"]: one["given"] for one in found["advice"]}
    assert (given["adapter.rank"], given["adapter.alpha"], given["train.learning_rate"]) == (4, 8.0, 3e-3)
    summed = advised(run, file, "train.epochs=2", "train.gradient_accumulation=2", "--rows", 2000)
    assert summed["figures"]["steps"] == 250 and summed["figures"]["supervised_tokens"] is None


def test_options_stand_for_rows(run: Run) -> None:
    found = advised(run, "--model", "tiny", "--rows", 100, "--tokens", 10**9, "--adapters", 3)
    fields = {one["field"]: one["suggested"] for one in found["advice"]}
    assert fields["merge"] == "keep mounted" and fields["train.epochs"] == 8 and fields["adapter.method"] == "full"
    assert [one["field"] for one in found["warnings"]] == ["train.learning_rate", "train.epochs", "adapter.rank"]


def test_a_run_without_rows_is_advised_too(run: Run) -> None:
    found = advised(run, "model=tiny", "adapter.targets=[q_proj, up_proj, down_proj]", "train.learning_rate=5e-3")
    assert found["figures"]["rows"] is found["figures"]["steps"] is None
    assert [one["field"] for one in found["warnings"]] == ["adapter.targets"] * 2
    first, second = (one["text"] for one in found["warnings"])
    assert "gate_proj is left out of 6" in first and "k_proj (6)" in second and "gate_proj" not in second


@pytest.mark.parametrize(
    "method", ["dora", "adalora", "full", "vera", "ia3", "bottleneck", "llama_adapter", "boft", "mora"]
)
def test_every_kind_of_method_is_advised(run: Run, method: str) -> None:
    found = advised(run, "model=tiny", f"adapter={{method: {method}}}")
    assert {"train.learning_rate", "merge"} <= {one["field"] for one in found["advice"]}
    assert ("break_even" in found["figures"]) == (method in ("dora", "adalora"))
    assert not [one for one in found["warnings"] if one["field"] == "adapter.targets"]


def test_the_text_says_what_the_record_says(run: Run) -> None:
    code, out, _ = run("--model", "tiny", "--rows", 100)
    assert code == 0
    for words in (
        "train.learning_rate: 0.0002 → 0.003",
        "measured: docs/methods.md",
        "break-even rank 85.33",
        "9.9 % more",
    ):
        assert words in out
    assert "warning: train.epochs: 13 steps are few" in out


def test_claims(run: Run) -> None:
    code, out, _ = run("--claims", "--json")
    claims = json.loads(out)["claims"]
    assert code == 0 and {one["verdict"] for one in claims} == {"true", "wrong", "depends"}
    code, out, _ = run("--claims")
    assert code == 0 and all(one["said"] in out and one["evidence"] in out for one in claims)


def test_a_probe_suggests_ranks_of_equal_size(run: Run, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(RECORDS.read_text(encoding="utf-8").splitlines(keepends=True)[:8]), encoding="utf-8")
    given = (f"data.train={rows}", "data.eval=null", "model=tiny", "adapter.rank=2", "train.batch_size=4")
    found = advised(run, *given, "--probe", "--batches", 1)["probe"]
    assert found["parameters"]["suggested"] <= found["parameters"]["given"]
    assert found["energy"]["suggested"] > found["energy"]["given"]
    assert len(found["modules"]) == 42 and found["adapter"]["rank"] == 2 and found["kind"] == "measured"
    pattern = json.dumps(found["adapter"]["rank_pattern"]).replace('"', "'")
    planned = advised(run, "model=tiny", "adapter.rank=2", f"adapter.rank_pattern={pattern}")
    assert planned["figures"]["trainable"] == found["parameters"]["suggested"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["nothing to advise on", "--model", "--claims"]),
        (["--claims", "--model", "tiny"], ["--claims", "leave"]),
        (["--model", "tiny", "--tokens", "5"], ["--rows"]),
        (["--model", "tiny", "--probe"], ["data.train"]),
        (["adapter.rank=4"], ["model is missing"]),
        (["model=tiny", "data=rows.jsonl"], ["data='rows.jsonl' must be a section"]),
        (["model=tiny", "adapter.rank=0"], ["rank=0", "at least 1"]),
        (["model=tiny", "adapter.targets=q_prj"], ["did you mean 'q_proj'"]),
        (["model=tiny", "data.train=nowhere.jsonl"], ["nowhere.jsonl"]),
        (["model=tiny", "adapter={from: runs/old}"], ["adapter.from", "leave"]),
        (["model=tiny", f"data.train={RECORDS}", "adapter={method: oft}", "--probe"], ["not of oft", "method: lora"]),
        (["model=tiny", f"data.train={RECORDS}", "data.tokens=[<|x|>]", "--probe"], ["leave data.tokens out"]),
    ],
)
def test_wrong_use_is_2_with_a_sentence(run: Run, arguments: list[str], words: list[str]) -> None:
    code, out, err = run(*arguments)
    assert code == 2 and "Traceback" not in err and out == ""
    assert all(word in err for word in words), err
