"""Facts of a run that is planned → a value for each setting that matters, with its reason, its source and how sure it is.

In the order in which settings matter: learning rate, targets, epochs and batch, rank, alpha, the method, what to do with
the result. Pure: facts in, sentences out. What is said of them without evidence stands in `deltaw.planner.evidence`.
"""

import math
import re
from dataclasses import dataclass
from typing import Any, NamedTuple

from deltaw.planner import sources as by
from deltaw.planner.arithmetic import Layer, optimizer_steps, unmerged_share
from deltaw.planner.measured import (
    EACH_ROW,
    MERGED,
    METHODS,
    MOUNTED,
    PROBED,
    STEP,
    STEP_DROPOUT,
    TINY_RATES,
    faster,
    span,
)

LOW_RANK = ("lora", "dora", "adalora")
"""Methods whose change is B·A, so that ranks, break-even and added multiplications are those of two factors."""
BITS_PER_PARAMETER = 2.0
"""What a trained number can hold (Schulman et al. 2025)."""
BITS_PER_TOKEN = 1.0
"""What a supervised token asks to be held: a guess, rather too much than too little."""
FEW_STEPS, ENOUGH_STEPS = 50, 100


@dataclass(frozen=True, kw_only=True)
class Situation:
    """What is known of a run before it is paid for. None where it is not known, or not the run's to choose."""

    method: str = "lora"
    rank: int | None = 16
    alpha: float | None = 32.0
    rslora: bool = False
    init: str = "kaiming"
    dropout: float = 0.0
    merges: bool = True
    targets: tuple[str, ...] = ("all-linear",)
    layers: tuple[Layer, ...] = ()
    """The weights that are adapted."""
    left: tuple[Layer, ...] = ()
    """Linear layers of the body that are not."""
    base_parameters: int = 0
    trainable: int = 0
    quantize: str = "none"
    learning_rate: float = 2e-4
    batch: int = 8
    """Rows of an optimizer step."""
    epochs: float = 1.0
    max_steps: int | None = None
    rows: int | None = None
    tokens: int | None = None
    """Supervised ones, of all rows."""
    adapters: int = 1
    """Adapters that will be used on one base."""

    @property
    def scale(self) -> float | None:
        if self.rank is None or self.alpha is None:
            return None
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def low_rank(self) -> bool:
        return self.method in LOW_RANK and bool(self.layers)

    @property
    def steps(self) -> int | None:
        """Optimizer steps in all."""
        if self.max_steps is not None or self.rows is None:
            return self.max_steps
        return optimizer_steps(self.rows, self.batch, self.epochs)

    @property
    def lowest(self) -> Layer | None:
        """The adapted layer of the smallest break-even rank."""
        return min(self.layers, key=lambda layer: layer.break_even, default=None)


class Advice(NamedTuple):
    field: str
    given: Any
    suggested: Any
    reason: str
    source: str
    kind: str


def advise(s: Situation) -> list[Advice]:
    """One for every setting that the run has."""
    own = [rank(s), alpha(s)] if s.method in ("lora", "dora") else []
    return [learning_rate(s), targets(s), epochs(s), batch(s), *own, dropout(s), method(s), after(s)]


def learning_rate(s: Situation) -> Advice:
    usual, why, source, kind = _rate_of_lora(s.base_parameters)
    times = faster(s.method)
    if s.method == "full" and kind != by.MEASURED:
        usual, source, kind = usual / 10, by.REGRET, by.PUBLISHED
        why = "a tenth of LoRA's (9.8 times over 14 models)"
    elif times != 1:
        best = METHODS[s.method].rate
        why = (
            f"{s.method} took {best:g} where LoRA took {METHODS['lora'].rate:g} on the bundled task, {times:.2g} times as much; "
            f"LoRA's here: {why}"
        )
        usual, source, kind = usual * times, f"{by.METHODS}; {source.removeprefix(f'{by.METHODS}; ')}", by.MEASURED
    else:
        why += "; about ten times that of full fine-tuning, nearly the same for every rank"
    suggested = float(f"{usual:.1g}")
    why += f". Matters more than anything below: try {suggested / 3:.1g}, {suggested:g} and {suggested * 3:.1g}"
    return Advice("train.learning_rate", s.learning_rate, suggested, why, source, kind)


