"""deltaw advise: a value for every setting that matters, with its reason and source; and popular rules, answered."""

import dataclasses
from typing import Annotated, Any

import typer

from deltaw.cli.app import Json, app, show
from deltaw.cli.base import record, without_rows


@app.command()
def advise(
    config: Annotated[
        list[str] | None,
        typer.Argument(
            help="As for plan: a YAML file, section.key=value overrides, or both; data may be left out.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="The base, where no configuration names it.", show_default=False)
    ] = None,
    rows: Annotated[
        int | None, typer.Option(help="Training rows, instead of reading any.", show_default=False, min=1)
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(help="Supervised tokens of all rows, with --rows.", show_default=False, min=1)
    ] = None,
    adapters: Annotated[int, typer.Option(help="Adapters that will be used on this base.", min=1)] = 1,
    claims: Annotated[bool, typer.Option("--claims", help="Popular rules: true, wrong or depends, and why.")] = False,
    probe: Annotated[
        bool,
        typer.Option("--probe", help="Load the base, take gradients of some batches, suggest a rank for each module."),
    ] = False,
    batches: Annotated[int, typer.Option(help="Batches that a probe looks at.", min=1)] = 4,
    as_json: Json = False,
) -> None:
    """Rank, alpha, targets, learning rate, batch, epochs, method, merge or mount: a value, its reason and how sure it is."""
    from deltaw.core.errors import UseError

    if claims:
        if config or model or probe:
            raise UseError("--claims answers rules by themselves: leave the configuration and other options out")
        _claims(as_json)
        return
    given, named = _given(config or [], model)
    if tokens is not None and rows is None:
        raise UseError("--tokens are those of the rows: give --rows too")
    if probe and not named:
        raise UseError("--probe takes gradients of rows: give data.train=…")
    from deltaw.config import parse
    from deltaw.planner.advice import advise as all_advice
    from deltaw.planner.departures import figures, warnings
    from deltaw.training.situation import situation

    parsed = parse.parse(given)
    found = situation(parsed, data=named and rows is None)
    found = dataclasses.replace(found, adapters=adapters)
    if rows is not None:
        found = dataclasses.replace(found, rows=rows, tokens=tokens)
    advice, warned, counted = all_advice(found), warnings(found), figures(found)
    result: dict[str, Any] = {
        "advice": [one._asdict() for one in advice],
        "warnings": [one._asdict() for one in warned],
        "figures": counted,
    }
    text = _text(advice, warned, counted)
    if probe:
        result["probe"], said = _probe(parsed, batches)
        text += f"\n\n{said}"
    show(result, as_json, text)


def _given(config: list[str], model: str | None) -> tuple[dict[str, Any], bool]:
    """Plain data of a configuration in which the rows, and with --model the base, may be missing; whether rows are there."""
    from deltaw.core.errors import UseError

    if not config and model is None:
        raise UseError("nothing to advise on: give a configuration file, or --model and --rows, or --claims")
    found = dict((record(config) if config else None) or {})
    if model is not None:
        found["model"] = model
    return without_rows(found)


def _text(advice: Any, warned: Any, counted: dict[str, Any]) -> str:
    blocks = []
    for one in advice:
        value = f"{_value(one.suggested)}" if one.given is None else f"{_value(one.given)} → {_value(one.suggested)}"
        blocks.append(f"{one.field}: {value}\n  {one.reason}\n  {one.kind}: {one.source}")
    blocks.append(_counted(counted))
    blocks += [f"warning: {one.field}: {one.text}" for one in warned]
    blocks.append("popular rules, answered: deltaw advise --claims")
    return "\n\n".join(blocks)


def _value(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _counted(found: dict[str, Any]) -> str:
    size = f"{found['trained_bytes'] / 1e6:,.2f} MB with gradients and AdamW's moments (fp32)"
    lines = [f"{found['trainable']:,} trainable beside {found['base_parameters']:,}; {size}"]
    if found["steps"] is not None:
        seen = "" if found["rows"] is None else f" of {found['rows']:,} rows"
        held = "" if found["supervised_tokens"] is None else f", {found['supervised_tokens']:,} supervised tokens"
        lines.append(f"{found['steps']:,} steps{seen}{held}")
    if "break_even" in found:
        least = found["break_even"]
        shape = "×".join(map(str, least["shape"]))
        lines.append(f"break-even rank {least['rank']:.4g} ({least['module']}, {shape}), the smallest of the targets")
        lines.append(
            f"mounted, {100 * found['unmerged_share']:.3g} % more multiplications in the adapted layers; a training step "
            f"multiplies {found['training_share']:.3g} of what training them in full does"
        )
    return "\n".join(lines)


def _claims(as_json: bool) -> None:
    from deltaw.planner.evidence import CLAIMS, table, topics

    blocks = []
    for topic in topics():
        blocks.append(topic.upper())
        blocks += [
            f"{one.verdict.upper()}  {one.said}\n  {one.answer}\n  {one.evidence}\n  {one.kind}: {one.source}"
            for one in table(topic)
        ]
    show({"claims": [one._asdict() for one in CLAIMS]}, as_json, "\n\n".join(blocks))


def _probe(config: Any, batches: int) -> tuple[dict[str, Any], str]:
    from deltaw.config import parse
    from deltaw.core.text import columns
    from deltaw.planner.measured import PROBED
    from deltaw.training.probe import probe

    found = probe(config, batches)
    (size, other), (energy, more) = found.sizes, found.energy
    rows = [("module", "shape", "energy in rank 1", f"in rank {found.usual}", "suggested rank")]
    rows += [
        (path, f"{s.out}×{s.into}", f"{s.captured(1):.1%}", f"{s.captured(found.usual):.1%}", str(found.ranks[path]))
        for path, s in found.spectra.items()
    ]
    outcome = f"ranks by gradients were {PROBED.verdict} than one rank for all on the bundled task. {PROBED.said}"
    result = {
        "adapter": found.adapter, "parameters": {"given": size, "suggested": other},
        "energy": {"given": energy, "suggested": more}, "outcome": outcome, "kind": "measured",
        "modules": {
            path: {"shape": [s.out, s.into], "rank": found.ranks[path], "total": s.total, "energies": list(s.energies)}
            for path, s in found.spectra.items()
        },
    }  # fmt: skip
    said = (
        f"{columns(rows)}\n{size:,} parameters follow {energy:.1%} of the gradients' energy, {other:,} shared out by it "
        f"{more:.1%}.\nmeasured: {outcome}\nadapter:\n"
    )
    return result, said + "\n".join(f"  {key}: {parse.dump(value)}" for key, value in found.adapter.items())
