"""Metrics of answers: the best reference counts, prompts are asked once, and what is missing is named."""

import json
import sys
from pathlib import Path

import pytest
import sacrebleu

from deltaw.core.errors import UseError
from deltaw.data.rows import read_rows
from deltaw.infer.evaluate import evaluate
from deltaw.infer.metrics import METRICS, metrics
from deltaw.models.base import load_base


def test_best_reference_counts() -> None:
    answers = ["the cat sat on the mat today", "a dog"]
    references = [["a cat", "The cat sat on the mat today"], ["a dog "]]
    assert METRICS["exact_match"](answers, references) == 0.5  # case counts, white space at the ends does not
    assert METRICS["rouge_l"](answers, references) == pytest.approx(1.0)
    assert METRICS["rouge_l"](["the cat"], [["the big cat"]]) == pytest.approx(2 * 1 * (2 / 3) / (1 + 2 / 3))
    assert METRICS["bleu"](answers[:1], references[:1]) == pytest.approx(100.0)
    expected = sacrebleu.corpus_bleu(
        answers, [["a cat", "a dog "], ["The cat sat on the mat today", None]], lowercase=True
    )
    assert METRICS["bleu"](answers, references) == expected.score


def test_unknown_and_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UseError, match="no metric 'blue'; did you mean 'bleu'"):
        metrics(["blue"])
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(UseError, match=r"needs sacrebleu: pip install 'deltaw\[eval\]'"):
        METRICS["bleu"](["a"], [["a"]])


def test_a_prompt_is_asked_once_and_has_all_its_references(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [{"prompt": p, "completion": c} for p, c in (("a", "one"), ("a", "two"), ("b", "three"))]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = load_base("tiny", dtype="fp32")
    found = evaluate(base.model, base.tokenizer, read_rows(file), metric=("exact_match", "bleu", "rouge_l"))
    assert found.rows == 3 and [list(s.references) for s in found.samples] == [["one", "two"], ["three"]]
    assert found.scores.keys() == {"exact_match", "bleu", "rouge_l"} and "<|user|>\na" in found.samples[0].prompt
