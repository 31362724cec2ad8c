"""Questions about handwritten digits, in two stages: which parts of an image-text model need training, and which do not.

    python -m benchmarks digits_vqa [--seeds 3] [--arms fixed,trained] [--work build/digits_vqa]

A CLIP tower (trained on scikit-learn's digits and their names) and a Llama (trained on facts about number words) are assembled
to a LlavaForConditionalGeneration. Stage 1 trains its projector to name digits; stage 2, the arms, learns six kinds of questions
from the same images. Scored on 497 images that nothing was trained on. All training of stages is deltaw.train, in fp32.
Learning rates are those with the least loss on 100 held-out training images on seed 0, at which every seed then runs.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks._common import keep, parser
from benchmarks._digits import ALL, KNOWN, NAMING, NEW, Digits, assembled, digits, write_images
from benchmarks._digits import asked as questions
from benchmarks._pictures import Cell, drawn
from benchmarks._vqa import Judge, held_out, made, shares, shuffled, spread, trained, write_rows
from deltaw import load_base
from deltaw.runs.directory import RunDirectory
from deltaw.training.run import Shelf

RATES = {"lora": [2e-3, 5e-3, 1e-2], "full": [3e-4, 1e-3, 3e-3], "projector": [1e-3, 3e-3, 1e-2]}
"""Tried on seed 0: of LoRA on the language model, of training it whole, of the projector where it alone is trained on."""
ALIGN = 5e-3
LORA: dict[str, Any] = {"method": "lora", "rank": 8, "alpha": 16}
STEPS, BATCH = 300, 32
ARMS: dict[str, dict[str, str]] = {
    "base": {},
    "none": {},
    "projector": {"projector": "projector"},
    "fixed": {"language": "lora"},
    "trained": {"language": "lora", "projector": "full"},
    "all": {"language": "lora", "projector": "full", "vision": "lora"},
    "full": {"language": "full"},
}
"""Arm → how each part is trained in stage 2; base: before stage 1. The vision tower gets its LoRA on attention alone."""
SWEPT = {"lora": "fixed", "full": "full", "projector": "projector"}
"""What is swept → on which arm."""
CONTROL = "fixed"
SHOWN = {"stage 1": "none", "stage 2": "fixed"}
"""Line of the picture → arm."""


@dataclass
class Seed:
    """One seed's base, its runs below `work`, and what they scored."""

    number: int
    work: Path
    data: Digits
    steps: int = STEPS
    shelf: Shelf = field(default_factory=Shelf)

    def __post_init__(self) -> None:
        began = time.process_time()
        write_images(self.data, self.work / "images")
        for name, numbers, asked in (("align", self.data.train, [NAMING]), ("train", self.data.train, [*ALL]),
                                     ("valid", self.data.valid, [*ALL]), ("test", self.data.test, [*ALL])):  # fmt: skip
            write_rows(self.rows(name), questions(self.data, numbers, asked))
        write_rows(self.rows("shuffled"), shuffled(questions(self.data, self.data.test, [*ALL])))
        folder = self.work / f"seed-{self.number}"
        self.base = folder / "base"
        self.quality = made(folder, lambda place: assembled(self.data, self.number, place))
        self.judge = Judge(load_base(str(self.base), dtype="fp32"))
        self.aligned = trained(
            self._record("align", {"projector": {"method": "full"}}, ALIGN, name="1-align"), self.shelf
        )
        self.seconds = time.process_time() - began

    def rows(self, name: str) -> Path:
        return self.work / f"{name}.json"

    def arm(self, name: str, rates: Mapping[str, float]) -> Path | None:
        """The adapter of an arm at these rates; None of the base, whose projector is random."""
        if not ARMS[name]:
            return self.aligned if name == "none" else None
        parts = {part: {**_method(how, part), "learning_rate": rates[how]} for part, how in ARMS[name].items()}
        said = "_".join([name, *(f"{rates[how]:g}" for how in dict.fromkeys(ARMS[name].values()))])
        record = self._record("train", parts, 1e-3, name=f"2-{said}")
        record["adapter"]["from"] = str(self.aligned)
        return trained(record, self.shelf)

    def _record(self, rows: str, parts: Mapping[str, Any], rate: float, name: str) -> dict[str, Any]:
        return {
            "model": str(self.base),
            "data": {"train": str(self.rows(rows)), "eval": None if self.number else str(self.rows("valid"))},
            "adapter": {**LORA, "parts": dict(parts)},
            "train": {
                "max_steps": self.steps, "batch_size": BATCH, "learning_rate": rate, "seed": self.number, "dtype": "fp32",
                "eval_every": self.steps, "save_every": self.steps,
            },
            "output": str(self.work / f"seed-{self.number}" / name),
        }  # fmt: skip

    def score(self, adapter: Path | None, rows: str = "test") -> dict[str, float]:
        """Share of right answers to each question."""
        asked = questions(self.data, self.data.test, [*ALL])
        return shares(asked, self.judge(str(self.rows(rows)), adapter)[0])


