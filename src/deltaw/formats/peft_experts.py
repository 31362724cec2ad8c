"""PEFT's `target_parameters`: LoRA on stacks of experts. Facts: PEFT 0.21, `ParamWrapper` in `tuners/lora/layer.py`.

    parameters of <module>      their tensors' keys          one wrapper around the other, in the order of registration
    gate_up_proj, down_proj     <module>.base_layer.lora_A.weight,  <module>.lora_A.weight
    one of them                 <module>.lora_A.weight              which, target_parameters alone can say

    A [E·r, in]    row e·r + i      is component i of expert e
    B [out, E·r]   column i·E + e   is component i of expert e: another order

Ranks and alphas go by the parameter's whole name, <module>.<parameter>.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import Tensor

from deltaw.core.method import Site
from deltaw.formats.peft_match import named
from deltaw.hosts.experts import ExpertsHost

NESTED = ".base_layer"


def is_stack(site: Site) -> bool:
    return site.slot in ExpertsHost.slots


def full_name(site: Site) -> str:
    """What PEFT calls a site: the module's path, or that of a parameter in it."""
    return f"{site.path}.{site.slot}" if is_stack(site) else site.path


def sites(config: Mapping[str, Any], paths: Iterable[str]) -> tuple[dict[str, Site], list[str]]:
    """The site of every path that keys give, and faults: paths that cannot be told apart have none."""
    layers: dict[str, list[str]] = {}
    for path in paths:
        layers.setdefault(path.replace(NESTED, ""), []).append(path)
    found: dict[str, Site] = {}
    faults: list[str] = []
    for module, nested in layers.items():
        slots = _slots(config, module)
        if not slots and len(nested) == 1 and nested == [module]:
            found[module] = Site(module)
        elif unknown := [slot for slot in slots if slot not in ("weight", *ExpertsHost.slots)]:
            faults.append(
                f"{module}: target_parameters names {', '.join(unknown)}; only stacks of experts are supported"
            )
        elif len(slots) != len(nested):
            known = ", ".join(slots) or "none"
            faults.append(f"{module}: the file adapts {len(nested)} of its parameters, target_parameters names {known}")
        else:
            inside_first = sorted(nested, key=len, reverse=True)
            found |= {path: Site(module, slot) for path, slot in zip(inside_first, slots, strict=True)}
    return found, faults


def _slots(config: Mapping[str, Any], module: str) -> list[str]:
    """Parameters of `module` that target_parameters names, in the order in which they are registered."""
    entries = list(config.get("target_parameters") or ())
    slots = {slot for slot in (entry.rpartition(".")[2] for entry in entries) if named(entries, f"{module}.{slot}")}
    order = [slot for slot in ExpertsHost.slots if slot in slots]
    return order + sorted(slots - set(order))


def keys(adapted: Collection[Site]) -> dict[Site, str]:
    """Path of every site in PEFT's keys."""
    order = {slot: number for number, slot in enumerate(ExpertsHost.slots)}
    depth = {s: sum(o.path == s.path and order.get(o.slot, 0) > order.get(s.slot, 0) for o in adapted) for s in adapted}
    return {site: site.path + NESTED * depth[site] for site in adapted}


def unflatten(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor] | str:
    """A [E·r, in], B [out, E·r] → [E, r, in], [E, out, r], or why not."""
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or not a.shape[0] or a.shape[0] % rank:
        return f"A is {tuple(a.shape)} and B is {tuple(b.shape)}: not the factors of a stack of experts at rank {rank}"
    stack = a.shape[0] // rank
    return a.reshape(stack, rank, -1), b.reshape(-1, rank, stack).permute(2, 0, 1)


def flatten(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The way back."""
    return a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)
