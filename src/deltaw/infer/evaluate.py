"""Held-out numbers of what is live on a model: loss, perplexity, and metrics of generated answers.

Answers are generated greedily to distinct prompts; the references of a prompt are the last turns of all its rows.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from deltaw.core.route import live
from deltaw.data.collate import Collator
from deltaw.data.conversation import Example
from deltaw.data.dataset import encode_rows
from deltaw.data.encode import IGNORE, Encoded, Policy, encode, prompt
from deltaw.data.rows import Rows
from deltaw.infer.generate import answer_all
from deltaw.infer.loss import SFTLoss, mean_loss
from deltaw.infer.metrics import Metric, metrics

Score = Callable[[str, str], float]
"""(answer, reference) → a number in [0, 1]."""


@dataclass(frozen=True)
class Sample:
    """One generated answer beside what was wanted."""

    prompt: str
    answer: str
    references: Sequence[str]


@dataclass(frozen=True)
class Evaluation:
    """Loss is nats per supervised token."""

    rows: int
    loss: float
    scores: Mapping[str, float] = field(default_factory=dict)
    samples: Sequence[Sample] = ()
    dropped: Mapping[str, int] = field(default_factory=dict)
    """Rows left out, by reason."""

    @property
    def answers(self) -> list[str]:
        return [sample.answer for sample in self.samples]

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    def to_dict(self) -> dict[str, Any]:
        return {
            "rows": self.rows,
            "loss": self.loss,
            "perplexity": self.perplexity,
            "dropped": dict(self.dropped),
            **self.scores,
        }


def last_turn(row: Example, tokenizer: Any, policy: Policy, processor: Any = None) -> tuple[Encoded, list[int]] | None:
    """Prompt and answer of a row's last turn as training sees them, the answer as token ids; None where the row is left out."""
    found = encode(row, tokenizer, dataclasses.replace(policy, turns="last", train_on_prompt=False), processor)
    if not isinstance(found, list):
        return None
    learnt = [place for place, label in enumerate(found[0].labels) if label != IGNORE]
    if learnt[0] == 0:  # the answer alone is too long
        return None
    before, answer = found[0].ids[: learnt[0]], found[0].ids[learnt[0] : learnt[-1] + 1]
    if not row.images:
        return Encoded(before, []), answer
    last = max(number for number, m in enumerate(row.messages) if m.role == "assistant" and m.learn)
    return prompt(row.messages[:last], tokenizer, row.tools, processor, row.where), answer


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    rows: Rows,
    *,
    max_length: int = 2048,
    generations: int | None = None,
    metric: Sequence[str] = ("exact_match",),
    scores: Mapping[str, Score] | None = None,
    max_new_tokens: int | None = None,
    batch_size: int = 32,
    processor: Any = None,
) -> Evaluation:
    """Loss over all rows; metrics over the answers to the first `generations` of them (all by default, 0 for none).

    metric: names of `deltaw.infer.metrics`; scores: further {name: (answer, reference) → number}, best reference, mean.
    processor: that of a base which reads images.
    """
    chosen = metrics(metric)
    live(model)  # no rows of some other batch
    policy = Policy(max_length)
    encoded, report = encode_rows(
        rows, tokenizer, policy, objective="text" if rows.form == "text" else "sft", pairs="chosen", processor=processor
    )
    loss = held_out_loss(model, tokenizer, encoded, batch_size, processor)
    samples = generate_samples(model, tokenizer, rows.rows[:generations], policy, max_new_tokens, batch_size, processor)
    if not samples:
        return Evaluation(len(encoded), loss, dropped=report.dropped)
    found = measured(samples, chosen)
    for name, score in (scores or {}).items():
        best = [max(score(sample.answer, text) for text in sample.references) for sample in samples]
        found[name] = sum(best) / len(best)
    return Evaluation(len(encoded), loss, found, samples, report.dropped)


def measured(samples: Sequence[Sample], chosen: Mapping[str, Metric]) -> dict[str, float]:
    """Metrics of generated answers; none where there is no answer."""
    answers, references = [s.answer for s in samples], [s.references for s in samples]
    return {name: measure(answers, references) for name, measure in chosen.items()} if samples else {}


def held_out_loss(
    model: nn.Module, tokenizer: Any, encoded: Sequence[Encoded], batch_size: int = 32, processor: Any = None
) -> float:
    """Mean loss of encoded rows in nats per supervised token."""
    order = sorted(encoded, key=lambda row: len(row.ids))  # like lengths together: less padding
    collate = Collator(tokenizer, processor=processor)
    return mean_loss(SFTLoss(model), (collate(order[i : i + batch_size]) for i in range(0, len(order), batch_size)))


def generate_samples(
    model: nn.Module,
    tokenizer: Any,
    rows: Sequence[Example],
    policy: Policy,
    max_new_tokens: int | None = None,
    batch_size: int = 32,
    processor: Any = None,
) -> list[Sample]:
    """Greedy answers to the distinct prompts of `rows`, which are not texts and not too long."""
    wanted: dict[tuple[Any, ...], list[list[int]]] = {}
    prompts: dict[tuple[Any, ...], Encoded] = {}
    for row in rows:
        wants = row.text is None and row.good is not False  # an unwanted answer is no reference
        turn = last_turn(row, tokenizer, policy, processor) if wants else None
        if turn is not None:
            key = (*turn[0].ids, *turn[0].images)
            prompts.setdefault(key, turn[0])
            wanted.setdefault(key, []).append(turn[1])
    if not wanted:
        return []
    longest = max(len(answer) for answers in wanted.values() for answer in answers)
    said = answer_all(
        model, tokenizer, list(prompts.values()), max_new_tokens=max_new_tokens or longest + 16, batch_size=batch_size,
        processor=processor,
    )  # fmt: skip

    def text(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True)).strip()

    return [
        Sample(_asked(prompts[key], tokenizer), answer, [text(ids) for ids in wanted[key]])
        for key, answer in zip(prompts, said, strict=True)
    ]


def _asked(prompt: Encoded, tokenizer: Any) -> str:
    """A prompt for people; images by the names of their files."""
    if not prompt.images:
        return str(tokenizer.decode(prompt.ids))
    return f"{prompt.text} [{', '.join(image.name for image in prompt.images)}]"
