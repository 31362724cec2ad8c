"""A conversation → token ids, and labels that are the ids of the assistant's turns and -100 everywhere else.

Where an answer begins and ends is not searched for by markers, it is measured: the chat template is rendered up to the
point where the model would begin to answer, and again with the answer in it; the difference is what it must learn, up
to and with the token that makes it stop.

    ids      <|user|> \\n  hello <|end|> \\n <|assistant|> \\n   hi   <|end|>   \\n
    labels    -100  -100  -100   -100  -100     -100     -100  hi   <|end|>  -100
"""

from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from deltaw.core.errors import DataError
from deltaw.data.forms import Message
from deltaw.data.rows import Example

IGNORE = -100


@dataclass(frozen=True)
class Encoded:
    """One row as tokens; labels are as long as ids and not shifted."""

    ids: list[int]
    labels: list[int]

    @property
    def supervised(self) -> int:
        """Positions that give a loss. The first token is predicted from nothing and gives none."""
        return sum(label != IGNORE for label in self.labels[1:])


@dataclass(frozen=True)
class Dropped:
    """A row left out, counted under its reason; `length` is what it would have taken."""

    reason: str
    length: int


def encode(example: Example, tokenizer: Any, max_length: int, train_on_prompt: bool = False) -> Encoded | Dropped:
    """Tokens and labels of a row, or why it is left out: a row is never cut, since its stop token would be lost.

    Without a chat template a prompt-completion row is its prompt, its completion and the end-of-text token. DataError
    where that cannot be done, or where the template does not let the answers be told from the rest.
    """
    ids, spans = _templated(example, tokenizer) if tokenizer.chat_template else _plain(example, tokenizer)
    if len(ids) > max_length:
        return Dropped(f"longer than {max_length} tokens", len(ids))
    labels = list(ids) if train_on_prompt else [IGNORE] * len(ids)
    for start, stop in spans:
        labels[start:stop] = ids[start:stop]
    encoded = Encoded(ids, labels)
    return encoded if encoded.supervised else Dropped("no token to learn", len(ids))


def prompt_ids(messages: tuple[Message, ...], tokenizer: Any) -> list[int]:
    """Tokens up to the point where the answer begins: the same in training and in generation."""
    if tokenizer.chat_template:
        return _tokens(_render(messages, tokenizer, answer=True), tokenizer)
    ids = tokenizer(messages[-1].content, add_special_tokens=True)["input_ids"]
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids  # some tokenizers close every text


def stop_token_trained(tokenizer: Any) -> int:
    """The token that ends an answer, seen to be supervised on a probe row; DataError where none is.

    A model whose stop token is never supervised learns to answer and not to stop, while its loss looks fine.
    """
    probe = Example((Message("user", "hello"), Message("assistant", "yes")), 0, "a probe row", completion=True)
    found = encode(probe, tokenizer, 1 << 20)
    assert isinstance(found, Encoded)
    return next(label for label in reversed(found.labels) if label != IGNORE)


Spans = list[tuple[int, int]]


def _plain(example: Example, tokenizer: Any) -> tuple[list[int], Spans]:
    if not example.completion:
        raise DataError(
            f"{example.where} is a conversation and the base has no chat template to render it with: "
            "write the rows as prompt and completion, with the line breaks between them, or take a base with a template"
        )
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no end-of-text token, so answers would never stop: set its eos_token")
    prompt = prompt_ids(example.messages[:-1], tokenizer)
    answer = tokenizer(example.messages[-1].content, add_special_tokens=False)["input_ids"]
    ids = [*prompt, *answer, tokenizer.eos_token_id]
    return ids, [(len(prompt), len(ids))]


def _templated(example: Example, tokenizer: Any) -> tuple[list[int], Spans]:
    messages = example.messages
    try:
        text = _render(messages, tokenizer)
        ids = _tokens(text, tokenizer)
        spans = []
        for number, message in enumerate(messages):
            if message.role != "assistant":
                continue
            before = _begins(_render(messages[:number], tokenizer, answer=True), text, ids, tokenizer)
            last = number + 1 == len(messages)
            after = len(ids) if last else _begins(_render(messages[: number + 1], tokenizer), text, ids, tokenizer)
            spans.append((before, _stop(ids, before, after, tokenizer)))
    except (TemplateError, _Unfit) as error:
        raise DataError(f"{example.where} does not go through the chat template: {error}") from None
    return ids, spans


class _Unfit(Exception):
    """The template's rendering cannot be divided into turns."""


def _begins(start: str, text: str, ids: list[int], tokenizer: Any) -> int:
    """Number of tokens of `start`, which must be how `text` and its `ids` begin."""
    if not text.startswith(start):
        raise _Unfit(
            "it writes earlier turns differently once later ones follow (it is not prefix-preserving), so that training "
            "would see other tokens than generation: use a template made for training, or rows of a single answer"
        )
    head = _tokens(start, tokenizer)
    if ids[: len(head)] != head:
        raise _Unfit(
            "the answer's first characters merge with the template's into one token: "
            "remove white space at the beginning of the answer"
        )
    return len(head)


def _stop(ids: list[int], start: int, end: int, tokenizer: Any) -> int:
    """Position after the token that ends the turn: the end-of-text token, else another special one."""
    special = {tokenizer.eos_token_id}
    if tokenizer.eos_token_id not in ids[start:end]:
        special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    for place in range(end, start, -1):
        if ids[place - 1] in special:
            return place
    raise _Unfit(
        f"it does not end the answer with the end-of-text token ({tokenizer.eos_token!r}) or another special token, so that "
        "the model would never learn to stop: add it after the assistant's content in the template"
    )


def _render(messages: tuple[Message, ...], tokenizer: Any, answer: bool = False) -> str:
    turns = [{"role": message.role, "content": message.content} for message in messages]
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=answer)


def _tokens(text: str, tokenizer: Any) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]
