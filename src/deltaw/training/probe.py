"""A few gradient batches on the frozen base → the spectrum of every target's weight gradient, before anything is trained.

    G = Σ over tokens of gᵀ x [out, in]      x what the layer read, g what came back to its output

G is what the first step of all weights would follow; the best change of rank k follows Σ_{i ≤ k} σᵢ² of it. Layers are
taken in groups whose gradients fit `held` bytes; each group costs one more pass over the batches, and only singular
values stay. `probe` shares out the parameters of a configuration by them (`deltaw.planner.allocate`).
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.config.schema import Config
from deltaw.core import targets as targeting
from deltaw.core.errors import UseError
from deltaw.core.plan import Target, TargetPlan
from deltaw.data.collate import Collator
from deltaw.infer.loss import SFTLoss
from deltaw.methods.lora import LoRA
from deltaw.models.base import load_base
from deltaw.planner.allocate import Spectrum, allocate, captured, parameters
from deltaw.training.prepare import prepare

HELD = 1 << 30
MOST = 4
"""A module gets at most this multiple of the usual rank."""


@dataclass(frozen=True)
class Probed:
    """What a probe of some batches suggests, beside what the configuration has."""

    spectra: Mapping[str, Spectrum]
    uniform: Mapping[str, int]
    ranks: Mapping[str, int]
    usual: int
    """The rank of most modules as configured."""
    scale: float
    rslora: bool = False

    @property
    def sizes(self) -> tuple[int, int]:
        """Parameters of the factors, as configured and as suggested."""
        return parameters(self.spectra, self.uniform), parameters(self.spectra, self.ranks)

    @property
    def energy(self) -> tuple[float, float]:
        """Share of the gradients' energy that the ranks can follow, as configured and as suggested."""
        return captured(self.spectra, self.uniform), captured(self.spectra, self.ranks)

    @property
    def adapter(self) -> dict[str, Any]:
        """Fields of the `adapter` section. Alphas go with the ranks, so that every module keeps its scale."""
        others = {path: rank for path, rank in self.ranks.items() if rank != self.usual}
        alphas = {path: self._alpha(rank) for path, rank in others.items()}
        return {"rank": self.usual, "alpha": self._alpha(self.usual), "rank_pattern": others, "alpha_pattern": alphas}

    def _alpha(self, rank: int) -> float:
        return self.scale * (math.sqrt(rank) if self.rslora else rank)


def probe(config: Config, batches: int = 4) -> Probed:
    """Look at the first batches of a configuration's rows; UseError where its method has no ranks to share out."""
    method = config.adapter.method
    if config.stages or config.adapter.parts is not None:
        given = "stages" if config.stages else "adapter.parts"
        raise UseError(f"a probe shares out the ranks of one run of one method: leave {given} out")
    if not isinstance(method, LoRA) or config.adapter.start is not None:
        given = "an adapter to go on from" if config.adapter.start is not None else method.name
        raise UseError(f"a probe shares out the ranks of a new lora or dora, not of {given}: set adapter.method: lora")
    data = prepare(config)
    if data.tokens.pieces:
        raise UseError("a probe runs the base alone, which has no rows for new tokens: leave data.tokens out")
    size, collate = config.train.batch_size, Collator(data.tokenizer, processor=data.processor)
    base = load_base(config.model, dtype=config.train.dtype, quantize=config.quantize)
    device = next(base.model.parameters()).device
    chosen = config.adapter
    plan = targeting.plan(base.model, method, chosen.targets, exclude=chosen.exclude, layers=chosen.layers)
    resolved = {t.site.path: t.method for t in plan.targets if isinstance(t.method, LoRA)}
    usual = Counter(m.rank or 1 for m in resolved.values()).most_common(1)[0][0]
    scale = Counter(m.scale for m in resolved.values()).most_common(1)[0][0]
    looked = [
        {key: value.to(device) for key, value in collate(data.encoded[first : first + size]).items()}
        for first in range(0, min(len(data.encoded), batches * size), size)
    ]
    found = spectra(base.model, plan, looked, MOST * usual)
    uniform = {path: resolved[path].rank or 1 for path in found}
    ranks = allocate(found, parameters(found, uniform), MOST * usual)
    return Probed(found, uniform, ranks, usual, scale, method.rslora)


def spectra(
    model: nn.Module, plan: TargetPlan, batches: Iterable[dict[str, Tensor]], most: int, *, held: int = HELD
) -> dict[str, Spectrum]:
    """path → spectrum of the gradient, its `most` largest values, for the linear layers of the plan.

    batches: with labels, as for training; a list, which several groups of layers read in turn. `model` stays as it was.
    """
    targets = [t for t in plan.targets if t.spec.linear and not t.spec.lookup and len(t.spec.whole) == 2]
    if not targets:
        raise UseError("a probe looks at linear layers, and the targets name none: give adapter.targets: all-linear")
    listed, loss = list(batches), SFTLoss(model)
    if not listed:
        raise UseError("a probe needs rows to take gradients of: give data.train")
    training, flags = model.training, {p: p.requires_grad for p in model.parameters()}
    model.eval().requires_grad_(False)
    table = model.get_input_embeddings()  # type: ignore[operator]
    entry = table.register_forward_hook(lambda _, __, y: y.requires_grad_())  # or nothing would reach the layers
    try:
        found: dict[str, Spectrum] = {}
        for group in _groups(targets, held):
            found |= _of(model, loss, group, listed, most)
        return found
    finally:
        entry.remove()
        model.train(training)
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)


def _groups(targets: Sequence[Target], held: int) -> Iterator[list[Target]]:
    group: list[Target] = []
    for target in targets:
        if group and 4 * sum(t.spec.numel for t in (*group, target)) > held:
            yield group
            group = []
        group.append(target)
    yield group


def _of(
    model: nn.Module, loss: SFTLoss, targets: Sequence[Target], batches: Sequence[dict[str, Tensor]], most: int
) -> dict[str, Spectrum]:
    gradients: dict[str, Tensor] = {}

    def watch(path: str, shape: tuple[int, ...]) -> Any:
        def forward(_: nn.Module, args: tuple[Any, ...], y: Tensor) -> None:
            x = args[0].detach().flatten(0, -2)

            def backward(g: Tensor) -> None:
                known = gradients.setdefault(path, g.new_zeros(shape, dtype=torch.float32))
                known.addmm_(g.flatten(0, -2).float().T, x.float())

            y.register_hook(backward)

        return forward

    hooks = [model.get_submodule(t.site.path).register_forward_hook(watch(t.site.path, t.spec.shape)) for t in targets]
    try:
        for batch in batches:
            total, count = loss(batch)
            (total / count).backward()
    finally:
        for hook in hooks:
            hook.remove()
    silent = [t.site.path for t in targets if t.site.path not in gradients]
    if silent:
        raise UseError(
            f"no gradient reached {', '.join(silent[:4])}: it did not run; look at more batches, or exclude it"
        )
    return {t.site.path: _spectrum(gradients.pop(t.site.path), most) for t in targets}


def _spectrum(gradient: Tensor, most: int) -> Spectrum:
    values = torch.linalg.svdvals(gradient)
    total = float(gradient.double().square().sum())
    if not math.isfinite(total):
        raise UseError("the gradient of the base is not finite: probe with train.dtype=fp32")
    out, into = gradient.shape
    return Spectrum(out, into, values[:most].double().square().tolist(), total)
