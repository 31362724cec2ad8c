"""Easy-VQA, real files of images and questions: LoRA on vision tower, projector and language model of a small image-text model.

    python -m benchmarks easy_vqa [--seeds 3] [--steps 1000] [--work build/easy_vqa]

A small CLIP tower learns shapes and colours, as far as the training questions tell them, and is assembled with the bundled `tiny`.
Stage 1 trains the projector alone on the questions for a shape or colour, and is merged into the base; stage 2 trains LoRA on
all three parts on a fixed sample of all training questions. Scored on a fixed sample of the test questions.
The learning rate is the one with the least loss after 300 steps on seed 0, on questions about 200 held-out training images.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import deltaw
from benchmarks._common import keep, parser
from benchmarks._easy import COLOURS, SHAPES, VALID, Split, image_processor, majority, split, tower
from benchmarks._pictures import Cell, drawn
from benchmarks._vqa import Judge, held_out, made, shuffled, spread, trained, write_rows
from deltaw.runs.directory import RunDirectory
from deltaw.ship.merge import merge_to_folder
from deltaw.training.run import Shelf

RATES = [1e-3, 2e-3, 4e-3]
ALIGN = 3e-3
ALIGN_STEPS, TOWER_STEPS, TRY_STEPS, BATCH = 150, 1200, 300, 16
TRAINED, CHECKED, SCORED = 16000, 200, 2000
"""Questions taken: of the training images, of those that choose the rate, of the test images."""
LORA: dict[str, Any] = {"method": "lora", "rank": 16, "alpha": 32}
PARTS = {"vision": {**LORA, "targets": "attention"}, "projector": LORA, "language": LORA}

Question = tuple[str, str, int]


@dataclass
class Seed:
    """One seed's base, its runs below `work`, and what they scored."""

    number: int
    work: Path
    train: Split
    test: Split
    shelf: Shelf = field(default_factory=Shelf)

    def __post_init__(self) -> None:
        folder = self.work / f"seed-{self.number}"
        self.asked, open_ended = sampled(self.test.asked, SCORED), [*SHAPES, *COLOURS]
        kept = [one for one in self.train.asked if one[2] >= VALID]
        files = {
            "align": self.train.rows([one for one in kept if one[1] in open_ended][: BATCH * ALIGN_STEPS]),
            "train": self.train.rows(sampled(kept, TRAINED)),
            "valid": self.train.rows(sampled([one for one in self.train.asked if one[2] < VALID], CHECKED)),
            "test": self.test.rows(self.asked),
            "shuffled": shuffled(self.test.rows(self.asked)),
        }
        self.rows = {name: write_rows(self.work / f"{name}.json", rows) for name, rows in files.items()}
        self.base = folder / "base"
        self.quality = made(folder, self._pieces)
        self.judge = Judge(deltaw.load_base(str(self.base), dtype="fp32"))

    def _pieces(self, folder: Path) -> dict[str, float]:
        """The tower, the model assembled with it, and the base of stage 2: that with the projector of stage 1."""
        clip, quality = tower(self.train, self.test, self.number, TOWER_STEPS)
        clip.save_pretrained(folder / "tower")
        image_processor().save_pretrained(folder / "tower")
        deltaw.assemble(str(folder / "tower"), "tiny", folder / "assembled", projector="mlp", seed=self.number)
        record = self._record("align", str(folder / "assembled"), {"projector": {"method": "full"}}, ALIGN, ALIGN_STEPS)
        aligned = trained({**record, "output": str(folder / "1-align")}, self.shelf)
        merge_to_folder(str(folder / "assembled"), aligned, self.base, dtype="fp32")
        return quality

    def run(self, rate: float, steps: int) -> Path:
        """The adapter of stage 2 after so many steps at this rate."""
        record = self._record("train", str(self.base), PARTS, rate, steps)
        output = self.work / f"seed-{self.number}" / f"2-{rate:g}-{steps}"
        return trained({**record, "output": str(output)}, self.shelf)

    def _record(self, rows: str, base: str, parts: dict[str, Any], rate: float, steps: int) -> dict[str, Any]:
        return {
            "model": base,
            "data": {"train": self.rows[rows], "eval": None if self.number else self.rows["valid"]},
            "adapter": {**LORA, "parts": parts},
            "train": {
                "max_steps": steps, "batch_size": BATCH, "learning_rate": rate, "seed": self.number, "dtype": "fp32",
                "eval_every": steps, "save_every": steps,
            },
        }  # fmt: skip

    def score(self, adapter: Path | None, rows: str = "test") -> dict[str, float]:
        """Share of right answers: of all, of questions for yes or no, for a shape, for a colour."""
        right, _ = self.judge(self.rows[rows], adapter)
        groups = {"all": None, "yes or no": ["yes", "no"], "shape": SHAPES, "colour": COLOURS}
        return {name: _share(self.asked, right, answers) for name, answers in groups.items()}


