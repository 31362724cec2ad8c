"""What a run will train and what its steps take, before any weight is loaded: on the base's modules and shapes (meta device).

configuration → outline of the base → TargetPlan → adapters on the outline → a step rehearsed → bytes by part, work
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from deltaw.config.schema import Config
from deltaw.core.attach import adapters
from deltaw.core.base import by_path, parameters
from deltaw.core.errors import TargetError, UseError
from deltaw.core.plan import Target, TargetPlan
from deltaw.data.collate import Collator
from deltaw.data.encode import Encoded
from deltaw.data.store import lengths
from deltaw.formats import directory
from deltaw.methods.full import Full
from deltaw.models.base import DTYPES, limit_of, outline
from deltaw.models.quantize import layers, method_of
from deltaw.planner.arithmetic import optimizer_steps
from deltaw.planner.memory import Memory, Weight, optimizer_bytes, weight_bytes
from deltaw.training.parts import ByPart, by_part, only, whole
from deltaw.training.prepare import Prepared, longest
from deltaw.training.rehearsal import NAME, Counted, dress, rehearse
from deltaw.training.watch import holes

OVERHEAD = {("cpu", "fp32"): 24_000_000, ("cpu", "bf16"): 9_000_000}
CARD = 34_000_000
"""Bytes that libraries take for themselves once a step has run: modules that are imported late, MKL's buffers for products in fp32,
on a card cuBLAS' workspace (docs/memory.md)."""


BESIDE = ("input_ids", "attention_mask", "position_ids", "labels")
"""Of a batch, what texts have too."""


