"""Checks of the rows one by one, the fields that are not read, tokens piece by piece, and what is shown in colours."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import AutoTokenizer

from deltaw.config.schema import Source
from deltaw.core.errors import DataError
from deltaw.data import preflight
from deltaw.data.characters import Characters, script
from deltaw.data.conversation import Example, Message
from deltaw.data.dataset import Encoder
from deltaw.data.encode import IGNORE, Encoded, Policy, encode
from deltaw.data.observed import Observed
from deltaw.data.preflight import Check
from deltaw.data.preview import LEARNT, coloured, pieces, preview, shows_colours
from deltaw.data.rows import read_rows
from deltaw.data.stream import stream
from deltaw.models.base import TINY


@pytest.fixture
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TINY)


def pair(asked: str, answer: str) -> Example:
    return Example((Message("user", asked), Message("assistant", answer)), 1, completion=True)


def seen_of(rows: list[Example], tokenizer: Any, policy: Policy | None = None) -> Observed:
    policy = policy or Policy(512)
    encoder = Encoder(tokenizer, policy, seen=Observed(tokenizer, policy))
    for row in rows:
        encoder.add(row)
    assert encoder.seen is not None
    return encoder.seen


def test_repeated_rows_and_rows_on_both_sides(tokenizer: Any) -> None:
    rows = [pair(f"{n % 7}", "yes") for n in range(10)]
    train, other = seen_of(rows, tokenizer), seen_of([pair("1", "yes"), pair("1", "no"), pair("9", "yes")], tokenizer)
    assert (train.pieces, train.repeated(), other.repeated(), other.shared(train)) == (10, 3, 0, 1)
    check = preflight.repeated(train)
    assert check.verdict == "warning" and check.found.startswith("3 of 10 rows (30.0%) are the same as an earlier one")
    few = preflight.repeated(seen_of([*[pair(f"{n}", "yes") for n in range(40)], pair("0", "yes")], tokenizer))
    assert few.verdict == "fine" and few.found.startswith("1 of 41 rows (2.4%)")


def test_a_row_that_is_taken_twice_on_purpose_is_no_repetition(tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"{n}", "completion": "yes"}) + "\n" for n in range(5)))
    source = Source(path=str(file), weight=3)
    assert len(rows := read_rows(source).rows) == 15
    assert seen_of(rows, tokenizer).repeated() == 0
    policy = Policy(512)
    side, _ = stream([source], lambda: Encoder(tokenizer, policy, seen=Observed(tokenizer, policy)), "sft", None)
    assert side.seen is not None and (len(side.encoded), side.seen.pieces, side.seen.repeated()) == (15, 5, 0)


def test_the_stop_token_is_looked_for_in_every_row(tokenizer: Any) -> None:
    row = pair("a", "b")
    [ended] = encode(row, tokenizer, Policy(512))  # type: ignore[misc]
    stop = tokenizer.eos_token_id
    endless = Encoded(ended.ids, [IGNORE if label == stop else label for label in ended.labels])

    def verdict(*rows: Encoded) -> Check:
        seen = Observed(tokenizer, Policy(512))
        for number, encoded in enumerate(rows):
            seen.add(pair(f"{number}", "b"), [encoded])
        return preflight.stop_token(seen, tokenizer)

    assert verdict(ended, ended) == Check("stop token", "fine", "'<|end|>' is learnt at the end of all 2 rows")
    assert (
        verdict(ended, endless).verdict == "warning"
        and "1 of 2 rows learn no stop token" in verdict(ended, endless).found
    )
    assert verdict(endless).verdict == "fatal"
    with pytest.raises(DataError, match=r"1 of 1 rows learn no stop token.*: end every answer with '<\|end\|>'"):
        preflight.refuse([verdict(ended), verdict(endless)])


def test_padding_with_the_stop_token_is_seen_to_be_safe(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    [row] = encode(pair("a", "b"), tokenizer, Policy(512))  # type: ignore[misc]
    assert preflight.padding(row, tokenizer).found == "padding is masked, and is not the token that ends answers"
    tokenizer.pad_token = tokenizer.eos_token
    assert preflight.padding(row, tokenizer) == Check(
        "padding", "fine", "'<|end|>' pads and ends answers; only where it pads is it masked"
    )

    class Masking(preflight.Collator):
        """What others do: every label that is the padding's id is masked."""

        def __call__(self, batch: Any) -> dict[str, Any]:
            found = super().__call__(batch)
            return {**found, "labels": found["labels"].masked_fill(found["input_ids"] == self.pad, IGNORE)}

    monkeypatch.setattr(preflight, "Collator", Masking)
    assert preflight.padding(row, tokenizer).verdict == "fatal"


