"""Merging: write W' = merged(W) into the base's weights. One way, unless a pristine copy is kept.

merge(model, "sql")                    W ← W'; the adapter is gone, the model is a plain one with no extra cost
merge(model, "sql", keep_base=True)    as above, the adapter stays, off; unmerge(model) puts the old bits back

Several merges give W' = W + ΔW₁ + ΔW₂ + …, every ΔW taken from the W that was kept. Never undone by subtraction: in
bf16, merge followed by subtraction changes about a quarter of all weights.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.core import guards, route
from deltaw.core.adapter import Adapter, WeightAdapter
from deltaw.core.attach import known
from deltaw.core.base import unwrapped
from deltaw.core.carried import here
from deltaw.core.errors import MergeError, faults
from deltaw.core.host import Host, ParameterHost, wide
from deltaw.core.place import remove


@dataclass(frozen=True)
class MergeReport:
    """What a merge wrote. `change` is ‖W' − W‖ / ‖W‖ over all touched weights, after rounding to what they can hold."""

    weights: int
    changed: int
    change: float


def merge(model: nn.Module, name: str = "default", *, keep_base: bool = False) -> MergeReport:
    """Write adapter `name` (at strength 1) into the weights it sits on.

    All faults are found before the first write: parts without a ΔW, tied weights that would change elsewhere, other
    adapters whose change would no longer be the same, values that are not finite in the weight's dtype, and a change
    that is zero everywhere. Raises MergeError.
    """
    model = unwrapped(model)
    known(model, name)
    before_route = route.live(model)
    modules = [module for module in route.adapted_modules(model) if name in here(module).entries]
    guards.intact(modules, name)
    if any(name in here(module).merged for module in modules):
        raise MergeError(f"{name!r} is merged already: unmerge the model before merging it again")
    work = changes(model, name)
    found = _faults(model, name, work, keep_base)
    if found:
        raise faults(MergeError, f"{name!r} cannot be merged", found)
    differences = [float((_after(adapter, host) - current(host)).norm()) for adapter, host in work]
    if not any(differences):
        raise MergeError(
            f"merging {name!r} would change no weight at all: its ΔW is zero, or too small for the weights' dtype. "
            "Was it trained, and did its file load?"
        )
    size = sum(float(current(host).norm()) ** 2 for _, host in work)
    for adapter, host in work:
        merged = _merged(adapter, host)
        if keep_base:
            readers = [(other.slot, here(other.module).pristine) for other in _readers(model, host.stored)]
            before = next((pristine[slot] for slot, pristine in readers if slot in pristine), None)
            kept = host.keep() if before is None else before  # an earlier merge kept it: now it is not the base's own
            for slot, pristine in readers:  # those that are tied see the base's own as well
                pristine[slot] = kept
        if not torch.equal(merged, current(host)):  # rounding anew what does not change could change it
            host.write(merged)
    for module in modules:
        if keep_base:
            here(module).merged = (*here(module).merged, name)
        else:
            remove(module, name, model)
    route.changed()
    route.apply(route.adapted_modules(model), {n: w for n, w in before_route.items() if n != name})
    change = sum(difference**2 for difference in differences)
    return MergeReport(len(work), sum(d > 0 for d in differences), (change / size) ** 0.5 if size else math.inf)


def unmerge(model: nn.Module) -> None:
    """Restore every weight kept by merge(keep_base=True), bit for bit, and turn the merged adapters on again."""
    model = unwrapped(model)
    before_route = route.live(model)
    back: dict[str, float] = {}
    for module in route.adapted_modules(model):
        there = here(module)
        hosts = {host.slot: host for group in there.entries.values() for _, host, _ in group}
        for slot, kept in there.pristine.items():
            hosts.get(slot, ParameterHost(module, slot)).restore(kept)
        back |= dict.fromkeys(there.merged, 1.0)
        there.pristine, there.merged = {}, ()
    if not back:
        raise MergeError("nothing to unmerge: no merge(…, keep_base=True) is in effect on this model")
    route.changed()
    route.apply(route.adapted_modules(model), {**before_route, **back})


def changes(model: nn.Module, name: str) -> list[tuple[Adapter, Any]]:
    """What a merge of `name` writes: every adapter of it with the view of the slot that it changes."""
    modules = [module for module in route.adapted_modules(model) if name in here(module).entries]
    entries = [entry for module in modules for entry in here(module).entries[name] if _own(*entry[:2])]
    work = [(adapter, host) for adapter, host, _ in {id(entry[0]): entry for entry in reversed(entries)}.values()][::-1]
    return work + [
        pair for adapter, host in work if isinstance(adapter, WeightAdapter) for pair in adapter.beside(host)
    ]


