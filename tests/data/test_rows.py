"""Rows as people write them: each form is read, each fault is named with its place and its fix, all of them at once."""

import json
from pathlib import Path
from typing import Any

import pytest

from deltaw.core.errors import DataError
from deltaw.data.conversation import Message
from deltaw.data.rows import read_rows

PAIR = {"prompt": "2 + 2?", "completion": "4"}
TALK = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "hi"},
        {"role": "user", "content": "bye"},
        {"role": "assistant", "content": "goodbye"},
    ]
}


def written(folder: Path, *rows: Any, name: str = "rows.jsonl") -> Path:
    file = folder / name
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return file


def fault(folder: Path, *rows: Any) -> str:
    with pytest.raises(DataError) as caught:
        read_rows(written(folder, *rows))
    return str(caught.value)


def test_prompt_completion(tmp_path: Path) -> None:
    rows = read_rows(written(tmp_path, PAIR, "", PAIR))  # an empty line is no row
    assert rows.form == "prompt-completion" and [row.line for row in rows.rows] == [1, 3]
    assert rows.rows[0].messages == (Message("user", "2 + 2?"), Message("assistant", "4")) and rows.rows[0].completion


def test_messages(tmp_path: Path) -> None:
    row = read_rows(written(tmp_path, TALK)).rows[0]
    assert [m.role for m in row.messages] == ["system", "user", "assistant", "user", "assistant"] and not row.completion


def test_alpaca_with_everything(tmp_path: Path) -> None:
    given = {"instruction": "Add", "input": "1, 2", "output": "3", "system": "S", "history": [["Hi", "Ho"]]}
    row = read_rows(written(tmp_path, given)).rows[0]
    assert [(m.role, m.content) for m in row.messages] == [
        ("system", "S"), ("user", "Hi"), ("assistant", "Ho"), ("user", "Add\n1, 2"), ("assistant", "3"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "text", [json.dumps([PAIR, PAIR]), json.dumps({"data": [PAIR, PAIR]}), f"{json.dumps(PAIR)}\n" * 2]
)
def test_json_files(tmp_path: Path, text: str) -> None:
    (tmp_path / "rows.json").write_text(text, encoding="utf-8-sig")
    assert len(read_rows(tmp_path / "rows.json")) == 2
    assert len(read_rows(tmp_path)) == 2  # the folder of it
    assert len(read_rows([tmp_path / "rows.json", written(tmp_path, PAIR)])) == 3


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ('{"prompt": "a"', "line 2 is not JSON"),
        ("[1, 2]", "line 2 is a list, not an object"),
        ({"prompt": "a", "completions": "b"}, "the field `completion` is missing"),
        ({"question": "a", "answer": "b"}, "no known form: it has question, answer"),
        ({**PAIR, "videos": ["a.mp4"]}, "`videos` cannot be read yet"),
        ({"prompt": "a", "chosen": "b"}, "`rejected` of a preference pair is missing"),
        ({**PAIR, "instruction": "a", "output": "b"}, "at once"),
        ({"prompt": 1, "completion": "b"}, "`prompt` is 1: must be text"),
        ({"prompt": "a", "completion": "  "}, "is empty: remove the row"),
        ({"prompt": "a", "completion": "\\ud83d"}, None),  # an escaped backslash is text like any other
        ('{"prompt": "a", "completion": "\\ud83d"}', "half of a character"),
        (TALK, "but rows.jsonl line 1 is prompt-completion"),
    ],
)  # fmt: skip
def test_a_bad_row_is_named(tmp_path: Path, row: Any, words: str | None) -> None:
    if words is None:
        assert len(read_rows(written(tmp_path, PAIR, row))) == 2
    else:
        assert words in fault(tmp_path, PAIR, row)


@pytest.mark.parametrize(
    ("turns", "words"),
    [
        ([], "must be a list of turns"),
        ([{"role": "user", "content": "a"}], "there is no answer to learn"),
        ([{"role": "assistant", "content": "a"}], "expected the user's: turns must alternate"),
        ([{"role": "user", "content": "a"}, {"role": "assistent", "content": "b"}], "did you mean 'assistant'?"),
        ([{"role": "user", "contents": "a"}, {"role": "assistant", "content": "b"}], "has no `content`"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": ["b"]}], "must be text"),
        ([*TALK["messages"], {"role": "user", "content": "more"}], "the last message is the user's"),
    ],
)  # fmt: skip
def test_a_bad_conversation_is_named(tmp_path: Path, turns: list[Any], words: str) -> None:
    assert words in fault(tmp_path, {"messages": turns})


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"conversations": []}, "`conversations` is []: must be a list of turns"),
        ({"text": " "}, "`text` is ' ': must be text, and not empty"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "`chosen` and `rejected` are the same"),
        ({"messages": TALK["messages"][:-1], "chosen": "b", "rejected": ""}, "with `rejected`: message 5"),
        ({**TALK, "tools": "[{"}, "`tools` is not JSON"),
        ({**TALK, "tools": [{"type": "function"}]}, "which has no name"),
    ],
)  # fmt: skip
def test_a_bad_row_of_other_forms_is_named(tmp_path: Path, row: Any, words: str) -> None:
    assert words in fault(tmp_path, row)


def test_all_faults_come_at_once(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read_rows(written(tmp_path, PAIR, "{", {"prompt": "a"}, PAIR, {"prompt": 1, "completion": 2}))
    assert len(caught.value.faults) == 4
    assert all(f"line {number}" in str(caught.value) for number in (2, 3, 5))


def test_files_that_are_not_there(tmp_path: Path) -> None:
    written(tmp_path, PAIR, name="train.jsonl")
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank.jsonl").write_text("\n")
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "a", "completion": "b"}\n{"prompt": "caf\xe9"}')
    for given, words in {
        "trian.jsonl": "did you mean 'train.jsonl'",
        "nowhere/x.jsonl": "there is no folder",
        "empty": "has no file of rows in it (it holds nothing)",
        "blank.jsonl": "is empty: no row in it",
        "latin.jsonl": "line 2 is not UTF-8",
    }.items():
        with pytest.raises(DataError) as caught:
            read_rows(tmp_path / given)
        assert words in str(caught.value)
    (tmp_path / "rows.docx").write_text("x")
    with pytest.raises(DataError, match=r"is none of \.jsonl, \.json, \.csv"):
        read_rows(tmp_path / "rows.docx")
