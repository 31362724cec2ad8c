"""Edges of data and runs: where answers stop, whose tokens count, what a run does at its very end."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

import deltaw
from deltaw.config.parse import parse
from deltaw.core.errors import ConfigError, DataError, FileError, UseError
from deltaw.data.conversation import Example, Message
from deltaw.data.encode import Dropped, Policy, encode
from deltaw.data.rows import read_rows
from deltaw.infer.evaluate import evaluate
from deltaw.infer.generate import answer_all, generate, prompt_ids, stop_tokens
from deltaw.models.base import TINY, Base, load_base
from deltaw.runs.directory import RunDirectory
from deltaw.training.prepare import prepare
from deltaw.training.sweep import sweep


@pytest.fixture
def base() -> Base:
    return load_base("tiny", dtype="fp32")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    words = ["river", "castle", "garden", "church", "mill", "bridge"]
    text = [
        {"prompt": f"say {a}", "completion": f"{b}, {a}" + f" and {b}" * (i % 5)}
        for i, a in enumerate(words)
        for b in words
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in text))
    return file


def config(rows: Path, output: Path, adapter: dict[str, Any] | None = None, **train: Any) -> dict[str, Any]:
    defaults = {
        "max_steps": 4,
        "batch_size": 4,
        "learning_rate": 5e-3,
        "eval_every": 2,
        "save_every": 2,
        "schedule": "constant",
    }
    return {"model": "tiny", "data": {"train": str(rows), "eval": 0.2}, "adapter": adapter or {"rank": 2},
            "train": {**defaults, **train}, "output": str(output)}  # fmt: skip


def tensors(run: Any) -> dict[str, torch.Tensor]:
    return load_file(run.adapter / "adapter_model.safetensors")


def same(a: Any, b: Any) -> bool:
    mine, theirs = tensors(a), tensors(b)
    return all(torch.equal(mine[key], theirs[key]) for key in theirs)


def test_answers_stop_where_training_ends_them(base: Base) -> None:
    """A turn may end with another token than the tokenizer's end of text."""
    end = base.tokenizer.convert_tokens_to_ids("<|end|>")
    base.tokenizer.eos_token = "<|system|>"
    base.tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>", "<|user|>", "<|assistant|>"]})
    base.model.generation_config.eos_token_id = None
    assert end in stop_tokens(base.model, base.tokenizer)
    base.model.generation_config.eos_token_id = [3, 7]
    assert {3, 7, end} <= set(stop_tokens(base.model, base.tokenizer))


def test_one_long_prompt_does_not_shorten_the_others(base: Base) -> None:
    short, long = prompt_ids(base.tokenizer, "Where is the river?"), [5] * 505
    alone = answer_all(base.model, base.tokenizer, [short], max_new_tokens=30)
    assert answer_all(base.model, base.tokenizer, [long, short], max_new_tokens=30)[1] == alone[0]
    with pytest.raises(UseError, match="prompt 1 is empty"):
        answer_all(base.model, base.tokenizer, [[]])


def test_a_tokenizer_without_pad_or_end_still_generates(base: Base) -> None:
    base.tokenizer.pad_token = base.tokenizer.eos_token = None
    assert len(generate(base.model, base.tokenizer, ["a", "a longer one"], max_new_tokens=3)) == 2


def test_role_tokens_in_a_text_are_control_tokens(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    bad = Example((Message("user", "a<|assistant|>b"), Message("assistant", "x")), 1)
    assert isinstance(encode(bad, tokenizer, Policy(64)), Dropped)
    marked = Example(
        (Message("user", "a"), Message("assistant", "b", learn=False), Message("user", "c"), Message("assistant", "d")),
        1,
        "row 1",
    )
    with pytest.raises(DataError, match="choose one of them"):
        encode(marked, tokenizer, Policy(64, train_on_prompt=True))


def test_unwanted_answers_are_no_references(base: Base, tmp_path: Path) -> None:
    given = [("hi", "good", True), ("hi", "bad", False), ("yo", "worse", False)]
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"prompt": p, "completion": c, "label": g}) + "\n" for p, c, g in given)
    )
    found = evaluate(base.model, base.tokenizer, read_rows(tmp_path / "rows.jsonl"))
    assert [list(s.references) for s in found.samples] == [["good"]] and found.dropped == {"judged unwanted": 2}


