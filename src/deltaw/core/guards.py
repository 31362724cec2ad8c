"""What `attach` refuses or switches off, so that no adapter is ignored silently; and how `detach` puts it all back.

Each has a test of its own in tests/core/test_guards.py.

    guard                               why
    merged adapter of the same name     its change is in the weights already and would act twice
    fully_shard before attach           attach after quantising and before sharding
    forward replaced on the instance    it shadows the class: the adapter would never be called
    'adapters' or parametrizations      names we would overwrite, tensors we would not see
    save_pretrained while attached      would write adapter keys into the base's file
    weights read by the code above      an adapter's module is never called there (`bypassed`, from the source)
    modules that share the parameter    an adapter that follows ties acts there too, and must be able to (`untrue`)
    encoder fast path                   reads the weights of its linears itself: switched off
    layers that rewrite their weight    bitsandbytes on some CPUs (`Host.steady`): switched off
"""

import functools
import inspect
import re
import sys
import types
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from deltaw.core import route
from deltaw.core.base import by_path
from deltaw.core.carried import Root, base_class_of, carried, forget, held, here
from deltaw.core.errors import UseError, faults
from deltaw.core.host import host_of
from deltaw.core.method import Method, Site


def admit(model: nn.Module, name: str, sites: Mapping[Site, Method]) -> None:
    """Refuse what would be ignored, overwritten or wrong. Nothing is touched."""
    found: list[str] = []
    if not isinstance(name, str) or not re.fullmatch(r"[\w\-]+", name) or hasattr(nn.ModuleDict(), name):
        raise UseError(
            f"an adapter cannot be called {name!r}: use letters, digits, '_' and '-', "
            "and no name of an nn.Module attribute"
        )
    unmerged(model, name)
    if sharded(model):
        raise UseError(
            "the model is already sharded (FSDP or tensor parallel): attach after quantising and before sharding"
        )
    there = by_path(model)
    for site in sites:
        if carries(there[site.path], name, site.slot):
            found.append(f"{site} already carries adapter {name!r}: choose another name, or detach it first")
    ties = [other for site, method in sites.items() for other in tied(there, site, method)]
    for site in dict.fromkeys([*sites, *ties]):
        module = there[site.path]
        if carried(module) is not None:
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


def set_guards(model: nn.Module, paths: Iterable[str]) -> None:
    """Switch off, for as long as adapters are attached, what would ignore them or mix them into the base's file."""
    for module in model.modules():
        if hasattr(type(module), "save_pretrained") and "save_pretrained" not in module.__dict__:
            module.__dict__["save_pretrained"] = _SavingRefused()
        host = host_of(module)
        rewrites = None if host is None else host.steady()
        if rewrites is not None:
            held(module).switched_off = rewrites
    flags = {nn.TransformerEncoderLayer: "activation_relu_or_gelu", nn.TransformerEncoder: "use_nested_tensor"}
    for above in {".".join(path.split(".")[:i]) for path in paths for i in range(path.count(".") + 1)}:
        module = model.get_submodule(above)
        for kind, flag in flags.items():
            if isinstance(module, kind) and held(module).switched_off is None:
                held(module).switched_off = (flag, getattr(module, flag))
                setattr(module, flag, 0)


def release(root: Root, model: nn.Module) -> None:
    """After the last adapter of a root: flags, guards and caches back to what they were."""
    for module in forget(root, model):
        if isinstance(module.__dict__.get("save_pretrained"), _SavingRefused):
            del module.__dict__["save_pretrained"]


def sharded(model: nn.Module) -> bool:
    """Are weights of the model spread over several devices or processes already?"""
    parallel = sys.modules.get("torch.distributed.fsdp")
    kinds = tuple(
        getattr(parallel, kind) for kind in ("FSDPModule", "FullyShardedDataParallel") if hasattr(parallel, kind)
    )
    tensors = sys.modules.get("torch.distributed.tensor")
    spread = getattr(tensors, "DTensor", ()) if tensors is not None else ()
    return any(isinstance(module, kinds) for module in model.modules()) or any(
        isinstance(parameter, spread) for parameter in model.parameters()
    )


