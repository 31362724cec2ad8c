"""Options that name a base and its adapters, and loading them: shared by eval, generate and chat."""

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from deltaw.cli.app import tell

Model = Annotated[
    str | None,
    typer.Option(help="The base: folder, hub id or `tiny`. Default: the one the adapter names.", show_default=False),
]
Adapters = Annotated[
    list[str] | None,
    typer.Option("--adapter", help="Adapter folder, or folder=strength; may be repeated.", show_default=False),
]
Mismatch = Annotated[
    bool, typer.Option("--allow-base-mismatch", help="Put the adapter on a base it was not trained on.")
]
Pickle = Annotated[bool, typer.Option("--allow-pickle", help="Read adapter_model.bin too (tensors only).")]
Quantize = Annotated[
    str | None,
    typer.Option(
        help="none, nf4, nf4-double or int8. Default: as the base was when the adapter was trained.", show_default=False
    ),
]
Dtype = Annotated[str, typer.Option(help="auto, fp32 or bf16.")]


def load_all(
    model: str | None, adapters: list[str], dtype: str, mismatch: bool, pickle: bool, quantize: str | None = None
) -> tuple[Any, dict[str, float], Any]:
    """The base with every adapter loaded, none of them live yet; the route that makes them live; and the tokenizer of
    the base alone, without the tokens that adapters bring."""
    import copy

    from deltaw.core.errors import UseError
    from deltaw.core.route import use
    from deltaw.data.kept import read_kept, together
    from deltaw.models.adapters import load
    from deltaw.models.base import base_of_adapter, load_base, named_quantization

    folders = [with_strength(text) for text in adapters]
    if model is None and not folders:
        raise UseError("give a base with --model, or an adapter with --adapter that names one")
    name = model or base_of_adapter(Path(folders[0][0]))
    if quantize is None:
        quantize = quantized_as({folder: named_quantization(Path(folder), name) for folder, _ in folders})
    base = load_base(name, dtype=dtype, quantize=quantize)
    route, own = {}, copy.deepcopy(base.tokenizer)
    kept = [read_kept(Path(folder)) for folder, _ in folders]
    together(kept, base.tokenizer.chat_template)
    for number, (folder, strength) in enumerate(folders):
        report = load(base.model, folder, name=f"adapter{number}", allow_base_mismatch=mismatch, allow_pickle=pickle)
        tell(folder, report.remarks)
        route[f"adapter{number}"] = strength
    for one in kept:
        one.give(base.tokenizer)
    use(base.model, {})
    own.chat_template = base.tokenizer.chat_template
    return base, route, own


def quantized_as(named: dict[str, str]) -> str:
    """How to load the base for these adapters: {folder: as it was trained}."""
    from deltaw.core.errors import UseError

    kinds = list(dict.fromkeys(kind for folder, kind in named.items() if Path(folder).is_dir()))
    if len(kinds) > 1:
        listed = ", ".join(f"{folder}: {kind}" for folder, kind in named.items())
        raise UseError(
            f"these adapters were trained on differently quantised bases ({listed}): say how to load it, --quantize {kinds[0]}"
        )
    return kinds[0] if kinds else "none"


def with_strength(text: str) -> tuple[str, float]:
    from deltaw.core.errors import UseError

    folder, equals, strength = text.rpartition("=")
    if not equals or Path(text).is_dir():  # a folder may be called lr=2e-4
        return text, 1.0
    try:
        value = float(strength)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UseError(f"{text!r}: {strength!r} is not a number: write folder=0.5")
    return folder, value


def record(given: list[str]) -> Any:
    """The plain data of a configuration: a YAML file first, then overrides; overrides alone are enough."""
    from deltaw.config import parse

    files = given[:1] if "=" not in given[0] else []
    overrides = given[len(files) :]
    return parse.load(files[0], overrides) if files else parse.override({}, overrides)


def parsed(given: list[str]) -> Any:
    """The configuration of `train` and `plan`."""
    from deltaw.config import parse

    return parse.parse(record(given))


def without_rows(found: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """A configuration in which the rows may be missing, with a name in their place; and whether they are there."""
    data, stages = found.get("data"), found.get("stages")
    if (
        isinstance(stages, list)
        and stages
        and isinstance(stages[0], dict)
        and (stages[0].get("data") or {}).get("train")
    ):
        return found, True
    if data is not None and not (isinstance(data, dict) and data.get("train") is None):
        return found, True
    return {**found, "data": {**(data or {}), "train": "(none)"}}, False