def test_judged_rows_split_among_the_wanted(tmp_path: Path) -> None:
    given = [{"prompt": f"p{n}", "completion": "c", "label": n % 2 == 0} for n in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))
    data = {"train": str(tmp_path / "rows.jsonl"), "pairs": "chosen", "eval": 0.05}
    prepared = prepare(parse({"model": "tiny", "data": data}))
    assert len(prepared.encoded) + len(prepared.held_out) == 10 and prepared.held_out
    assert prepared.report.dropped == {"judged unwanted": 10}


def test_weights_and_the_held_out_share_are_drawn_apart(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"prompt": f"{n}", "completion": "c"}) + "\n" for n in range(800))
    )
    data = {"train": {"path": str(tmp_path / "rows.jsonl"), "weight": 0.2}, "eval": 0.2}
    prepared = prepare(parse({"model": "tiny", "data": data}))
    assert len(prepared.encoded) > 2 * len(prepared.held_out) > 20


def test_held_out_rows_that_are_left_out_are_said(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": "word " * n} for n in (1, 600, 700)]
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"train": str(tmp_path / "held.jsonl"), "eval": str(tmp_path / "held.jsonl")}
    assert (
        prepare(parse({"model": "tiny", "data": data})).held_out_said
        == "held out 1 rows, left out longer than 512 tokens: 2"
    )


def test_a_text_without_lines_is_split_near_the_share(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("Title\n" + "word " * 5000)
    data = {"train": str(tmp_path / "book.txt"), "eval": 0.1}
    prepared = prepare(parse({"model": "tiny", "data": data, "train": {"objective": "text"}}))
    assert len(prepared.encoded) > 5 * len(prepared.held_out) > 0


@pytest.mark.parametrize(
    ("text", "count"),
    [("prompt,completion\na,hello\u2028world\n", 1), ("prompt,completion\na,b\n\nc,d\n", 2)],
    ids=["U+2028", "blank"],
)
def test_tables_are_cut_at_lines_only(tmp_path: Path, text: str, count: int) -> None:
    (tmp_path / "t.csv").write_text(text, encoding="utf-8")
    assert len(read_rows(tmp_path / "t.csv")) == count


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"adapter": {"rank": True}}, "adapter.rank=True: must be a number"),
        ({"train": {"epochs": True}}, "train.epochs=True: must be a number"),
        ({"train": {"best": "no"}}, "train.best='no': must be true or false"),
        ({"adapter": {"from": "a", "start": "b"}}, "one thing"),
        ({"data": {"train": "x", "eval": ""}}, "data.eval is empty"),
        ({"data": {"train": "x", "template": ""}}, "data.template is empty"),
    ],
)
def test_values_of_the_wrong_kind(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words.replace(".", r"\.")):
        parse({"model": "tiny", "data": {"train": "x"}, **change})


def test_a_run_cut_off_after_its_last_step_makes_no_other(rows: Path, tmp_path: Path) -> None:
    whole = deltaw.train(config(rows, tmp_path / "whole"), quiet=True)
    part = deltaw.train(config(rows, tmp_path / "part"), quiet=True)
    shutil.rmtree(part.adapter)
    again = deltaw.resume(part.path, quiet=True)
    assert again.steps == 4 and same(again, whole) and again.losses == whole.losses


def test_a_run_that_stopped_early_stays_stopped(rows: Path, tmp_path: Path) -> None:
    given = {"max_steps": 40, "learning_rate": 0.2, "eval_every": 1, "save_every": 1, "warmup": 0, "early_stopping": 1}
    run = deltaw.train(config(rows, tmp_path / "run", **given), quiet=True)
    assert len(RunDirectory(run.path).events("stopped")) == 1 and run.steps < 40
    before = tensors(run)
    shutil.rmtree(run.adapter)
    again = deltaw.resume(run.path, quiet=True)
    assert again.steps == run.steps and all(torch.equal(before[key], t) for key, t in tensors(again).items())


def test_like_lengths_resume_to_the_bit_in_a_later_epoch(rows: Path, tmp_path: Path) -> None:
    given = {"group_by_length": True, "max_steps": 16, "save_every": 6, "eval_every": 16, "keep": 9}
    whole = deltaw.train(config(rows, tmp_path / "whole", **given), quiet=True)
    shutil.copytree(whole.path, tmp_path / "part")
    part = RunDirectory(tmp_path / "part")
    shutil.rmtree(part.adapter)
    text = (part.path / "config.yaml").read_text().replace(str(whole.path), str(part.path))
    (part.path / "config.yaml").write_text(text)
    plan = part.plan()
    plan["config"]["output"] = str(part.path)
    part.write_plan(plan)
    for step in part.steps():
        if step > 12:
            shutil.rmtree(part.checkpoint(step))
    assert part.steps()[-1] == 12
    assert same(deltaw.resume(part.path, quiet=True), whole)


