"""Merging: write W' = merged(W) into the base's weights. One way, unless a pristine copy is kept.

merge(model, "sql")                    W ← W'; the adapter is gone, the model is a plain one with no extra cost
merge(model, "sql", keep_base=True)    as above, the adapter stays, off; unmerge(model) puts the old bits back

Never undone by subtraction: in bf16, merge followed by subtraction changes about a quarter of all weights.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deltaw.core import route
from deltaw.core.adapter import WeightAdapter
from deltaw.core.attach import _known, _release, _remove
from deltaw.core.errors import MergeError, faults


@dataclass(frozen=True)
class MergeReport:
    """What a merge wrote. `change` is ‖W' − W‖ / ‖W‖ over all touched weights, after rounding to their dtype."""

    weights: int
    changed: int
    change: float


def merge(model: nn.Module, name: str = "default", *, keep_base: bool = False) -> MergeReport:
    """Write adapter `name` (at strength 1) into the weights it sits on.

    All faults are found before the first write: parts without a ΔW, tied weights that would change elsewhere, values
    that are not finite in the weight's dtype, and a change that is zero everywhere. Raises MergeError.
    """
    _known(model, name)
    modules = [module for module in route.adapted_modules(model) if name in module.__dict__["entries"]]
    if any(name in module.__dict__["merged"] for module in modules):
        raise MergeError(f"{name!r} is merged already: unmerge the model before merging it again")
    found, change, size, changed = [], 0.0, 0.0, 0
    paths = {id(module): path or "the model itself" for path, module in model.named_modules()}
    owners = _owners(model)
    work = [(module, adapter, host) for module in modules for adapter, host, _ in module.__dict__["entries"][name]]
    for module, adapter, host in work:
        path = paths[id(module)]
        if not isinstance(adapter, WeightAdapter):
            found.append(f"{path}: {adapter.method.name} has no ΔW, no weight can hold it")
            continue
        tied = [other for other in owners[_storage(host.parameter)] if other != f"{path}.{host.slot}"]
        if tied:
            found.append(
                f"{path}.{host.slot} is tied to {', '.join(tied)}, which would change too: untie them first, or train only one of them without a merge"
            )
            continue
        before, after = host.weight.float(), _rounded(adapter, host)
        if not torch.isfinite(after).all():
            found.append(f"{path}: the merged weight is not finite in {host.parameter.dtype}")
        difference = float((after - before).norm())
        changed, change, size = changed + (difference > 0), change + difference**2, size + float(before.norm()) ** 2
    if found:
        raise faults(MergeError, f"{name!r} cannot be merged", found)
    if not changed:
        raise MergeError(
            f"merging {name!r} would change no weight at all: its ΔW is zero, or too small for the weights' dtype. "
            "Was it trained, and did its file load?"
        )
    for module, adapter, host in work:
        if keep_base:
            module.__dict__["pristine"].setdefault(host.slot, host.parameter.detach().clone())
        host.write(_rounded(adapter, host))
    before_route = route.live(model)
    for module in modules:
        if keep_base:
            module.__dict__["merged"] = (*module.__dict__["merged"], name)
        else:
            _remove(module, name)
    route.changed()
    route.apply(route.adapted_modules(model), {n: w for n, w in before_route.items() if n != name})
    if not route.adapted_modules(model):
        _release(model)
    return MergeReport(len(work), changed, (change / size) ** 0.5 if size else 0.0)


def unmerge(model: nn.Module) -> None:
    """Restore every weight kept by merge(keep_base=True), bit for bit, and turn the merged adapters on again."""
    back: dict[str, float] = {}
    for module in route.adapted_modules(model):
        with torch.no_grad():
            for slot, kept in module.__dict__["pristine"].items():
                module._parameters[slot].copy_(kept)
        back |= dict.fromkeys(module.__dict__["merged"], 1.0)
        module.__dict__.update(pristine={}, merged=())
    if not back:
        raise MergeError("nothing to unmerge: no merge(…, keep_base=True) is in effect on this model")
    route.apply(route.adapted_modules(model), {**route.live(model), **back})


def _rounded(adapter: WeightAdapter, host: object) -> Tensor:
    """The merged canonical weight as it will be stored: fp32 arithmetic, rounded once to the parameter's dtype."""
    weight: Tensor = host.weight  # type: ignore[attr-defined]
    with torch.no_grad():
        return adapter.merged(weight.float()).to(weight.dtype).float()


def _storage(parameter: Tensor) -> tuple[object, int, int]:
    return (parameter.device, parameter.untyped_storage().data_ptr(), parameter.storage_offset())


def _owners(model: nn.Module) -> dict[tuple[object, int, int], list[str]]:
    """Storage of a parameter → every `path.slot` in the model that reads it. Several where weights are tied."""
    result: dict[tuple[object, int, int], list[str]] = {}
    for path, module in model.named_modules():
        for slot, parameter in module._parameters.items():
            if parameter is not None:
                result.setdefault(_storage(parameter), []).append(f"{path or 'the model itself'}.{slot}")
    return result
