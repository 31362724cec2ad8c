"""Greedy or sampled answers of a base with whatever adapters are live, batched, through transformers' generate.

Padding is on the left, positions follow the attention mask, and the answer ends before its stop token.
"""

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from deltaw.core.errors import DataError, UseError, faults
from deltaw.core.route import Route, live, use
from deltaw.data.collate import padding
from deltaw.data.encode import plain_ids, stop_token_trained

Prompt = str | Sequence[dict[str, str]]
"""A user's turn as text, or a whole conversation as messages."""


def prompt_ids(tokenizer: Any, prompt: Prompt) -> list[int]:
    """Token ids up to the point where the answer begins: through the chat template where there is one, else the text."""
    if getattr(tokenizer, "chat_template", None):
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)[
            "input_ids"
        ]
    if not isinstance(prompt, str):
        if len(prompt) != 1:
            raise UseError("this base has no chat template: give the prompt as plain text, not as a conversation")
        prompt = prompt[0]["content"]
    return plain_ids(prompt, tokenizer)


def generate(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    batch_size: int = 32,
    routes: Sequence[Route | str] | None = None,
) -> list[str]:
    """One answer per prompt, in order. temperature 0 is greedy; with `seed` sampling repeats.

    routes: adapters for each prompt by itself, as `use` takes them; prompts of different adapters share a batch.
    """
    encoded = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    return answer_all(
        model, tokenizer, encoded, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed,
        batch_size=batch_size, routes=routes,
    )  # fmt: skip


def check_sampling(max_new_tokens: int, temperature: float, top_p: float) -> None:
    """UseError for settings that cannot be."""
    found = [] if 0 <= temperature < math.inf else [f"temperature={temperature} must not be negative"]
    found += [] if 0 < top_p <= 1 else [f"top_p={top_p} must be in (0, 1]"]
    found += [] if max_new_tokens >= 1 else [f"max_new_tokens={max_new_tokens} must be at least 1"]
    if found:
        raise faults(UseError, "sampling", found)


def answer_all(
    model: nn.Module,
    tokenizer: Any,
    encoded: Sequence[list[int]],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    batch_size: int = 32,
    routes: Sequence[Route | str] | None = None,
) -> list[str]:
    """As `generate`, for prompts that are token ids already."""
    check_sampling(max_new_tokens, temperature, top_p)
    live(model)  # no rows of some other batch
    if routes is not None and len(routes) != len(encoded):
        raise UseError(f"{len(routes)} routes for {len(encoded)} prompts: give one for each, {{}} for the base")
    device = next(model.parameters()).device
    pad = padding(tokenizer)
    stops = stop_tokens(model, tokenizer)
    limit = getattr(model.config, "max_position_embeddings", None)
    for number, ids in enumerate(encoded, 1):
        if not ids:
            raise UseError(f"prompt {number} is empty: give at least one word")
        if limit is not None and len(ids) >= limit:
            raise UseError(f"prompt {number} has {len(ids)} tokens, the base reads at most {limit}: shorten it")
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
        if temperature
        else {"do_sample": False}
    )
    if seed is not None:
        torch.manual_seed(seed)
    answers: dict[int, str] = {}
    training = model.training
    model.eval()
    try:
        for numbers in _batches(encoded, batch_size, max_new_tokens, limit):
            chunk = [encoded[number] for number in numbers]
            width = max(map(len, chunk))
            ids = torch.tensor([[pad] * (width - len(row)) + row for row in chunk], device=device)
            mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in chunk], device=device)
            room = max_new_tokens if limit is None else min(max_new_tokens, limit - width)
            chosen = contextlib.nullcontext() if routes is None else use(model, [routes[number] for number in numbers])
            with torch.no_grad(), chosen:
                out = model.generate(
                    input_ids=ids, attention_mask=mask, max_new_tokens=room, pad_token_id=pad,
                    eos_token_id=stops or None, **sampling,
                )  # fmt: skip
            answers |= dict(zip(numbers, tokenizer.batch_decode(out[:, width:], skip_special_tokens=True), strict=True))
    finally:
        model.train(training)
    return [answers[number].strip() for number in range(len(encoded))]


def stop_tokens(model: nn.Module, tokenizer: Any) -> list[int]:
    """What ends an answer: the tokenizer's end of text, the model's own stops, and the token that training ends turns with."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])}
    if getattr(tokenizer, "chat_template", None):
        with contextlib.suppress(DataError):  # a template that cannot be trained still has the stops above
            found.add(stop_token_trained(tokenizer))
    return sorted(token for token in found if token is not None)


def _batches(encoded: Sequence[list[int]], size: int, new: int, limit: int | None) -> list[list[int]]:
    """Numbers of the prompts in batches; one with little room for its answer goes alone, it would shorten the others'."""
    tight = [n for n, ids in enumerate(encoded) if limit is not None and limit - len(ids) < new]
    free = [n for n in range(len(encoded)) if n not in set(tight)]
    # the widest of a batch sets the room of all: like lengths together
    widths = sorted(free, key=lambda n: len(encoded[n]))
    return [widths[i : i + size] for i in range(0, len(widths), size)] + [[n] for n in tight]
