"""deltaw export: writes, checks, prints one object, and ends with 1 where an engine that was asked for does not take it."""

import json
from pathlib import Path

import pytest
import torch

import deltaw
from deltaw.models.base import TINY
from deltaw.ship.engines import ENGINES


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = deltaw.load_base("tiny", dtype="fp32").model
    torch.manual_seed(0)
    deltaw.attach(model, deltaw.LoRA(rank=4, alpha=8, rslora=True), targets=["q_proj"])
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.05)
    folder = tmp_path_factory.mktemp("cli") / "a"
    deltaw.save(model, folder)
    return folder


def test_check_writes_nothing(run, adapter: Path) -> None:
    before = sorted(adapter.iterdir())
    code, out, _ = run("export", "--check", adapter)
    assert code == 0 and sorted(adapter.iterdir()) == before
    lines = out.splitlines()
    assert [line.split()[0] for line in lines if line and not line.startswith(" ")] == [
        "engine",
        *ENGINES,
        "Whether",
        "deltaw",
    ]
    assert "    mis-scales: use_rslora is not read: it scales q_proj by 2 instead of 4" in lines
    assert any("q_proj without v_proj" in line for line in lines)


def test_an_engine_that_does_not_take_it_is_1(run, adapter: Path) -> None:
    assert run("export", adapter, "--engine", "vllm")[0] == 0
    code, out, err = run("export", adapter, "--engine", "vllm", "--engine", "sglang", "--json")
    record = json.loads(out)["engines"]
    assert code == 1 and record["vllm"]["takes"] and record["sglang"]["verdict"] == "refuses" and "Traceback" not in err
    assert {"rule", "effect", "why", "evidence", "stays"} == record["sglang"]["findings"][0].keys()
    assert record["sglang"]["version"] == "0.5.23"


def test_what_does_not_help_is_not_advised(run, adapter: Path, tmp_path: Path) -> None:
    """Another form of the adapter is still one for a base that an engine does not convert."""
    config = json.loads((TINY / "config.json").read_text())
    config |= {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    (tmp_path / "base").mkdir()
    (tmp_path / "base/config.json").write_text(json.dumps(config))
    on_it = ["export", adapter, "--check", "--model", tmp_path / "base"]
    alone = run(*on_it, "--engine", "ollama")[1]
    assert "the base is MistralForCausalLM" in alone and "deltaw export" not in alone
    assert "No other form of the adapter helps with ollama" in alone
    both = run(*on_it, "--engine", "ollama", "--engine", "sglang")[1]
    assert "writes a form for sglang, where" in both and "helps with ollama:" in both


def test_what_is_written_is_told(run, adapter: Path, tmp_path: Path) -> None:
    code, out, _ = run(
        "export", adapter, "--output", tmp_path / "b", "--check", "--engine", "sglang", "--engine", "llama.cpp"
    )
    assert code == 0 and "rank 8 and scale 1, bfloat16" in out and "12 modules added with zeros" in out
    code, out, _ = run("export", adapter, "--output", tmp_path / "c", "--json", "--dtype", "fp32")
    record = json.loads(out)
    assert code == 0 and record["filled"] == 12 and record["error"] < 1e-6 and len(record["modules"]) == 6
    assert record["path"] == str(tmp_path / "c") and record["rank"] == 8
    code, out, _ = run("export", adapter, "--output", tmp_path / "d", "--profile", "peft")
    assert code == 0 and "peft, 6 modules, float32" in out


def test_wrong_use_is_one_sentence(run, adapter: Path, tmp_path: Path) -> None:
    for arguments, words in (
        ([adapter], "give a folder to write with --output, or ask what engines make of this one with --check"),
        ([adapter, "--engine", "vlm"], "no engine 'vlm'; did you mean 'vllm'?"),
        ([adapter, "--output", tmp_path / "b", "--profile", "gguf"], "no profile 'gguf'"),
        ([adapter, "--output", tmp_path / "b", "--rank", "0"], "rank=0 must be at least 1"),
    ):
        code, out, err = run("export", *arguments)
        assert code == 2 and words in err and not out and "Traceback" not in err
    assert run("export", tmp_path / "none", "--check")[0] == 1
    assert list(tmp_path.iterdir()) == []
