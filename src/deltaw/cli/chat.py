"""deltaw chat: talk to a base and its adapters."""

import sys
from typing import Annotated

import typer

from deltaw.cli.app import app
from deltaw.cli.base import Adapters, Dtype, Mismatch, Model, Pickle, Quantize, load_all

COMMANDS = "/base /tuned /clear /quit"


@app.command()
def chat(
    model: Model = None,
    adapter: Adapters = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.7,
    allow_base_mismatch: Mismatch = False,
    allow_pickle: Pickle = False,
    dtype: Dtype = "auto",
    quantize: Quantize = None,
) -> None:
    """Talk to the base and its adapters. /base and /tuned switch, /clear starts anew, /quit ends."""
    from deltaw.core.errors import DeltawError
    from deltaw.core.route import use
    from deltaw.infer.generate import check_sampling
    from deltaw.infer.generate import generate as answer

    check_sampling(max_new_tokens, temperature, 1.0)
    base, route, _ = load_all(model, adapter or [], dtype, allow_base_mismatch, allow_pickle, quantize)
    live, messages = route, []
    print(f"{base.name} with {', '.join(adapter or []) or 'no adapter'}. {COMMANDS}", file=sys.stderr)
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        text = line.strip()
        if not line or text == "/quit":
            break
        if text in ("/base", "/tuned"):
            live = {} if text == "/base" else route
        elif text == "/clear":
            messages = []
        elif text.startswith("/"):
            print(f"no command {text.split()[0]}; there are {COMMANDS}", file=sys.stderr)
        elif text:
            asked = [*messages, {"role": "user", "content": text.encode("utf-8", "replace").decode()}]
            try:
                with use(base.model, live):
                    said = answer(
                        base.model, base.tokenizer, [asked], max_new_tokens=max_new_tokens, temperature=temperature,
                        processor=base.processor,
                    )[0]  # fmt: skip
            except DeltawError as error:  # the conversation goes on without this turn
                print(f"error: {error}; /clear starts the conversation anew", file=sys.stderr)
                continue
            messages = [*asked, {"role": "assistant", "content": said}]
            print(said, flush=True)
