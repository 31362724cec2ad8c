"""What is in an adapter, as plain data and as a table: modules, ranks, scales, the size of the change."""

import re
from typing import Any

from deltaw.analysis.norms import norms
from deltaw.core.state import AdapterState
from deltaw.core.text import columns

COLUMNS = ("module", "method", "rank", "alpha", "scale", "count", "parameters", "norm of change")


def describe(state: AdapterState) -> list[dict[str, Any]]:
    """One record per site: site, method, rank, alpha, scale, norm of ΔW (None where it depends on the base), size."""
    sizes = norms(state)
    return [
        {
            "site": str(site),
            "method": method.name,
            **{key: getattr(method, key, None) for key in ("rank", "alpha", "scale")},
            "norm": sizes[site],
            "parameters": sum(tensor.numel() for tensor in state.tensors[site].values()),
        }
        for site, method in state.methods.items()
    ]


def table(records: list[dict[str, Any]]) -> str:
    """The records as text, equal modules of repeated layers folded into one line."""
    folded: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for record in records:
        path = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", record["site"])
        numbers = (_number(record[key]) for key in ("rank", "alpha", "scale"))
        folded.setdefault((path, record["method"], *numbers), []).append(record)
    rows = [COLUMNS]
    for key, group in folded.items():
        known = [record["norm"] for record in group if record["norm"] is not None]
        span = f"{min(known):.3g} … {max(known):.3g}" if known else "depends on the base"
        rows.append((*key, str(len(group)), f"{sum(record['parameters'] for record in group):,}", span))  # type: ignore[arg-type]
    return columns(rows)


def _number(value: float | int | None) -> str:
    return "–" if value is None else f"{value:g}"
