"""deltaw chat: talk to a base and its adapters."""

import sys
from typing import Annotated

import typer

from deltaw.cli.app import app
from deltaw.cli.base import Adapters, Dtype, Mismatch, Model, Pickle, load_all


@app.command()
def chat(
    model: Model = None,
    adapter: Adapters = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.7,
    allow_base_mismatch: Mismatch = False,
    allow_pickle: Pickle = False,
    dtype: Dtype = "auto",
) -> None:
    """Talk to the base and its adapters. /base and /tuned switch, /clear starts anew, /quit ends."""
    from deltaw.core.route import use
    from deltaw.infer.generate import generate as answer

    base, route = load_all(model, adapter or [], dtype, allow_base_mismatch, allow_pickle)
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