def test_fields_that_are_not_read(tmp_path: Path) -> None:
    def check(**row: Any) -> Check:
        (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
        [part] = read_rows(tmp_path / "rows.jsonl").parts
        return preflight.fields(type("Report", (), {"parts": (part,)})())

    row = {"prompt": "a", "completion": "b"}
    assert check(**row).found == "prompt-completion; every field is read"
    noted = check(**row, id=7, source="web", images=[], note=None)
    assert noted.verdict == "fine" and noted.found == "prompt-completion; not read of the rows: 'id', 'source'"
    lost = check(**row, id=7, system="Be kind.")
    assert lost.verdict == "warning" and "put 'system' into a field of this form" in lost.fix
    assert check(instruction="a", output="b", context="c").verdict == "warning"  # Dolly's name for alpaca's input
    assert (
        check(messages=[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], system="c").verdict
        == "fine"
    )


def test_columns_that_are_mapped_are_read(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"q": "a", "all": [{"text": "b"}], "n": 1}) + "\n")
    source = Source(path=str(tmp_path / "rows.jsonl"), columns={"prompt": "q", "completion": "all.0.text"})
    assert read_rows(source).parts[0].unread == ("n",)


def test_scripts_have_the_names_people_use() -> None:
    found = {character: script(character) for character in "中あ한жéक。，—😀²\n\u200b"}
    assert list(found.values()) == [
        "Chinese", "Japanese (Hiragana)", "Korean", "Cyrillic", "Latin", "Devanagari", "punctuation", "punctuation",
        "punctuation", "symbols", "digits", "white space", "control characters",
    ]  # fmt: skip


def test_a_byte_level_tokenizer_gives_all_back_and_is_asked_once_a_character(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    characters = Characters(tokenizer)
    characters.add("你好，世界。 — é \t\r\n😀", "Καλημέρα 한국어")
    assert not characters.lost and not characters.changed and characters.rows == 0
    assert preflight.given_back(Characters(tokenizer)).verdict == "fine"
    monkeypatch.setattr(Characters, "_ids", lambda self, texts: pytest.fail(f"asked again for {texts}"))
    characters.add("好，你 —", "한é")
    assert characters.texts == 2


@pytest.mark.shared
def test_a_character_that_falls_back_to_bytes_comes_back(shared: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared / "models/stories260K")
    characters = Characters(tokenizer)
    characters.add("你好，世界。", " Once\n")
    check = preflight.given_back(characters)
    assert not characters.lost and check.verdict == "warning"
    assert check.found.startswith(
        "all come back, but 100% of those to learn are spelled byte by byte: Chinese (all 4: "
    )


@pytest.mark.parametrize("text", ["Beyond — “far” 😀.", "你好，\n世界。", "  two  blanks ", "e\u0301"])
def test_pieces_are_the_text_whatever_its_tokens(tokenizer: Any, text: str) -> None:
    [row] = encode(pair(text, text), tokenizer, Policy(512))  # type: ignore[misc]
    found = list(pieces(row, tokenizer))
    assert "".join(piece.text for piece in found) == tokenizer.decode(row.ids)
    assert [number for piece in found for number in piece.ids] == row.ids
    learnt = "".join(piece.text for piece in found if piece.learnt)
    assert f"⟦{learnt}⟧" in preview(row, tokenizer) and "\ufffd" not in learnt
    assert all(len(piece.ids) == 1 for piece in found if piece.text in ("<|user|>", "<|end|>", "\n"))


def test_pieces_of_bytes_that_make_no_character_are_shown(tokenizer: Any) -> None:
    half = tokenizer("😀", add_special_tokens=False)["input_ids"][:1]
    row = Encoded([*half * 20, tokenizer.eos_token_id], [*[IGNORE] * 20, tokenizer.eos_token_id])
    found = list(pieces(row, tokenizer))
    assert [number for piece in found for number in piece.ids] == row.ids
    assert len(found) == 4 and found[-1].text == "<|end|>" and found[-1].learnt


@pytest.mark.shared
def test_pieces_keep_the_blanks_that_a_first_token_would_lose(shared: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared / "models/stories260K")
    [row] = encode(pair("Once upon", " a time"), tokenizer, Policy(512))  # type: ignore[misc]
    assert "".join(piece.text for piece in pieces(row, tokenizer)) == tokenizer.decode(row.ids)


def test_colours_stand_where_the_marks_stand(tokenizer: Any) -> None:
    [row] = encode(pair("a", "yes \x1b[31mred\x07"), tokenizer, Policy(512))  # type: ignore[misc]
    text = coloured(row, tokenizer)
    [span] = [span for span in text.spans if span.style == LEARNT]
    assert text.plain[span.start : span.end] == "yes ␛[31mred␇<|end|>"  # a row does not steer the terminal
    assert "\x1b" not in text.plain


def test_colours_are_for_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    assert shows_colours(Console(file=Terminal()))
    assert not shows_colours(Console(file=io.StringIO()))
    monkeypatch.setenv("NO_COLOR", "1")
    assert not shows_colours(Console(file=Terminal()))
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert not shows_colours(Console(file=Terminal()))