def _rate_of_lora(parameters: int) -> tuple[float, str, str, str]:
    """Of LoRA at a factor of 2, by the size of the base: rate, reason, source, kind."""
    low, high = TINY_RATES
    if parameters < 1e8:
        why = f"best on the bundled base of 5.8 M: {low:g} in a long run, {high:g} in a short one"
        return low, why, f"{by.METHODS}; {by.TASKS}", by.MEASURED
    if parameters < 1e9:
        why = "4e-4 to 5e-4 on RoBERTa-base (125 M), 2e-4 on GPT-2 M"
        return 4e-4, why, f"{by.LORA}, Tables 9 and 11", by.PUBLISHED
    if parameters < 1e10:
        return 2e-4, "2e-4 on GPT-2 and GPT-3, as in most tools", f"{by.LORA}, Tables 11 and 12", by.PUBLISHED
    return 1e-4, "half of what smaller bases take", by.TOOLS, by.RULE


def mlps_alone(s: Situation) -> bool:
    """Is all that is left out in attention, which adds little to the MLPs?"""
    return bool(s.left) and all(re.search(r"attn|attention", layer.path.lower()) for layer in s.left)


def targets(s: Situation) -> Advice:
    missing = sorted({layer.path.rpartition(".")[2] for layer in s.left})
    why = "all linear layers, or the MLPs, learn at least as well as attention alone at equal size; q and v are no more than a habit"
    if missing:
        why += f". Left out here: {', '.join(missing)}"
    given = s.targets[0] if len(s.targets) == 1 else list(s.targets)
    wanted = given if mlps_alone(s) else "all-linear"
    return Advice("adapter.targets", given, wanted, why, f"{by.REGRET}; {by.LESS}; {by.QLORA}", by.PUBLISHED)


def epochs(s: Situation) -> Advice:
    """Passes, or steps where the run counts those."""
    if s.max_steps is not None:
        why = f"{ENOUGH_STEPS} steps are what every method had on the bundled task; held-out rows say when it is enough"
        return Advice("train.max_steps", s.max_steps, max(ENOUGH_STEPS, s.max_steps), why, by.METHODS, by.RULE)
    if s.rows is None:
        why = f"1 to 3 where rows are many; with few, as many as make {ENOUGH_STEPS} steps, watched by held-out rows"
        return Advice("train.epochs", s.epochs, 1, why, by.TOOLS, by.RULE)
    a_pass = math.ceil(s.rows / s.batch)
    suggested = max(1, min(30, math.ceil(ENOUGH_STEPS / a_pass)))
    if suggested == 1:
        why = f"one pass is {a_pass:,} steps; 1 to 3 passes, and held-out rows say when it is enough"
        return Advice("train.epochs", s.epochs, max(1, min(3, s.epochs)), why, by.TOOLS, by.RULE)
    why = (
        f"a pass of {s.rows:,} rows is {a_pass} steps of {s.batch}, and {ENOUGH_STEPS} are a fair beginning; Hu et al. ran 25 to 80 "
        "passes on small tasks. train.best: true keeps the best evaluation"
    )
    return Advice("train.epochs", s.epochs, suggested, why, f"{by.LORA}, Table 9", by.PUBLISHED)


def batch(s: Situation) -> Advice:
    least = 8 if s.rows is None or s.rows >= 8 else max(1, s.rows)
    why = "8 to 32 rows a step: LoRA falls behind all weights as batches grow, and no rank mends that"
    return Advice("train.batch_size", s.batch, max(least, min(32, s.batch)), why, by.REGRET, by.PUBLISHED)


def needed(s: Situation) -> int | None:
    """The rank at which the factors can hold the rows' supervised tokens; None where these are not known."""
    unit = sum(layer.stack * (layer.out + layer.into) for layer in s.layers)
    if s.tokens is None or not unit:
        return None
    return math.ceil(s.tokens * BITS_PER_TOKEN / (BITS_PER_PARAMETER * unit))


def rank(s: Situation) -> Advice:
    few = s.rows is not None and s.rows < 1000
    wanted, source, kind = 8 if few else 16, f"{by.LORA}, Tables 6 and 18", by.PUBLISHED
    why = (
        f"{'less than a thousand rows' if few else 'the default'}: losses are flat from {wanted} on for most tasks; no formula "
        "gives the rank from the task, and more rank costs only parameters"
    )
    need = needed(s) if s.low_rank else None
    if need is not None and need > wanted:
        wanted, source, kind = min(256, 2 ** math.ceil(math.log2(need))), by.REGRET, by.RULE
        why = (
            f"{s.tokens:,} supervised tokens, at a bit each, want rank {need} at two bits a parameter; up to 256 has been shown "
            "to pay, beyond that train all weights"
        )
    lowest = s.lowest
    if s.low_rank and lowest is not None and wanted > lowest.break_even / 2:
        wanted = max(1, 2 ** math.floor(math.log2(max(1.0, lowest.break_even / 2))))
        why += f". Kept to half of the break-even rank {lowest.break_even:.4g} of {lowest.path} ({lowest.out}×{lowest.into})"
    why += f". One rank for all: ranks by gradients (--probe) were {PROBED.verdict} than it on the bundled task"
    return Advice("adapter.rank", s.rank, wanted, why, source, kind)