def test_a_child_needs_neither_parent_nor_its_template_again(rows: Path, tmp_path: Path) -> None:
    given = config(rows, tmp_path / "parent")
    given["data"]["template"] = "plain"
    parent = deltaw.train(given, quiet=True)
    child = deltaw.train(config(rows, tmp_path / "child", {"from": str(parent.adapter)}), quiet=True)
    assert (child.adapter / "chat_template.jinja").read_text() == (parent.adapter / "chat_template.jinja").read_text()
    before, manifest = tensors(child), json.loads((child.adapter / "deltaw.json").read_text())
    shutil.rmtree(child.adapter)
    (parent.adapter / "adapter_model.safetensors").unlink()
    again = deltaw.resume(child.path, quiet=True)
    assert all(torch.equal(before[key], t) for key, t in tensors(again).items())
    assert json.loads((again.adapter / "deltaw.json").read_text())["meta"]["parents"] == manifest["meta"]["parents"]


def test_a_damaged_checkpoint_is_not_resumed(rows: Path, tmp_path: Path) -> None:
    run = deltaw.train(config(rows, tmp_path / "run"), quiet=True)
    shutil.rmtree(run.adapter)
    (RunDirectory(run.path).last_checkpoint() / "optimizer.pt").unlink()
    with pytest.raises(FileError, match=r"is damaged, it lacks optimizer\.pt"):
        deltaw.resume(run.path, quiet=True)


def test_faults_before_the_first_step_leave_no_folder(rows: Path, tmp_path: Path) -> None:
    with pytest.raises(UseError, match="no metric 'nope'"):
        deltaw.train(config(rows, tmp_path / "run", generate=2, metrics=["nope"]), quiet=True)
    assert not (tmp_path / "run").exists()


def test_sweeps_refuse_what_would_mislead(rows: Path, tmp_path: Path) -> None:
    record = config(rows, tmp_path / "out", max_steps=1)
    first = sweep(record, {"adapter.rank": [1]}, quiet=True)
    assert not first.failed
    with pytest.raises(ConfigError, match="holds a run of another configuration"):
        sweep(config(rows, tmp_path / "out", max_steps=2), {"adapter.rank": [1]}, quiet=True)
    for axes, words in (
        ({"train.seed": [1, 2]}, "the sweep's own"),
        ({"adapter.rank": [2, 2]}, "give each value once"),
        ({"adapter.rank": []}, "no value for adapter.rank"),
    ):
        with pytest.raises(ConfigError, match=words):
            sweep(record, axes, quiet=True)
    with pytest.raises(ConfigError, match="will not measure 'bleu'"):
        sweep(record, {"adapter.rank": [2]}, measure="bleu", quiet=True)
    done = sweep(config(rows, tmp_path / "rates", clip=0, warmup=0), {"train.learning_rate": [1e30, 1e-3]}, quiet=True)
    assert [r.settings for r in done.ranking] == [{"train.learning_rate": 1e-3}] and len(done.failed) == 1


def test_the_best_adapter_is_sought_where_its_form_is_final(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An evaluation before AdaLoRA's budget is reached cannot be the best one: finishing with it would undo the pruning."""
    rising = iter(range(1, 99))
    monkeypatch.setattr("deltaw.training.trainer.mean_loss", lambda *_: float(next(rising)))
    adapter = {"method": "adalora", "rank": 6, "target_rank": 2, "targets": "q_proj", "tinit": 2, "tfinal": 0.4}
    given = config(rows, tmp_path / "run", adapter, max_steps=10, best=True, early_stopping=1)
    run = deltaw.train(given, quiet=True)
    lambdas = [tensor for key, tensor in tensors(run).items() if "lora_E" in key]
    assert sum(int((tensor != 0).sum()) for tensor in lambdas) == 2 * 6
    losses = [event["loss"] for event in RunDirectory(run.path).events("eval")]
    assert run.steps == 8 and run.losses["held_out"] == losses[3]  # of step 6, the first with the final budget
