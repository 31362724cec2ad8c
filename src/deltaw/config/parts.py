"""How each part of a composite model is trained: `adapter.parts`, {part: frozen, a method's name, or a section of its own}.

    parts: {vision: frozen, projector: full, language: {rank: 64, layers: 0-10, learning_rate: 1e-4}}

A part that is not named is frozen. The fields of the adapter section hold for every part of the same method, changed by
what the part says itself.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

from deltaw.core.host import ParameterHost
from deltaw.core.method import Method

FROZEN = "frozen"


@dataclass(frozen=True, kw_only=True)
class PartConfig:
    method: Method
    """The part's method; by default that of the adapter section with its fields. A name alone (projector: full) is enough."""
    targets: str | tuple[str, ...] = "all-linear"
    """Modules of the part: all-linear, attention, mlp, names, full paths, regular expressions, or all (of full: everything)."""
    exclude: str | tuple[str, ...] = ()
    """Modules taken away from the targets."""
    layers: int | str | tuple[int, ...] | None = None
    """Only these layers of the part: "0-10"."""
    learning_rate: float | None = None
    """Peak learning rate of the part; by default train.learning_rate."""

    def to_dict(self) -> dict[str, Any]:
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "method"}
        return {"method": self.method.name, **dataclasses.asdict(self.method), **own}


def everything(method: type[Method]) -> str:
    """The targets of a part that names none: all its linear layers, of a method on parameters all that it owns."""
    return "all" if issubclass(method.host, ParameterHost) else "all-linear"
