"""A row → token ids, and labels that are the ids of the assistant's turns and -100 everywhere else.

Where an answer begins and ends is not searched for by markers, it is measured: the chat template is rendered up to the
point where the model would begin to answer, and again with the answer in it; the difference is what it must learn, up
to and with the token that makes it stop.

    ids      <|user|> \\n  hello <|end|> \\n <|assistant|> \\n   hi   <|end|>   \\n
    labels    -100  -100  -100   -100  -100     -100     -100  hi   <|end|>  -100
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jinja2 import TemplateError

from deltaw.core.errors import DataError
from deltaw.data.conversation import Example, Message
from deltaw.data.processors import Reader, reader
from deltaw.data.template import Unfit, render, unwritten

IGNORE = -100


@dataclass(frozen=True)
class Policy:
    """How rows become tokens."""

    max_length: int
    train_on_prompt: bool = False
    """Supervise everything, not only the answers."""
    turns: Literal["all", "last"] = "all"
    """Which of the assistant's turns are learnt."""
    overflow: Literal["drop", "cut"] = "drop"
    """A row that is too long: drop it, or cut its beginning away; its end, with the stop token, always stays. A row with
    images is dropped: half of an image is none."""


@dataclass(frozen=True)
class Encoded:
    """One row as tokens; labels are as long as ids and not shifted."""

    ids: list[int]
    labels: list[int]
    cut: int = 0
    """Tokens cut away at its beginning."""
    text: str = ""
    """What the processor reads, with one placeholder for each image; empty where the base has no processor."""
    images: tuple[Path, ...] = ()
    """Files of its images, in order."""

    @property
    def supervised(self) -> int:
        """Positions that give a loss. The first token is predicted from nothing and gives none."""
        return sum(label != IGNORE for label in self.labels[1:])


@dataclass(frozen=True)
class Dropped:
    """A row left out, counted under its reason; `length` is what it would have taken."""

    reason: str
    length: int


CONTROL = "a control token in the text"
IMAGELESS = "no image for"
"""How the reason begins where the token of an image stands in a row that names none."""


def encode(row: Example, tokenizer: Any, policy: Policy, processor: Any = None) -> list[Encoded] | Dropped:
    """Tokens and labels of a row, or why it is left out. A text gives as many pieces as it is long.

    Without a chat template a prompt-completion row is its prompt, its completion and the end-of-text token. DataError
    where that cannot be done, or where the template does not let the answers be told from the rest. processor: that of a
    base which reads images; tokens of images are never learnt.
    """
    if row.text is not None:
        return _pieces(row.text, tokenizer, policy.max_length)
    if policy.train_on_prompt and not all(m.learn for m in row.messages):
        raise DataError(
            f"{row.where} marks turns as context only, data.train_on_prompt learns everything: choose one of them"
        )
    read = None if processor is None else reader(processor)
    _readable(row.messages, row.where, tokenizer, read)
    if read is not None and _control(row, tokenizer, read.token):  # the template would write too many placeholders
        alone = not row.images and not _control(row, tokenizer, but=read.token)
        reason = f"{IMAGELESS} {read.token} in the text" if alone else CONTROL
        return Dropped(reason, len(_tokens(" ".join(m.content for m in row.messages), tokenizer)))
    ids, spans, text = (_templated if tokenizer.chat_template else _plain)(row, tokenizer, policy, read)
    if _control(row, tokenizer):
        return Dropped(CONTROL, len(ids))
    labels = list(ids) if policy.train_on_prompt else [IGNORE] * len(ids)
    for start, stop in spans:
        labels[start:stop] = ids[start:stop]
    images = row.images
    if read is not None and images:
        silent = frozenset().union(*(read.never_learnt(image, tokenizer) for image in images))
        labels = [IGNORE if label in silent else label for label in labels]
    over = len(ids) - policy.max_length
    if over > 0 and (policy.overflow == "drop" or images):
        return Dropped(f"longer than {policy.max_length} tokens", len(ids))
    if over > 0:
        kept = ids[:1] if ids[0] == tokenizer.bos_token_id else []
        start = over + len(kept)
        encoded = Encoded(kept + ids[start:], [IGNORE] * len(kept) + labels[start:], cut=start - len(kept))
    else:
        encoded = Encoded(ids, labels, text=text, images=images)
    return [encoded] if encoded.supervised else Dropped("no token to learn", len(ids))


def prompt_ids(messages: tuple[Message, ...], tokenizer: Any, tools: tuple[str, ...] = ()) -> list[int]:
    """Tokens up to the point where the answer begins: the same in training and in generation."""
    if tokenizer.chat_template:
        return _tokens(render(messages, tokenizer, tools, answer=True), tokenizer)
    return plain_ids(messages[-1].content, tokenizer)


def prompt(
    messages: Sequence[Message],
    tokenizer: Any,
    tools: Sequence[str] = (),
    processor: Any = None,
    where: str = "a prompt",
) -> Encoded:
    """The same where images may stand in it, with what the processor reads; nothing is labelled."""
    read = None if processor is None else reader(processor)
    _readable(messages, where, tokenizer, read)
    if read is None or not tokenizer.chat_template:
        return Encoded(prompt_ids(tuple(messages), tokenizer, tuple(tools)), [])
    images = tuple(image for m in messages for image in m.images)
    try:
        text = render(messages, tokenizer, tools, answer=True, content=read.content(messages, tokenizer, tools))
        ids = _tokens(read.expanded(text, images), tokenizer)
    except (TemplateError, Unfit) as error:
        raise DataError(f"{where} does not go through the chat template: {error}") from None
    return Encoded(ids, [], text=text, images=images)


