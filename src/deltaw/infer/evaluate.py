"""Held-out numbers of what is live on a model: loss, perplexity, exact match. Base and tuned side by side.

Exact match generates greedily and compares the answer, white space at the ends aside, with the row's last turn.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from deltaw.core.errors import DataError
from deltaw.data.collate import Collator
from deltaw.data.dataset import encode_rows
from deltaw.data.rows import Rows
from deltaw.infer.generate import generate
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
    encoded, _ = encode_rows(rows, tokenizer, max_length)
    order = sorted(encoded, key=lambda row: len(row.ids))  # like lengths together: less padding
    collate = Collator(tokenizer)
    loss = mean_loss(SFTLoss(model), (collate(order[i : i + batch_size]) for i in range(0, len(order), batch_size)))
    chosen = rows.rows[:generations]
    if not chosen:
        return Evaluation(len(encoded), loss)
    prompts, references = [], []
    for example in chosen:
        *before, last = example.messages
        if last.role != "assistant":
            raise DataError(f"{rows.source}: row {example.line} does not end with an answer to compare with")
        prompts.append([{"role": m.role, "content": m.content} for m in before])
        references.append(last.content)
    longest = max(len(tokenizer(text)["input_ids"]) for text in references)
    answers = generate(model, tokenizer, prompts, max_new_tokens=max_new_tokens or longest + 16, batch_size=batch_size)
    named = {"exact_match": exact, **(scores or {})}
    means = {
        name: sum(score(a, r) for a, r in zip(answers, references, strict=True)) / len(answers)
        for name, score in named.items()
    }
    return Evaluation(len(encoded), loss, means, answers)
