"""data.tokens: words of the rows become tokens of their own, trained as rows, kept with the adapter and merged with it."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import deltaw
from deltaw.core.errors import ConfigError, DataError, FileError
from deltaw.data.kept import TEMPLATE, TOKENS, Tokens, add_tokens, use_kept
from deltaw.data.template import TEMPLATES
from deltaw.models.base import load_tokenizer
from deltaw.ship.merge import merge_to_folder
from deltaw.training.prepare import prepare
from deltaw.training.rows import attach_rows, readable
from deltaw.training.run import resume

ACTS = ("<ACT_0>", "<ACT_1>", "<ACT_2>")
WORDS = ("red", "blue", "green")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file, draw = tmp_path_factory.mktemp("rows") / "rows.jsonl", random.Random(0)
    pairs = [(draw.randrange(3), draw.randrange(3)) for _ in range(120)]
    text = [{"prompt": f"go {WORDS[a]} {WORDS[b]}", "completion": f"{ACTS[a]}{ACTS[b]}"} for a, b in pairs]
    file.write_text("".join(json.dumps(row) + "\n" for row in text))
    return file


def config(rows: Path, output: Path, tokens: tuple[str, ...] = ACTS, **data: Any) -> dict[str, Any]:
    train = {"max_steps": 80, "batch_size": 16, "learning_rate": 5e-3, "dtype": "fp32"}
    return {
        "model": "tiny", "data": {"train": str(rows), "eval": None, "tokens": tokens, **data},
        "adapter": {"rank": 4}, "train": train, "output": str(output),
    }  # fmt: skip


@pytest.fixture(scope="module")
def run(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return deltaw.train(config(rows, tmp_path_factory.mktemp("runs") / "run"), quiet=True)


def answers(model: Any, tokenizer: Any) -> list[str]:
    return deltaw.generate(model, tokenizer, ["go red blue", "go green red"], max_new_tokens=4)


def test_rows_are_learnt_kept_and_merged(run: Any, tmp_path: Path) -> None:
    assert run.losses["train"] < 0.1
    assert json.loads((run.adapter / TOKENS).read_text()) == {"<ACT_0>": 4096, "<ACT_1>": 4097, "<ACT_2>": 4098}
    base = deltaw.load_base("tiny", dtype="fp32")
    assert deltaw.load(base.model, run.adapter).base == "match"
    use_kept(base.tokenizer, run.adapter)
    wanted = ["<ACT_0><ACT_1>", "<ACT_2><ACT_0>"]  # as text: they are words of the rows, not control tokens
    assert answers(base.model, base.tokenizer) == wanted
    assert base.model.get_input_embeddings().weight.shape[0] == 4096
    shipped = merge_to_folder("tiny", run.adapter, tmp_path / "merged", dtype="fp32")
    assert shipped.max_logit_difference < 1e-3
    merged = deltaw.load_base(str(tmp_path / "merged"), dtype="fp32")
    assert merged.model.get_input_embeddings().weight.shape[0] == 4099
    assert answers(merged.model, merged.tokenizer) == wanted


def test_new_rows_begin_as_the_mean_of_what_spelled_them(rows: Path, tmp_path: Path) -> None:
    given = config(rows, tmp_path / "run")
    given["train"] |= {"max_steps": 1, "learning_rate": 1e-12}
    run = deltaw.train(given, quiet=True)
    base = deltaw.load_base("tiny", dtype="fp32")
    pieces = base.tokenizer("<ACT_1>", add_special_tokens=False)["input_ids"]
    assert len(pieces) > 3
    deltaw.load(base.model, run.adapter)
    with torch.no_grad():
        table = base.model.get_input_embeddings()
        torch.testing.assert_close(table(torch.tensor([4097]))[0], table.weight[pieces].mean(0), atol=1e-6, rtol=0)


def test_a_start_from_data_reads_new_tokens(rows: Path, tmp_path: Path) -> None:
    given = config(rows, tmp_path / "run")
    given["adapter"] |= {"init": "eva"}
    given["train"] |= {"max_steps": 1}
    run = deltaw.train(given, quiet=True)
    kinds = [target.method.name for target in run.plan.targets]
    assert kinds.count("token_rows") == 1 and kinds.count("lora") == 42
    assert run.plan.trainable == sum(t.numel() for t in load_file(run.adapter / "adapter_model.safetensors").values())


def test_new_tokens_as_embeddings_are_what_their_first_rows_give() -> None:
    base = deltaw.load_base("tiny", dtype="fp32")
    tokens = Tokens({"<|end|>": 2, "<a>": 4096, "<b>": 4097}, {4096: [5, 6, 7], 4097: [8, 9]})
    batch = {"input_ids": torch.tensor([[2, 4096, 5, 4097], [4097, 7, 7, 7]])}
    with torch.no_grad():
        early = base.model(**readable(base.model, batch, tokens)).logits
        attach_rows(base.model, tokens)
        torch.testing.assert_close(early, base.model(**batch).logits[..., :4096], atol=1e-5, rtol=1e-5)


def test_a_run_goes_on_with_its_parents_tokens(run: Any, rows: Path, tmp_path: Path) -> None:
    given = config(rows, tmp_path / "more", ())
    given["adapter"] = {"from": str(run.adapter)}
    given["train"] |= {"max_steps": 2}
    more = deltaw.train(given, quiet=True)
    assert (more.adapter / TOKENS).read_text() == (run.adapter / TOKENS).read_text() and more.losses["train"] < 0.1
    given["data"]["tokens"] = ["<new>"]
    with pytest.raises(ConfigError, match=r"adapter\.from brings its own tokens: leave data\.tokens out"):
        deltaw.train({**given, "output": str(tmp_path / "other")}, quiet=True)


def test_resume_needs_neither_the_parent_nor_the_templates_file(rows: Path, tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text(TEMPLATES["plain"].replace("### ", "## "))
    given = config(rows, tmp_path / "parent", template=str(tmp_path / "own.jinja"))
    given["train"] |= {"max_steps": 2, "save_every": 1}
    parent = deltaw.train(given, quiet=True)
    child = {**given, "data": {**given["data"], "tokens": [], "template": None}}
    child |= {"adapter": {"from": str(parent.adapter)}, "output": str(tmp_path / "child")}
    runs = [parent, deltaw.train(child, quiet=True)]
    ends = [load_file(run.adapter / "adapter_model.safetensors") for run in runs]
    cut = [tmp_path / "cut-parent", tmp_path / "cut-child"]
    for run, folder in zip(runs, cut, strict=True):
        run.path.rename(folder)
        shutil.rmtree(folder / "adapter")
        shutil.rmtree(folder / "checkpoints" / "step-2")
    (tmp_path / "own.jinja").unlink()
    for folder, end in zip(cut, ends, strict=True):
        run = resume(folder, quiet=True)
        again = load_file(run.adapter / "adapter_model.safetensors")
        assert all(torch.equal(again[key], end[key]) for key in end)
        assert list(json.loads((run.adapter / TOKENS).read_text())) == list(ACTS)
        assert (run.adapter / TEMPLATE).read_text().startswith(TEMPLATES["plain"][:20])


def test_control_tokens_of_a_template(rows: Path, tmp_path: Path) -> None:
    """chatml on a base without its tokens: refused without them, trained and left out of answers with them."""
    with pytest.raises(DataError, match=r"stop|end"):
        prepare(deltaw.config.parse.parse(config(rows, tmp_path / "run", (), template="chatml")))
    control = ("<|im_start|>", "<|im_end|>")
    given = config(rows, tmp_path / "run", (*control, *ACTS), template="chatml")
    run = deltaw.train(given, quiet=True)
    base = deltaw.load_base("tiny", dtype="fp32")
    deltaw.load(base.model, run.adapter)
    use_kept(base.tokenizer, run.adapter)
    assert (run.adapter / TEMPLATE).is_file()
    assert answers(base.model, base.tokenizer) == ["<ACT_0><ACT_1>", "<ACT_2><ACT_0>"]
    prepared = prepare(deltaw.config.parse.parse(given))
    assert prepared.previews(1)[0].count("<|im_end|>⟧") == 1


def test_a_token_that_is_there_keeps_its_id() -> None:
    tokenizer, _ = load_tokenizer("tiny")
    found = add_tokens(tokenizer, ["<|end|>", "<new>"])
    assert found.ids == {"<|end|>": tokenizer.convert_tokens_to_ids("<|end|>"), "<new>": 4096}
    assert list(found.pieces) == [4096]


def test_two_adapters_cannot_bring_different_tokens(run: Any, tmp_path: Path) -> None:
    tokenizer, _ = load_tokenizer("tiny")
    (tmp_path / TOKENS).write_text('{"<other>": 4096}')
    use_kept(tokenizer, tmp_path)
    use_kept(tokenizer, tmp_path)  # the same ones again are fine
    with pytest.raises(FileError, match="the token '<ACT_0>' was 4096 in training and is 4097 here"):
        use_kept(tokenizer, run.adapter)
    (tmp_path / TOKENS).write_text("[1]")
    with pytest.raises(FileError, match="is a list, expected an object"):
        use_kept(tokenizer, tmp_path)
    (tmp_path / TOKENS).write_text('{"<other>": "x"}')
    with pytest.raises(FileError, match="is not a table"):
        use_kept(tokenizer, tmp_path)


def test_a_parents_tokens_must_get_their_ids(rows: Path, tmp_path: Path) -> None:
    (tmp_path / TOKENS).write_text('{"<other>": 5000}')
    given = {**config(rows, tmp_path / "run", ()), "adapter": {"from": str(tmp_path)}}
    with pytest.raises(FileError, match="'<other>' was 5000 in training and is 4096 here"):
        prepare(deltaw.config.parse.parse(given))
    given["adapter"] = {"from": str(tmp_path / "nowhere")}
    with pytest.raises(FileError, match=r"no adapter folder .*nowhere"):  # not rows without the parent's template
        prepare(deltaw.config.parse.parse(given))


@pytest.mark.parametrize(
    ("tokens", "words"), [((" ",), "is no token"), (("<a>", "<a>"), "names '<a>' twice")], ids=["blank", "twice"]
)
def test_impossible_tokens(rows: Path, tmp_path: Path, tokens: tuple[str, ...], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        deltaw.train(config(rows, tmp_path / "run", tokens), quiet=True)
