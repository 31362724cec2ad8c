"""Is what was written the adapter? Read by PEFT's config alone, as a stranger would, and compared module by module.

low-rank           ‖sBA − s'B'A'‖ / ‖sBA‖ from the factors, never as a matrix
other changes      ‖ΔW − ΔW'‖ / ‖ΔW‖ on the base's weight, or on any where ΔW is compared with itself
copies, rows, …    largest difference over the largest value
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from deltaw.analysis.norms import norm
from deltaw.core.adapter import Factors
from deltaw.core.errors import FileError, MergeError, faults
from deltaw.core.files import read_json
from deltaw.core.host import HostSpec, WeightHost, host_of
from deltaw.core.method import Site
from deltaw.core.state import AdapterState, delta
from deltaw.formats.directory import CONFIG, open_directory
from deltaw.formats.peft import from_peft
from deltaw.formats.weights import read_tensors
from deltaw.mixing.through import Conversion

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Largest accepted relative error of a module beyond that of its conversion: what rounding both factors makes, doubled."""

EXACT = 1e-6
"""Largest relative difference of a ΔW in files that hold it as it is; the difference of Gram matrices sees 1e-8."""


def read_back(folder: Path, specs: AdapterState) -> AdapterState:
    """The adapter in a folder by PEFT's two files alone; shapes that these do not tell from `specs`."""
    state, _ = from_peft(read_json(folder / CONFIG, "export again"), read_tensors(folder, allow_pickle=False))
    return AdapterState(state.methods, state.tensors, {**specs.specs, **state.specs}, state.base, state.meta)


def must_be(state: AdapterState, folder: Path) -> float:
    """The largest relative difference of a ΔW between `state` and what `folder` holds. FileError where one is too large.

    Where PEFT has a format for the adapter, reading goes by PEFT's own config and holds it against ours: ranks, scales and
    patterns that would load to something else are found here.
    """
    wanted, there = state.finished(), open_directory(folder).state
    alone = wanted.methods.keys() ^ there.methods.keys()
    found = [
        f"{site}: it is in {'memory' if site in wanted.methods else 'the file'} only" for site in sorted(alone, key=str)
    ]
    differences = {site: apart(wanted, there, site) for site in wanted.methods if site in there.methods}
    found += [f"{site}: ΔW differs by {d:.3g}" for site, d in differences.items() if not d <= EXACT]
    if found:
        raise faults(FileError, "the adapter that was written reads as another one, nothing is kept of it", found)
    return max(differences.values(), default=0.0)


def errors(
    source: AdapterState, written: AdapterState, converted: Conversion, model: nn.Module | None = None
) -> dict[Site, float]:
    """The relative error of every module of the source. MergeError where one is more than conversion and rounding explain,
    where a module is lost, or where one that was added is not zero."""
    found: dict[Site, float] = {}
    wrong = [f"{site}: it was not written" for site in source.methods if site not in written.methods]
    for site in written.methods:
        if site not in source.methods and site in converted.sites:
            continue  # what a method changes beside its weight (a scaled bias), which the conversion made a site of its own
        if site not in source.methods:
            factors = written.factors(site)
            if factors is not None and norm(factors) == 0:
                continue
            wrong.append(f"{site}: the adapter has nothing there, and the file has")
            continue
        found[site] = apart(source, written, site, model)
        coarse = max(TOLERANCE.get(tensor.dtype, 1e-5) for tensor in written.tensors[site].values())
        allowed = converted.sites[site].error * (1 + 1e-3) + coarse
        if not found[site] <= allowed:
            wrong.append(f"{site}: read back it differs by {found[site]:.3g} of its size, more than {allowed:.3g}")
    if wrong:
        raise faults(MergeError, "what was written is not the adapter, nothing is left of it: try --dtype fp32", wrong)
    return found


def apart(source: AdapterState, written: AdapterState, site: Site, model: nn.Module | None = None) -> float:
    """The relative error of one module."""
    ours, others = source.tensors[site], written.tensors[site]
    same = ours.keys() == others.keys() and all(torch.equal(ours[name], others[name]) for name in ours)
    if same and source.methods[site].to_dict() == written.methods[site].to_dict():
        return 0.0
    mine, theirs = source.factors(site), written.factors(site)
    if mine is not None and theirs is not None and _fit(mine, theirs):
        (a, b, s), (c, d, t) = mine, theirs
        difference = Factors(torch.cat([a, c], -2), torch.cat([s * b, -t * d], -1), 1.0)
        return _share(norm(difference), norm(mine))
    if source.methods[site].host is WeightHost and not source.methods[site].follows_ties:
        weight = _weight(source.specs.get(site) or written.specs[site], site, model)
        change = delta(source, site, weight)
        return _share(float((change - delta(written, site, weight)).norm()), float(change.norm()))
    pairs = [(tensor, written.tensors[site].get(name)) for name, tensor in source.finished().tensors[site].items()]
    return max(
        _share(_most(a.float() - b.float()), _most(a.float())) if b is not None else float("inf") for a, b in pairs
    )


def _fit(mine: Factors, theirs: Factors) -> bool:
    return mine.a.shape[-1] == theirs.a.shape[-1] and mine.b.shape[-2] == theirs.b.shape[-2]


def _share(part: float, whole: float) -> float:
    return part / whole if whole else float("inf") if part else 0.0


def _most(tensor: Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def _weight(spec: HostSpec, site: Site, model: nn.Module | None) -> Tensor:
    """The base's weight, or any of its shape."""
    if model is not None:
        host = host_of(model.get_submodule(site.path), site.slot)
        return host.weight.detach().float().cpu()  # type: ignore[union-attr]
    shape = spec.whole
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)) / shape[-1] ** 0.5
