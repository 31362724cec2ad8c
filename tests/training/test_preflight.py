"""What `plan` and a run find in the rows before any weight is loaded: each fatal fault stops both, with the fix."""

import json
import os
import pty
import re
import shutil
import string
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from pictured import base as pictured_base
from pictured import rows as pictured_rows
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import deltaw
from deltaw.cli import main as cli
from deltaw.config.parse import parse
from deltaw.core.errors import DataError, UseError
from deltaw.data.template import TEMPLATES
from deltaw.models.base import TINY
from deltaw.runs.directory import RunDirectory
from deltaw.training.prepare import prepare

PAIR = {"prompt": "Where is the river?", "completion": "Beyond the hill."}
TALK = {"messages": [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b")) * 2]}
CHINESE = {"prompt": "河在哪里？", "completion": "在山的那一边。"}
KNOWN = string.ascii_letters + " .?|<>\n"


def written(folder: Path, rows: list[dict[str, Any]], name: str = "rows.jsonl") -> Path:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder / name


def base(folder: Path, kind: str) -> str:
    """A base with a tokenizer that does not have every character; only its configuration is there, no weight."""
    vocabulary = {character: number for number, character in enumerate(KNOWN)}
    letters = {**vocabulary, "<unk>": len(vocabulary)}
    words = ("Where", "is", "the", "river", "?", "Beyond", "hill", ".", "<unk>")
    tokenizer = {
        "letters": lambda: Tokenizer(models.BPE(vocab=letters, merges=[], unk_token="<unk>")),
        "silent": lambda: Tokenizer(models.BPE(vocab=vocabulary, merges=[])),
        "lower": lambda: Tokenizer(models.BPE(vocab=letters, merges=[], unk_token="<unk>")),
        "words": lambda: Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>")),
    }[kind]()
    if kind == "words":
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    else:
        tokenizer.decoder = decoders.Fuse()
    if kind == "lower":
        tokenizer.normalizer = normalizers.Lowercase()
    unknown = {} if kind == "silent" else {"unk_token": "<unk>"}
    turns = ["<|user|>", "<|assistant|>", "<|system|>"]
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", additional_special_tokens=turns, **unknown
    )
    made.chat_template = TEMPLATES["tiny"]
    made.save_pretrained(folder / kind)
    shutil.copy(TINY / "config.json", folder / kind)
    return str(folder / kind)


def config(folder: Path, rows: list[dict[str, Any]], model: str = "tiny", **data: Any) -> dict[str, Any]:
    given = {"train": str(written(folder, rows)), "eval": None, **data}
    return {"model": model, "data": given, "output": str(folder / "run")}


def template(folder: Path, text: str) -> str:
    (folder / "own.jinja").write_text(text)
    return str(folder / "own.jinja")


Given = Callable[[Path], dict[str, Any]]
LONG = {"prompt": "word " * 600, "completion": "yes"}
FATAL: dict[str, tuple[Given, str]] = {
    "all rows are too long": (
        lambda f: config(f, [LONG] * 3),
        r"no row is left to learn from, of 3 \(longer than 512 tokens: 3\).*: raise data\.max_length, set data\.overflow to cut",
    ),
    "a cut that leaves no token": (
        lambda f: config(f, [LONG], max_length=2, overflow="cut"),
        r"no row is left to learn from, of 1 \(no token to learn: 1\).*: raise data\.max_length, or give the rows longer answers",
    ),
    "control tokens in all texts": (
        lambda f: config(f, [{"prompt": "a", "completion": "b <|end|>"}]),
        r"\(a control token in the text: 1\).*: take the template's own tokens out of the texts",
    ),
    "all answers unwanted": (
        lambda f: config(f, [{**PAIR, "label": False}], pairs="chosen"),
        r"\(judged unwanted: 1\): add rows whose label is true",
    ),
    "a template that never stops": (
        lambda f: config(f, [PAIR], template=template(f, "{% for m in messages %}{{ m.content }}\n{% endfor %}")),
        r"the model would never learn to stop: add it after the assistant's content in the template",
    ),
    "a template that writes turns differently later": (
        lambda f: config(
            f, [TALK],
            template=template(f, "{% for m in messages %}{{ messages|length }}{{ m.content }}<|end|>{% endfor %}"),
        ),
        r"not prefix-preserving.*: use a template made for training",
    ),
    "a template that leaves content out": (
        lambda f: config(
            f, [PAIR],
            template=template(f, "{% for m in messages if m.role != 'user' %}{{ m.content }}<|end|>{% endfor %}"),
        ),
        r"it does not write the content of message 1, the user's: set data\.template to one that does",
    ),
    "raw texts to answer": (
        lambda f: config(f, [{"text": "a text"}]),
        r"raw `text` has no answer to supervise: set train\.objective to text",
    ),
    "no held-out row": (
        lambda f: config(f, [PAIR], eval=str(written(f, [], "none.jsonl"))),
        r"none\.jsonl is empty: no row in it",
    ),
    "held-out rows that are all too long": (
        lambda f: config(f, [PAIR], eval=str(written(f, [LONG], "long.jsonl"))),
        r"long\.jsonl: no row is left to evaluate on, of 1 \(longer than 512 tokens: 1\)",
    ),
    "held-out rows that are all too long, streamed": (
        lambda f: config(f, [PAIR], eval=str(written(f, [LONG], "long.jsonl")), streaming=True),
        r"long\.jsonl: no row is left to evaluate on, of 1 \(longer than 512 tokens: 1\)",
    ),
    "a share that holds nothing out": (
        lambda f: config(f, [PAIR], eval=0.0001, streaming=True),
        r"no row is left to evaluate on: give more rows, or a file of their own in data\.eval",
    ),
    "answers of unknown characters": (
        lambda f: config(f, [CHINESE, PAIR, CHINESE, CHINESE], base(f, "letters")),
        r"60% of the characters to learn are lost.*Chinese \(all 9: .*; in 3 of 4 rows: choose a base whose tokenizer has them",
    ),
    "answers whose characters vanish": (
        lambda f: config(f, [CHINESE], base(f, "silent")),
        r"100% of the characters to learn and 100% of the characters of the prompts are lost",
    ),
    "prompts of unknown characters": (
        lambda f: config(f, [{**PAIR, "prompt": CHINESE["prompt"]}], base(f, "letters"), streaming=True),
        r"100% of the characters of the prompts are lost: the tokenizer has no token for 5 characters",
    ),
    "answers of unknown words": (
        lambda f: config(f, [{**PAIR, "completion": "Nobody knows ."}], base(f, "words")),
        r"92% of the characters to learn are lost",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FATAL)
def test_a_fatal_fault_stops_a_run_and_a_plan_before_the_base_is_loaded(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given, words = FATAL[case]

    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("the base is loaded")

    monkeypatch.setattr("deltaw.training.run.load_base", load)
    record = given(tmp_path)
    with pytest.raises(DataError) as caught:
        deltaw.train(record, quiet=True)
    assert re.search(words, str(caught.value), re.S), caught.value
    assert not (tmp_path / "run").exists()
    (tmp_path / "config.yaml").write_text(json.dumps(record))  # JSON is YAML
    code, out, err = called(monkeypatch, capsys, "plan", tmp_path / "config.yaml", "--html", tmp_path / "page.html")
    assert code == 2 and out == "" and re.search(words, err, re.S), err
    assert not (tmp_path / "page.html").exists()


def test_the_same_run_without_the_fault_goes_on_to_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in for the base would be noticed: the tests above prove something."""

    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("the base is loaded")

    monkeypatch.setattr("deltaw.training.run.load_base", load)
    with pytest.raises(AssertionError, match="the base is loaded"):
        deltaw.train(config(tmp_path, [PAIR]), quiet=True)


def called(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["deltaw", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def verdicts(prepared: Any) -> dict[str, str]:
    return {check.name: check.verdict for check in prepared.checks}


@pytest.mark.parametrize("streaming", [False, True])
def test_all_checks_of_rows_that_are_well(tmp_path: Path, streaming: bool) -> None:
    rows = [{**PAIR, "prompt": f"{n}?"} for n in range(30)]
    found = prepare(parse(config(tmp_path, rows, eval=0.2, streaming=streaming)))
    assert set(verdicts(found).values()) == {"fine"} and found.remarks == []
    assert list(verdicts(found)) == [
        "fields", "supervised tokens", "stop token", "padding", "template", "dropped rows", "cut rows", "repeated rows",
        "held-out rows", "characters",
    ]  # fmt: skip


def test_streamed_rows_are_checked_as_those_in_memory(tmp_path: Path) -> None:
    rows = [{**PAIR, "prompt": f"{n % 20}"} for n in range(30)] + [LONG] * 4 + [CHINESE]
    half = str(written(tmp_path, rows[:7], "half.jsonl"))
    both = [prepare(parse(config(tmp_path, rows, eval=half, streaming=s))).checks for s in (False, True)]
    assert both[0] == both[1]
    warned = {check.name: check.found for check in both[0] if check.verdict == "warning"}
    assert set(warned) == {"dropped rows", "repeated rows", "held-out rows"}
    assert warned["dropped rows"] == "4 of 35 rows (11.4%) are left out (longer than 512 tokens: 4)"
    assert warned["held-out rows"].startswith("7 of the held-out rows are trained on too")


def test_cut_rows_are_warned_of_where_they_are_many(tmp_path: Path) -> None:
    rows = [{**PAIR, "prompt": f"{n}"} for n in range(30)]
    few = prepare(parse(config(tmp_path, [*rows, LONG], overflow="cut")))
    assert verdicts(few)["cut rows"] == "fine"
    many = prepare(parse(config(tmp_path, [*rows[:9], LONG], overflow="cut")))
    [check] = [check for check in many.checks if check.name == "cut rows"]
    assert check.verdict == "warning" and check.found == "1 of 10 rows (10.0%) lose their beginning (too long)"


def test_words_that_the_vocabulary_has_are_not_lost_letter_by_letter(tmp_path: Path) -> None:
    found = prepare(parse(config(tmp_path, [PAIR], base(tmp_path, "words"))))
    assert verdicts(found)["characters"] == "fine"


def test_characters_that_come_back_as_others(tmp_path: Path) -> None:
    found = prepare(parse(config(tmp_path, [PAIR], base(tmp_path, "lower"))))
    [check] = [check for check in found.checks if check.name == "characters"]
    assert check.verdict == "warning"
    assert check.found == "2 characters come back as others: Latin (2 of 14: B W); in 1 of 1 rows"


def test_characters_of_held_out_rows(tmp_path: Path) -> None:
    held_out = str(written(tmp_path, [CHINESE], "held.jsonl"))
    found = prepare(parse(config(tmp_path, [PAIR], base(tmp_path, "letters"), eval=held_out)))
    [check] = [check for check in found.checks if check.name == "characters"]
    assert check.verdict == "warning" and check.found.startswith(
        "of the held-out rows, 100% of the characters to learn"
    )


def test_texts_without_an_end(tmp_path: Path) -> None:
    folder = Path(base(tmp_path, "letters"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    given = {**config(tmp_path, [{"text": "Where is the river?"}], str(folder)), "train": {"objective": "text"}}
    [check] = [check for check in prepare(parse(given)).checks if check.name == "stop token"]
    assert check.verdict == "warning" and check.found.startswith("1 of 1 rows learn no stop token")


def test_a_run_logs_what_a_plan_warns_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = {**config(tmp_path, [PAIR] * 4), "adapter": {"rank": 2}, "train": {"max_steps": 1, "batch_size": 2}}
    run = deltaw.train(given)
    words = "3 of 4 rows (75.0%) are the same as an earlier one"
    assert any(words in event["text"] for event in RunDirectory(run.path).events("warning"))
    assert f"note: {words}" in capsys.readouterr().err


def test_plan_in_a_pipe_and_as_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # what continuous integration sets; a pipe is still none
    words = ["plan", "model=tiny", f"data.train={written(tmp_path, [PAIR, PAIR])}", "data.eval=null"]
    code, out, _ = called(monkeypatch, capsys, *words)
    assert code == 0 and "\x1b" not in out and "⟦Beyond the hill.<|end|>⟧" in out
    assert re.search(r"^warning  repeated rows +1 of 2 rows \(50\.0%\) are the same as an earlier one$", out, re.M)
    assert re.search(r"^ +fix: take them out", out, re.M)
    code, out, _ = called(monkeypatch, capsys, *words, "--json")
    checks = json.loads(out)["checks"]
    assert code == 0 and all(set(check) == {"name", "verdict", "found", "fix"} for check in checks)
    assert {check["name"]: check["verdict"] for check in checks}["repeated rows"] == "warning"
    assert json.loads(out)["shown"][0].endswith("⟦Beyond the hill.<|end|>⟧")


@pytest.mark.parametrize("refused", [False, True])
def test_plan_on_a_terminal(tmp_path: Path, refused: bool) -> None:
    """A real terminal: what is learnt is on a colour; between the marks where the user wants no colour."""
    rows = written(tmp_path, [PAIR, {"prompt": "x", "completion": "By\nthe mill."}])
    kept = {name: text for name, text in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    environment = {**kept, "TERM": "xterm-256color", **({"NO_COLOR": "1"} if refused else {})}
    command = [sys.executable, "-m", "deltaw", "plan", "model=tiny", f"data.train={rows}", "data.eval=null"]
    ours, theirs = pty.openpty()
    process = subprocess.Popen(command, stdout=theirs, stderr=subprocess.STDOUT, env=environment)
    os.close(theirs)
    out = b""
    while chunk := _read(ours):
        out += chunk
    os.close(ours)
    assert process.wait(timeout=120) == 0, out
    text = out.decode()
    if refused:
        assert "\x1b" not in text and "⟦Beyond the hill.<|end|>⟧" in text
    else:
        spans = re.findall("\x1b\\[30;42m(.*?)\x1b\\[0m", text)
        assert spans == ["green", "Beyond the hill.<|end|>", "By", "the mill.<|end|>"] and "⟦" not in text
        assert "\x1b[32mfine" in text


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 4096)
    except OSError:  # Linux says so at the end
        return b""


SMALL = {"height": 8, "width": 8}
UNLIKE: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "size": (
        lambda p: p["image_processor"].update(size=SMALL),
        "it makes images of 8 × 8 pixels, the model reads 16 × 16: save the right one there, or set size and crop_size",
    ),
    "patch": (
        lambda p: p.update(patch_size=8),
        "it writes 4 tokens for an image, the model gives 16: save the right one there, or set in its processor_config.json "
        "patch_size to 4, vision_feature_select_strategy to default and num_additional_image_tokens to 1",
    ),
    "selected": (
        lambda p: p.update(vision_feature_select_strategy="full"), "it writes 17 tokens for an image, the model gives 16",
    ),
    "additional": (
        lambda p: p.update(num_additional_image_tokens=0), "it writes 15 tokens for an image, the model gives 16",
    ),
}  # fmt: skip


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("case", UNLIKE)
def test_a_processor_that_does_not_make_what_the_tower_reads_is_refused(
    case: str, streaming: bool, tmp_path: Path
) -> None:
    model, rows = pictured_base(tmp_path / "base"), pictured_rows(tmp_path)
    given = {"model": str(model), "data": {"train": str(rows), "eval": None, "streaming": streaming}}
    assert prepare(parse(given)).report.images == 8
    change, words = UNLIKE[case]
    settings = json.loads((model / "processor_config.json").read_text())
    change(settings)
    (model / "processor_config.json").write_text(json.dumps(settings))
    with pytest.raises(UseError) as caught:
        prepare(parse(given))
    assert f"{model}: the processor in its folder is not the model's: {words}" in str(caught.value)
    text = {"train": str(written(tmp_path, [PAIR], "text.jsonl")), "eval": None}
    assert prepare(parse({"model": str(model), "data": text})).report.images == 0  # text does not need it


@pytest.mark.parametrize("streaming", [False, True])
def test_images_of_held_out_rows_that_are_trained_on_are_counted(streaming: bool, tmp_path: Path) -> None:
    model = pictured_base(tmp_path / "base")
    train, other = pictured_rows(tmp_path), tmp_path / "other.jsonl"
    Image.new("RGB", (16, 16), "pink").save(tmp_path / "pink.png")
    given = {"model": str(model), "data": {"train": str(train), "eval": str(other), "streaming": streaming}}
    for names, words in (
        (["red", "red", "blue", "pink"], "; 2 of their 3 images are trained on, in other rows"), (["pink"], ""),
    ):  # fmt: skip
        written(
            tmp_path, [{**PAIR, "prompt": f"Dark, {n}?", "image": f"{x}.png"} for n, x in enumerate(names)], other.name
        )
        [check] = [check for check in prepare(parse(given)).checks if check.name == "held-out rows"]
        assert (check.verdict, check.found) == ("fine", f"none of {len(names)} is trained on{words}")


class Page(HTMLParser):
    """What a browser makes of a page: its tags, its text, and the spans of its rows."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.links: list[str] = []
        self.spans: list[tuple[str, str]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, given: list[tuple[str, str | None]]) -> None:
        attributes = {name: value or "" for name, value in given}
        self.tags.append(tag)
        self.links += [name for name in attributes if name in ("src", "href") or name.startswith("on")]
        if tag not in ("meta", "br"):
            self.open.append(tag)
        if tag == "span":
            self.spans.append((attributes.get("class", ""), ""))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.open and self.open[-1] == "span":
            self.spans[-1] = (self.spans[-1][0], self.spans[-1][1] + data)


def test_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    evil = {"prompt": "<script>alert('&amp;')</script>\n\"河\"", "completion": "</div><b onclick=x>😀"}
    rows = written(tmp_path, [evil, evil, LONG], "rows <i>.jsonl")
    page = tmp_path / "page.html"
    words = ["plan", "model=tiny", f"data.train={rows}", "data.eval=null", "--rows", "1", "--html", page]
    code, out, _ = called(monkeypatch, capsys, *words)
    assert code == 0 and "⟦</div><b onclick=x>😀<|end|>⟧" in out
    text = page.read_text(encoding="utf-8")
    found = Page(text)
    assert found.open == [] and not found.links and "http" not in text
    assert not set(found.tags) & {"script", "link", "img", "iframe", "b", "i"}
    assert f"{rows}" in found.text and "longer than 512 tokens" in found.text and "prompt-completion" in found.text
    assert "1 of 3 rows (33.3%) are left out" in found.text and "are the same as an earlier one" in found.text
    assert re.findall(r'class="verdict (\w+)"', text).count("warning") == 2
    learnt = "".join(said for kind, said in found.spans if "learnt" in kind)
    assert learnt == "</div><b onclick=x>😀<|end|>"
    whole = "".join(said for _, said in found.spans)
    assert whole == "<|user|>↵\n" + evil["prompt"].replace("\n", "↵\n") + f"<|end|>↵\n<|assistant|>↵\n{learnt}↵\n"
    assert {said for kind, said in found.spans if "special" in kind} == {"<|user|>", "<|end|>", "<|assistant|>"}
    bars = re.findall(r"≤ ([\d,]+) tokens</th><td>(\d+)</td>.*?width:([\d.]+)%", text)
    assert bars == [("64", "2", "100.0"), ("1,024", "1", "50.0")]
    assert "42 adapters" in found.text


def test_a_long_row_loses_its_middle_on_the_page(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    rows = written(tmp_path, [{"prompt": "word " * 1000, "completion": "yes"}])
    page = tmp_path / "page.html"
    given = ["model=tiny", f"data.train={rows}", "data.eval=null", "data.max_length=512", "data.overflow=cut"]
    monkeypatch.setattr("deltaw.data.page.MOST", 100)
    assert called(monkeypatch, capsys, "plan", *given, "--html", page)[0] == 0
    found = Page(page.read_text(encoding="utf-8"))
    assert "tokens were cut away before" in found.text and "… 412 tokens …" in found.text
    assert "".join(said for kind, said in found.spans if "learnt" in kind) == "yes<|end|>" and len(found.spans) == 100


@pytest.mark.parametrize("page", ["no/page.html", "."])
def test_a_page_that_cannot_be_written(page: str, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = called(monkeypatch, capsys, "plan", "model=tiny", "data.train=nowhere.jsonl", "--html", page)
    assert code == 2 and out == "" and "cannot be written: give a file in a folder that exists" in err


@pytest.mark.shared
def test_real_chinese_rows_on_tiny_and_on_a_base_without_chinese(shared: Path, tmp_path: Path) -> None:
    data = {"train": str(shared / "data/llamafactory_demo/alpaca_zh_demo.json"), "eval": None, "max_length": 512}
    prepared = prepare(parse({"model": "tiny", "data": data}))
    [check] = [check for check in prepared.checks if check.name == "characters"]
    assert check.verdict == "warning" and check.found.startswith("all come back, but 7")  # bytes hold every character
    assert re.search(
        r"% of those to learn are spelled byte by byte: .*Chinese \(1,\d\d\d of 1,\d\d\d: 的 ", check.found
    )
    assert prepared.report.kept < 600 and verdicts(prepared)["dropped rows"] == "warning"
    with pytest.raises(DataError, match=r"are lost: the tokenizer has no token for .*: Chinese \(all \d,\d\d\d: 的 "):
        prepare(parse({"model": base(tmp_path, "letters"), "data": data}))


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "data", "form"),
    [
        ("llamafactory_demo/alpaca_en_demo.json", {}, "alpaca"),
        ("llamafactory_demo/glaive_toolcall_en_demo.json", {}, "sharegpt"),
        ("llamafactory_demo/reason_tool_use_demo_50.jsonl", {"overflow": "cut"}, "messages"),
        ("llamafactory_demo/kto_en_demo.json", {"pairs": "chosen"}, "judged"),
        ("llamafactory_demo/dpo_en_demo.json", {"pairs": "chosen"}, "preference"),
    ],
)
def test_real_rows_are_well_but_for_lengths_and_repetitions(
    name: str, data: dict[str, Any], form: str, shared: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    words = [f"data.{key}={value}" for key, value in data.items()]
    given = ["plan", "model=tiny", f"data.train={shared / 'data' / name}", "data.eval=0.1", *words, "--json"]
    code, out, err = called(monkeypatch, capsys, *given, "--html", tmp_path / "page.html")
    assert code == 0, err
    found = {check["name"]: check for check in json.loads(out)["checks"]}
    warned = {name for name, check in found.items() if check["verdict"] == "warning"}
    assert warned - {"dropped rows", "cut rows"} == ({"repeated rows"} if "glaive" in name else set())
    if "glaive" in name:  # the file says 35 of its rows twice or three times
        assert found["repeated rows"]["found"].startswith("9 of 81 rows (11.1%)")
    assert found["fields"]["found"].startswith(form) and found["held-out rows"]["found"].startswith("none of ")
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert page.open == [] and "".join(said for kind, said in page.spans if "learnt" in kind)
