"""Would a smaller rank do? Held-out loss of an adapter cut by SVD to rank after rank: r, r/2, …, 1, and 0, which is the base.

    ΔW = UΣVᵀ  →  U_k Σ_k V_kᵀ at every site (`mixing.to_lora`)  →  loss on rows that were not trained on

A cut after training is as a rule worse than training at the smaller rank, which would use it otherwise. What is no low-rank
change (trained copies, rows of tokens) stays whole in every cut but rank 0.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from deltaw.core.attach import detach, extract, insert
from deltaw.core.errors import UseError
from deltaw.core.host import WeightHost
from deltaw.core.route import live, use
from deltaw.core.state import AdapterState
from deltaw.core.text import columns
from deltaw.data.dataset import encode_rows
from deltaw.data.encode import Policy
from deltaw.data.rows import Rows
from deltaw.infer.evaluate import held_out_loss
from deltaw.mixing.convert import to_lora

MOST = 64
"""The first cut of changes that have no rank of their own."""
LEAST = 0.01
"""Share of the base's loss that an adapter must gain for its ranks to be judged."""
ENOUGH = 0.99
"""Share of what the adapter gains over its base that a smaller rank must keep to do."""


@dataclass(frozen=True)
class Cut:
    """lost: share of ‖ΔW‖² that the cut gave up at the site where that is most; 1 for the base."""

    rank: int
    loss: float
    lost: float


@dataclass(frozen=True)
class Truncation:
    """loss: of the adapter as it is; cuts: the largest rank first, the base (rank 0) last. Nats per supervised token."""

    rows: int
    loss: float
    cuts: tuple[Cut, ...]

    @property
    def gain(self) -> float:
        """What the adapter takes off the base's loss."""
        return self.cuts[-1].loss - self.loss

    @property
    def judges(self) -> bool:
        """Is the gain more than a chance of these rows?"""
        return self.gain > LEAST * self.cuts[-1].loss

    def kept(self, cut: Cut) -> float:
        """Share of that gain that a cut keeps."""
        return (self.cuts[-1].loss - cut.loss) / self.gain if self.gain else 0.0

    @property
    def enough(self) -> int | None:
        """The least rank whose cut, like all above it, keeps `ENOUGH` of the gain; None where none does."""
        found = None
        for cut in self.cuts[:-1] if self.judges else ():
            if self.kept(cut) < ENOUGH:
                break
            found = cut.rank
        return found

    @property
    def said(self) -> str:
        if not self.judges:
            return "the adapter is no better than its base on these rows, or hardly: no rank can be judged by them"
        if self.enough is None:
            return f"no: already rank {self.cuts[0].rank} loses more than {1 - ENOUGH:.0%} of what the adapter gains"
        if self.enough == self.cuts[0].rank:
            return f"no: below rank {self.enough} more than {1 - ENOUGH:.0%} of what the adapter gains is lost"
        return f"yes: cut to rank {self.enough} it keeps {ENOUGH:.0%} of what it gains over the base"

    @property
    def table(self) -> list[tuple[str, ...]]:
        """Cells, the head first."""
        lines: list[tuple[str, ...]] = [
            ("rank", "held-out loss", "of the gain kept", "of a module's ‖ΔW‖² lost at most")
        ]
        lines.append(("as it is", f"{self.loss:.4f}", "100.0%", "–"))
        for cut in self.cuts:
            name = str(cut.rank) if cut.rank else "0, the base"
            lines.append((name, f"{cut.loss:.4f}", f"{self.kept(cut):.1%}", f"{cut.lost:.2%}"))
        return lines

    def __str__(self) -> str:
        return f"would a smaller rank do? {self.said}\n{columns(self.table)}"

    def to_dict(self) -> dict[str, Any]:
        cuts = [{"rank": c.rank, "loss": c.loss, "kept": self.kept(c), "lost": c.lost} for c in self.cuts]
        return {"rows": self.rows, "loss": self.loss, "enough": self.enough, "said": self.said, "cuts": cuts}


def truncation(
    model: nn.Module, tokenizer: Any, rows: Rows, *, name: str, own: Any = None, max_length: int = 2048,
    batch_size: int = 32, say: Callable[[str], None] = lambda text: None,
) -> Truncation:  # fmt: skip
    """The curve of adapter `name` on `model`, which is left as it was. own: the tokenizer of the base, where the adapter
    brings tokens. Ranks: the adapter's largest, its halves down to 1, and 0. say: is told before each loss.

    Raises DataError where no row can be learnt from, UseError for an adapter without a ΔW that could be cut.
    """
    state = extract(model, name)
    objective = "text" if rows.form == "text" else "sft"

    def loss(of: Any, route: dict[str, float]) -> float:
        encoded, _ = encode_rows(rows, of, Policy(max_length), objective=objective, pairs="chosen")
        with use(model, route):
            return held_out_loss(model, of, encoded, batch_size)

    before, draft, cuts = live(model), f"{name}_cut", list[Cut]()
    say("as it is")
    whole = loss(tokenizer, {name: 1.0})
    for rank in halves(highest(state)):
        say(f"rank {rank}")
        cut, report = to_lora(state, model, rank)
        insert(model, cut, name=draft)
        try:
            cuts.append(Cut(rank, loss(tokenizer, {draft: 1.0}), report.error**2))
        finally:
            detach(model, draft)
            use(model, before)
    say("the base")
    cuts.append(Cut(0, loss(own or tokenizer, {}), 1.0))
    return Truncation(len(rows), whole, tuple(cuts))


def halves(rank: int) -> list[int]:
    """r, r/2 rounded down, …, 1"""
    return [rank, *halves(rank // 2)] if rank > 1 else [rank]


def highest(state: AdapterState) -> int:
    """The largest rank of its changes: of their factors, and `MOST` at most of those that have none."""
    known = []
    for site, method in state.methods.items():
        factors = state.factors(site)
        if factors is not None:
            known.append(factors.a.shape[-2])
        elif method.host is WeightHost and not method.follows_ties:
            known.append(min(MOST, state.specs[site].out_features, state.specs[site].fan_in))
    if not known:
        raise UseError("the adapter changes no weight in a way that could be cut to a rank")
    return max(known)
