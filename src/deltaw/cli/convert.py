"""deltaw convert: an adapter of one tool as an adapter of another; another tool's configuration as ours."""

from pathlib import Path
from typing import Annotated

import typer

from deltaw.cli.app import Json, app, show, tell
from deltaw.core.text import counted


@app.command()
def convert(
    source: Annotated[
        Path,
        typer.Argument(
            help="Adapter folder or file: deltaw, PEFT, kohya/LyCORIS, diffusers, …; or a .yaml or .json configuration."
        ),
    ],
    output: Annotated[Path, typer.Option(help="Folder to write; of a configuration a YAML file.")],
    to: Annotated[str, typer.Option(help="deltaw, peft, kohya or diffusers.")] = "deltaw",
    tool: Annotated[
        str | None,
        typer.Option(
            "--from",
            help="Whose it is: peft, kohya, diffusers, loralib, mlx or torchtune. Default: as its keys say.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="The base, whose module names the file's are looked up in: folder, hub id or `tiny`; of a diffusers "
            "pipeline its folder. Only configurations are read.",
            show_default=False,
        ),
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option(help="lora_alpha of the training, for files that hold none (loralib, …).", show_default=False),
    ] = None,
    enable_lora: Annotated[
        str | None,
        typer.Option(help="Of loralib's MergedLinear: which parts, as true,false,true.", show_default=False),
    ] = None,
    allow_pickle: Annotated[bool, typer.Option("--allow-pickle", help="Read .bin and .pt too (tensors only).")] = False,
    as_json: Json = False,
) -> None:
    """Read another tool's adapter, or write one for it; what was written is read back and its change compared."""
    import dataclasses

    if source.suffix in (".yaml", ".yml", ".json"):
        given = {"--to": to != "deltaw", "--from": tool, "--model": model, "--alpha": alpha is not None,
                 "--enable-lora": enable_lora, "--allow-pickle": allow_pickle}  # fmt: skip
        _configuration(source, output, [name for name, value in given.items() if value], as_json)
        return

    from deltaw.ship.convert import convert as converted

    done = converted(
        source, output, to=to, tool=tool, model=model, alpha=alpha, enable_lora=_switches(enable_lora),
        allow_pickle=allow_pickle,
    )  # fmt: skip
    tell(source, done.notes)
    layers = ", ".join(f"{counted(count, 'layer')} of the {role}" for role, count in done.parts.items())
    text = (
        f"{done.path}: from {done.tool} to {done.to}, {layers}, {counted(done.parameters, 'parameter')}\n"
        f"read back: the change differs by at most {done.error:.2g} of itself"
    )
    show({**dataclasses.asdict(done), "notes": list(done.notes)}, as_json, text)


def _configuration(source: Path, output: Path, given: list[str], as_json: bool) -> None:
    """A configuration of LLaMA-Factory or PEFT, or a block of LoRA options, as a YAML file of ours."""
    from deltaw.config import foreign, parse
    from deltaw.core.errors import UseError
    from deltaw.core.files import write_text

    if given:
        raise UseError(f"{source} is a configuration, and {', '.join(given)} is for adapters: leave it out")
    if output.exists():
        raise UseError(f"{output} exists: give another output")
    text, left = foreign.text(parse.load(str(source)))
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text(output, text)
    head = f"{output}: written" + ("; not carried over as it was, or missing:" if left else "")
    said = [head, *(f"  {one.key}: {one.why}" for one in left)]
    record = {"config": str(output), "left": [one._asdict() for one in left]}
    show(record, as_json, "\n".join(said))


def _switches(text: str | None) -> list[bool] | None:
    from deltaw.core.errors import UseError

    words = [] if text is None else [word.strip().lower() for word in text.split(",")]
    wrong = [word for word in words if word not in ("true", "false")]
    if wrong:
        raise UseError(f"--enable-lora {text}: {wrong[0]!r} is neither true nor false: write true,false,true")
    return None if text is None else [word == "true" for word in words]
