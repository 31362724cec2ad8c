"""Is what was written what was meant? The folder is read again and every ΔW in it compared with that of the state.

    by factors   ‖s·BA − s'·B'A'‖ = ‖[sB, −s'B']·[A; A']‖ from two Gram matrices in fp64, never a matrix d × d
    else         the tensors themselves: methods without factors, trained copies, token rows

Where PEFT has a format for the adapter, reading goes by PEFT's own config and holds it against ours: ranks, scales and
patterns that would load to something else are found here.
"""

from pathlib import Path

import torch

from deltaw.analysis.norms import norm
from deltaw.core.adapter import Factors
from deltaw.core.errors import FileError, faults
from deltaw.core.method import Site
from deltaw.core.state import AdapterState
from deltaw.formats import directory

TOLERANCE = 1e-6
"""Largest relative difference of a ΔW; the difference of Gram matrices sees 1e-8."""


def read_back(state: AdapterState, folder: Path) -> float:
    """The largest relative difference of a ΔW between `state` and what `folder` holds. FileError where one is too large."""
    wanted, there = state.finished(), directory.open_directory(folder).state
    apart = sorted(str(site) for site in wanted.methods.keys() ^ there.methods.keys())
    found = [f"{site}: it is in {'the file' if site in map(str, there.methods) else 'memory'} only" for site in apart]
    differences = {site: _difference(wanted, there, site) for site in wanted.methods if site in there.methods}
    found += [f"{site}: ΔW differs by {d:.3g}" for site, d in differences.items() if not d <= TOLERANCE]
    if found:
        raise faults(FileError, "the adapter that was written reads as another one, nothing is kept of it", found)
    return max(differences.values(), default=0.0)


def _difference(wanted: AdapterState, there: AdapterState, site: Site) -> float:
    """‖ΔW − ΔW'‖ / ‖ΔW‖ at a site."""
    ours, theirs = wanted.tensors[site], there.tensors[site]
    same = ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    a, b = wanted.factors(site), there.factors(site)
    if a is None or b is None:
        return 0.0 if same and wanted.methods[site].to_dict() == there.methods[site].to_dict() else float("inf")
    if same and a.scale == b.scale:
        return 0.0
    if a.a.shape[-1] != b.a.shape[-1] or a.b.shape[-2] != b.b.shape[-2]:
        return float("inf")
    both = Factors(torch.cat([a.a, b.a], -2), torch.cat([a.scale * a.b, -b.scale * b.b], -1), 1.0)
    size = norm(a)
    return norm(both) / size if size else float(norm(both) > 0)
