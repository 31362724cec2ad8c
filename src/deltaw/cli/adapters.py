"""deltaw inspect, mix, merge: what is in an adapter, several into one, one into its base."""

from pathlib import Path
from typing import Annotated

import typer

from deltaw.cli.main import Json, app, show

Pickle = Annotated[bool, typer.Option("--allow-pickle", help="Read adapter_model.bin too (tensors only).")]


@app.command()
def inspect(
    adapter: Annotated[Path, typer.Argument(help="Adapter folder.")],
    allow_pickle: Pickle = False,
    as_json: Json = False,
) -> None:
    """What is in an adapter: modules, ranks, scales, the size of the change, its base and how it was trained."""
    import re

    from deltaw.analysis.norms import norms
    from deltaw.formats import directory

    state, notes = directory.read(adapter, allow_pickle=allow_pickle)
    sizes = norms(state)
    rows = []
    for site, method in state.methods.items():
        factors = state.factors(site)
        rank, alpha = getattr(method, "rank", None), getattr(method, "alpha", None)
        count = sum(tensor.numel() for tensor in state.tensors[site].values())
        scale = getattr(method, "scale", None) if factors is None else factors.scale
        rows.append(
            {
                "site": str(site),
                "method": method.name,
                "rank": rank,
                "alpha": alpha,
                "scale": scale,
                "norm": sizes[site],
                "parameters": count,
            }
        )
    record = {
        "parameters": state.parameters, "base": None if state.base is None else {"name": state.base.name, "class": state.base.layer},
        "sites": rows, "meta": dict(state.meta), "notes": list(notes),
    }  # fmt: skip
    folded: dict[tuple[str, ...], list[dict]] = {}
    for row in rows:
        key = (
            re.sub(r"(?<=\.)\d+(?=\.|$)", "*", row["site"]),
            row["method"],
            *(_number(row[k]) for k in ("rank", "alpha", "scale")),
        )
        folded.setdefault(key, []).append(row)
    table = [("module", "method", "rank", "alpha", "scale", "count", "parameters", "norm of change")]
    for key, group in folded.items():
        known = [row["norm"] for row in group if row["norm"] is not None]
        span = f"{min(known):.3g} … {max(known):.3g}" if known else "depends on the base"
        table.append((*key, str(len(group)), f"{sum(r['parameters'] for r in group):,}", span))
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in table]
    lines.append(f"{len(rows)} adapters, {state.parameters:,} parameters")
    lines.append(
        f"base: {state.base.name} ({state.base.layer})"
        if state.base
        else "base: not recorded, only named by the file" + _named(adapter)
    )
    if state.meta.get("metrics"):
        lines.append(f"measured: {state.meta['metrics']}")
    show(record, as_json, "\n".join([*lines, *notes]))


def _number(value: float | int | None) -> str:
    return "–" if value is None else f"{value:g}"


def _named(folder: Path) -> str:
    from deltaw.models.base import base_of_adapter

    return f" ({base_of_adapter(folder)})"


@app.command()
def mix(
    parts: Annotated[
        list[str], typer.Argument(help="Adapter folders with weights: runs/a/adapter=0.7 runs/b/adapter=0.3")
    ],
    output: Annotated[Path, typer.Option(help="Folder of the new adapter.")],
    as_json: Json = False,
) -> None:
    """Several adapters into one, the exact weighted sum of their changes (its rank is the sum of theirs)."""
    from deltaw.cli.ask import _strength
    from deltaw.core.errors import UseError
    from deltaw.formats import directory
    from deltaw.mixing.exact import exact

    if output.exists() and any(output.iterdir()):
        raise UseError(f"{output} exists and is not empty: give another output folder")
    pairs = [_strength(part) for part in parts]
    states = [directory.read(folder)[0] for folder, _ in pairs]
    mixed = exact(states, [weight for _, weight in pairs])
    directory.write(mixed, output)
    record = {"adapter": str(output), "parts": dict(pairs), "parameters": mixed.parameters}
    show(record, as_json, f"{output}: {' + '.join(f'{w:g} × {f}' for f, w in pairs)}, {mixed.parameters:,} parameters")


@app.command()
def merge(
    adapter: Annotated[Path, typer.Argument(help="Adapter folder.")],
    output: Annotated[Path, typer.Option(help="Folder of the merged model.")],
    model: Annotated[
        str | None, typer.Option(help="The base. Default: the one the adapter names.", show_default=False)
    ] = None,
    dtype: Annotated[str, typer.Option(help="Dtype to write: auto (that of the base's files), fp32 or bf16.")] = "auto",
    allow_base_mismatch: Annotated[
        bool, typer.Option("--allow-base-mismatch", help="Merge into a base it was not trained on.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write a plain Transformers model with the adapter in its weights, reload it and check its logits."""
    import dataclasses

    from deltaw.core.errors import FileError, UseError
    from deltaw.models.base import DTYPES, base_of_adapter

    if dtype not in ("auto", *DTYPES):
        raise UseError(f"--dtype {dtype} is none of auto, {', '.join(DTYPES)}")
    if not adapter.is_dir():
        raise FileError(f"no adapter folder {str(adapter)!r}")
    from deltaw.ship.merge import merge_to_folder

    done = merge_to_folder(
        model or base_of_adapter(adapter), adapter, output, dtype=dtype, allow_base_mismatch=allow_base_mismatch
    )
    text = (
        f"{done.path}: {done.weights} weights merged, written in {done.dtype}, read back and checked\n"
        f"largest logit difference to the adapter {done.max_logit_difference:.3g}, effect of the adapter {done.effect:.3g}"
    )
    show(dataclasses.asdict(done), as_json, text)
