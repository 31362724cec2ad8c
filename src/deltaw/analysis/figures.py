"""Figures as inline SVG by matplotlib, which is loaded only here: equal numbers give equal bytes.

Text stays text (the page's own font), no date and no random names; ids that nothing refers to are left out.
"""

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

from deltaw.analysis.layers import Grid
from deltaw.core.errors import UseError

SETTINGS = {"svg.hashsalt": "deltaw", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 8}
COLOURS = ("#0969da", "#cf222e", "#1a7f37", "#9a6700", "#8250df", "#bf3989", "#57606a", "#0a7ea4")


def require() -> Any:
    """matplotlib, or one line that says how to install it."""
    try:
        import matplotlib
        import matplotlib.figure
    except ImportError:
        raise UseError("pages with figures are drawn by matplotlib: pip install 'deltaw[report]'") from None
    return matplotlib


def heat_map(grid: Grid, title: str, centred: bool = False) -> str:
    """Layers from left to right, modules from top to bottom; empty where nothing is known. centred: 0 is white."""
    rows = [[float("nan") if value is None else value for value in row] for row in grid.values]
    size = (7.4, 0.9 + 0.24 * len(grid.modules))
    figure, axes = _axes(size, title)
    most = max(map(abs, grid.known)) or 1.0
    limits: dict[str, Any] = {"cmap": "RdBu", "vmin": -most, "vmax": most} if centred else {"cmap": "viridis"}
    image = axes.pcolormesh(rows, **limits)
    axes.invert_yaxis()
    axes.set_yticks([y + 0.5 for y in range(len(grid.modules))], grid.modules)
    step = max(1, -(-len(grid.layers) // 16))
    axes.set_xticks([x + 0.5 for x in range(0, len(grid.layers), step)], [str(n) for n in grid.layers[::step]])
    axes.set_xlabel("layer")
    figure.colorbar(image, ax=axes)
    return svg(figure, title)


def matrix(values: Sequence[Sequence[float]], title: str, x: str, y: str) -> str:
    """values[row][column] in 0 … 1, counted from 1: φ(i, j)."""
    figure, axes = _axes((3.6, 3.0), title)
    image = axes.pcolormesh(values, cmap="viridis", vmin=0, vmax=1)
    for ticks, count in ((axes.set_xticks, len(values[0])), (axes.set_yticks, len(values))):
        step = max(1, -(-count // 8))
        ticks([n + 0.5 for n in range(0, count, step)], [str(n + 1) for n in range(0, count, step)])
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    figure.colorbar(image, ax=axes)
    return svg(figure, title)


def curves(
    lines: Mapping[str, Sequence[tuple[float, float]]],
    title: str,
    x: str,
    y: str,
    level: tuple[str, float] | None = None,
) -> str:
    """Named lines of points with a legend; level: a named horizontal line."""
    figure, axes = _axes((7.4, 3.0), title)
    for number, (name, points) in enumerate(lines.items()):
        axes.plot(*zip(*points, strict=True), marker=".", color=COLOURS[number % len(COLOURS)], label=name)
    if level is not None:
        axes.axhline(level[1], color="#57606a", linestyle="--", linewidth=1, label=level[0])
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.legend(frameon=False)
    return svg(figure, title)


def _axes(size: tuple[float, float], title: str) -> tuple[Any, Any]:
    matplotlib = require()
    with matplotlib.rc_context(SETTINGS):
        figure = matplotlib.figure.Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        axes.set_title(title, loc="left")
    return figure, axes


def svg(figure: Any, title: str) -> str:
    """The figure as an <svg> element that stands in a page."""
    with require().rc_context(SETTINGS):
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', text))
    text = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", text)
    text = re.sub(r' width="[\d.]+pt" height="[\d.]+pt"', ' width="100%"', text, count=1)
    return text.replace("<svg", f'<svg role="img" aria-label="{_attribute(title)}"', 1).strip()


def _attribute(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
