"""A configuration → rows as tokens, with no weight loaded: faults in rows, template and mask stop here, before they cost.

config → sources → rows → (tokenizer, template) → encoded rows, report
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltaw.config.schema import Config, DataConfig, Source
from deltaw.core.errors import ConfigError
from deltaw.data.dataset import DataReport, encode_rows, split
from deltaw.data.encode import Encoded, Policy
from deltaw.data.kept import TEMPLATE, Tokens, add_tokens, kept_tokens
from deltaw.data.preview import preview
from deltaw.data.rows import Rows, read_rows
from deltaw.data.sources import named
from deltaw.data.template import template
from deltaw.models.base import DEFAULT_LENGTH, load_tokenizer


@dataclass(frozen=True)
class Prepared:
    """What a run learns from, and what it is held against."""

    tokenizer: Any
    encoded: list[Encoded]
    report: DataReport
    held_out: list[Encoded]
    held_out_rows: Rows | None
    held_out_report: DataReport | None
    policy: Policy
    own_template: bool
    """Is the template another one than the base's own?"""
    tokens: Tokens
    """Tokens whose rows are trained."""

    @property
    def held_out_said(self) -> str:
        if self.held_out_report is None:
            return "held out none"
        lost = ", ".join(f"{reason}: {count:,}" for reason, count in self.held_out_report.dropped.items())
        return f"held out {len(self.held_out):,} rows" + (f", left out {lost}" if lost else "")

    def previews(self, count: int, most: int = 2000) -> list[str]:
        """The text of the first rows with what they learn between ⟦ and ⟧; long ones lose their middle."""
        texts = [preview(row, self.tokenizer).rstrip("\n") for row in self.encoded[:count]]
        return [text if len(text) <= most else f"{text[: most // 2]} … {text[-most // 2 :]}" for text in texts]

    def shown(self, count: int = 1, most: int = 600) -> str:
        """The same for people."""
        parts = ("\n".join(f"  {line}" for line in text.split("\n")) for text in self.previews(count, most))
        return "learnt between ⟦ and ⟧:\n" + "\n  ---\n".join(parts)


def prepare(config: Config) -> Prepared:
    """Read, split and encode the rows. Raises DataError, ConfigError, FileError (the tokenizer)."""
    d = config.data
    parent = None if config.adapter.start is None else Path(config.adapter.start)
    given = d.template or (str(parent / TEMPLATE) if parent and (parent / TEMPLATE).is_file() else None)
    chat = template(given) if given else None
    rows, held_out = read_rows(_sources(d, d.train)), None
    if isinstance(d.eval, float):
        unwanted = [row for row in rows.rows if row.good is False]  # counted, but not drawn for either side
        rows, held_out = split(dataclasses.replace(rows, rows=[r for r in rows.rows if r.good is not False]), d.eval)
        rows = dataclasses.replace(rows, rows=rows.rows + unwanted)
    elif d.eval:
        held_out = read_rows(_sources(d, d.eval))
    tokenizer, limit = load_tokenizer(config.model)
    if d.max_length is not None and limit is not None and d.max_length > limit:
        raise ConfigError(f"data.max_length={d.max_length} is more than {config.model!r} reads: at most {limit} tokens")
    if chat is not None:
        tokenizer.chat_template = chat
    tokens = add_tokens(tokenizer, list(kept_tokens(parent)) if parent else d.tokens)
    policy = Policy(
        d.max_length or min(DEFAULT_LENGTH, limit or DEFAULT_LENGTH), d.train_on_prompt, d.turns, d.overflow
    )
    encoded, report = encode_rows(rows, tokenizer, policy, objective=config.train.objective, pairs=d.pairs)
    evaluated: list[Encoded] = []
    held_report = None
    if held_out is not None:
        evaluated, held_report = encode_rows(
            held_out, tokenizer, policy, objective=config.train.objective, pairs=d.pairs
        )
    return Prepared(tokenizer, encoded, report, evaluated, held_out, held_report, policy, chat is not None, tokens)


def _sources(data: DataConfig, given: str | Source | tuple[str | Source, ...]) -> list[Source]:
    """The sources, with the columns and the pattern of the whole section where they have none of their own."""
    listed = [named(one) for one in (given if isinstance(given, tuple) else (given,))]
    return [
        dataclasses.replace(one, columns=one.columns or data.columns, pattern=one.pattern or data.pattern)
        for one in listed
    ]
