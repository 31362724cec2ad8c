"""A configuration → rows as tokens, with no weight loaded: faults in rows, template and mask stop here, before they cost.

config → sources → rows → (tokenizer, template) → encoded rows, report, checks
"""

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from deltaw.config.schema import Config, DataConfig, Source
from deltaw.core.errors import ConfigError, DataError, FileError
from deltaw.data.dataset import EVALUATE, LEARN, DataReport, Encoder, encode_rows, split
from deltaw.data.encode import Encoded, Policy
from deltaw.data.kept import Kept, Tokens, add_tokens, read_kept
from deltaw.data.observed import Observed
from deltaw.data.preflight import Check, checks, refuse
from deltaw.data.preview import LEARNT, coloured, preview, shows_colours
from deltaw.data.processors import fitting
from deltaw.data.rows import Rows, read_rows
from deltaw.data.sources import named
from deltaw.data.stream import Side, stream
from deltaw.data.template import template
from deltaw.models.base import DEFAULT_LENGTH, load_processor, load_tokenizer, read_config
from deltaw.training.general import general_rows


@dataclass(frozen=True)
class Prepared:
    """What a run learns from, and what it is held against."""

    tokenizer: Any
    encoded: Sequence[Encoded]
    report: DataReport
    held_out: Sequence[Encoded]
    held_out_rows: Rows | None
    held_out_report: DataReport | None
    policy: Policy
    tokens: Tokens
    """Tokens whose rows are trained."""
    kept: Kept
    """What the adapter keeps of the tokenizer."""
    checks: tuple[Check, ...]
    general: Sequence[Encoded] = ()
    """What forgetting is measured on."""
    processor: Any = None
    """Of a base that reads images."""

    @property
    def remarks(self) -> list[str]:
        """What is allowed and seldom meant, each a sentence."""
        return [f"{check.found}; {check.fix}" for check in self.checks if check.verdict == "warning"]

    @property
    def held_out_said(self) -> str:
        if self.held_out_report is None:
            return "held out none"
        lost = ", ".join(f"{reason}: {count:,}" for reason, count in self.held_out_report.dropped.items())
        return f"held out {len(self.held_out):,} rows" + (f", left out {lost}" if lost else "")

    @property
    def general_said(self) -> list[str]:
        tokens = sum(row.supervised for row in self.general)
        return [f"general  {tokens:,} tokens, measured before and after, never trained on"] if self.general else []

    def first(self, count: int) -> list[Encoded]:
        """The rows to show."""
        rows = list(self.encoded[:count])
        if count and self.report.cut and not any(row.cut for row in rows):
            rows += itertools.islice((row for row in self.encoded if row.cut), 1)  # what a cut leaves is worth a look
        return rows

    def previews(self, count: int, most: int = 2000) -> list[str]:
        """The text of the first rows with what they learn between ⟦ and ⟧; long ones lose their middle."""
        texts = [preview(row, self.tokenizer, self.processor).rstrip("\n") for row in self.first(count)]
        return [text if len(text) <= most else f"{text[: most // 2]} … {text[-most // 2 :]}" for text in texts]

    def shown(self, count: int = 1, most: int = 600) -> str:
        """The same for people."""
        parts = ("\n".join(f"  {line}" for line in text.split("\n")) for text in self.previews(count, most))
        return "learnt between ⟦ and ⟧:\n" + "\n  ---\n".join(parts)

    def coloured(self, count: int = 1, most: int = 600) -> Text:
        """The same for a terminal with colours."""
        parts = []
        for row in self.first(count):
            text = coloured(row, self.tokenizer, self.processor)
            text.rstrip()
            text = text if len(text) <= most else Text(" … ").join([text[: most // 2], text[-(most // 2) :]])
            parts.append(Text("\n").join(Text("  ").append(line) for line in text.split("\n", allow_blank=True)))
        return Text("learnt on ").append("green", LEARNT).append(":\n").append(Text("\n  ---\n").join(parts))

    def on(self, console: Console) -> Text | str:
        """What is shown on a console: in colours where it has them."""
        return self.coloured() if shows_colours(console) else self.shown()


def brought(config: Config, checkpoint: Path | None = None) -> Kept:
    """The template that is not the base's, and the tokens of the adapter that a run goes on from.

    A run that is resumed has both beside its checkpoint's adapter: its parent and its template's file may be gone.
    """
    folder = config.adapter.start if checkpoint is None else checkpoint / "adapter"
    if folder is not None and not Path(folder).is_dir():
        raise FileError(f"no adapter folder {str(folder)!r}: adapter.from names the folder of an adapter to go on from")
    found = Kept() if folder is None else read_kept(Path(folder))
    if config.data.template and (checkpoint is None or found.template is None):
        found = dataclasses.replace(found, template=template(config.data.template))
    return found


def read_by(config: Config) -> tuple[Any, ...]:
    """All that `prepare` reads of a configuration beside what is `brought`: where it is equal, so are the rows."""
    kept = config.train.generate if config.data.streaming else None  # without streaming all rows are there
    return config.model, config.data, config.train.objective, kept


def longest(config: Config, limit: int | None) -> int:
    """Tokens of the longest row that a run takes. limit: what the base reads."""
    return config.data.max_length or min(DEFAULT_LENGTH, limit or DEFAULT_LENGTH)


def prepare(config: Config, given: Kept | None = None) -> Prepared:
    """Read, split, encode and check the rows. Raises DataError, ConfigError, FileError (the tokenizer).

    given: the template and the tokens to go by, by default what `config` names.
    """
    d, objective = config.data, config.train.objective
    given = brought(config) if given is None else given
    sides = [] if d.streaming else _read(d)  # faults of rows come before a tokenizer is looked for
    tokenizer, limit = load_tokenizer(config.model)
    processor = _processor(config, sides)
    tokenizer = tokenizer if processor is None else processor.tokenizer
    if d.max_length is not None and limit is not None and d.max_length > limit:
        raise ConfigError(f"data.max_length={d.max_length} is more than {config.model!r} reads: at most {limit} tokens")
    most = longest(config, limit)
    general = general_rows(
        () if d.general is None else _sources(d, d.general), tokenizer, most, processor
    )  # as the base reads them, before it gets a template or tokens
    tokens = given.give(tokenizer)
    tokens = tokens if tokens.ids else add_tokens(tokenizer, d.tokens)
    policy = Policy(most, d.train_on_prompt, d.turns, d.overflow)
    if d.streaming:
        first, second = _streamed(config, tokenizer, policy, processor)
    else:
        found = []
        for rows, purpose in zip(sides, (LEARN, EVALUATE), strict=False):
            seen = Observed(tokenizer, policy)
            side = encode_rows(
                rows, tokenizer, policy, objective=objective, pairs=d.pairs, seen=seen, purpose=purpose,
                processor=processor,
            )  # fmt: skip
            found.append(Side(*side, rows, seen))
        first, second = found[0], found[1] if len(found) > 1 else None
    checked = checks(first, second, tokenizer, processor)
    refuse(checked)
    return Prepared(
        tokenizer, first.encoded, first.report, second.encoded if second else (), second.rows if second else None,
        second.report if second else None, policy, tokens, Kept(given.template, tokens.ids), checked, general,
        processor,
    )  # fmt: skip


def _processor(config: Config, sides: Sequence[Rows]) -> Any:
    """The base's processor of images, or None. DataError for rows with images where there is none."""
    processor = load_processor(config.model)
    held = [row for rows in sides for row in rows.rows if row.images]
    if processor is not None:
        images = config.data.streaming or bool(held)  # of rows that are not read yet nobody knows
        fitting(processor, read_config(config.model), config.model, images)
        return processor
    if held:
        raise DataError(
            f"{config.model!r} reads no images, and {len(held):,} rows hold some (the first is {held[0].where}): choose a base "
            "that does, or keep the rows of text"
        )
    return None


def _read(d: DataConfig) -> list[Rows]:
    """Training rows, and held-out ones where there are any."""
    rows = read_rows(_sources(d, d.train))
    if not isinstance(d.eval, float):
        return [rows, read_rows(_sources(d, d.eval))] if d.eval else [rows]
    unwanted = [row for row in rows.rows if row.good is False]  # counted, but not drawn for either side
    rows, held_out = split(dataclasses.replace(rows, rows=[r for r in rows.rows if r.good is not False]), d.eval)
    return [dataclasses.replace(rows, rows=rows.rows + unwanted), held_out]


def _streamed(config: Config, tokenizer: Any, policy: Policy, processor: Any) -> tuple[Side, Side | None]:
    d, objective, keep = config.data, config.train.objective, config.train.generate

    def encoder() -> Encoder:
        return Encoder(tokenizer, policy, objective, Observed(tokenizer, policy), processor)

    share = d.eval if isinstance(d.eval, float) else None
    first, second = stream(_sources(d, d.train), encoder, objective, d.pairs, share=share, keep=keep)
    if d.eval is not None and share is None:
        second, _ = stream(_sources(d, d.eval), encoder, objective, d.pairs, keep=keep, purpose=EVALUATE)
    return first, second


def _sources(data: DataConfig, given: Any) -> list[Source]:
    """The sources, with the columns and the pattern of the whole section where they have none of their own."""
    listed = [named(one) for one in (given if isinstance(given, tuple) else (given,))]
    return [
        dataclasses.replace(one, columns=one.columns or data.columns, pattern=one.pattern or data.pattern)
        for one in listed
    ]
