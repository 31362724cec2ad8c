"""deltaw mix: several adapters into one file, read back and compared before it has its name."""

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from deltaw.cli.app import Json, app, show, tell
from deltaw.cli.base import Mismatch, Pickle, quantized_as, with_strength
from deltaw.core.text import counted

WAYS = ("exact", "svd", "ties", "dare", "dare-ties", "blocks")
AUTO = 0.99
"""The share of energy that --rank auto keeps where --energy does not say."""


@app.command()
def mix(
    parts: Annotated[
        list[str], typer.Argument(help="Adapter folders with weights: runs/a/adapter=0.7 runs/b/adapter=-0.3")
    ],
    output: Annotated[Path, typer.Option(help="Folder of the new adapter.")],
    how: Annotated[
        str | None,
        typer.Option(
            help="exact, svd, ties, dare, dare-ties or blocks (exact, with --block). Default: exact; svd with --rank or --energy.",
            show_default=False,
        ),
    ] = None,
    rank: Annotated[
        str | None,
        typer.Option(help="Cut to this rank; auto: as --energy asks, module by module; full: cut nothing.", show_default=False),
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option(help="Smallest ranks that keep this share of ‖ΔW‖², 0.99 with --rank auto.", show_default=False),
    ] = None,
    density: Annotated[
        float | None, typer.Option(help="ties and dare: share of the numbers that stay.", show_default=False)
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="dare: which numbers are dropped. Default: 0.", show_default=False)
    ] = None,
    block: Annotated[
        list[str] | None,
        typer.Option(
            help="Other weights for some modules, one for each adapter: attention=1,0  mlp@0-11=0,1  q_proj=0.5,0.5; "
            "may be repeated, the first that names a module counts.",
            show_default=False,
        ),
    ] = None,
    subtract: Annotated[
        list[str] | None,
        typer.Option(help="Take this adapter away: folder, or folder=strength; may be repeated.", show_default=False),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="The base, where a change depends on its weights (DoRA, OFT, …).", show_default=False),
    ] = None,
    allow_base_mismatch: Mismatch = False,
    allow_pickle: Pickle = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Several adapters into one: the exact weighted sum of their changes, that in a given rank, TIES or DARE.

    Weights may be negative. Every change is ΔW itself, never A and B apart; what a cut loses is said module by module.
    """
    import dataclasses

    from deltaw.core.files import must_be_free, whole_folder
    from deltaw.data.kept import read_kept, together
    from deltaw.formats import directory
    from deltaw.mixing import blocks
    from deltaw.ship.readback import must_be

    plan = _plan(how, rank, energy, density, seed, block)
    must_be_free(output)
    pairs = [with_strength(part) for part in parts]
    pairs += [(folder, -strength) for folder, strength in map(with_strength, subtract or [])]
    by_block = _blocks(block or [])
    stored = [directory.open_directory(folder, allow_pickle=allow_pickle) for folder, _ in pairs]
    for (folder, _), one in zip(pairs, stored, strict=True):
        tell(folder, one.notes)
    names = sorted({one.base_name for one in stored if one.base_name})
    if len(names) > 1 and any(one.state.base is None for one in stored):  # else `same_base` compares their weights
        tell(output, [f"the adapters name different bases ({', '.join(names)}), and not all files say more of theirs"])
    kept = together([read_kept(Path(folder)) for folder, _ in pairs])
    states, weights = [one.state for one in stored], [weight for _, weight in pairs]
    base = None if model is None else _base(model, pairs, states, allow_base_mismatch)
    terms = blocks(states, weights, by_block) if by_block else (states, weights)
    mixed, report = _mixed(*terms, plan, base, not as_json and sys.stderr.isatty())
    _not_nothing(mixed, *terms)
    made = {key: value for key, value in plan.items() if value is not None}
    made |= {"blocks": {name: list(own) for name, own in by_block.items()}} if by_block else {}
    lost = {str(site): round(one.error, 9) for site, one in report.sites.items() if one.error} if report else {}
    meta = _shared([one.state.meta for one in stored])
    meta |= {"parents": [one.digest for one in stored], "weights": weights, "mix": made}
    meta |= {"cut": {"rank": plan["rank"], "relative_error": report.error, "modules": lost}} if lost and report else {}
    with whole_folder(output) as draft:
        directory.write(dataclasses.replace(mixed, meta=meta), draft, beside=kept.files)
        difference = must_be(mixed, draft)
    ranks = sorted({rank for method in mixed.methods.values() if (rank := getattr(method, "rank", None))})
    record = {
        "adapter": str(output), "parts": [{"adapter": folder, "weight": weight} for folder, weight in pairs], **made,
        "parameters": mixed.parameters, "ranks": ranks, "read_back": difference,
    }  # fmt: skip
    said = [
        f"{output}: {' + '.join(f'{w:g} × {f}' for f, w in pairs)}, {plan['how']}, {counted(mixed.parameters, 'parameter')}"
    ]
    said[0] += (
        f", rank {ranks[0]}{f' to {ranks[-1]}' if len(ranks) > 1 else ''}; read back and compared" if ranks else ""
    )
    if report is not None:
        sites = {str(site): dataclasses.asdict(one) for site, one in report.sites.items()}
        record |= {"error": report.error, "modules": sites}
        said += [f"at most {report.error:.2%} of a module's change is lost", str(report.worst(5))] if lost else []
    show(record, as_json, "\n".join(said))


def _plan(
    how: str | None,
    rank: str | None,
    energy: float | None,
    density: float | None,
    seed: int | None,
    block: list[str] | None,
) -> dict[str, Any]:
    """What is to be done, where the options go together; UseError with all that does not."""
    from deltaw.core.errors import UseError, did_you_mean, faults

    cuts = rank is not None or energy is not None
    how = how or ("svd" if cuts else "blocks" if block else "exact")
    sparse, found = how in ("ties", "dare", "dare-ties"), []
    if how not in WAYS:
        raise UseError(f"--how {how!r} is none of {', '.join(WAYS)}{did_you_mean(how, WAYS)}")
    if how in ("exact", "blocks") and cuts:
        found.append(f"--how {how} cuts nothing, --rank and --energy do: leave them out, or use --how svd")
    if how == "blocks" and not block:
        found.append("--how blocks needs the weights: --block attention=1,0 --block mlp@0-11=0,1")
    if (sparse or how == "svd") and not cuts:
        found.append(f"--how {how} needs a rank: --rank 16, --rank auto (with --energy) or --rank full")
    if sparse and density is None:
        found.append(f"--how {how} needs --density, the share of numbers that stay (0.2 in the paper of TIES)")
    if not sparse and density is not None:
        found.append(f"--density belongs to ties and dare, not to {how}")
    if seed is not None and not how.startswith("dare"):
        found.append(f"--seed belongs to dare, not to {how}")
    if rank is not None and rank not in ("auto", "full") and not rank.isdecimal():
        found.append(f"--rank {rank!r} is neither a whole number, nor auto, nor full")
    if found:
        raise faults(UseError, "this mix cannot be made", found)
    number = int(rank) if rank is not None and rank.isdecimal() else "full" if rank == "full" else None
    kept = AUTO if rank == "auto" and energy is None else energy
    seed = (seed or 0) if how.startswith("dare") else None
    return {"how": how, "rank": number, "energy": kept, "density": density, "seed": seed}


def _blocks(texts: Sequence[str]) -> dict[str, list[float]]:
    """['attention=1,0'] → {'attention': [1.0, 0.0]}."""
    from deltaw.core.errors import UseError

    found: dict[str, list[float]] = {}
    for text in texts:
        name, _, numbers = text.rpartition("=")
        if name in found:
            raise UseError(f"--block {name!r} is given twice: leave one out")
        try:
            found[name] = [float(number) for number in numbers.split(",")]
        except ValueError:
            raise UseError(f"--block {text!r}: {numbers!r} is not a list of numbers: write attention=1,0") from None
    return found


def _mixed(
    states: Sequence[Any], weights: Sequence[float], plan: Mapping[str, Any], base: Any, bar: bool
) -> tuple[Any, Any]:
    """The mixed state, and by site what it cost; None where nothing can be lost."""
    from deltaw.mixing import dare, exact, svd, ties

    def track(sites: Sequence[Any]) -> Iterable[Any]:
        from rich.console import Console
        from rich.progress import track

        return track(sites, "mixing", console=Console(stderr=True), transient=True, disable=not bar)

    how, options = plan["how"], {"rank": plan["rank"], "energy": plan["energy"], "base": base, "track": track}
    if how in ("exact", "blocks"):
        return exact(states, weights, base), None
    if how == "svd":
        return svd(states, weights, **options)
    if how == "ties":
        return ties(states, weights, plan["density"], **options)
    return dare(states, weights, plan["density"], seed=plan["seed"], elect=how == "dare-ties", **options)


def _base(model: str, pairs: Sequence[tuple[str, float]], states: Sequence[Any], mismatch: bool) -> Any:
    """The base as it was in training: its weights one at a time from disk where that can be, else loaded."""
    from deltaw.core.base import identify
    from deltaw.core.errors import BaseMismatchError
    from deltaw.models.base import load_base, named_quantization
    from deltaw.models.mapped import open_base

    quantize = quantized_as({folder: named_quantization(Path(folder), model) for folder, _ in pairs})
    if quantize == "none":
        paths = {site.path for state in states for site in state.methods if state.factors(site) is None}
        opened = open_base(model, paths)
        base, here = opened.model, opened.identity
    else:
        base = load_base(model, dtype="fp32", quantize=quantize).model
        here = identify(base)
    for (folder, _), state in zip(pairs, states, strict=True):
        why = None if state.base is None else state.base.difference(here)
        if why and not mismatch:
            raise BaseMismatchError(
                f"{folder} was trained on another base than {model!r}: {why}. Give that base, or --allow-base-mismatch"
            )
    return base


def _not_nothing(mixed: Any, states: Sequence[Any], weights: Sequence[float]) -> None:
    """UseError where all changes are zero, or cancel to what rounding leaves of them."""
    from deltaw.analysis.norms import norms
    from deltaw.core.errors import UseError

    parts = [
        {site: abs(w) * (size or 0.0) for site, size in norms(s).items()} for s, w in zip(states, weights, strict=True)
    ]
    left = [(size, 1e-6 * sum(part.get(site, 0.0) for part in parts)) for site, size in norms(mixed).items()]
    if all(size is not None and size <= least for size, least in left):
        raise UseError("the mix would change nothing at all: every weight, or every adapter's change, is zero")


def _shared(metas: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What is as true of a mix as of each of its parts."""
    known = {key: metas[0].get(key) for key in ("task_type", "chat_template", "mask")}
    return {k: v for k, v in known.items() if v is not None and all(meta.get(k) == v for meta in metas)}
