"""What `deltaw inspect` and `deltaw compare` found, as one HTML file without network or scripts: tables and SVG figures."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

from deltaw.analysis import figures, tables
from deltaw.analysis.comparison import Comparison, rows, summary
from deltaw.analysis.layers import folded, grid, short
from deltaw.analysis.spectrum import mean
from deltaw.core.html import document, facts, table

STYLE = "body{max-width:1100px}table{font-size:13px}figure{margin:1em 0}"
MAPS = {
    "of_base": "‖ΔW‖ / ‖W‖", "norm": "‖ΔW‖", "effective_rank": "effective rank", "stable_rank": "stable rank",
    "amplified": "amplification", "intruding": "intruder dimensions",
}  # fmt: skip


def inspected(
    title: str, known: Mapping[str, object], records: Sequence[dict[str, Any]], cuts: Mapping[str, Any] | None = None
) -> str:
    """The page of one adapter. known: facts about it; records: of `describe`; cuts: of `infer.truncate`, as plain data."""
    flat = [tables.with_factors(record) for record in records]
    parts = [facts(known)]
    if cuts is not None:
        parts += ["<h2>Would a smaller rank do?</h2>", _cuts(cuts)]
    parts += ["<h2>Modules</h2>", table(tables.rows(records), head=True)]
    maps = [(grid(flat, measure), name) for measure, name in MAPS.items()]
    drawn = [_figure(figures.heat_map(one, name)) for one, name in maps if one.known]
    parts += ["<h2>Layer by layer</h2>", *drawn] if drawn else []
    energy = _energy(flat)
    if energy:
        title_of = "energy Σ σ² in the first k directions, mean over layers"
        parts += ["<h2>Spectrum</h2>", _figure(figures.curves(energy, title_of, "k", "share"))]
    return document(title, parts, "inspect", STYLE)


def compared(title: str, known: Mapping[str, object], found: Comparison) -> str:
    """The page of a comparison."""
    parts = [facts(known), f"<pre>{html.escape(summary(found))}</pre>"]
    if not found.sites:
        return document(title, parts, "compare", STYLE)
    flat = [{**one, **_shares(one)} for one in found.sites]
    parts += ["<h2>Modules</h2>", table(rows(found), head=True), "<h2>Layer by layer</h2>"]
    names = {"cosine": "cosine of ΔW", "left": f"left φ, first {found.top}", "right": f"right φ, first {found.top}"}
    parts += [
        _figure(figures.heat_map(one, name, centred=measure == "cosine"))
        for measure, name in names.items()
        if (one := grid(flat, measure)).known
    ]
    parts.append("<h2>φ(i, j), mean over modules</h2>")
    for side in ("left", "right"):
        tables_of = [one[side]["grid"] for one in found.sites if one[side] is not None]
        if tables_of:
            parts.append(_figure(figures.matrix(_mean(tables_of), f"{side} directions", "j, of B", "i, of A")))
    return document(title, parts, "compare", STYLE)


def _figure(drawn: str) -> str:
    return f"<figure>{drawn}</figure>"


def _energy(records: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """Module → points (k, share of the energy)."""
    groups: dict[str, list[Sequence[float]]] = {}
    for record in records:
        if record["energy"]:
            groups.setdefault(folded(record["site"]), []).append(record["energy"])
    lines: dict[str, list[tuple[float, float]]] = {}
    for name, group in zip(short(list(groups)), groups.values(), strict=True):
        longest = max(map(len, group))
        whole = [[*one, *[1.0] * (longest - len(one))] for one in group]  # a smaller rank has all of it
        lines[name] = [(float(k), mean(shares)) for k, shares in enumerate(zip(*whole, strict=True), 1)]
    return lines


def _cuts(cuts: Mapping[str, Any]) -> str:
    ranked = [one for one in cuts["cuts"] if one["rank"]]
    points = [(one["rank"], one["loss"]) for one in ranked]
    drawn = figures.curves({"cut by SVD": points}, "held-out loss of the adapter cut to a rank", "rank", "loss",
                           ("the adapter as it is", cuts["loss"]))  # fmt: skip
    return f"<p>{html.escape(cuts['said'])}</p>{_figure(drawn)}{table(cuts['rows'], head=True)}"


def _shares(one: Mapping[str, Any]) -> dict[str, float | None]:
    return {side: None if one[side] is None else one[side]["top"]["phi"] for side in ("left", "right")}


def _mean(found: Sequence[Sequence[Sequence[float]]]) -> list[list[float]]:
    """Cell by cell over tables, cut to the smallest."""
    height, width = min(map(len, found)), min(len(one[0]) for one in found)
    return [[mean([one[i][j] for one in found]) for j in range(width)] for i in range(height)]
