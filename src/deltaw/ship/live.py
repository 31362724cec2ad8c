"""Base and adapters in memory, in fp32: what a merge is held against, and merging there.

Merged in memory is what cannot be written file by file (`deltaw.ship.merge` says why): tables that grow, weights read
back from a quantised base, pickled checkpoints, parameters that transformers makes in another way as it loads.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.core.attach import adapters, detach, extract, insert
from deltaw.core.errors import UseError
from deltaw.core.merge import MergeReport, merge
from deltaw.core.method import Site
from deltaw.core.route import use
from deltaw.core.state import AdapterState, combine
from deltaw.data.kept import Kept
from deltaw.methods.token_rows import TokenRows
from deltaw.models.adapters import LoadReport, load
from deltaw.models.base import load_base, load_tokenizer, resolve, unreadable
from deltaw.models.mapped import class_of
from deltaw.ship.check import Reference, Row, logits, reference, rows_for
from deltaw.ship.picture import picture
from deltaw.ship.roundtrip import RoundTrip, decoded, put, round_trip


@dataclass(frozen=True)
class Job:
    """What is to be merged, and how."""

    model: str
    parts: Sequence[tuple[Path, float]]
    """Adapter folders with strengths."""
    kept: Kept
    """What the adapters together need of the tokenizer."""
    into: str
    quantize: str
    """The kind of base that they were trained on."""
    allowed: Mapping[str, bool]
    prompts: Sequence[str]
    check: bool
    layer: str | None
    """Class of the model that the adapters were trained on, where their files say it."""

    @property
    def route(self) -> dict[str, float]:
        return {f"merged{number}": strength for number, (_, strength) in enumerate(self.parts)}


@dataclass(frozen=True)
class Live:
    """The base in fp32 with the adapters of a job on it, none merged yet."""

    model: nn.Module
    tokenizer: Any
    reports: Sequence[LoadReport]
    reference: Reference | None


def live(job: Job, tokenizer: bool) -> Live:
    """Load the job and, where it is to be checked, what it computes; the tokenizer only where asked or needed."""
    found = _trained_on(job) if job.quantize != "none" and (job.check or job.into == "dequantized") else None
    model, words = loaded(job.model, job.layer), None
    if tokenizer or job.prompts:
        words = load_tokenizer(job.model)[0]
        job.kept.give(words)
    known = {"allow_base_mismatch": True} if found is not None else {}  # it is the right one for the quantised base
    reports = load_all(model, job, {**job.allowed, **known})
    ways: dict[str, Mapping[str, Tensor]] = {}
    if found is not None:
        ways = {"original": put(model, found.weights), "dequantized": found.weights}
    distances = {}
    rows, unseen = _rows(model, job, words)
    if found is not None and job.check:
        with use(model, job.route):
            distances = round_trip(model, ways, found.logits, lambda: [logits(model, row) for row in rows])
    if ways:
        put(model, ways[job.into])
    compared = RoundTrip(job.quantize, **distances) if distances else None
    held = reference(model, job.route, rows, compared, unseen) if job.check else None
    return Live(model, words, found.reports if found is not None else reports, held)


def _rows(model: nn.Module, job: Job, tokenizer: Any) -> tuple[list[Row], str | None]:
    """What is to be compared on, and why none of it is a picture where one should be."""
    if not job.check:
        return [], None
    seen = picture(job.model)
    rows = rows_for(model, list(job.route), job.prompts, tokenizer)
    return [*rows, *([] if seen.row is None else [seen.row])], seen.lacking


def loaded(name: str, layer: str | None = None) -> Any:
    """A base in fp32 on the CPU, whatever its class; FileError where it cannot be loaded."""
    try:
        model = class_of(name, layer).from_pretrained(resolve(name), dtype=torch.float32)
    except Exception as error:  # whatever a foreign folder raises, it is one thing: a base that cannot be loaded
        raise unreadable(name, error) from error
    if name == "tiny":
        model.config._name_or_path = name
    return model.eval().requires_grad_(False)


def load_all(model: nn.Module, job: Job, allowed: Mapping[str, Any]) -> list[LoadReport]:
    """Every adapter of the job onto `model`, under the names of its route, none of them live."""
    names = zip(job.route, job.parts, strict=True)
    reports = [load(model, folder, name=name, **allowed) for name, (folder, _) in names]
    use(model, {})
    return reports


@dataclass(frozen=True)
class _Trained:
    """The base as the adapters were trained on it: its weights read back, what the adapters compute there."""

    weights: Mapping[str, Tensor]
    logits: Sequence[Tensor]
    reports: Sequence[LoadReport]


def _trained_on(job: Job) -> _Trained:
    base = load_base(job.model, dtype="fp32", device=torch.device("cpu"), quantize=job.quantize)
    job.kept.give(base.tokenizer)
    reports = load_all(base.model, job, job.allowed)
    rows, _ = _rows(base.model, job, base.tokenizer)
    with use(base.model, job.route):
        return _Trained(decoded(base.model), [logits(base.model, row) for row in rows], reports)


def merge_live(there: Live, job: Job) -> MergeReport:
    """Merge the adapters into the model, whose tables grow as they need.

    Several, or other strengths than 1, are one exact sum first (`core.state.combine`); UseError where there is none.
    """
    states = [extract(there.model, name) for name in job.route]
    state = _sum(states, list(job.route.values()))
    for name in job.route:
        detach(there.model, name)
    _grow(there.model, state)
    insert(there.model, state, name="merged")
    return merge(there.model, "merged")


def _sum(states: Sequence[AdapterState], weights: Sequence[float]) -> AdapterState:
    """Σ weight · ΔW as one state. What only one of them changes, at strength 1, needs no sum and stays as it is."""
    count = Counter(site for state in states for site in state.methods)
    alone = [
        _part(state, [site for site in state.methods if count[site] == 1 and weight == 1])
        for state, weight in zip(states, weights, strict=True)
    ]
    rest = [
        (_part(state, [site for site in state.methods if site not in kept.methods]), weight)
        for state, kept, weight in zip(states, alone, weights, strict=True)
    ]
    rest = [(state, weight) for state, weight in rest if state.methods]
    try:
        parts = [*alone, *([combine([s for s, _ in rest], [w for _, w in rest])] if rest else [])]
    except UseError as error:
        raise UseError(f"in memory only exact sums are merged, and {error}") from None
    chained = [{site: one for part in parts for site, one in table(part).items()} for table in _TABLES]
    return AdapterState(*chained)


_TABLES = (lambda state: state.methods, lambda state: state.tensors, lambda state: state.specs)


def _part(state: AdapterState, sites: Sequence[Site]) -> AdapterState:
    methods, tensors, specs = (
        {site: table(state)[site] for site in sites if site in table(state)} for table in _TABLES
    )
    return AdapterState(methods, tensors, specs)


def _grow(model: nn.Module, state: AdapterState) -> None:
    """Where a state brings rows of new tokens, make the base's tables as large as they need."""
    tokens = [token for method in state.methods.values() if isinstance(method, TokenRows) for token in method.tokens]
    size = max(tokens, default=-1) + 1
    if size > model.get_input_embeddings().weight.shape[0]:  # type: ignore[operator]
        model.resize_token_embeddings(size, mean_resizing=False)  # type: ignore[operator]


def corrects(states: Sequence[AdapterState]) -> bool:
    """Does one of them make up for what quantising rounds off?"""
    return any(method.corrects for state in states for method in state.methods.values())


def grows(model: nn.Module, names: Sequence[str]) -> bool:
    """Does one of the adapters bring rows that the base's tables have no place for?"""
    return any(getattr(adapter, "added", 0) for name in names for adapter in adapters(model, name).values())