def obstacles(model: nn.Module, work: Sequence[tuple[Adapter, Any]]) -> dict[int, str]:
    """Which items of `work`, by number, no merge can write, whatever the values: parts without a ΔW, and tied weights."""
    found, owners = {}, _owners(model)
    paths = {id(module): path or "the model itself" for path, module in model.named_modules()}
    for number, (adapter, host) in enumerate(work):
        path = f"{paths[id(host.module)]}.{host.slot}"
        if not isinstance(adapter, WeightAdapter):
            found[number] = f"{path}: {adapter.method.name} has no ΔW, no weight can hold it"
            continue
        tied = [other for other in owners[_storage(host.stored)] if other != path and not adapter.method.follows_ties]
        if tied:
            found[number] = (
                f"{path} is tied to {', '.join(tied)}, which would change too: "
                "untie them first, or keep the adapter unmerged"
            )
    return found


def _faults(model: nn.Module, name: str, work: list[tuple[Adapter, Any]], keep_base: bool) -> list[str]:
    found, hopeless = [], obstacles(model, work)
    paths = {id(module): path or "the model itself" for path, module in model.named_modules()}
    twice = Counter((host.module, host.slot) for _, host in work)
    for number, (adapter, host) in enumerate(work):
        path = f"{paths[id(host.module)]}.{host.slot}"
        if number in hopeless:
            found.append(hopeless[number])
            continue
        if adapter.added:
            found.append(
                f"{path}: it brings rows that the weight has no place for: write a grown model with `deltaw merge`"
            )
            continue
        after = _after(adapter, host)
        if not torch.isfinite(after).all():
            found.append(f"{path}: the merged weight is not finite in {host.quantized or host.stored.dtype}")
        elif not keep_base and twice[host.module, host.slot] > 1:
            found.append(f"{path}: two parts of this adapter change it: merge with keep_base=True, which adds them up")
        elif not keep_base and host.slot in here(host.module).pristine:
            found.append(
                f"{path}: another adapter is merged here with its base kept, and unmerge would undo both: "
                "merge with keep_base=True, or unmerge first"
            )
        elif not keep_base and (others := _disturbed(model, name, host, after)):
            found.append(
                f"{path}: the change of {', '.join(others)} depends on this weight and would become another one: "
                "merge with keep_base=True, or detach them first"
            )
    return found


def current(host: Any) -> Tensor:
    """The canonical weight as the module computes with it now, earlier merges included, fp32."""
    pristine = here(host.module).pristine
    kept = pristine.pop(host.slot, None)
    weight = wide(host.weight.detach())
    if kept is not None:
        pristine[host.slot] = kept
    return weight


@torch.no_grad()
def _merged(adapter: Any, host: Any) -> Tensor:
    """The canonical weight that is to be stored, in fp32: `write` rounds it, once."""
    base = wide(host.weight)
    whole = adapter.merged(base)
    if host.slot in here(host.module).pristine:
        whole = current(host) + (whole - base)
    return whole.detach()  # type: ignore[no-any-return]


def _after(adapter: Any, host: Any) -> Tensor:
    """The canonical weight as it will be stored. Without a change it stays what it is, however coarse the storage."""
    merged, now = _merged(adapter, host), current(host)
    return now if torch.equal(merged, now) else host.rounded(merged)


def _readers(model: nn.Module, parameter: Tensor) -> list[Host]:
    """Views of every adapted slot that reads `parameter`."""
    return [
        Host(module, slot)
        for module in route.adapted_modules(model)
        for slot, other in module._parameters.items()
        if other is parameter
    ]


@torch.no_grad()
def _disturbed(model: nn.Module, name: str, host: Any, after: Tensor) -> list[str]:
    """Other adapters whose ΔW on the stored parameter, here or in a module tied to it, would be another one on the
    merged weight (DoRA, trained copies, a scaled bias)."""
    found = []
    for reader in _readers(model, host.stored):
        entries = [(a, h) for group in here(reader.module).entries.values() for a, h, _ in group if a.name != name]
        pairs = [pair for a, h in entries if isinstance(a, WeightAdapter) for pair in ((a, h), *a.beside(h))]
        pairs = [(a, h) for a, h in pairs if h.slot == reader.slot and _own(a, h)]
        found += [repr(a.name) for a, h in pairs if not _keeps(a, h, host, after)]
    return list(dict.fromkeys(found))


def _own(adapter: Adapter, host: Any) -> bool:
    """Is this the view that the adapter was made for? One that follows ties sits in modules of several layouts."""
    return not adapter.method.follows_ties or host.spec == adapter.spec


def _keeps(adapter: Any, other: Any, host: Any, after: Tensor) -> bool:
    """Is an adapter's ΔW the same once `after` stands in the parameter that its own view of it, `other`, sees too?"""
    base, merging = wide(other.weight), wide(host.weight)
    if not torch.equal(base, merging):  # a table is the transpose of the head that is tied to it
        after, merging = after.mT, merging.mT
    if adapter.added or not torch.equal(base, merging):  # seen in another layout: cannot tell
        return False
    delta = adapter.merged(base) - base
    error = float((adapter.merged(after) - after - delta).norm())
    return error <= 1e-3 * float(delta.norm()) + 1e-5 * float(base.norm())


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
