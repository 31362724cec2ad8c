"""Sources: columns, patterns, weights, tables, other people's dialects and lists of data sets."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from deltaw.config.schema import Source
from deltaw.core.errors import DataError
from deltaw.data.conversation import Call, Message
from deltaw.data.rows import read_rows
from deltaw.data.sources import named

QA = [{"question": f"q{n}", "answer": f"a{n}"} for n in range(400)]
MAP = {"prompt": "question", "completion": "answer"}


def jsonl(folder: Path, rows: list[Any], name: str = "rows.jsonl") -> str:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


def said(row: Any) -> list[tuple[str, str]]:
    return [(m.role, m.content) for m in row.messages]


def test_columns(tmp_path: Path) -> None:
    path = jsonl(tmp_path, QA)
    rows = read_rows(Source(path=path, columns=MAP))
    assert said(rows.rows[3]) == [("user", "q3"), ("assistant", "a3")] and str(rows.parts[0]).endswith(
        "400 rows of prompt-completion"
    )
    with pytest.raises(DataError, match=r"line 1 has no column 'questions'; did you mean 'question'"):
        read_rows(Source(path=path, columns={**MAP, "prompt": "questions"}))
    nested = jsonl(tmp_path, [{"instruction": "i", "instances": [{"input": "x", "output": "y"}]}], "nested.jsonl")
    row = read_rows(Source(path=nested, columns={"input": "instances.0.input", "output": "instances.0.output"})).rows[0]
    assert said(row) == [("user", "i\nx"), ("assistant", "y")]


def test_weights_are_fixed_by_what_rows_say(tmp_path: Path) -> None:
    path = jsonl(tmp_path, QA)
    half = read_rows(Source(path=path, columns=MAP, weight=0.5))
    assert 150 < len(half) < 250 and half.rows == read_rows(Source(path=path, columns=MAP, weight=0.5)).rows
    more = read_rows(Source(path=path, columns=MAP, weight=2.5))
    assert len(more) == 800 + len(half)
    both = read_rows([Source(path=path, columns=MAP), Source(path=path, columns=MAP, weight=2)])
    assert len(both) == 1200 and [part.weight for part in both.parts] == [1.0, 2.0]


def test_tables(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text('prompt,completion\na,"b, ""c""\nd"\n')
    assert said(read_rows(tmp_path / "t.csv").rows[0])[1] == ("assistant", 'b, "c"\nd')
    (tmp_path / "t.tsv").write_text("prompt\tcompletion\na\tb\n")
    assert len(read_rows(tmp_path / "t.tsv")) == 1
    for text, words in {
        "prompt,completion\na\n": "line 2 has 1 cells, the header has 2",
        "prompt,prompt\na,b\n": "names a column twice",
        'prompt,completion\na,"b\n': "is not CSV",
    }.items():
        (tmp_path / "t.csv").write_text(text)
        with pytest.raises(DataError, match=words):
            read_rows(tmp_path / "t.csv")


def test_parquet(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(QA[:5]).to_parquet(tmp_path / "rows.parquet")
    assert said(read_rows(Source(path=str(tmp_path / "rows.parquet"), columns=MAP)).rows[4])[0] == ("user", "q4")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match="broken"):
        read_rows(tmp_path / "broken.parquet")


def test_patterns(tmp_path: Path) -> None:
    (tmp_path / "scan.txt").write_text("IN: walk left OUT: L W\n\nIN: run OUT: R\n")
    rows = read_rows(Source(path=str(tmp_path / "scan.txt"), pattern="IN: (?P<prompt>.*) OUT: (?P<completion>.*)"))
    assert [said(row)[1][1] for row in rows.rows] == ["L W", "R"] and rows.rows[1].line == 3
    with pytest.raises(DataError, match=r"line 1 does not match data.pattern: 'IN: walk left OUT: L W'"):
        read_rows(Source(path=str(tmp_path / "scan.txt"), pattern="(?P<prompt>.*)=(?P<completion>.*)"))
    text = read_rows(tmp_path / "scan.txt")
    assert text.form == "text" and len(text) == 1 and text.rows[0].text.startswith("IN: walk")


def test_folders_of_one_kind(tmp_path: Path) -> None:
    jsonl(tmp_path, [{"text": "a"}], "a.jsonl")
    jsonl(tmp_path, [{"text": "b"}], "b.jsonl")
    assert [row.text for row in read_rows(tmp_path).rows] == ["a", "b"]
    (tmp_path / "c.csv").write_text("text\nc\n")
    with pytest.raises(DataError, match=r"several kinds \(\.csv, \.jsonl\)"):
        read_rows(tmp_path)


def test_dialects(tmp_path: Path) -> None:
    openai = {
        "messages": [
            {"role": "developer", "content": "S"},
            {"role": "user", "content": [{"type": "text", "text": "weather?"}]},
            {"role": "assistant", "content": None, "reasoning_content": "hm",
             "tool_calls": [{"type": "function", "function": {"name": "w", "arguments": '{"at": "Rome"}'}}]},
            {"role": "tool", "content": "sun"},
            {"role": "assistant", "content": "Sunny.", "weight": 0},
            {"role": "user", "content": "thanks"},
            {"role": "assistant", "content": "Welcome."},
        ],
        "tools": [{"name": "w", "parameters": {}}],
    }  # fmt: skip
    row = read_rows(jsonl(tmp_path, [openai])).rows[0]
    assert [m.role for m in row.messages] == ["system", "user", "assistant", "tool", "assistant", "user", "assistant"]
    assert row.messages[2] == Message("assistant", "", "hm", (Call("w", '{"at": "Rome"}'),))
    assert [m.learn for m in row.messages if m.role == "assistant"] == [True, False, True]
    assert json.loads(row.tools[0]) == {"type": "function", "function": {"name": "w", "parameters": {}}}
    mine = [{"talk": [{"who": "customer", "said": "hi"}, {"who": "agent", "said": "ho"}]}]
    roles = {"role": "who", "content": "said", "user": "customer", "assistant": "agent"}
    row = read_rows(Source(path=jsonl(tmp_path, mine), columns={"messages": "talk"}, roles=roles)).rows[0]
    assert said(row) == [("user", "hi"), ("assistant", "ho")]


@pytest.mark.parametrize(
    ("turns", "words"),
    [
        (["user", "tool", "assistant"], "message 2 is the tool's, expected the assistant's"),
        (["user", "call", "user", "assistant"], "message 3 is the user's, expected the tool's"),
        (["user", "call"], None),
        (["user", "call", "tool"], "the last message is the tool's and has no answer"),
    ],
)
def test_calls_need_their_results(tmp_path: Path, turns: list[str], words: str | None) -> None:
    call = {"from": "function_call", "value": '{"name": "f", "arguments": {}}'}
    row = {"conversations": [call if turn == "call" else {"from": turn, "value": "x"} for turn in turns]}
    if words is None:
        assert read_rows(jsonl(tmp_path, [row])).rows[0].messages[-1].calls
    else:
        with pytest.raises(DataError, match=words):
            read_rows(jsonl(tmp_path, [row]))


def test_preference_and_judged_rows(tmp_path: Path) -> None:
    asked, good, bad = (
        {"role": r, "content": c} for r, c in (("user", "p"), ("assistant", "good"), ("assistant", "bad"))
    )
    forms = [
        {"prompt": "p", "chosen": "good", "rejected": "bad"},
        {"prompt": [asked], "chosen": [good], "rejected": [bad]},
        {"chosen": [asked, good], "rejected": [asked, bad]},
        {"prompt": "p", "chosen": [asked, good], "rejected": [asked, bad]},
        {
            "conversations": [{"from": "human", "value": "p"}],
            "chosen": {"from": "gpt", "value": "good"},
            "rejected": bad,
        },
        {"instruction": "p", "chosen": "good", "rejected": "bad"},
    ]
    for form in forms:
        row = read_rows(jsonl(tmp_path, [form])).rows[0]
        assert said(row) == [("user", "p"), ("assistant", "good")] and row.rejected[-1].content == "bad"
    rows = read_rows(jsonl(tmp_path, [{"prompt": "p", "completion": "c", "label": False}]))
    assert rows.form == "judged" and rows.rows[0].good is False


def test_a_list_of_data_sets(tmp_path: Path) -> None:
    jsonl(tmp_path, [{"q": "a", "r": "b", "s": "sys"}], "own.jsonl")
    entry = {"file_name": "own.jsonl", "columns": {"prompt": "q", "response": "r", "system": "s"}}
    (tmp_path / "dataset_info.json").write_text(
        json.dumps(
            {
                "own": entry,
                "pictures": {"file_name": "x", "columns": {"videos": "i"}},
                "sized": {"file_name": "x", "num_samples": 3},
                "nothing": {},
            }
        )
    )
    info = str(tmp_path / "dataset_info.json")
    assert said(read_rows(f"{info}#own").rows[0]) == [("system", "sys"), ("user", "a"), ("assistant", "b")]
    for name, words in {
        "onw": "has no data set 'onw'; did you mean 'own'",
        "pictures": "'videos' cannot be read yet",
        "sized": "num_samples",
        "nothing": "names neither a file_name nor",
    }.items():
        with pytest.raises(DataError, match=words):
            named(f"{info}#{name}")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read as a list of data sets"):
        named(str(tmp_path / "broken.json") + "#own")


def test_the_page_of_data_names_every_key_of_a_source() -> None:
    page = (Path(__file__).parents[2] / "docs/data.md").read_text(encoding="utf-8")
    keys = page.split("| key | is |")[1].split("\n\n")[0]
    assert [field.name for field in dataclasses.fields(Source) if f"`{field.name}`" not in keys] == []