@dataclass(frozen=True)
class Batch:
    """The widest batch: rows, tokens in each, whether a mask is needed, share of the positions that are learnt."""

    rows: int
    length: int
    padded: bool = True
    supervised: float = 1.0
    images: bool | None = None
    """Do rows hold images, in this batch or in others? None where there are no rows to ask."""
    given: Mapping[str, Tensor] | None = field(default=None, compare=False, repr=False)
    """Where they do, the batch itself: towers ask it for numbers (grids of patches, which images are there)."""

    @property
    def features(self) -> tuple[tuple[str, tuple[int, ...], str], ...]:
        """What the model takes beside what texts have too: names, shapes and dtypes (pixel_values, …)."""
        beside = ((name, t) for name, t in (self.given or {}).items() if name not in BESIDE)
        return tuple((name, tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in beside)

    def record(self) -> dict[str, Any]:
        fields = (f.name for f in dataclasses.fields(self) if f.name != "given")
        return {**{name: getattr(self, name) for name in fields}, "features": self.features}


@dataclass
class Outlook:
    """A base's outline and what will be attached to it."""

    model: Any
    plan: TargetPlan
    """What is trained."""
    kept: tuple[Target, ...] = ()
    """Adapters that are there and are not trained."""
    carried: tuple[Target, ...] | None = None
    """Those of the adapter that it goes on from."""
    by_part: ByPart | None = None
    _weights: list[Weight] = field(default_factory=list)
    """Those of the base, known once the adapters are on the outline."""
    _counted: dict[Any, Counted] = field(default_factory=dict)

    @property
    def quantized(self) -> str | None:
        """How the base's own files are quantised, in our words; None where they are not. UseError for what we do not know."""
        own = getattr(self.model.config, "quantization_config", None)
        if own is None:
            return None
        record = own if isinstance(own, dict) else own.to_dict()
        if record.get("load_in_8bit"):
            return "int8"
        if record.get("load_in_4bit"):
            return "nf4-double" if record.get("bnb_4bit_use_double_quant") else "nf4"
        raise UseError(f"what a base quantised by {method_of(self.model.config)} takes is not known")

    @property
    def limit(self) -> int | None:
        """The longest row that the base reads, where it says one."""
        return limit_of(self.model.config)

    def count(self, config: Config, batch: Batch, kind: str, dtype: str) -> tuple[Counted, Memory]:
        """A step of `batch` on a device of `kind` (cpu, cuda): what it computes, and its bytes by part.

        The outline keeps the dtype of the first call, and whether it is quantised: others need another outlook.
        """
        kind_of_weights = self.quantized or config.quantize
        if not self._weights:
            self._weights += base_weights(self.model)
            rounded = layers(self.model) if kind_of_weights != "none" else []
            everything = (*self.plan.targets, *self.kept)
            dress(self.model.to(dtype=DTYPES[dtype]), everything, rounded)
            if everything:
                only(self.model, NAME, [target.site for target in self.plan.targets])
        t = config.train
        options: dict[str, Any] = {
            "device": kind, "padded": batch.padded, "supervised": batch.supervised, "checkpointing": t.checkpointing,
            "accumulated": t.gradient_accumulation > 1,
        }  # fmt: skip
        key = dataclasses.replace(batch, given=None), batch.features, *options.values()  # which keeps no pixels
        if key not in self._counted:
            self._counted[key] = rehearse(self.model, batch.rows, batch.length, given=batch.given, **options)
        counted = self._counted[key]
        sizes = [p.numel() for p in self.model.parameters() if p.requires_grad]
        held = sum(p.numel() for one in adapters(self.model, NAME).values() for p in one.parameters())
        masters, states, peak = 4 * held, optimizer_bytes(sizes, t.optimizer), int(counted.peak)
        gradients = min(int(counted.gradients), peak)
        activations = min(int(counted.saved), peak - gradients)
        kept = holes(t.checkpointing) * (masters + states + peak) if kind == "cpu" else 0
        return counted, Memory(
            weights=weight_bytes(self._weights, DTYPES[dtype].itemsize, kind_of_weights),
            adapters=masters,
            optimizer=states,
            gradients=gradients,
            activations=activations,
            work=peak - gradients - activations,
            overhead=OVERHEAD.get((kind, dtype), CARD) + int(kept),
            evaluation=int(counted.evaluation),
        )


def outlook(config: Config, carried: Sequence[Target] | None = None) -> Outlook | None:
    """The plan that attaching will carry out, on the base's outline; None where the run goes on from a whole adapter.

    carried: what the adapter that it goes on from holds, where that is not written yet (an earlier stage).
    Raises TargetError for targets that cannot be adapted, FileError for a base whose configuration cannot be read.
    """
    found = _planned(config, carried)
    if found is not None:
        _trainable(found, config.quantize)
    return found


def _trainable(look: Outlook, quantize: str) -> None:
    """TargetError where weights would be trained in full that will be rounded to a few bits, which the outline does not show."""
    kind = method_of(look.model.config) or quantize
    if kind == "none":
        return
    there, rounded = by_path(look.model), {id(module) for module in layers(look.model)}
    full = [t.site for t in look.plan.targets if isinstance(t.method, Full) and t.site.slot == "weight"]
    if wrong := [site.path for site in full if id(there[site.path]) in rounded]:
        raise TargetError(
            f"full would train {len(wrong):,} layers whose weights are quantised ({kind}; the first is {wrong[0]}), and a trained copy "
            "needs the values: train them with lora, or set quantize to none"
        )


def _planned(config: Config, carried: Sequence[Target] | None) -> Outlook | None:
    chosen = config.adapter
    if chosen.start is not None and chosen.parts is None and carried is None:
        return None
    model = outline(config.model).requires_grad_(False)
    if chosen.start is not None and carried is None:
        carried = held_by(chosen.start, model)
    there = None if carried is None else tuple(carried)
    if chosen.parts is not None:
        found = by_part(model, chosen, there or (), bool(config.data.tokens))
        return Outlook(model, found.plan(model), found.kept, there, found)
    if there is not None:
        return Outlook(model, TargetPlan(there, parameters(model)), carried=there)
    return Outlook(model, whole(model, chosen))


def held_by(folder: str, model: nn.Module) -> tuple[Target, ...]:
    """What an adapter's files hold, as targets on the outline of its base; sites that the base lacks are left to `load`."""
    state, there = directory.read(folder)[0], by_path(model)
    sizes = {site: sum(tensor.numel() for tensor in own.values()) for site, own in state.tensors.items()}
    return tuple(
        Target(site, type(there[site.path]).__name__, state.specs[site], method, sizes[site])
        for site, method in state.methods.items()
        if site.path in there and site in state.specs
    )


def widest(config: Config, data: Prepared | None, limit: int | None) -> Batch:
    """The widest batch of a run's rows; without any, of rows as long as it takes.

    It is as wide as the longest row, because every row of a batch is padded to the longest of it. What is learnt of it is
    counted on the longest rows, which may be unlike the others. Of rows with images the batch is made.
    """
    size, most = config.train.batch_size, longest(config, limit)
    if data is None:
        return Batch(size, most)
    found = [min(n, most) for n in lengths(data.encoded)]
    order = sorted(range(len(found)), key=lambda n: -found[n])[:size]
    learnt = sum(min(data.encoded[n].supervised, found[n]) for n in order)
    share = min(1.0, learnt / max(1, len(order) * (found[order[0]] - 1)))
    rows, pictured = [data.encoded[n] for n in order], data.report.with_images > 0
    given = _given(rows, data) if pictured else None
    return Batch(len(order), found[order[0]], size > 1 and min(found) != max(found), share, pictured, given)


def _given(rows: Sequence[Encoded], data: Prepared) -> dict[str, Tensor]:
    """The batch of these rows, without labels; with the first row with images in it where they have none."""
    chosen, width = list(rows), max(len(row.ids) for row in rows)
    if not any(row.images for row in chosen):
        chosen[-1] = next(row for row in data.encoded if row.images)
    made = Collator(data.tokenizer, processor=data.processor)(chosen)
    shape = made.pop("labels").shape
    return {name: F.pad(t, (0, width - shape[1])) if t.shape == shape else t for name, t in made.items()}


def steps(config: Config, rows: int) -> tuple[int, int]:
    """Optimizer steps in all, and between evaluations."""
    t = config.train
    total = t.max_steps or optimizer_steps(rows, t.batch_size * t.gradient_accumulation, t.epochs)
    every = max(1, math.ceil(total / 5)) if t.eval_every == "auto" else t.eval_every
    return total, every


def base_weights(model: nn.Module) -> list[Weight]:
    """The tensors of a base, and which of them would be quantised."""
    linear = {id(module.weight) for module in layers(model)}
    tensors = (*model.parameters(), *model.buffers())
    return [Weight(t.numel(), len(t) if t.ndim else 1, id(t) in linear) for t in tensors]