def _share(asked: Sequence[Question], right: Sequence[bool], answers: Sequence[str] | None) -> float:
    counted = [one for (_, answer, _), one in zip(asked, right, strict=True) if answers is None or answer in answers]
    return sum(counted) / len(counted)


def sampled(asked: Sequence[Question], count: int) -> list[Question]:
    """So many of them, always the same."""
    return random.Random(0).sample(list(asked), min(count, len(asked)))


def main(arguments: list[str]) -> None:
    options = parser(__doc__)
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--steps", type=int, default=1000)
    options.add_argument("--work", type=Path, default=Path("build/easy_vqa"))
    args = options.parse_args(arguments)
    train, test = (split((args.shared / "data/easy_vqa" / name).resolve()) for name in ("train", "test"))
    scores: dict[str, list[dict[str, float]]] = {"stage 1": [], "stage 2": [], "shuffled": []}
    seeds: list[Seed] = []
    for number in range(args.seeds):
        seeds.append(seed := Seed(number, args.work, train, test))
        if not number:
            tried = {f"{rate:g}": held_out(seed.run(rate, TRY_STEPS)) for rate in RATES}
            rate = float(min(tried, key=tried.__getitem__))
        adapter = seed.run(rate, args.steps)
        for name, scored in (("stage 1", (None,)), ("stage 2", (adapter,)), ("shuffled", (adapter, "shuffled"))):
            scores[name].append(seed.score(*scored))
            print(number, name, scores[name][-1], flush=True)
    picture(seeds[0], seeds[0].run(rate, args.steps))
    keep(
        "easy_vqa",
        {
            "images": len(train.labels()), "asked": TRAINED, "checked": CHECKED, "scored": SCORED, "steps": args.steps, "batch": BATCH,
            "align_steps": ALIGN_STEPS, "align_rate": ALIGN, "tower_steps": TOWER_STEPS, "try_steps": TRY_STEPS, "tried": tried,
            "chosen": rate, "parameters": RunDirectory(adapter.parent).plan()["trainable"],
            "tower": {kind: spread([seed.quality[kind] for seed in seeds]) for kind in ("shape", "colour")},
            "majority": majority(train.asked, seeds[0].asked),
            "scores": {name: {kind: spread([o[kind] for o in one]) for kind in one[0]} for name, one in scores.items()},
        },
    )  # fmt: skip


def picture(seed: Seed, adapter: Path) -> None:
    """The first ten of the scored questions, and what is said after each stage."""
    said = {"stage 1": seed.judge(seed.rows["test"])[1], "stage 2": seed.judge(seed.rows["test"], adapter)[1]}
    cells = [
        Cell(Path(image), text, answer, {name: words[number] for name, words in said.items()})
        for number, (image, text, answer) in enumerate(seed.test.rows(seed.asked[:10]))
    ]
    drawn(cells, "easy_vqa")
