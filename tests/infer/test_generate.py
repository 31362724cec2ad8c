"""Generation and evaluation: batched equals alone, sampling repeats, adapters act, prompts that do not fit are refused."""

import json
from pathlib import Path

import pytest
import torch

import deltaw
from deltaw.core.errors import DataError, UseError
from deltaw.data.rows import read_rows
from deltaw.infer.evaluate import evaluate
from deltaw.infer.generate import generate, prompt_ids
from deltaw.models.base import Base, load_base

PROMPTS = ["The captain said", "A", "It was a dark night and the old house stood alone by the river"]


@pytest.fixture(scope="module")
def base() -> Base:
    return load_base("tiny", dtype="fp32")


def test_batched_equals_one_by_one(base: Base) -> None:
    together = generate(base.model, base.tokenizer, PROMPTS, max_new_tokens=12)
    alone = [generate(base.model, base.tokenizer, [prompt], max_new_tokens=12)[0] for prompt in PROMPTS]
    assert together == alone and all(together)


def test_sampling_repeats_with_a_seed(base: Base) -> None:
    def draw(seed: int) -> list[str]:
        return generate(base.model, base.tokenizer, PROMPTS, max_new_tokens=12, temperature=1.0, seed=seed)

    assert draw(1) == draw(1) != draw(2)


def test_conversations_and_text_go_through_the_template(base: Base) -> None:
    ids = prompt_ids(base.tokenizer, "hello")
    assert ids == prompt_ids(base.tokenizer, [{"role": "user", "content": "hello"}])
    assert base.tokenizer.decode(ids) == "<|user|>\nhello<|end|>\n<|assistant|>\n"


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"top_p": 0.0}, {"max_new_tokens": 0}])
def test_impossible_settings(base: Base, wrong: dict) -> None:
    with pytest.raises(UseError, match=f"{next(iter(wrong))}="):
        generate(base.model, base.tokenizer, ["x"], **wrong)


def test_a_prompt_longer_than_the_base_reads(base: Base) -> None:
    with pytest.raises(UseError, match=r"prompt 2 has .* the base reads at most 512"):
        generate(base.model, base.tokenizer, ["short", "word " * 600])


def test_evaluate_sees_what_is_live(base: Base, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"p {i}", "completion": f"answer {i}"}) + "\n" for i in range(5)))
    rows = read_rows(file)
    before = evaluate(
        base.model, base.tokenizer, rows, max_length=128, scores={"length": lambda a, r: float(len(a) > 0)}
    )
    assert before.rows == 5 and before.scores.keys() == {"exact_match", "length"} and len(before.answers) == 5
    assert before.perplexity == pytest.approx(torch.tensor(before.loss).exp().item())
    deltaw.attach(base.model, deltaw.LoRA(rank=2), targets="q_proj", name="noise")
    with torch.no_grad():
        for parameter in base.model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    changed = evaluate(base.model, base.tokenizer, rows, max_length=128, generations=0)
    with deltaw.use(base.model, {}):
        same = evaluate(base.model, base.tokenizer, rows, max_length=128, generations=2)
    deltaw.detach(base.model, "noise")
    assert changed.loss != before.loss and same.loss == pytest.approx(before.loss) and len(same.answers) == 2
    assert not changed.scores
    with pytest.raises(DataError, match="max_length"):
        evaluate(base.model, base.tokenizer, rows, max_length=3)