def plain_ids(text: str, tokenizer: Any) -> list[int]:
    """Tokens of a text that something follows."""
    ids: list[int] = tokenizer(text, add_special_tokens=True)["input_ids"]
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids  # some tokenizers close every text


def stop_token_trained(tokenizer: Any, processor: Any = None) -> int:
    """The token that ends an answer, seen to be supervised on a probe row; DataError where none is.

    A model whose stop token is never supervised learns to answer and not to stop, while its loss looks fine.
    """
    probe = Example((Message("user", "hello"), Message("assistant", "yes")), 0, "a probe row", completion=True)
    found = encode(probe, tokenizer, Policy(1 << 20), processor)
    assert isinstance(found, list)
    return next(label for label in reversed(found[0].labels) if label != IGNORE)


Spans = list[tuple[int, int]]


def _pieces(text: str, tokenizer: Any, length: int) -> list[Encoded] | Dropped:
    """A text with its end token in pieces of `length`; each begins with the last token of the one before it, so that
    every token but the first is predicted once."""
    ids = tokenizer(text, add_special_tokens=True)["input_ids"]
    if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
        ids = [*ids, tokenizer.eos_token_id]
    if len(ids) < 2:
        return Dropped("no token to learn", len(ids))
    parts = [ids[start : start + length] for start in range(0, len(ids) - 1, length - 1)]
    return [Encoded(part, list(part)) for part in parts]


def _readable(messages: Sequence[Message], where: str, tokenizer: Any, read: Reader | None) -> None:
    """DataError for images that the base does not read."""
    if any(m.images for m in messages):
        if read is None:
            raise DataError(f"{where} holds an image, and this base reads none: choose one that does, or leave it out")
        if not tokenizer.chat_template:
            raise DataError(
                f"{where} holds an image and the base has no chat template: set data.template (plain fits any base)"
            )


def _plain(row: Example, tokenizer: Any, policy: Policy, read: Reader | None) -> tuple[list[int], Spans, str]:
    if not row.completion:
        raise DataError(
            f"{row.where} is a conversation and the base has no chat template to render it with: set data.template "
            "(plain fits any base), or write the rows as prompt and completion"
        )
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no end-of-text token, so answers would never stop: set its eos_token")
    prompt = prompt_ids(row.messages[:-1], tokenizer)
    answer = tokenizer(row.messages[-1].content, add_special_tokens=False)["input_ids"]
    ids = [*prompt, *answer, tokenizer.eos_token_id]
    return ids, [(len(prompt), len(ids))], ""


def _templated(row: Example, tokenizer: Any, policy: Policy, read: Reader | None) -> tuple[list[int], Spans, str]:
    messages = row.messages
    learnt = [n for n, m in enumerate(messages) if m.role == "assistant" and m.learn]
    try:
        content = None if read is None else read.content(messages, tokenizer, row.tools)

        def write(turns: Sequence[Message], answer: bool = False) -> str:
            """What the template writes, as it is tokenised."""
            text = render(turns, tokenizer, row.tools, answer, content)
            return text if read is None else read.expanded(text, [image for m in turns for image in m.images])

        rendered = render(messages, tokenizer, row.tools, content=content)
        if missing := unwritten(messages, row.tools, rendered):
            raise Unfit(
                f"it does not write {missing}: set data.template to one that does (chatml, plain), or leave them out"
            )
        text = write(messages)
        ids = _tokens(text, tokenizer)
        spans = []
        for number in learnt if policy.turns == "all" else learnt[-1:]:
            before = _begins(write(messages[:number], answer=True), text, ids, tokenizer)
            last = number + 1 == len(messages)
            after = len(ids) if last else _begins(write(messages[: number + 1]), text, ids, tokenizer)
            spans.append((before, _stop(ids, before, after, tokenizer)))
    except (TemplateError, Unfit) as error:
        raise DataError(f"{row.where} does not go through the chat template: {error}") from None
    return ids, spans, "" if read is None else rendered


def _begins(start: str, text: str, ids: list[int], tokenizer: Any) -> int:
    """Number of tokens of `start`, which must be how `text` and its `ids` begin."""
    if not text.startswith(start):
        raise Unfit(
            "it writes earlier turns differently once later ones follow (it is not prefix-preserving), so that training "
            "would see other tokens than generation: use a template made for training, data.turns: last, "
            "or rows of a single answer"
        )
    head = _tokens(start, tokenizer)
    if ids[: len(head)] != head:
        raise Unfit(
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
    raise Unfit(
        f"it does not end the answer with the end-of-text token ({tokenizer.eos_token!r}) or another special token, so that "
        "the model would never learn to stop: add it after the assistant's content in the template"
    )


def _control(row: Example, tokenizer: Any, *more: str, but: str = "") -> bool:
    """Does someone's text hold a control token (or one of `more`, not `but`), which would be read as the template's own?"""
    special = {
        *more,
        *tokenizer.all_special_tokens,
        *(t.content for t in tokenizer.added_tokens_decoder.values() if t.special),
    } - {but}
    texts = [text for m in row.messages for text in (m.content, m.reasoning, *(t for c in m.calls for t in c)) if text]
    texts += row.tools
    return any(token in text for token in special for text in texts)


def _tokens(text: str, tokenizer: Any) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]