def alpha(s: Situation) -> Advice:
    suggested = (1 if s.rslora else 2) * (s.rank or 0)
    given = "" if s.scale is None else f", here {s.scale:.4g}"
    form = "α/√r with rslora" if s.rslora else "α/r"
    why = (
        f"what counts is {form}{given}; the rates above were found near 2. Under Adam α is about another learning rate: keep it, "
        "tune the rate. 2r is later advice, not the LoRA paper's, which took the first rank tried"
    )
    if s.init == "pissa":
        why = "factors taken from the weight stand for it at a scale of 1; another scale is another start than the paper's"
        unit = math.sqrt(s.rank or 0) if s.rslora else s.rank
        return Advice("adapter.alpha", s.alpha, unit, why, by.PISSA, by.PUBLISHED)
    if s.rslora:
        return Advice("adapter.alpha", s.alpha, suggested, why, by.RSLORA, by.RULE)
    return Advice("adapter.alpha", s.alpha, suggested, why, f"{by.LESS}; {by.LORA}, §4.1", by.PUBLISHED)


def dropout(s: Situation) -> Advice:
    why = (
        f"no result asks for it by default, and a step takes {span(STEP_DROPOUT)} of the frozen base's with 0.05, {span(STEP)} "
        "without. Fewer epochs are the cheaper cure of overfitting"
    )
    return Advice("adapter.dropout", s.dropout, 0.0, why, by.STEPS, by.MEASURED)


def method(s: Situation) -> Advice:
    lora = METHODS["lora"]
    why = (
        f"tuned, variants come within 1 to 2 % of LoRA; on the bundled task lora has a held-out loss of {lora.loss:.4f}"
    )
    found = METHODS.get(s.method)
    if s.method != "lora" and found is not None:
        why += f", {s.method} {found.loss:.4f} at {found.step:.2f} of its time a step"
    rank_ = s.rank or 0
    if s.method == "lora" and not s.rslora and rank_ >= 64:
        why += f". At rank {rank_} rslora: true (α/√r) keeps the change from shrinking with the rank"
        return Advice("adapter.method", s.method, "lora", why, by.RSLORA, by.PUBLISHED)
    need = needed(s) if s.low_rank else None
    if need is not None and need > 256:
        why = (
            f"these rows want rank {need}; beyond 256 and in continued pretraining all weights learn more "
            "(HumanEval .263 against .224)"
        )
        return Advice("adapter.method", s.method, "full", why, by.LESS, by.PUBLISHED)
    return Advice("adapter.method", s.method, "lora", why, f"{by.METHODS}; {by.RATES}", by.MEASURED)


def after(s: Situation) -> Advice:
    """Merge, or keep mounted."""
    if not s.merges:
        why = f"{s.method} has no form as a weight: it stays mounted and costs time at every call"
        return Advice("merge", None, "keep mounted", why, by.METHODS, by.MEASURED)
    cost = f"a decoding step takes {span(MOUNTED)} of the base's with one mounted adapter, merged {span(MERGED)}"
    if s.low_rank:
        cost += f", though the factors add only {100 * unmerged_share(s.layers):.3g} % to these layers' multiplications"
    if s.adapters > 1:
        why = (
            f"{s.adapters} adapters share one base, each with a file of its own and a route for every row "
            f"({span(EACH_ROW)} of the base's step); merge one that takes most of the traffic. {cost[0].upper()}{cost[1:]}"
        )
        return Advice("merge", None, "keep mounted", why, by.COSTS, by.MEASURED)
    why = f"one adapter, one model: {cost}. Keep the adapter's folder: a merge is undone from the base's own weights"
    if s.quantize != "none":
        why += f". Onto the weights read back from {s.quantize}: deltaw merge --into dequantized, which is what was trained"
    return Advice("merge", None, "merge", why, by.COSTS, by.MEASURED)
