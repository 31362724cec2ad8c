"""What `attach` refuses or switches off, so that no adapter is ignored silently; and how `detach` puts it all back.

Each has a test of its own in tests/core/test_guards.py.

    guard                               why
    merged adapter of the same name     its change is in the weights already and would act twice
    fully_shard before attach           attach after quantising and before sharding
    forward replaced on the instance    it shadows the class: the adapter would never be called
    'adapters' or parametrizations      names we would overwrite, tensors we would not see
    save_pretrained while attached      would write adapter keys into the base's file
    out_proj of MultiheadAttention      the attention reads its parameters itself (`bypassed`)
    encoder fast path                   reads the weights of its linears itself: switched off
"""

import itertools
import re
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from deltaw.core import route
from deltaw.core.base import base_parameters
from deltaw.core.errors import UseError, faults
from deltaw.core.method import Method, Site

_order = itertools.count()


def admit(model: nn.Module, name: str, sites: Mapping[Site, Method]) -> None:
    """Refuse what would be ignored, overwritten or wrong; nothing has been touched yet. Then set the guards."""
    found: list[str] = []
    if not re.fullmatch(r"[\w\-]+", name) or hasattr(nn.ModuleDict(), name):
        raise UseError(
            f"an adapter cannot be called {name!r}: use letters, digits, '_' and '-', "
            "and no name of an nn.Module attribute"
        )
    unmerged(model, name)
    fsdp = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    if fsdp is not None and any(isinstance(module, fsdp) for module in model.modules()):
        raise UseError("the model is already sharded (fully_shard): attach after quantising and before sharding")
    for site in sites:
        module = model.get_submodule(site.path)
        if carries(module, name, site.slot):
            found.append(f"{site} already carries adapter {name!r}: choose another name, or detach it first")
        if "entries" in module.__dict__:
            continue
        if not _forward_is_the_classes(module):
            found.append(
                f"{site}: its forward was replaced on the instance, an adapter would be ignored: attach before patching"
            )
        if hasattr(module, "adapters") or hasattr(module, "parametrizations"):
            found.append(
                f"{site}: the module has an attribute 'adapters' or parametrizations of its own: remove them first"
            )
    if found:
        raise faults(UseError, f"cannot attach {name!r}", found)
    if "_required_grad" not in model.__dict__:
        flags = {path for path, parameter in base_parameters(model) if parameter.requires_grad}
        model.__dict__["_required_grad"] = (next(_order), flags)
        if hasattr(type(model), "save_pretrained"):
            model.__dict__["save_pretrained"] = _SavingRefused()
    _no_fast_path(model, [site.path for site in sites])


def carries(module: nn.Module, name: str, slot: str) -> bool:
    """Does the module have an adapter `name` on this slot?"""
    return any(host.slot == slot for _, host, _ in module.__dict__.get("entries", {}).get(name, ()))


def unmerged(model: nn.Module, name: str) -> None:
    """Refuse to go on while adapter `name` is merged."""
    if any(name in module.__dict__["merged"] for module in route.adapted_modules(model)):
        raise UseError(f"{name!r} is merged into the weights: unmerge the model first")


def bypassed(model: nn.Module, path: str) -> str | None:
    """Why the forward of the module at `path` is never called, so that an adapter there would be ignored; or None."""
    above, _, name = path.rpartition(".")
    if path and isinstance(model.get_submodule(above), nn.MultiheadAttention) and name == "out_proj":
        return "nn.MultiheadAttention reads the parameters of out_proj itself, an adapter there would be ignored"
    return None


def release(model: nn.Module) -> None:
    """After the last adapter: flags, guards and caches back to what they were."""
    records = []
    for module in model.modules():
        module.__dict__.pop("save_pretrained", None)
        module.__dict__.pop("_adapted", None)
        if "_fast_path" in module.__dict__:
            setattr(module, *module.__dict__.pop("_fast_path"))
        if "_required_grad" in module.__dict__:
            records.append((*module.__dict__.pop("_required_grad"), module))
    for _, flags, module in sorted(records, key=lambda record: record[0], reverse=True):  # the first to attach wins
        for path, parameter in module.named_parameters():
            parameter.requires_grad_(path in flags)


def _forward_is_the_classes(module: nn.Module) -> bool:
    """Is the class's forward what runs, if only through accelerate's hooks (which call `_old_forward`)?"""
    if "forward" not in module.__dict__:
        return True
    return getattr(module.__dict__.get("_old_forward"), "__func__", None) is type(module).forward


class _SavingRefused:
    """Stands for `save_pretrained` while adapters are attached: it would write adapter keys into the base's file."""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        raise UseError(
            "save_pretrained on a model with adapters attached would mix their tensors into the base's file: "
            "deltaw.save(model, path) writes the adapter, deltaw.merge(model) first gives a plain model to save"
        )


def _no_fast_path(model: nn.Module, paths: Iterable[str]) -> None:
    """nn.TransformerEncoderLayer's inference fast path reads the weights of its linears itself: switch it off."""
    flags = {nn.TransformerEncoderLayer: "activation_relu_or_gelu", nn.TransformerEncoder: "use_nested_tensor"}
    for above in {".".join(path.split(".")[:i]) for path in paths for i in range(path.count(".") + 1)}:
        module = model.get_submodule(above)
        for kind, flag in flags.items():
            if isinstance(module, kind) and "_fast_path" not in module.__dict__:
                module.__dict__["_fast_path"] = (flag, getattr(module, flag))
                setattr(module, flag, 0)
