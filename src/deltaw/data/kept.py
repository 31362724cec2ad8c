"""What an adapter needs of its tokenizer, kept in text files beside its tensors: a template and tokens of its own.

    chat_template.jinja   the template it was trained with, where that is not the base's
    tokens.json           {token: id} of the tokens whose rows it brings

A token that the vocabulary lacks is added to the tokenizer, and its row to the adapter (`methods.token_rows`); the base
keeps its size. Tokens that stand in the template are control tokens: no text may hold them, and answers leave them out.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deltaw.core.errors import FileError, UseError, faults
from deltaw.core.files import read_json
from deltaw.formats.directory import TEMPLATE, TOKENS


@dataclass(frozen=True)
class Tokens:
    """Tokens whose rows are trained."""

    ids: Mapping[str, int] = field(default_factory=dict)
    pieces: Mapping[int, Sequence[int]] = field(default_factory=dict)
    """Of those that were added: the ids that spelled the token before."""


def add_tokens(tokenizer: Any, tokens: Sequence[str]) -> Tokens:
    """Make each of `tokens` one token of `tokenizer`, whose template must be set before."""
    known = tokenizer.get_vocab()
    fresh = [token for token in tokens if token not in known]
    spelled = [tokenizer(token, add_special_tokens=False)["input_ids"] for token in fresh]
    template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else ""
    control = [token for token in fresh if token in template]
    from_text = [token for token in fresh if token not in template]
    tokenizer.add_tokens(control, special_tokens=True)
    tokenizer.add_tokens(from_text)
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in tokens}
    return Tokens(ids, {ids[token]: pieces for token, pieces in zip(fresh, spelled, strict=True)})


@dataclass(frozen=True)
class Kept:
    """What one adapter keeps of its tokenizer."""

    template: str | None = None
    tokens: Mapping[str, int] = field(default_factory=dict)
    folder: Path | None = field(default=None, compare=False)
    """Where it was read."""

    @property
    def files(self) -> dict[str, str]:
        """The files to write beside the adapter: name → text."""
        files = {} if self.template is None else {TEMPLATE: self.template}
        return files | ({TOKENS: json.dumps(self.tokens, indent=1, ensure_ascii=False) + "\n"} if self.tokens else {})

    def give(self, tokenizer: Any) -> Tokens:
        """Give it to a tokenizer. FileError where a token does not get the id that the adapter has a row for."""
        if self.template is not None:
            tokenizer.chat_template = self.template
        found = add_tokens(tokenizer, list(self.tokens))
        wrong = [token for token, number in self.tokens.items() if found.ids[token] != number]
        if wrong:
            raise FileError(
                f"{self.folder}: the token {wrong[0]!r} was {self.tokens[wrong[0]]} in training and is "
                f"{found.ids[wrong[0]]} here: another adapter's new tokens took its place, load one of them at a time; "
                "or it is another tokenizer"
            )
        return found


def use_kept(tokenizer: Any, folder: str | Path) -> Tokens:
    """Give the tokenizer what an adapter folder keeps: another template than in training costs half of what was learnt.

    FileError where a token does not get the id that the adapter has a row for.
    """
    return read_kept(Path(folder)).give(tokenizer)


def read_kept(folder: Path) -> Kept:
    """What an adapter folder keeps; nothing where it has neither file. FileError where one cannot be read."""
    template, tokens, again = folder / TEMPLATE, folder / TOKENS, "fetch the adapter's folder again"
    try:
        text = template.read_text(encoding="utf-8") if template.is_file() else None
    except (ValueError, OSError) as error:
        raise FileError(f"{template} cannot be read: {error}; {again}") from None
    record = read_json(tokens, again) if tokens.is_file() else {}
    if not all(type(number) is int for number in record.values()):
        raise FileError(f"{tokens} is not a table {{token: id}}; {again}")
    return Kept(text, record, folder)


def together(parts: Sequence[Kept], own: str | None = None) -> Kept:
    """What several adapters keep, as one tokenizer can have it. UseError where they want different things of it.

    own: the base's template, which those without a template were trained with.
    """
    found, tokens, first = [], dict[str, int](), parts[0] if parts else Kept()
    for one in parts[1:]:
        if (one.template or own) != (first.template or own):
            found.append(
                f"{first.folder} and {one.folder} were trained with different templates: use one at a time, or copy the "
                f"{TEMPLATE} to go by into the other folder"
            )
    for one in parts:
        taken = {number: token for token, number in tokens.items()}
        for token, number in one.tokens.items():
            if tokens.get(token, number) != number or taken.get(number, token) != token:
                found.append(
                    f"{one.folder}: its token {token!r} is {number}, which another of these adapters has otherwise: use one "
                    "at a time, or train one from the other (adapter.from)"
                )
                break
        tokens |= one.tokens
    if found:
        raise faults(UseError, "these adapters do not go together", found)
    ordered = dict(sorted(tokens.items(), key=lambda item: item[1]))  # new ones are added in the order of their ids
    return Kept(next((one.template for one in parts if one.template is not None), None), ordered)
