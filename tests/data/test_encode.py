"""Exact masks: what is supervised is the answer and its stop token, nothing else; what cannot be masked is refused."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from deltaw.core.errors import DataError
from deltaw.data.collate import Collator
from deltaw.data.conversation import Example, Message
from deltaw.data.dataset import encode_rows, split
from deltaw.data.encode import IGNORE, Dropped, Policy, encode, prompt_ids, stop_token_trained
from deltaw.data.preview import preview
from deltaw.data.rows import Rows, read_rows
from deltaw.models.base import TINY

USER, ANSWER = Message("user", "Where is the river?"), Message("assistant", "Beyond the hill.")
TALK = Example(
    (Message("system", "Be kind."), USER, ANSWER, Message("user", "And then?"), Message("assistant", "The sea.")), 1
)


@pytest.fixture
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TINY)


def row(number: int) -> Example:
    return Example((Message("user", f"number {number}?"), Message("assistant", f"{number}.")), number, f"row {number}")


def test_supervised_are_the_answers_and_their_stop_tokens(tokenizer: Any) -> None:
    [encoded] = encode(TALK, tokenizer, Policy(512))
    assert preview(encoded, tokenizer) == (
        "<|system|>\nBe kind.<|end|>\n<|user|>\nWhere is the river?<|end|>\n<|assistant|>\n⟦Beyond the hill.<|end|>⟧\n"
        "<|user|>\nAnd then?<|end|>\n<|assistant|>\n⟦The sea.<|end|>⟧\n"
    )
    assert all(label in (IGNORE, token) for token, label in zip(encoded.ids, encoded.labels, strict=True))


def test_training_begins_the_answer_where_generation_does(tokenizer: Any) -> None:
    [encoded] = encode(Example((USER, ANSWER), 1), tokenizer, Policy(512))
    first = next(i for i, label in enumerate(encoded.labels) if label != IGNORE)
    assert encoded.ids[:first] == prompt_ids((USER,), tokenizer)


def test_train_on_prompt_supervises_everything(tokenizer: Any) -> None:
    [encoded] = encode(TALK, tokenizer, Policy(512, train_on_prompt=True))
    assert encoded.labels == encoded.ids and encoded.supervised == len(encoded.ids) - 1


def test_a_long_row_is_dropped_whole(tokenizer: Any) -> None:
    found = encode(TALK, tokenizer, Policy(8))
    assert isinstance(found, Dropped) and found.reason == "longer than 8 tokens" and found.length > 8


def test_without_a_template_a_pair_is_text_and_a_stop_token(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    pair = Example((Message("user", "2 + 2 ="), Message("assistant", " 4")), 1, "row 1", completion=True)
    [encoded] = encode(pair, tokenizer, Policy(512))
    assert preview(encoded, tokenizer) == "2 + 2 =⟦ 4<|end|>⟧"
    with pytest.raises(DataError, match="the base has no chat template"):
        encode(TALK, tokenizer, Policy(512))


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for m in messages %}{{ m['content'] }}\n{% endfor %}", "never learn to stop"),
        ("{% for m in messages %}{{ loop.index }}/{{ messages|length }}{{ m['content'] }}<|end|>{% endfor %}", "not prefix-preserving"),
        ("{% for m in messages %}{{ raise_exception('no system turn') }}{% endfor %}", "no system turn"),
    ],
)  # fmt: skip
def test_templates_that_cannot_be_trained(tokenizer: Any, template: str, words: str) -> None:
    tokenizer.chat_template = template
    with pytest.raises(DataError, match=words):
        encode(Example((USER, ANSWER, USER, ANSWER), 1, "row 1"), tokenizer, Policy(512))


def test_the_stop_token_is_seen_to_be_trained(tokenizer: Any) -> None:
    assert stop_token_trained(tokenizer) == tokenizer.eos_token_id
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    with pytest.raises(DataError, match="never learn to stop"):
        encode_rows(Rows("messages", [row(1)], "rows"), tokenizer, Policy(64))


def test_the_report_accounts_for_every_row(tokenizer: Any) -> None:
    rows = [row(n) for n in range(20)] + [Example((USER, Message("assistant", "word " * 300)), 21, "row 21")]
    encoded, report = encode_rows(Rows("messages", rows, "rows"), tokenizer, Policy(64))
    assert (report.rows, report.kept, report.dropped) == (21, 20, {"longer than 64 tokens": 1})
    assert report.total_tokens == sum(len(e.ids) for e in encoded) and report.longest > 300
    assert report.supervised_tokens == sum(e.supervised for e in encoded)
    assert "dropped 1 (longer than 64 tokens: 1)" in str(report)
    with pytest.raises(DataError, match="no row is left to learn from, of 21"):
        encode_rows(Rows("messages", rows, "rows"), tokenizer, Policy(4))


def test_the_split_stays_when_rows_are_added() -> None:
    train, held_out = split(Rows("messages", [row(n) for n in range(400)], "rows"), 0.1)
    assert 20 < len(held_out) < 60 and len(train) + len(held_out) == 400
    more_train, more_held = split(Rows("messages", [row(n) for n in reversed(range(600))], "rows"), 0.1)
    assert {r.line for r in held_out.rows} <= {r.line for r in more_held.rows}
    assert {r.line for r in train.rows} <= {r.line for r in more_train.rows}
    twice = [Example(row(n).messages, 1000 + n) for n in range(400)]
    both_train, both_held = split(Rows("messages", [*map(row, range(400)), *twice], "rows"), 0.1)
    assert not {r.messages for r in both_train.rows} & {r.messages for r in both_held.rows}
    few_train, few_held = split(Rows("messages", [row(1), row(2)], "rows"), 0.01)
    assert len(few_train) == len(few_held) == 1


def test_a_batch_is_padded_and_padding_gives_no_loss(tokenizer: Any) -> None:
    [short], [long] = encode(row(1), tokenizer, Policy(512)), encode(TALK, tokenizer, Policy(512))
    batch = Collator(tokenizer)([short, long])
    assert batch["input_ids"].shape == (2, len(long.ids))
    assert batch["attention_mask"].sum(1).tolist() == [len(short.ids), len(long.ids)]
    assert (batch["labels"][0, len(short.ids) :] == IGNORE).all()


@pytest.mark.shared
def test_real_alpaca_rows(shared: Path, tokenizer: Any) -> None:
    rows = read_rows(shared / "data/llamafactory_demo/alpaca_en_demo.json")
    encoded, report = encode_rows(rows, tokenizer, Policy(512))
    assert (
        report.kept == len(encoded) == len(rows) - sum(report.dropped.values()) > 800
        and 0 < report.supervised_tokens < report.total_tokens
    )
