"""What a change needs of the base where its files do not say it all: the layer's shape, its weight, its bias.

weights   the base as a model, or path → canonical weight [out, in, *kernel]; of an embedding [dim, vocab]
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.core.adapter import WeightAdapter
from deltaw.core.base import by_path
from deltaw.core.change import independent
from deltaw.core.errors import UseError, did_you_mean
from deltaw.core.host import HostSpec, ParameterHost, WeightHost, host_of
from deltaw.core.method import Method, Site
from deltaw.core.state import AdapterState, built, delta

Weights = nn.Module | Callable[[str], Tensor | nn.Module] | Mapping[str, Tensor]
GIVE = "give the model as weights (--model)"


def kept(method: Method) -> bool:
    """Is it a change of a parameter itself (a trained copy, token rows), which PEFT holds beside LoRA?"""
    return method.follows_ties or method.host is ParameterHost


def spec_of(method: Method, site: Site, weights: Weights | None) -> HostSpec:
    """The shape of a layer that the adapter's files do not tell."""
    if weights is None:
        raise UseError(f"the files of this {method.name} do not tell the layer's shape: {GIVE}")
    weight, module = weight_of(weights, site), _module(weights, site.path)
    return HostSpec(tuple(weight.shape)) if module is None else _host(module, site).spec  # type: ignore[no-any-return]


def matrix(state: AdapterState, site: Site, weights: Weights | None) -> Tensor:
    """ΔW, [.., out, fan_in] in fp32, with the base's weight where it depends on that."""
    factors = state.factors(site)
    if factors is not None:
        return factors.scale * (factors.b @ factors.a)
    same = independent(state, site)
    if same is not None:
        return same.flatten(1)
    if weights is None:
        raise UseError(f"the change of {state.methods[site].name} depends on the base's weight: {GIVE}")
    return delta(state, site, weight_of(weights, site)).flatten(1)


def beside(state: AdapterState, site: Site, weights: Weights | None) -> dict[Site, Tensor]:
    """Other parameters of the module that the method changes too (a scaled bias), as trained copies."""
    method, found = state.methods[site], dict[Site, Tensor]()
    if kept(method):
        return found
    adapter = built(state, site)
    if type(adapter).beside is WeightAdapter.beside:
        return found
    module = _module(weights, site.path)
    if module is None:
        raise UseError(f"{method.name} also changes the bias of a layer that has one: {GIVE}")
    adapter.name, adapter.method = method.name, method
    with torch.no_grad():
        for changed, host in adapter.beside(_host(module, site)):
            assert isinstance(host, WeightHost | ParameterHost), "what has a ΔW changes a parameter"
            found[Site(site.path, host.slot)] = changed.merged(host.weight.detach().float().cpu())
    return found


def parameter(weights: Weights | None, site: Site, shape: tuple[int, ...]) -> Tensor:
    """The base's own parameter at a site, as it is stored, fp32. UseError where it is not known or of another shape."""
    owner = _module(weights, site.path)
    if owner is None:
        raise UseError(f"the base's own values are needed: {GIVE}")
    if not ParameterHost.has(owner, site.slot):
        raise UseError("the base has no such parameter")
    own: Tensor = ParameterHost(owner, site.slot).weight.detach().float().cpu()
    if tuple(own.shape) != shape:
        raise UseError(f"the base's parameter is {tuple(own.shape)}, the adapter's copy {shape}")
    return own


def weight_of(weights: Weights, site: Site) -> Tensor:
    """The base's canonical weight at a site, fp32 on the CPU."""
    module = _module(weights, site.path)
    given = _host(module, site).weight if module is not None else _given(weights, site.path)
    if not isinstance(given, Tensor):
        raise UseError(f"{site}: `weights` gives {given!r}, not its weight")
    return given.detach().float().cpu()


def _module(weights: Weights | None, path: str) -> nn.Module | None:
    """The module at a path, where modules are what was given."""
    if isinstance(weights, nn.Module):
        try:
            return weights.get_submodule(path)
        except AttributeError:
            raise UseError(f"the base has no module {path!r}{did_you_mean(path, by_path(weights))}") from None
    given = None if weights is None else _given(weights, path)
    return given if isinstance(given, nn.Module) else None


def _given(weights: Any, path: str) -> Any:
    return weights.get(path) if isinstance(weights, Mapping) else weights(path)


def _host(module: nn.Module, site: Site) -> Any:
    host = host_of(module, site.slot)
    if host is None:
        raise UseError(f"{site}: the base has no weight there that could carry it")
    return host
