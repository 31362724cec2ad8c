"""deltaw eval, generate, chat: a base, with or without adapters on it."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from deltaw.cli.main import Json, app, show

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
Dtype = Annotated[str, typer.Option(help="auto, fp32 or bf16.")]


def load_all(model: str | None, adapters: list[str], dtype: str, mismatch: bool) -> tuple[Any, dict[str, float]]:
    """The base with every adapter loaded, none of them live yet, and the route that makes them live."""
    from deltaw.core.errors import UseError
    from deltaw.core.route import use
    from deltaw.models.adapters import load
    from deltaw.models.base import DTYPES, base_of_adapter, load_base

    if dtype not in ("auto", *DTYPES):
        raise UseError(f"--dtype {dtype} is none of auto, {', '.join(DTYPES)}")
    folders = [_strength(text) for text in adapters]
    if model is None and not folders:
        raise UseError("give a base with --model, or an adapter with --adapter that names one")
    base = load_base(model or base_of_adapter(Path(folders[0][0])), dtype=dtype)
    route = {}
    for number, (folder, strength) in enumerate(folders):
        load(base.model, folder, name=f"adapter{number}", allow_base_mismatch=mismatch)
        route[f"adapter{number}"] = strength
    use(base.model, {})
    return base, route


def _strength(text: str) -> tuple[str, float]:
    from deltaw.core.errors import UseError

    folder, equals, strength = text.rpartition("=")
    if not equals:
        return text, 1.0
    try:
        return folder, float(strength)
    except ValueError:
        raise UseError(f"--adapter {text!r}: {strength!r} is not a strength: write folder=0.5") from None


@app.command("eval")
def evaluate(
    data: Annotated[str, typer.Option(help="Held-out rows: .jsonl, .json or a folder.")],
    model: Model = None,
    adapter: Adapters = None,
    generations: Annotated[
        int | None,
        typer.Option(help="Rows to generate answers for (exact match); default all, 0 none.", show_default=False),
    ] = None,
    allow_base_mismatch: Mismatch = False,
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Held-out loss, perplexity and exact match: the base and the tuned model side by side."""
    from deltaw.data.rows import read_rows

    rows = read_rows(data)
    from deltaw.core.route import use
    from deltaw.infer import evaluate as infer

    base, route = load_all(model, adapter or [], dtype, allow_base_mismatch)
    result: dict[str, Any] = {"model": base.name, "rows": len(rows.rows)}
    for name, live in {"base": {}, "tuned": route}.items():
        if name == "base" or route:
            with use(base.model, live):
                found = infer.evaluate(
                    base.model, base.tokenizer, rows, max_length=base.max_length, generations=generations
                )
            result[name] = found.to_dict()
    columns = [name for name in ("base", "tuned") if name in result]
    lines = [f"{'':12}" + "".join(f"{name:>12}" for name in columns)]
    for key in ("loss", "perplexity", "exact_match"):
        if key in result["base"]:
            lines.append(f"{key:12}" + "".join(f"{result[name][key]:12.4f}" for name in columns))
    show(result, as_json, "\n".join(lines))


@app.command()
def generate(
    prompt: Annotated[
        list[str] | None, typer.Argument(help="Prompts; without any, lines from stdin.", show_default=False)
    ] = None,
    model: Model = None,
    adapter: Adapters = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Nucleus for sampling.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeat.", show_default=False)] = None,
    allow_base_mismatch: Mismatch = False,
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Answer prompts with the base and its adapters."""
    from deltaw.core.errors import UseError

    prompts = prompt or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not prompts:
        raise UseError("no prompt: give one as an argument or on stdin")
    from deltaw.core.route import use
    from deltaw.infer.generate import generate as answer

    base, route = load_all(model, adapter or [], dtype, allow_base_mismatch)
    with use(base.model, route):
        answers = answer(
            base.model,
            base.tokenizer,
            prompts,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
        )
    show({"model": base.name, "answers": answers}, as_json, "\n".join(answers))


@app.command()
def chat(
    model: Model = None,
    adapter: Adapters = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.7,
    allow_base_mismatch: Mismatch = False,
    dtype: Dtype = "auto",
) -> None:
    """Talk to the base and its adapters. /base and /tuned switch, /clear starts anew, /quit ends."""
    from deltaw.core.route import use
    from deltaw.infer.generate import generate as answer

    base, route = load_all(model, adapter or [], dtype, allow_base_mismatch)
    live, messages = route, []
    print(f"{base.name} with {', '.join(adapter or []) or 'no adapter'}. /base /tuned /clear /quit", file=sys.stderr)
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            break
        if text == "/quit":
            break
        if text in ("/base", "/tuned"):
            live = {} if text == "/base" else route
        elif text == "/clear":
            messages = []
        elif text:
            messages.append({"role": "user", "content": text})
            with use(base.model, live):
                said = answer(
                    base.model, base.tokenizer, [messages], max_new_tokens=max_new_tokens, temperature=temperature
                )[0]
            messages.append({"role": "assistant", "content": said})
            print(said)
