"""What a run forgets: the loss on general rows that are never trained on, of the base and of its adapter.

    event general   strength 0 (the base) before the first step, 1 after the last, and HALF where that forgets

A smaller strength costs nothing to try, so that a run which forgets says what it would give.
"""

from collections.abc import Sequence
from typing import Any

from deltaw.config.schema import Source
from deltaw.core.adapter import WeightAdapter
from deltaw.core.attach import adapters
from deltaw.core.route import use
from deltaw.data.dataset import Encoder
from deltaw.data.encode import Encoded, Policy
from deltaw.data.rows import read_rows
from deltaw.infer.evaluate import held_out_loss
from deltaw.models.base import Base
from deltaw.runs.diagnosis import FORGETS
from deltaw.runs.directory import RunDirectory

TOKENS = 1 << 16
"""Most tokens that are measured: a mean over them is known to 0.01 nats, where single tokens differ by 2.5."""
HALF = 0.5


def general_rows(sources: Sequence[Source], tokenizer: Any, max_length: int, processor: Any = None) -> list[Encoded]:
    """The first rows of data.general, up to TOKENS tokens of them, read as the base reads them."""
    kept, tokens = list[Encoded](), 0
    for source in sources:
        rows = read_rows(source)
        objective = "text" if rows.form == "text" else "sft"
        encoder = Encoder(tokenizer, Policy(max_length), objective, processor=processor)
        for piece in (piece for row in rows.rows for piece in encoder.add(row)):
            if tokens >= TOKENS:
                return kept
            kept.append(piece)
            tokens += len(piece.ids)
        encoder.report(rows.parts, rows.source)  # an error where none is left
    return kept


class General:
    """Measures adapter `name`, and logs what it measured. `held_out` are the run's own rows, for what half of it keeps."""

    def __init__(
        self, base: Base, name: str, run: RunDirectory, rows: Sequence[Encoded], held_out: Sequence[Encoded], size: int
    ):
        self.base, self.name, self.run, self.rows, self.held_out, self.size = base, name, run, rows, held_out, size

    def before(self) -> None:
        """The base's loss; a run that is resumed has it already."""
        if self.rows and not self.run.events("general"):
            self._measure(0, 0.0)

    def after(self, step: int) -> None:
        """The adapter's loss, and where it forgets what half of the adapter would give."""
        if not self.rows:
            return
        base = next(event["loss"] for event in self.run.events("general") if event["strength"] == 0)
        rise = self._measure(step, 1.0) - base
        scales = all(isinstance(one, WeightAdapter) for one in adapters(self.base.model, self.name).values())
        if rise > FORGETS and scales:
            self._measure(step, HALF)

    def _measure(self, step: int, strength: float) -> float:
        model, tokenizer, processor = self.base.model, self.base.tokenizer, self.base.processor
        tokens = sum(row.supervised for row in self.rows)
        with use(model, {self.name: strength} if strength else {}):
            loss = held_out_loss(model, tokenizer, self.rows, self.size, processor)
            found = {"strength": strength, "loss": loss, "tokens": tokens}
            if 0 < strength < 1 and self.held_out:
                found["held_out"] = held_out_loss(model, tokenizer, self.held_out, self.size, processor)
        self.run.log("general", step=step, **found)
        return loss
