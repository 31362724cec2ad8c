"""TargetPlan: what `attach` does, or did, as plain data that prints as a table. Made by `deltaw.core.targets`."""

import re
from collections import Counter
from dataclasses import dataclass

from deltaw.core.errors import TargetError, faults
from deltaw.core.host import HostSpec
from deltaw.core.method import Method, Site
from deltaw.core.text import columns


@dataclass(frozen=True)
class Target:
    """One planned adapter: its site, the layer it sits on and the method with all values resolved."""

    site: Site
    layer: str
    spec: HostSpec
    method: Method
    trainable: int


@dataclass(frozen=True)
class TargetPlan:
    """What `attach` does, or did. `print(plan)` shows it as a table, equal layers folded into one line."""

    targets: tuple[Target, ...]
    base_parameters: int
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        # a file has one place for each site: of two adapters there, one would be lost
        counts = Counter(target.site for target in self.targets)
        found = [
            f"{site} is planned {count} times: leave all but one out" for site, count in counts.items() if count > 1
        ]
        if found:
            raise faults(TargetError, "a plan has every site once", found)

    @property
    def trainable(self) -> int:
        """Trainable parameters of the adapter."""
        return sum(target.trainable for target in self.targets)

    @property
    def paths(self) -> list[str]:
        """Paths of the adapted modules, in model order, each once."""
        return list(dict.fromkeys(target.site.path for target in self.targets))

    def __len__(self) -> int:
        return len(self.targets)

    def __str__(self) -> str:
        rows: dict[tuple[str, ...], list[int]] = {}
        for t in self.targets:
            folded = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", str(t.site))
            rank = getattr(t.method, "rank", None)
            key = (folded, t.layer, "×".join(map(str, t.spec.whole)), t.method.name, "–" if rank is None else str(rank))
            rows.setdefault(key, []).append(t.trainable)
        table: list[tuple[str, ...]] = [("module", "layer", "shape", "method", "rank", "count", "trainable")]
        table += [(*key, str(len(counts)), f"{sum(counts):,}") for key, counts in rows.items()]
        lines = [columns(table)]
        share = 100 * self.trainable / self.base_parameters if self.base_parameters else 0.0
        trainable = f"{self.trainable:,} trainable, {share:.4g} % of the base's {self.base_parameters:,}"
        lines.append(f"{len(self.targets)} adapters, {trainable}")
        return "\n".join([*lines, *self.notes])
