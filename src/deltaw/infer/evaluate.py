"""Held-out numbers of what is live on a model: loss, perplexity, exact match. Base and tuned side by side.

Exact match generates greedily and compares the answer, white space at the ends aside, with the row's last turn.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from deltaw.data.collate import Collator
from deltaw.data.conversation import Example
from deltaw.data.dataset import encode_rows
from deltaw.data.encode import IGNORE, Policy, encode
from deltaw.data.rows import Rows
from deltaw.infer.generate import answer_all
from deltaw.infer.loss import SFTLoss, mean_loss

Score = Callable[[str, str], float]
"""(answer, reference) → a number in [0, 1]."""


@dataclass(frozen=True)
class Evaluation:
    """Loss is nats per supervised token; scores are means over rows."""

    rows: int
    loss: float
    scores: Mapping[str, float] = field(default_factory=dict)
    answers: Sequence[str] = ()

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    def to_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "loss": self.loss, "perplexity": self.perplexity, **self.scores}


def exact(answer: str, reference: str) -> float:
    return float(answer.strip() == reference.strip())


def last_turn(row: Example, tokenizer: Any, policy: Policy) -> tuple[list[int], list[int]] | None:
    """Prompt and answer of a row's last turn as token ids, as training sees them; None where the row is left out."""
    found = encode(row, tokenizer, dataclasses.replace(policy, turns="last", train_on_prompt=False))
    if not isinstance(found, list):
        return None
    learnt = [place for place, label in enumerate(found[0].labels) if label != IGNORE]
    return found[0].ids[: learnt[0]], found[0].ids[learnt[0] : learnt[-1] + 1]


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    rows: Rows,
    *,
    max_length: int,
    generations: int | None = None,
    scores: Mapping[str, Score] | None = None,
    max_new_tokens: int | None = None,
    batch_size: int = 32,
) -> Evaluation:
    """Loss over all rows; scores over the answers to the first `generations` rows (all by default, 0 for none).

    `scores`: {name: (answer, reference) → number}; exact_match is always among them.
    """
    policy = Policy(max_length)
    encoded, _ = encode_rows(
        rows, tokenizer, policy, objective="text" if rows.form == "text" else "sft", pairs="chosen"
    )
    order = sorted(encoded, key=lambda row: len(row.ids))  # like lengths together: less padding
    collate = Collator(tokenizer)
    loss = mean_loss(SFTLoss(model), (collate(order[i : i + batch_size]) for i in range(0, len(order), batch_size)))
    asked = [
        turn for row in rows.rows[:generations] if row.text is None and (turn := last_turn(row, tokenizer, policy))
    ]
    if not asked:
        return Evaluation(len(encoded), loss)
    longest = max(len(answer) for _, answer in asked)
    answers = answer_all(
        model, tokenizer, [prompt for prompt, _ in asked], max_new_tokens=max_new_tokens or longest + 16,
        batch_size=batch_size,
    )  # fmt: skip
    references = [tokenizer.decode(answer, skip_special_tokens=True).strip() for _, answer in asked]
    named = {"exact_match": exact, **(scores or {})}
    means = {
        name: sum(score(a, r) for a, r in zip(answers, references, strict=True)) / len(answers)
        for name, score in named.items()
    }
    return Evaluation(len(encoded), loss, means, answers)
