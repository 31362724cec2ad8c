"""deltaw generate: answers of a base with its adapters."""

import sys
from typing import Annotated, Any

import typer

from deltaw.cli.app import Json, app, show
from deltaw.cli.base import Adapters, Dtype, Mismatch, Model, Pickle, Quantize, load_all


@app.command()
def generate(
    prompt: Annotated[
        list[str] | None, typer.Argument(help="Prompts; without any, lines from stdin.", show_default=False)
    ] = None,
    image: Annotated[
        list[str] | None,
        typer.Option(
            help="An image file for each prompt, at its marks <image> in order, else before it; may be repeated.",
            show_default=False,
        ),
    ] = None,
    model: Model = None,
    adapter: Adapters = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Nucleus for sampling.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeat.", show_default=False, min=0)] = None,
    allow_base_mismatch: Mismatch = False,
    allow_pickle: Pickle = False,
    dtype: Dtype = "auto",
    quantize: Quantize = None,
    as_json: Json = False,
) -> None:
    """Answer prompts with the base and its adapters."""
    from deltaw.core.errors import UseError

    prompts = prompt or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not prompts:
        raise UseError("no prompt: give one as an argument or on stdin")
    from deltaw.core.route import use
    from deltaw.data.turns import MARK
    from deltaw.infer.generate import check_sampling
    from deltaw.infer.generate import generate as answer

    check_sampling(max_new_tokens, temperature, top_p)
    asked = [pictured(text, image) for text in prompts] if image else prompts
    base, route, _ = load_all(model, adapter or [], dtype, allow_base_mismatch, allow_pickle, quantize)
    if base.processor is not None and not image:  # elsewhere a mark is text
        asked = [pictured(text, []) if MARK in text else text for text in prompts]
    with use(base.model, route):
        answers = answer(
            base.model,
            base.tokenizer,
            asked,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            processor=base.processor,
        )
    show({"model": base.name, "answers": answers}, as_json, "\n".join(answers))


def pictured(text: str, images: list[str]) -> list[dict[str, Any]]:
    """A prompt with its images as messages: at its marks `<image>` in order, or without any before it. UseError where marks and
    images are not as many."""
    from deltaw.core.errors import UseError
    from deltaw.core.text import counted
    from deltaw.data.turns import MARK

    texts = text.split(MARK) if MARK in text else ["" for _ in images] + [text]
    if len(texts) != len(images) + 1:
        written, given = counted(len(texts) - 1, "time"), counted(len(images), "time")
        raise UseError(f"{text!r} has {MARK} {written}, and --image is given {given}: as many of each")
    parts: list[dict[str, Any]] = [{"type": "text", "text": texts[0]}]
    for image, after in zip(images, texts[1:], strict=True):
        parts += [{"type": "image", "path": image}, {"type": "text", "text": after}]
    return [{"role": "user", "content": [part for part in parts if part.get("text") != ""]}]
