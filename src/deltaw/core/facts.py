"""What planning knows of every module of a model: plain data, read off it once, of which `core.targets` makes a plan."""

from dataclasses import dataclass

from torch import nn

from deltaw.core.base import base_modules, by_path
from deltaw.core.carried import base_class_of
from deltaw.core.guards import bypassed
from deltaw.core.host import HostSpec, kind_of
from deltaw.core.method import Method


@dataclass(frozen=True)
class ModuleFact:
    """What planning knows of one module."""

    path: str
    layer: str
    """Class name."""
    lineage: tuple[str, ...]
    """Class names of the modules above it, outermost first."""
    slots: dict[str, HostSpec]
    """Slots the method's protocol finds here, with their shapes; empty where the module cannot carry it."""
    parameters: dict[str, tuple[int, ...]]
    """Names and shapes of the parameters the module itself owns."""
    linear: bool
    """A linear layer, whatever the method needs of it: what presets choose among."""
    stack: bool
    """Experts of a kind that no view knows: a module of its own with 3-D weights."""
    head: bool
    """True for modules outside the model's body (language-model and classifier heads)."""
    refusal: str | None = None
    """Why adapters on this module would be ignored or wrong."""


def facts(model: nn.Module, method: Method) -> list[ModuleFact]:
    """Facts of every module of `model`, as the method's protocol sees them."""
    body, there = _body(model), by_path(model)
    get_output = getattr(model, "get_output_embeddings", None)
    output = get_output() if callable(get_output) else None
    result: list[ModuleFact] = []
    lineage: dict[str, tuple[str, ...]] = {}
    for path, module in base_modules(model):
        layer = base_class_of(module)
        above = lineage[path.rpartition(".")[0]] if path else ()
        lineage[path] = (*above, layer.__name__) if path else (layer.__name__,)
        own = {name: tuple(p.shape) for name, p in module._parameters.items() if p is not None}
        kind = kind_of(type(module), method.host)
        slots, refusal = dict[str, HostSpec](), None
        if kind is not None:
            for slot in kind.slots or own:
                if kind.has(module, slot):
                    host = kind(module, slot)
                    slots[slot] = host.spec
                    refusal = refusal or method.unstacked(host.spec) or host.fault()
        refusal = bypassed(there, path) or refusal
        head = module is output or (body is not None and bool(path) and path.split(".")[0] not in body)
        kinds = (_linear(module), _unknown_stack(module))
        result.append(ModuleFact(path, layer.__name__, lineage[path], slots, own, *kinds, head, refusal))
    return result


def _linear(module: nn.Module) -> bool:
    """Does the layer apply one matrix, or one for each expert, to vectors? Tables of rows and convolutions do not."""
    kind = kind_of(type(module))
    specs = [kind(module, slot).spec for slot in kind.slots if kind.has(module, slot)] if kind is not None else []
    return any(spec.linear and not spec.lookup and len(spec.shape) == 2 for spec in specs)


def _unknown_stack(module: nn.Module) -> bool:
    weights = [p for p in module._parameters.values() if p is not None and p.ndim == 3 and min(p.shape) > 1]
    own = not type(module).__module__.startswith("torch.nn.")
    return bool(weights) and own and kind_of(type(module)) is None


def _body(model: nn.Module) -> set[str] | None:
    """Names of the model's children that form its body, where the model tells (transformers: base_model_prefix)."""
    prefix = getattr(model, "base_model_prefix", "")
    return {prefix} if prefix and isinstance(model._modules.get(prefix), nn.Module) else None
