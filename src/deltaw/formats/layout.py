"""What a state does not say about its base and a model does: needed to write short, exact PEFT configs, and to read
files of other tools, whose names say neither what kind of layer they mean nor, some of them, where a name is split."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from deltaw.core.host import HostSpec
from deltaw.core.method import Site


@dataclass(frozen=True)
class Layout:
    entries: Mapping[str, Collection[str]]
    """Path of every module of the base → names of its own parameters and saved buffers."""
    containers: Collection[str] = ()
    """Paths of lists and dictionaries of modules, which PEFT does not wrap as a whole."""
    transposed: Collection[str] = ()
    """Paths of linear layers that store Wᵀ (transformers' Conv1D)."""
    specs: Mapping[Site, HostSpec] = field(default_factory=dict)
    """Every slot that carries weight methods → its shape."""

    def below(self, path: str) -> list[tuple[str, str]]:
        """(path, name) of everything that the module at `path` and those inside it own."""
        inside = [p for p in self.entries if p == path or p.startswith(path + ".")]
        return [(p, name) for p in inside for name in self.entries[p]]
