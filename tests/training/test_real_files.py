"""Files of many makers go through `prepare` and are masked right: what each row looks like is written here by hand."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import deltaw
from deltaw.config.parse import parse
from deltaw.training.prepare import prepare

U, A, END = "<|user|>\n", "<|assistant|>\n", "<|end|>"


def pair(asked: str, answer: str) -> str:
    return f"{U}{asked}{END}\n{A}⟦{answer}{END}⟧"


def alpaca(row: dict[str, Any]) -> str:
    return pair(row["instruction"] + (f"\n{row['input']}" if row["input"] else ""), row["output"])


def judged(row: dict[str, Any]) -> str:
    turns = [m["content"] for m in row["messages"]]
    return "\n".join(pair(asked, answer) for asked, answer in zip(turns[::2], turns[1::2], strict=True))


def preferred(row: dict[str, Any]) -> str:
    turns = [*row["conversations"], row["chosen"]]
    system = f"<|system|>\n{turns.pop(0)['value']}{END}\n" if turns[0]["from"] == "system" else ""
    return system + "\n".join(pair(a["value"], b["value"]) for a, b in zip(turns[::2], turns[1::2], strict=True))


def tools(row: dict[str, Any]) -> str:
    known = json.loads(row["tools"])
    lines = [
        json.dumps(tool if "function" in tool else {"type": "function", "function": tool}, ensure_ascii=False)
        for tool in known
    ]
    text = "<|system|>\n# Tools\n" + "\n".join(lines) + END + "\n" if lines else ""
    for turn in row["conversations"]:
        said = turn["value"]
        if turn["from"] == "function_call":
            said = f"<tool_call>\n{json.dumps(json.loads(said), ensure_ascii=False)}\n</tool_call>"
        text += {
            "human": f"{U}{said}{END}\n",
            "gpt": f"{A}⟦{said}{END}⟧\n",
            "function_call": f"{A}⟦{said}{END}⟧\n",
            "observation": f"{U}<tool_response>\n{said}\n</tool_response>{END}\n",
        }[turn["from"]]
    return text.rstrip("\n")


def reasoned(row: dict[str, Any]) -> str:
    lines = [json.dumps(tool, ensure_ascii=False) for tool in json.loads(row["tools"])]
    system, *turns = row["messages"]
    text = f"<|system|>\n{system['content'][0]['value']}\n\n# Tools\n" + "\n".join(lines) + END + "\n"
    for turn in turns:
        parts = turn["content"]
        if turn["role"] != "assistant":
            said = (
                parts[0]["value"]
                if turn["role"] == "user"
                else f"<tool_response>\n{parts[0]['value']}\n</tool_response>"
            )
            text += f"{U}{said}{END}\n"
            continue
        thought, *rest = parts
        said = "\n".join(
            f"<tool_call>\n{json.dumps(json.loads(p['value']), ensure_ascii=False)}\n</tool_call>"
            if p["type"] == "tool_call"
            else p["value"]
            for p in rest
        )
        text += f"{A}⟦<think>\n{thought['value']}\n</think>\n\n{said}{END}⟧\n"
    return text.rstrip("\n")


def lines(file: Path) -> list[str]:
    return [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]


def objects(file: Path) -> list[Any]:
    return (
        json.loads(file.read_text(encoding="utf-8"))
        if file.suffix == ".json"
        else [json.loads(line) for line in lines(file)]
    )


def table(file: Path) -> list[Any]:
    with file.open(encoding="utf-8", newline="") as opened:
        return list(csv.DictReader(opened))


FACTORY = "llamafactory_demo"
E2E = {"pattern": r"(?P<prompt>.*)\|\|(?P<completion>.*)"}
SCAN = {"pattern": "IN: (?P<prompt>.*) OUT: (?P<completion>.*)"}
SQL = {"pattern": r"(?P<prompt>.*)\nA: (?P<completion>.*)"}
GSM = {"columns": {"prompt": "question", "completion": "answer"}}
SEED = {"columns": {"input": "instances.0.input", "output": "instances.0.output"}}
CASES: list[tuple[str, dict[str, Any], Callable[[Path], list[Any]], Callable[[Any], str]]] = [
    (f"{FACTORY}/identity.json", {}, objects, alpaca),
    (f"{FACTORY}/alpaca_en_demo.json", {}, objects, alpaca),
    (f"{FACTORY}/dataset_info.json#alpaca_zh_demo", {}, objects, alpaca),
    (f"{FACTORY}/glaive_toolcall_en_demo.json", {}, objects, tools),
    (f"{FACTORY}/dataset_info.json#glaive_toolcall_en_demo", {}, objects, tools),
    (f"{FACTORY}/reason_tool_use_demo_50.jsonl", {}, objects, reasoned),
    (f"{FACTORY}/dataset_info.json#dpo_en_demo", {"pairs": "chosen"}, objects, preferred),
    (f"{FACTORY}/dpo_en_demo.json", {"pairs": "chosen"}, objects, preferred),
    (f"{FACTORY}/kto_en_demo.json", {"pairs": "chosen"}, objects, judged),
    ("e2e/valid.txt", E2E, lines, lambda line: pair(*(part.strip() for part in line.split("||")))),
    ("e2e/devset.csv", {"columns": {"prompt": "mr", "completion": "ref"}}, table, lambda row: pair(row["mr"], row["ref"])),
    ("gsm8k/train.jsonl", GSM, objects, lambda row: pair(row["question"], row["answer"])),
    ("mlx_wikisql/data/train.jsonl", SQL, objects, lambda row: pair(*row["text"].split("\nA: "))),
    ("scan/simple_split/tasks_test_simple.txt", SCAN, lines, lambda line: pair(*line.removeprefix("IN: ").split(" OUT: "))),
    ("self_instruct_seed/data/seed_tasks.jsonl", SEED, objects, lambda row: alpaca({**row, **row["instances"][0]})),
    ("self_instruct_seed/human_eval/user_oriented_instructions.jsonl", SEED, objects, lambda row: alpaca({**row, **row["instances"][0]})),
]  # fmt: skip


@pytest.mark.shared
@pytest.mark.parametrize(("name", "data", "read", "expected"), CASES, ids=[case[0] for case in CASES])
def test_masks_of_real_rows(
    shared: Path,
    tmp_path: Path,
    name: str,
    data: dict[str, Any],
    read: Callable[[Path], list[Any]],
    expected: Callable[[Any], str],
) -> None:
    given = {"train": str(shared / "data" / name), "eval": None, **data}
    prepared = prepare(parse({"model": "tiny", "data": given}))
    report = prepared.report
    file = shared / "data" / name.replace("dataset_info.json#", "")
    rows = read(file if file.is_file() else file.with_suffix(".json"))
    assert report.rows == len(rows) == report.kept + sum(report.dropped.values())
    texts = {expected(row) for row in rows}
    shown = prepared.previews(20, most=10**6)
    assert shown and all(text in texts for text in shown), shown[0]
    # a few steps on the shortest rows, cut where even those are too long
    run = deltaw.train(
        {
            "model": "tiny", "data": {**given, "eval": 0.002, "max_length": 128, "overflow": "cut"},
            "adapter": {"rank": 2}, "train": {"max_steps": 2, "batch_size": 2}, "output": str(tmp_path / "run"),
        },
        quiet=True,
    )  # fmt: skip
    assert run.steps == 2 and run.losses["held_out"] > 0
