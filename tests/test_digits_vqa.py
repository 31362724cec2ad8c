"""Two stages on real images: a language model that knew digits as words answers questions about pictures of them.

The experiment of `python -m benchmarks digits_vqa`, one seed, one arm and its control, with fewer steps and images.
"""

import dataclasses
from pathlib import Path

import deltaw
from benchmarks._digits import ALL, KNOWN, NAMING, NEW, assembled, digits, write_images
from benchmarks._digits import asked as questions
from benchmarks._vqa import Judge, shares, shuffled, write_rows

LORA = {"method": "lora", "rank": 8, "alpha": 16}


def test_lora_on_the_language_model_answers_questions_about_images(tmp_path: Path) -> None:
    data = digits()
    data = dataclasses.replace(data, test=data.test[:150])
    write_images(data, tmp_path / "images")
    assembled(data, 0, tmp_path, steps=(300, 150))
    rows = {
        "align": questions(data, data.train[:400], [NAMING]),
        "train": questions(data, data.train, [*ALL]),
        "test": (asked := questions(data, data.test, [*ALL])),
        "shuffled": shuffled(asked),
    }
    files = {name: write_rows(tmp_path / f"{name}.json", each) for name, each in rows.items()}
    record = {
        "model": str(tmp_path / "base"),
        "adapter": {**LORA, "parts": {"projector": "full"}},
        "data": {"train": files["align"], "eval": None},
        "train": {"batch_size": 32, "learning_rate": 5e-3, "max_steps": 200, "dtype": "fp32"},
        "output": str(tmp_path / "1-align"),
    }
    aligned = deltaw.train(record, quiet=True)
    record["adapter"] = {**LORA, "from": str(aligned.adapter), "parts": {"language": "lora"}}
    record |= {"data": {"train": files["train"], "eval": None}, "output": str(tmp_path / "2-instruct")}
    record["train"] = {**record["train"], "max_steps": 300}
    run = deltaw.train(record, quiet=True)
    judge = Judge(deltaw.load_base(str(tmp_path / "base"), dtype="fp32"))  # the adapter comes from its files
    before, after = (shares(asked, judge(files["test"], adapter)[0]) for adapter in (None, run.adapter))
    blind = shares(asked, judge(files["shuffled"], run.adapter)[0])

    def mean(found: dict[str, float], of: dict[str, object]) -> float:
        return sum(found[question] for question in of) / len(of)

    assert mean(after, KNOWN) >= 0.83 and mean(after, NEW) >= 0.82, after
    assert mean(before, KNOWN) < 0.5 and mean(before, NEW) < 0.5, before
    assert mean(blind, ALL) <= 0.35, blind