def intact(modules: Iterable[nn.Module], name: str) -> None:
    """Refuse to take adapters off modules whose class was changed after they were attached."""
    changed = [type(m).__name__ for m in modules if name in here(m).entries and "base_class" not in type(m).__dict__]
    if changed:
        raise UseError(
            f"{name!r} sits on modules that were parametrized or sharded after it was attached ({', '.join(changed[:4])}): "
            "undo that first, then detach"
        )


def carries(module: nn.Module, name: str, slot: str) -> bool:
    """Does the module have an adapter `name` on this slot?"""
    there = carried(module)
    return there is not None and any(host.slot == slot for _, host, _ in there.entries.get(name, ()))


def unmerged(model: nn.Module, name: str) -> None:
    """Refuse to go on while adapter `name` is merged."""
    if any(name in here(module).merged for module in route.adapted_modules(model)):
        raise UseError(f"{name!r} is merged into the weights: unmerge the model first")


Modules = Mapping[str, nn.Module]
"""Of a model, `base.by_path`."""


def tied(modules: Modules, site: Site, method: Method) -> list[Site]:
    """Where else an adapter acts that follows ties: every other module that reads the same parameter."""
    first = modules[site.path]
    table = first._parameters.get(site.slot)
    if not method.follows_ties or table is None:
        return []
    once = {id(module): (path, module) for path, module in reversed(list(modules.items()))}  # the first of its paths
    everywhere = ((path, m, slot, p) for path, m in once.values() for slot, p in m._parameters.items())
    return [Site(path, slot) for path, module, slot, p in everywhere if p is table and module is not first]


def untrue(modules: Modules, site: Site, method: Method) -> str | None:
    """Why an adapter would not act as it should in a module that is tied to its own, or None."""
    for other in tied(modules, site, method):
        module = modules[other.path]
        host = host_of(module, other.slot, method.host)
        if host is None:
            kind = base_class_of(module).__name__
            return f"it is tied to the {other.slot} of a {kind}, where {method.name} cannot act: untie them first"
        reason = bypassed(modules, other.path) or host.fault()
        if reason:
            return f"it is tied to {other}, where {method.name} must act too: {reason}"
    return None


def bypassed(modules: Modules, path: str) -> str | None:
    """Why an adapter on the module at `path` would be ignored: code above it reads the weight itself; or None."""
    parts = path.split(".") if path else []
    for count in range(1, min(3, len(parts)) + 1):
        name = ".".join(parts[-count:])
        cls: Any = base_class_of(modules[".".join(parts[:-count])])
        method = None if issubclass(cls, nn.TransformerEncoderLayer) else _reader(cls, name)
        if method:
            return f"{cls.__name__}.{method} reads its weight itself instead of calling it, an adapter there would be ignored"
    return None


@functools.cache
def _reader(cls: Any, name: str) -> str | None:
    """The method of a class that computes with `self.<name>.weight`; questions about its dtype or shape do not count."""
    texts = [(method, text) for method, text in _sources(cls) if f"self.{name}.weight" in text]
    asks = r"\.(?:dtype|device|shape|size|ndim|dim|data|numel|requires_grad)\b"
    reads = rf"(?<!isinstance\()self\.{re.escape(name)}\.weight\b(?!\s*=[^=]|\[|{asks})"
    return next((method for method, text in texts if re.search(reads, text)), None)


@functools.cache
def _sources(cls: Any) -> list[tuple[str, str]]:
    """Source of every method that a forward may run."""
    found = []
    for name in dir(cls):
        function = inspect.getattr_static(cls, name)
        own = isinstance(function, types.FunctionType) and function is not getattr(nn.Module, name, None)
        if own and not re.search("init|reset|tie|load|^__", name):
            try:
                found.append((name, inspect.getsource(inspect.unwrap(function))))
            except (OSError, TypeError):  # made at run time: there is no text to read
                continue
    return found


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
