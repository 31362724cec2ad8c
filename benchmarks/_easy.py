"""The pieces of the Easy-VQA experiment: its questions, what they say of an image, and a tower trained on that.

4,000 images of one shape each (three shapes, eight colours, any place and size, 64 × 64 pixels), seen here at 24 × 24.
"""

import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

from benchmarks._digits import descend
from benchmarks._vqa import Asked

SHAPES = ["circle", "rectangle", "triangle"]
COLOURS = ["black", "blue", "brown", "gray", "green", "red", "teal", "yellow"]
SIZE, PATCH, MOVED = 24, 4, 1
VALID = 200
"""Training images, the first, that only choose the learning rate."""


@dataclass(frozen=True)
class Split:
    """Questions of train or test, the image by its number."""

    folder: Path
    asked: list[tuple[str, str, int]]

    def rows(self, chosen: Sequence[tuple[str, str, int]]) -> list[Asked]:
        return [(str(self.folder / "images" / f"{number}.png"), text, answer) for text, answer, number in chosen]

    def labels(self) -> Tensor:
        """[images, 2]: the shape and the colour of an image as far as its questions say it, else −100."""
        found = torch.full((1 + max(number for *_, number in self.asked), 2), -100)
        for text, answer, number in self.asked:
            words = {answer, *text.rstrip("?").split()} if answer == "yes" and not _denies(text) else {answer}
            for column, names in enumerate((SHAPES, COLOURS)):
                for word in words & set(names):
                    found[number, column] = names.index(word)
        return found

    def pixels(self, count: int) -> Tensor:
        """[images, 3, SIZE, SIZE], as the tower will see them."""
        images = [Image.open(self.folder / "images" / f"{number}.png").convert("RGB") for number in range(count)]
        return image_processor()(images, return_tensors="pt").pixel_values


def _denies(text: str) -> bool:
    return bool({"no", "not"} & set(text.rstrip("?").split()))


def split(folder: Path) -> Split:
    return Split(folder, [tuple(one) for one in json.loads((folder / "questions.json").read_text(encoding="utf-8"))])


def image_processor() -> CLIPImageProcessorPil:
    half = [0.5, 0.5, 0.5]
    size = {"height": SIZE, "width": SIZE}
    return CLIPImageProcessorPil(size=size, crop_size=size, do_center_crop=False, image_mean=half, image_std=half)


def tower(train: Split, test: Split, seed: int, steps: int) -> tuple[CLIPVisionModel, dict[str, float]]:
    """A CLIP tower that tells shapes and colours by the mean of its patches; and the shares of test images it gets right.

    Trained on flipped and moved images, whose shape and colour are those that training questions say.
    """
    torch.manual_seed(seed)
    config = CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, image_size=SIZE, patch_size=PATCH,
    )  # fmt: skip
    body, order = (
        nn.ModuleList([CLIPVisionModel(config), nn.Linear(64, len(SHAPES) + len(COLOURS))]),
        random.Random(seed),
    )
    labels = train.labels()
    pixels = train.pixels(len(labels))

    def found(images: Tensor) -> tuple[Tensor, Tensor]:
        told = body[1](body[0](images).last_hidden_state[:, 1:].mean(1))
        return told[:, : len(SHAPES)], told[:, len(SHAPES) :]

    def loss() -> Tensor:
        chosen = order.sample(range(VALID, len(labels)), 64)
        pairs = zip(found(_moved(pixels[chosen], order)), labels[chosen].T, strict=True)
        return torch.stack([nn.functional.cross_entropy(said, true) for said, true in pairs]).sum()

    descend(body, loss, steps, 2e-3)
    wanted = test.labels()
    with torch.no_grad():
        said = [one.argmax(1) for one in found(test.pixels(len(wanted)))]
    right = {
        name: float((guess == true)[true >= 0].float().mean())
        for name, guess, true in zip(("shape", "colour"), said, wanted.T, strict=True)
    }
    return body[0], right


def _moved(images: Tensor, order: random.Random) -> Tensor:
    """The same images, flipped and moved by up to MOVED pixels; a batch in the same way."""
    sides = [side for side in (-1, -2) if order.random() < 0.5]
    wide = nn.functional.pad(images.flip(sides), (MOVED,) * 4, mode="replicate")
    down, right = order.randint(0, 2 * MOVED), order.randint(0, 2 * MOVED)
    return wide[:, :, down : down + SIZE, right : right + SIZE]


def majority(train: Sequence[tuple[str, str, int]], test: Sequence[tuple[str, str, int]]) -> dict[str, float]:
    """What blind answers get right: the one most frequent answer, and the most frequent one to each question."""
    answers = Counter(answer for _, answer, _ in train)
    each: dict[str, Counter[str]] = {}
    for text, answer, _ in train:
        each.setdefault(text, Counter())[answer] += 1
    one = answers.most_common(1)[0][0]
    by_question = {text: counted.most_common(1)[0][0] for text, counted in each.items()}
    return {
        "one answer": float(np.mean([answer == one for _, answer, _ in test])),
        "by question": float(np.mean([answer == by_question.get(text, one) for text, answer, _ in test])),
    }
