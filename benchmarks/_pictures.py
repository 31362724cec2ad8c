"""A picture for the documentation: images with a question, and what each model says of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from PIL import Image

FOLDER = Path(__file__).parent.parent / "docs" / "pictures"
WIDE = 5
RIGHT, WRONG = "#1a7f37", "#b3261e"


@dataclass(frozen=True)
class Cell:
    image: Path
    question: str
    answer: str
    """The right one."""
    said: Mapping[str, str]
    """By whom → what."""


def drawn(cells: Sequence[Cell], name: str) -> Path:
    """docs/pictures/NAME.svg, WIDE cells to a line; equal to the byte for equal cells."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = -(-len(cells) // WIDE)
    height = 1.35 + 0.2 * len(cells[0].said)
    with pyplot.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 8, "font.family": "sans-serif"}):
        figure, places = pyplot.subplots(lines, WIDE, figsize=(1.7 * WIDE, height * lines), squeeze=False)
        for place in places.flat:
            place.axis("off")
        for cell, place in zip(cells, places.flat, strict=False):
            place.imshow(Image.open(cell.image).convert("RGB"), interpolation="nearest")
            place.set_title(cell.question, fontsize=8)
            for line, (who, words) in enumerate(cell.said.items()):
                colour = RIGHT if words == cell.answer else WRONG
                down = -0.08 - 0.15 * line
                place.text(0.5, down, f"{who}: {words}", color=colour, ha="center", va="top", transform=place.transAxes)
        figure.tight_layout(h_pad=1.5)
        FOLDER.mkdir(parents=True, exist_ok=True)
        figure.savefig(FOLDER / f"{name}.svg", metadata={"Date": None})
        pyplot.close(figure)
    return FOLDER / f"{name}.svg"
