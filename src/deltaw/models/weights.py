"""The weights of a base one at a time, for what looks at some of them and needs no model that runs.

site → module of the opened base (`deltaw.models.mapped`: over its files, or loaded) → canonical weight
"""

from typing import Any

from torch import Tensor

from deltaw.core.base import by_path
from deltaw.core.errors import BaseMismatchError, FileError, did_you_mean, faults
from deltaw.core.host import HostSpec, ParameterHost, host_of
from deltaw.core.method import Shapes, Site
from deltaw.core.state import AdapterState, misfit
from deltaw.models.mapped import open_base


class BaseWeights:
    """Callable: site of `state` → its canonical weight in the dtype of the files, on the CPU; None where there is none:
    of trained modules that the base does not have (a classifier's head), of adapters beside a block."""

    def __init__(self, name: str, state: AdapterState, *, allow_base_mismatch: bool = False):
        """name: as for `load_base`. FileError where the adapter does not fit it, BaseMismatchError for another base's."""
        base = open_base(name, {site.path for site in state.methods})
        self.name, self.remarks = name, [base.remark] if base.remark else []
        self._methods, self._modules = state.methods, by_path(base.model)
        self.specs = self._fit(state)
        if state.base is None:
            self.remarks.append("the adapter does not say which base it was trained on")
            return
        why = state.base.difference(base.identity)
        if why and not allow_base_mismatch:
            raise BaseMismatchError(
                f"the adapter was trained on {state.base.name!r}, {name!r} is another base: {why}. "
                "Give the right one, or pass --allow-base-mismatch if you know better"
            )
        if why or not state.base.comparable(base.identity):
            unknown = "nothing tells whether it is the right base"
            self.remarks.append(f"another base, allowed: {why}" if why else unknown)

    def __call__(self, site: Site) -> Tensor | None:
        if site not in self.specs or site.slot not in self._modules[site.path]._parameters:
            return None
        host: Any = host_of(self._modules[site.path], site.slot, self._methods[site].host)
        return host.weight.detach()  # type: ignore[no-any-return]

    def _fit(self, state: AdapterState) -> dict[Site, HostSpec]:
        """The shape of every site in the base. FileError for what it does not have, or in another shape."""
        specs, found, lacking, shapes = dict[Site, HostSpec](), list[str](), list[Site](), Shapes()
        for site, method in state.methods.items():
            module = self._modules.get(site.path)
            host = None if module is None else host_of(module, site.slot, method.host)
            if module is None and method.host is ParameterHost:
                lacking.append(site)
            elif module is None:
                found.append(f"{site}: the base has no such module{did_you_mean(site.path, self._modules)}")
            elif host is None or not host.has(module, site.slot):
                found.append(f"{site}: {type(module).__name__} cannot carry {method.name} at {site.slot!r}")
            elif reason := misfit(method, state.tensors[site], host.spec, shapes):
                found.append(f"{site}: {reason}")
            else:
                specs[site] = host.spec
        if found:
            raise faults(FileError, f"the adapter does not fit the base {self.name!r}", found)
        if lacking and not specs:
            raise FileError(f"the base {self.name!r} has nothing of what the adapter changes: {lacking[0]}, …")
        if lacking:
            self.remarks.append(f"the base has no {', '.join(map(str, lacking))}: trained beside it, seen without it")
        return specs
