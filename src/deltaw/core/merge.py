"""Merging: write W' = merged(W) into the base's weights. One way, unless a pristine copy is kept.

merge(model, "sql")                    W ← W'; the adapter is gone, the model is a plain one with no extra cost
merge(model, "sql", keep_base=True)    as above, the adapter stays, off; unmerge(model) puts the old bits back

Several merges give W' = W + ΔW₁ + ΔW₂ + …, every ΔW taken from the W that was kept. Never undone by subtraction: in
bf16, merge followed by subtraction changes about a quarter of all weights.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.core import route
from deltaw.core.adapter import Adapter, WeightAdapter
from deltaw.core.attach import known, remove
from deltaw.core.errors import MergeError, faults
from deltaw.core.guards import release
from deltaw.core.host import Host


@dataclass(frozen=True)
class MergeReport:
    """What a merge wrote. `change` is ‖W' − W‖ / ‖W‖ over all touched weights, after rounding to their dtype."""

    weights: int
    changed: int
    change: float


def merge(model: nn.Module, name: str = "default", *, keep_base: bool = False) -> MergeReport:
    """Write adapter `name` (at strength 1) into the weights it sits on.

    All faults are found before the first write: parts without a ΔW, tied weights that would change elsewhere, other
    adapters whose change would no longer be the same, values that are not finite in the weight's dtype, and a change
    that is zero everywhere. Raises MergeError.
    """
    known(model, name)
    modules = [module for module in route.adapted_modules(model) if name in module.__dict__["entries"]]
    if any(name in module.__dict__["merged"] for module in modules):
        raise MergeError(f"{name!r} is merged already: unmerge the model before merging it again")
    entries = [entry for module in modules for entry in module.__dict__["entries"][name]]
    work = [(adapter, host) for adapter, host, _ in {id(entry[0]): entry for entry in reversed(entries)}.values()][::-1]
    found = _faults(model, name, work, keep_base)
    if found:
        raise faults(MergeError, f"{name!r} cannot be merged", found)
    differences = [float((_merged(adapter, host) - _current(host)).norm()) for adapter, host in work]
    if not any(differences):
        raise MergeError(
            f"merging {name!r} would change no weight at all: its ΔW is zero, or too small for the weights' dtype. "
            "Was it trained, and did its file load?"
        )
    size = sum(float(_current(host).norm()) ** 2 for _, host in work)
    for adapter, host in work:
        merged = _merged(adapter, host)
        if keep_base:
            host.module.__dict__["pristine"].setdefault(host.slot, host.stored.detach().clone())
        host.write(merged)
    before_route = route.live(model)
    for module in modules:
        if keep_base:
            module.__dict__["merged"] = (*module.__dict__["merged"], name)
        else:
            remove(module, name)
    route.changed()
    route.apply(route.adapted_modules(model), {n: w for n, w in before_route.items() if n != name})
    if not route.adapted_modules(model):
        release(model)
    change = sum(difference**2 for difference in differences)
    return MergeReport(len(work), sum(d > 0 for d in differences), (change / size) ** 0.5 if size else math.inf)


def unmerge(model: nn.Module) -> None:
    """Restore every weight kept by merge(keep_base=True), bit for bit, and turn the merged adapters on again."""
    back: dict[str, float] = {}
    for module in route.adapted_modules(model):
        with torch.no_grad():
            for slot, kept in module.__dict__["pristine"].items():
                Host(module, slot).stored.copy_(kept)
        back |= dict.fromkeys(module.__dict__["merged"], 1.0)
        module.__dict__.update(pristine={}, merged=())
    if not back:
        raise MergeError("nothing to unmerge: no merge(…, keep_base=True) is in effect on this model")
    route.apply(route.adapted_modules(model), {**route.live(model), **back})


def _faults(model: nn.Module, name: str, work: list[tuple[Adapter, Any]], keep_base: bool) -> list[str]:
    found = []
    paths = {id(module): path or "the model itself" for path, module in model.named_modules()}
    owners = _owners(model)
    for adapter, host in work:
        path = f"{paths[id(host.module)]}.{host.slot}"
        if not isinstance(adapter, WeightAdapter):
            found.append(f"{path}: {adapter.method.name} has no ΔW, no weight can hold it")
            continue
        tied = [other for other in owners[_storage(host.stored)] if other != path and not adapter.method.follows_ties]
        after = _merged(adapter, host)
        if tied:
            found.append(
                f"{path} is tied to {', '.join(tied)}, which would change too: "
                "untie them first, or keep the adapter unmerged"
            )
        elif not torch.isfinite(after).all():
            found.append(f"{path}: the merged weight is not finite in {host.stored.dtype}")
        elif not keep_base and host.slot in host.module.__dict__["pristine"]:
            found.append(
                f"{path}: another adapter is merged here with its base kept, and unmerge would undo both: "
                "merge with keep_base=True, or unmerge first"
            )
        elif not keep_base and (others := _disturbed(name, host, after)):
            found.append(
                f"{path}: the change of {', '.join(others)} depends on this weight and would become another one: "
                "merge with keep_base=True, or detach them first"
            )
    return found


def _current(host: Any) -> Tensor:
    """The canonical weight as the module computes with it now, earlier merges included, fp32."""
    pristine = host.module.__dict__["pristine"]
    kept = pristine.pop(host.slot, None)
    weight: Tensor = host.weight.detach().float()
    if kept is not None:
        pristine[host.slot] = kept
    return weight


@torch.no_grad()
def _merged(adapter: WeightAdapter, host: Any) -> Tensor:
    """The canonical weight as it will be stored: fp32 arithmetic, rounded once to the weight's dtype."""
    base = host.weight.float()
    whole = adapter.merged(base)
    if host.slot in host.module.__dict__["pristine"]:
        whole = _current(host) + (whole - base)
    return whole.to(host.weight.dtype).float().detach()


@torch.no_grad()
def _disturbed(name: str, host: Any, after: Tensor) -> list[str]:
    """Other adapters on the same weight whose ΔW would be another one on the merged weight (DoRA, trained copies)."""
    found = []
    entries: dict[str, tuple[route.Live, ...]] = host.module.__dict__["entries"]
    for adapter, other, _ in (entry for group in entries.values() for entry in group):
        if other.slot != host.slot or adapter.name == name or not isinstance(adapter, WeightAdapter):
            continue
        base = other.weight.float()
        if not torch.equal(base, host.weight.float()):  # seen in another layout: cannot tell
            found.append(repr(adapter.name))
            continue
        delta = adapter.merged(base) - base
        error = float((adapter.merged(after) - after - delta).norm())
        if error > 1e-3 * float(delta.norm()) + 1e-5 * float(base.norm()):
            found.append(repr(adapter.name))
    return found


def _storage(parameter: Tensor) -> tuple[Any, ...]:
    return (parameter.device, parameter.untyped_storage().data_ptr(), parameter.storage_offset())


def _owners(model: nn.Module) -> dict[tuple[Any, ...], list[str]]:
    """Storage of a parameter → every `path.slot` in the model that reads it. Several where weights are tied."""
    result: dict[tuple[Any, ...], list[str]] = {}
    for path, module in model.named_modules():
        for slot, parameter in module._parameters.items():
            if parameter is not None:
                result.setdefault(_storage(parameter), []).append(f"{path or 'the model itself'}.{slot}")
    return result
