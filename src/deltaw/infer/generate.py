"""Greedy or sampled answers of a base with whatever adapters are live, batched, through transformers' generate.

Padding is on the left, positions follow the attention mask, and the answer ends before its stop token. Prompts with images
go in batches of their own, which the base's processor makes.
"""

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.core.errors import DataError, UseError, faults
from deltaw.core.route import Route, live, use
from deltaw.data.collate import padding, with_images, zeros
from deltaw.data.conversation import Example
from deltaw.data.encode import Encoded, plain_ids, stop_token_trained
from deltaw.data.encode import prompt as pictured
from deltaw.data.images import placed
from deltaw.data.turns import messages as turns_of

Prompt = str | Sequence[dict[str, Any]]
"""A user's turn as text, or a whole conversation as messages; with images as typed parts, {"type": "image", "path": file}."""


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


def prompt_row(tokenizer: Any, prompt: Prompt, processor: Any = None, where: str = "the prompt") -> Encoded:
    """The same with its images, names seen from the working directory. UseError for turns or images that cannot be read."""
    parts = [] if isinstance(prompt, str) else [turn.get("content") for turn in prompt]
    if processor is None and not any(isinstance(part, list) for part in parts):
        return Encoded(prompt_ids(tokenizer, prompt), [])
    given = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    turns, found = turns_of(given, "the prompt")
    row, wrong = placed(Example(tuple(turns), 0), {}, None)
    if found + wrong:
        raise faults(UseError, where, found + wrong)
    if processor is None and not row.images:
        return Encoded(prompt_ids(tokenizer, prompt), [])
    if not getattr(tokenizer, "chat_template", None):
        return Encoded(prompt_ids(tokenizer, prompt), []) if not row.images else pictured(turns, tokenizer, where=where)
    return pictured(row.messages, tokenizer, (), processor, where)


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
    processor: Any = None,
) -> list[str]:
    """One answer per prompt, in order. temperature 0 is greedy; with `seed` sampling repeats.

    routes: adapters for each prompt by itself, as `use` takes them; prompts of different adapters share a batch.
    processor: that of a base which reads images.
    """
    encoded = [prompt_row(tokenizer, p, processor, f"prompt {number}") for number, p in enumerate(prompts, 1)]
    return answer_all(
        model, tokenizer, encoded, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed,
        batch_size=batch_size, routes=routes, processor=processor,
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
    encoded: Sequence[list[int] | Encoded],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    batch_size: int = 32,
    routes: Sequence[Route | str] | None = None,
    processor: Any = None,
) -> list[str]:
    """As `generate`, for prompts that are token ids already, or encoded with their images."""
    check_sampling(max_new_tokens, temperature, top_p)
    live(model)  # no rows of some other batch
    rows = [one if isinstance(one, Encoded) else Encoded(one, []) for one in encoded]
    if routes is not None and len(routes) != len(rows):
        raise UseError(f"{len(routes)} routes for {len(rows)} prompts: give one for each, {{}} for the base")
    device = next(model.parameters()).device
    pad = padding(tokenizer)
    stops = stop_tokens(model, tokenizer, processor)
    limit = _limit(model)
    for number, row in enumerate(rows, 1):
        if not row.ids:
            raise UseError(f"prompt {number} is empty: give at least one word")
        if limit is not None and len(row.ids) >= limit:
            raise UseError(f"prompt {number} has {len(row.ids)} tokens, the base reads at most {limit}: shorten it")
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
        for numbers in _batches(rows, batch_size, max_new_tokens, limit):
            inputs = _inputs([rows[number] for number in numbers], pad, processor)
            width = inputs["input_ids"].shape[1]
            room = max_new_tokens if limit is None else min(max_new_tokens, limit - width)
            chosen = contextlib.nullcontext() if routes is None else use(model, [routes[number] for number in numbers])
            with torch.no_grad(), chosen:
                out = model.generate(
                    **{key: value.to(device) for key, value in inputs.items()}, max_new_tokens=room, pad_token_id=pad,
                    eos_token_id=stops or None, **sampling,
                )  # fmt: skip
            answers |= dict(zip(numbers, tokenizer.batch_decode(out[:, width:], skip_special_tokens=True), strict=True))
    finally:
        model.train(training)
    return [answers[number].strip() for number in range(len(rows))]


def _limit(model: nn.Module) -> int | None:
    """The longest row that the model reads, where its configuration says one."""
    config: Any = model.config
    return getattr(
        config.get_text_config() if hasattr(config, "get_text_config") else config, "max_position_embeddings", None
    )


def _inputs(rows: Sequence[Encoded], pad: int, processor: Any) -> dict[str, Tensor]:
    """A batch padded on the left: input_ids, attention_mask [B, T], and what the model takes beside them."""
    if rows[0].images:
        return with_images(rows, processor, "left")
    width = max(len(row.ids) for row in rows)
    ids = torch.tensor([[pad] * (width - len(row.ids)) + row.ids for row in rows])
    mask = torch.tensor([[0] * (width - len(row.ids)) + [1] * len(row.ids) for row in rows])
    return {"input_ids": ids, "attention_mask": mask, **({} if processor is None else zeros(ids, processor))}


def stop_tokens(model: nn.Module, tokenizer: Any, processor: Any = None) -> list[int]:
    """What ends an answer: the tokenizer's end of text, the model's own stops, and the token that training ends turns with."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])}
    if getattr(tokenizer, "chat_template", None):
        with contextlib.suppress(DataError):  # a template that cannot be trained still has the stops above
            found.add(stop_token_trained(tokenizer, processor))
    return sorted(token for token in found if token is not None)


def _batches(rows: Sequence[Encoded], size: int, new: int, limit: int | None) -> list[list[int]]:
    """Numbers of the prompts in batches; one with little room for its answer goes alone, it would shorten the others'."""
    tight = [n for n, row in enumerate(rows) if limit is not None and limit - len(row.ids) < new]
    free = [n for n in range(len(rows)) if n not in set(tight)]
    # the widest of a batch sets the room of all: like lengths together
    widths = sorted(free, key=lambda n: len(rows[n].ids))
    kinds = ([n for n in widths if bool(rows[n].images) is with_any] for with_any in (False, True))
    return [kind[i : i + size] for kind in kinds for i in range(0, len(kind), size)] + [[n] for n in tight]
