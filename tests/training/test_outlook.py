"""What a run will train, from a configuration file alone: published models come out as published."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers as t

import deltaw
from deltaw.cli.main import main
from deltaw.config import parse
from deltaw.core.errors import TargetError
from deltaw.core.targets import plan
from deltaw.models.base import load_base, outline
from deltaw.training.outlook import outlook

QWEN3_06B = t.Qwen3Config(
    vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
    num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
)  # fmt: skip
LLAMA_7B = t.LlamaConfig(
    vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
)
GEMMA_2B = t.GemmaConfig(
    vocab_size=256000, hidden_size=2048, intermediate_size=16384, num_hidden_layers=18, num_attention_heads=8,
    num_key_value_heads=1, head_dim=256,
)  # fmt: skip
SEVEN: dict[str, Any] = {"targets": "all-linear"}
NO_GATE = {"targets": ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]}
Q_V = {"targets": ["q_proj", "v_proj"]}


@pytest.mark.parametrize(
    ("config", "total", "rank", "targets", "trainable"),
    [
        (QWEN3_06B, 596_049_920, 8, SEVEN, 5_046_272),
        (QWEN3_06B, 596_049_920, 32, SEVEN, 20_185_088),
        (QWEN3_06B, 596_049_920, 32, NO_GATE, 16_515_072),
        (QWEN3_06B, 596_049_920, 512, SEVEN, 322_961_408),
        (LLAMA_7B, 6_738_415_616, 8, Q_V, 4_194_304),
        (LLAMA_7B, 6_738_415_616, 16, SEVEN, 39_976_960),
        (GEMMA_2B, 2_506_172_416, 16, SEVEN, 19_611_648),
        (GEMMA_2B, 2_506_172_416, 16, {"targets": ["q_proj", "v_proj", "o_proj"]}, 3_022_848),
    ],
)
def test_published_models(
    config: Any, total: int, rank: int, targets: dict[str, Any], trainable: int, tmp_path: Path
) -> None:
    """No weights are there, and none are made: 7 billion parameters would be 27 GB."""
    config.save_pretrained(tmp_path)
    record = {
        "model": str(tmp_path),
        "data": {"train": "none.jsonl"},
        "adapter": {"method": "lora", "rank": rank, **targets},
    }
    planned = outlook(parse.parse(record))
    assert planned is not None
    assert (planned.plan.base_parameters, planned.plan.trainable) == (total, trainable)


@pytest.mark.parametrize("method", ["lora", "dora", "bottleneck", "llama_adapter", "boft"])
def test_it_is_what_attaching_does(method: str) -> None:
    chosen, base = deltaw.core.method.get(method)(), load_base("tiny")
    before = plan(outline("tiny"), chosen, "all-linear")
    assert str(before) == str(deltaw.attach(base.model, chosen, targets="all-linear"))


def test_wrong_targets_stop_before_the_base_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n", encoding="utf-8")

    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("the base was loaded")

    monkeypatch.setattr("deltaw.training.run.load_base", load)
    record = {
        "model": "tiny",
        "data": {"train": str(rows), "eval": None},
        "adapter": {"method": "lora", "targets": "q_prj"},
        "output": str(tmp_path / "run"),
    }
    with pytest.raises(TargetError, match="did you mean 'q_proj'"):
        deltaw.train(record, quiet=True)
    assert not (tmp_path / "run").exists()


def test_plan_shows_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n", encoding="utf-8")
    command = ["deltaw", "plan", "model=tiny", f"data.train={rows}", "data.eval=null", "adapter.rank=4", "--json"]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit) as done:
        main()
    found = json.loads(capsys.readouterr().out)
    assert done.value.code == 0
    assert found["parameters"] == {"trainable": 116_736, "total": 5_770_496, "adapters": 42}
    assert found["trained_bytes"] == 4 * 116_736
