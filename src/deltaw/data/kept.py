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

from deltaw.core.errors import FileError

TEMPLATE, TOKENS = "chat_template.jinja", "tokens.json"


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


def kept(tokenizer: Any, own_template: bool, tokens: Tokens) -> dict[str, str]:
    """The files to write beside an adapter: name → text."""
    files = {TEMPLATE: tokenizer.chat_template} if own_template else {}
    return files | ({TOKENS: json.dumps(tokens.ids, indent=1, ensure_ascii=False) + "\n"} if tokens.ids else {})


def use_kept(tokenizer: Any, folder: Path) -> None:
    """Give the tokenizer what an adapter keeps: another template than in training costs half of what was learnt.

    FileError where a token does not get the id that the adapter has a row for.
    """
    if (folder / TEMPLATE).is_file():
        tokenizer.chat_template = (folder / TEMPLATE).read_text(encoding="utf-8")
    wanted = kept_tokens(folder)
    found = add_tokens(tokenizer, list(wanted)).ids
    wrong = [token for token, number in wanted.items() if found[token] != number]
    if wrong:
        raise FileError(
            f"{folder}: the token {wrong[0]!r} was {wanted[wrong[0]]} in training and is {found[wrong[0]]} here: another "
            "adapter's new tokens took its place, load one of them at a time; or it is another tokenizer"
        )


def kept_tokens(folder: Path) -> dict[str, int]:
    """The tokens of an adapter folder and their ids; none where it has no tokens of its own."""
    file = folder / TOKENS
    if not file.is_file():
        return {}
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise FileError(f"{file} cannot be read: {error}; fetch the adapter's folder again") from None
    if not isinstance(record, dict) or not all(type(number) is int for number in record.values()):
        raise FileError(f"{file} is not a table {{token: id}}: fetch the adapter's folder again")
    return record
