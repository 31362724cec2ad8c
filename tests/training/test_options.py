"""Options of training: each does what its sentence says, and a run that is killed goes on to the same bits."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import deltaw
from deltaw.config.parse import parse
from deltaw.config.schema import TrainConfig
from deltaw.core.errors import BaseMismatchError, ConfigError, TargetError, TrainError, UseError
from deltaw.runs.directory import RunDirectory
from deltaw.training.facts import unchanged
from deltaw.training.optimizer import build, groups


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    words = ["river", "castle", "garden", "church", "mill", "bridge"]
    text = [
        {"prompt": f"say {a} then {b}", "completion": f"{b}, {a}" + f" and {b}" * (i % 4)}
        for i, a in enumerate(words)
        for b in words
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in text))
    return file


def config(rows: Path, output: Path, adapter: dict[str, Any] | None = None, **train: Any) -> dict[str, Any]:
    defaults = {
        "max_steps": 6,
        "batch_size": 4,
        "learning_rate": 5e-3,
        "eval_every": 2,
        "save_every": 2,
        "log_every": 1,
    }
    return {
        "model": "tiny", "data": {"train": str(rows), "eval": 0.2}, "adapter": adapter or {"rank": 4, "dropout": 0.1},
        "train": {**defaults, **train}, "output": str(output),
    }  # fmt: skip


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def losses(run: Any) -> list[float]:
    return [event["loss"] for event in RunDirectory(run.path).events("step")]


def test_rates_of_tensors_and_modules() -> None:
    base = deltaw.load_base("tiny", dtype="fp32")
    deltaw.attach(base.model, deltaw.LoRA(rank=2, plus=16), targets=["q_proj", "up_proj"])
    given = TrainConfig(learning_rate=1e-3, rates={r".*up_proj": 0.5})
    found = {group["lr"]: sum(p.numel() for p in group["params"]) for group in groups(base.model, "default", given)}
    assert found == {1e-3: 6 * 2 * 256, 16e-3: 6 * 2 * 256, 0.5e-3: 6 * 2 * 256, 8e-3: 6 * 2 * 768}
    with pytest.raises(TargetError, match="matches the whole path of no adapted module"):
        groups(base.model, "default", TrainConfig(rates={"up_proj": 0.5}))


def test_lora_plus_moves_b_faster(rows: Path, tmp_path: Path) -> None:
    runs = [
        deltaw.train(
            config(rows, tmp_path / str(plus), {"rank": 4, "plus": plus}, max_steps=1, warmup=0, learning_rate=1e-4),
            quiet=True,
        )
        for plus in (1, 8)
    ]
    plain, plus = (sum(t.norm() for k, t in tensors(run.adapter).items() if "lora_B" in k) for run in runs)
    assert float(plus) == pytest.approx(8 * float(plain), rel=1e-2)  # B starts at 0 and Adam's first step is the rate


def test_8bit_optimizer(rows: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    optimizer = build(
        [{"params": [torch.nn.Parameter(torch.zeros(4))], "lr": 1e-3}], TrainConfig(optimizer="adamw-8bit")
    )
    assert type(optimizer).__name__ == "AdamW8bit"


def test_checkpointing_changes_nothing(rows: Path, tmp_path: Path) -> None:
    runs = [deltaw.train(config(rows, tmp_path / str(on), checkpointing=on), quiet=True) for on in (False, True)]
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), rel=1e-5)


def test_neftune_is_noise_in_training_only(rows: Path, tmp_path: Path) -> None:
    plain, noisy = (deltaw.train(config(rows, tmp_path / str(n), neftune=n), quiet=True) for n in (None, 20.0))
    assert losses(plain)[0] != pytest.approx(losses(noisy)[0], rel=1e-3)
    assert plain.losses["base"] == noisy.losses["base"]


def test_like_lengths_together(rows: Path, tmp_path: Path) -> None:
    run = deltaw.train(config(rows, tmp_path / "run", group_by_length=True), quiet=True)
    assert run.losses["held_out"] < run.losses["base"]


def test_the_best_adapter_and_early_stopping(rows: Path, tmp_path: Path) -> None:
    # a rate that first helps and then ruins
    given = {
        "max_steps": 40,
        "learning_rate": 0.05,
        "schedule": "constant",
        "eval_every": 1,
        "save_every": 40,
        "warmup": 0,
    }
    run = deltaw.train(config(rows, tmp_path / "run", best=True, early_stopping=3, **given), quiet=True)
    record = RunDirectory(run.path)
    evals = {event["step"]: event["loss"] for event in record.events("eval") if event["step"] > 0}
    best = min(list(evals)[:-1], key=lambda step: evals[step])
    assert run.steps < 40 and record.events("stopped")[0]["best"] == best
    assert run.losses["held_out"] == pytest.approx(min(evals.values()), rel=1e-5)
    assert all(torch.equal(t, tensors(record.best)[k]) for k, t in tensors(run.adapter).items())


def test_going_on_from_an_adapter(rows: Path, tmp_path: Path) -> None:
    first = deltaw.train(config(rows, tmp_path / "first"), quiet=True)
    second = deltaw.train(config(rows, tmp_path / "second", {"from": str(first.adapter)}), quiet=True)
    assert second.losses["base"] == pytest.approx(first.losses["held_out"], rel=1e-5)
    assert second.losses["held_out"] < first.losses["held_out"] and second.plan.trainable == first.plan.trainable
    manifest = [json.loads((run.adapter / "deltaw.json").read_text()) for run in (first, second)]
    assert manifest[1]["meta"]["parents"] == [manifest[0]["digest"]]
    assert "from: " in (second.path / "config.yaml").read_text()
    shutil.rmtree(second.adapter)  # as if it had stopped before the end
    again = deltaw.resume(second.path, quiet=True)
    assert again.losses["held_out"] == second.losses["held_out"]
    with pytest.raises(ConfigError, match=r"adapter.from brings its own method and targets: leave out 'rank'"):
        deltaw.train(config(rows, tmp_path / "third", {"from": str(first.adapter), "rank": 4}), quiet=True)


def test_a_template_stays_with_its_adapter(rows: Path, tmp_path: Path) -> None:
    given = config(rows, tmp_path / "run", max_steps=2)
    given["data"]["template"] = "plain"
    run = deltaw.train(given, quiet=True)
    done = subprocess.run(
        [sys.executable, "-m", "deltaw", "eval", "--adapter", run.adapter, "--data", rows, "--generations", "0", "--json"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert (run.adapter / "chat_template.jinja").is_file()
    seen = json.loads(done.stdout)
    del given["data"]["template"]
    other = deltaw.train({**given, "output": str(tmp_path / "other")}, quiet=True)
    assert abs(seen["base"]["loss"] - other.losses["base"]) > 0.1  # scored through the template it was trained with


def test_reporters_that_are_not_there(rows: Path, tmp_path: Path) -> None:
    with pytest.raises(UseError, match=r"train\.report_to: no logger 'tensorbored'; did you mean 'tensorboard'"):
        deltaw.train(config(rows, tmp_path / "run", report_to=["tensorbored"]), quiet=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGINT])
def test_killed_and_resumed_is_bit_identical(rows: Path, tmp_path: Path, kill: signal.Signals) -> None:
    """Sampler, RNG, optimizer, schedule and the best so far come back; accumulation, dropout and packing are on."""
    options = {
        "max_steps": 30,
        "gradient_accumulation": 2,
        "best": True,
        "batch_size": 4,
        "save_every": 5,
        "eval_every": 5,
    }
    whole = deltaw.train(config(rows, tmp_path / "whole", **options), quiet=True)
    (tmp_path / "config.json").write_text(json.dumps(config(rows, tmp_path / "part", **options)))
    env = {
        **os.environ,
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }  # sums over other threads have other last bits
    process = subprocess.Popen(
        [sys.executable, "-m", "deltaw", "train", str(tmp_path / "config.json"), "--quiet"], env=env
    )
    part, wanted = RunDirectory(tmp_path / "part"), random.Random(int(kill)).randint(6, 24)
    while process.poll() is None and len(part.events("step")) < wanted:
        time.sleep(0.01)
    os.kill(process.pid, kill)
    assert process.wait() != 0 and part.steps() and not part.adapter.exists()
    resumed = deltaw.resume(tmp_path / "part", quiet=True)
    mine, theirs = tensors(resumed.adapter), tensors(whole.adapter)
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)
    assert resumed.losses == whole.losses


def test_a_run_does_not_go_on_with_something_else(rows: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    shutil.copy(rows, file)
    base = deltaw.load_base("tiny", dtype="fp32")
    base.model.save_pretrained(tmp_path / "base")
    base.tokenizer.save_pretrained(tmp_path / "base")
    given = {**config(file, tmp_path / "run"), "model": str(tmp_path / "base")}
    run = deltaw.train(given, quiet=True)
    shutil.rmtree(run.adapter)  # as if it had stopped before the end
    text = (run.path / "config.yaml").read_text()
    (run.path / "config.yaml").write_text(text.replace("learning_rate: 0.005", "learning_rate: 0.001"))
    with pytest.raises(TrainError, match=r"train.learning_rate was 0.005, is 0.001"):
        deltaw.resume(run.path, quiet=True)
    (run.path / "config.yaml").write_text(text)
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[1:]))
    with pytest.raises(TrainError, match=r"the training rows are others|the held-out rows are others"):
        deltaw.resume(run.path, quiet=True)
    before = {"config": {"model": "m", "data": {"train": "x"}}, "rows": 60, "digest": {"rows": "a", "held_out": "c"}}
    now = {**before, "config": parse(before["config"]).to_dict()}
    with pytest.raises(TrainError, match="60 as before, with other tokens, or with images whose files have changed"):
        unchanged(before, {**now, "digest": {"rows": "b", "held_out": "c"}})
    with pytest.raises(TrainError, match=r"the training rows are others: 60 then, 59 now$"):
        unchanged(before, {**now, "rows": 59, "digest": {"rows": "b", "held_out": "c"}})
    file.write_text("".join(lines))
    with torch.no_grad():
        base.model.model.embed_tokens.weight.add_(0.5)
    base.model.save_pretrained(tmp_path / "base")
    with pytest.raises(BaseMismatchError, match="the base is not the one this run began with"):
        deltaw.resume(run.path, quiet=True)


def test_several_processes_are_refused(rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UseError, match="training runs in one process, torchrun started 2"):
        deltaw.train(config(rows, tmp_path / "run"), quiet=True)


def test_answers_and_their_metrics_during_training(rows: Path, tmp_path: Path) -> None:
    given = config(
        rows, tmp_path / "run", generate=3, metrics=["exact_match", "rouge_l"], report_to=["tensorboard"], max_steps=4
    )
    run = RunDirectory(deltaw.train(given, quiet=True).path)
    scores = run.events("scores")
    assert [event["step"] for event in scores] == [0, 2, 4] and all("rouge_l" in event for event in scores)
    samples = run.samples()
    assert len(samples["first"]) == len(samples["last"]) <= 3 and samples["first"] != samples["last"]
    assert "Answers to held-out prompts" in (run.path / "report.html").read_text()
    assert list(tmp_path.rglob("events.out.tfevents*"))