def _method(how: str, part: str) -> dict[str, Any]:
    if how != "lora":
        return {"method": "full"}
    return {**LORA, "targets": "attention"} if part == "vision" else dict(LORA)


def swept(seed: Seed) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """The held-out loss at every rate tried, and the best rate."""
    tried = {
        how: {f"{rate:g}": held_out(seed.arm(SWEPT[how], {how: rate})) for rate in rates}
        for how, rates in RATES.items()
    }
    return tried, {how: float(min(losses, key=losses.__getitem__)) for how, losses in tried.items()}


def summary(scores: list[dict[str, float]]) -> dict[str, Any]:
    """Known and new questions, each question counting the same: mean ± sd over seeds."""
    means = {
        kind: spread([sum(one[question] for question in asked) / len(asked) for one in scores])
        for kind, asked in (("known", KNOWN), ("new", NEW))
    }
    return {**means, "questions": {question: sum(one[question] for one in scores) / len(scores) for question in ALL}}


def picture(seed: Seed, rates: Mapping[str, float]) -> None:
    """The first test image of every digit with a question about it, and what is said after each stage."""
    asked = questions(seed.data, seed.data.test, [*ALL])
    said = {name: seed.judge(str(seed.rows("test")), seed.arm(arm, rates))[1] for name, arm in SHOWN.items()}
    firsts = [seed.data.shown[seed.data.test].tolist().index(digit) for digit in range(10)]
    chosen = [first * len(ALL) + number % len(ALL) for number, first in enumerate(firsts)]
    cells = [
        Cell(seed.work / asked[n][0], asked[n][1], asked[n][2], {name: words[n] for name, words in said.items()})
        for n in chosen
    ]
    drawn(cells, "digits_vqa")


def main(arguments: list[str]) -> None:
    options = parser(__doc__)
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--arms", default=",".join(ARMS))
    options.add_argument("--work", type=Path, default=Path("build/digits_vqa"))
    args = options.parse_args(arguments)
    arms, data = args.arms.split(","), digits()
    scores: dict[str, list[dict[str, float]]] = {name: [] for name in [*arms, "control"]}
    sizes: dict[str, int] = {}
    seeds, seconds = [], []
    for number in range(args.seeds):
        seed = Seed(number, args.work, data)
        seeds.append(seed)
        if not number:
            tried, rates = swept(seed)
        began = time.process_time()
        for name in arms:
            adapter = seed.arm(name, rates)
            sizes[name] = RunDirectory(adapter.parent).plan()["trainable"] if adapter else 0
            scores[name].append(seed.score(adapter))
            print(number, name, scores[name][-1], flush=True)
        scores["control"].append(seed.score(seed.arm(CONTROL, rates), "shuffled"))
        if number or args.seeds == 1:  # of the first some arms ran before, to choose the rates
            seconds.append(seed.seconds + time.process_time() - began)
    picture(seeds[0], rates)
    keep(
        "digits_vqa",
        {
            "train": len(data.train), "valid": len(data.valid), "test": len(data.test), "steps": STEPS, "batch": BATCH,
            "align_rate": ALIGN, "tried": tried, "chosen": rates, "control_of": CONTROL,
            "tower": spread([seed.quality["tower"] for seed in seeds]), "seconds": seconds,
            "parameters": sizes, "arms": {name: summary(one) for name, one in scores.items()},
        },
    )  # fmt: skip
