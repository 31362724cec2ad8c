"""The base as acceptance rules and exports know it: its configuration and the shapes of its layers, never its weights.

A name in an adapter's files counts where nothing has to be downloaded for it; what is given counts always.
"""

import functools
import re
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from deltaw.core.base import base_modules
from deltaw.core.errors import FileError
from deltaw.core.host import HostSpec, WeightHost, host_of
from deltaw.core.parts import find
from deltaw.models.base import named_base, named_hub, outline
from deltaw.ship.acceptance import Base


def base_of(model: nn.Module) -> Base:
    """What a base's outline tells."""
    config = model.config.to_dict()  # type: ignore[union-attr, operator]
    text = model.config.get_text_config().to_dict()  # type: ignore[union-attr, operator]
    names = {"architectures": config.get("architectures") or [type(model).__name__]}
    hosts = {path: host_of(module) for path, module in base_modules(model)}
    there = {
        p: host.spec for p, host in hosts.items() if isinstance(host, WeightHost) and host.has(host.module, host.slot)
    }
    shapes = {path: spec.shape for path, spec in there.items() if is_linear(spec)}
    return Base({**text, **config, **names}, shapes, find(model))


def is_linear(spec: HostSpec) -> bool:
    return len(spec.shape) == 2 and spec.stack is None and spec.linear and not spec.lookup


@dataclass(frozen=True)
class Seen:
    """The base of an adapter folder by its name, and its outline; neither, and a remark, where it was not looked at."""

    name: str | None = None
    outline: nn.Module | None = None
    remark: str | None = None

    @functools.cached_property
    def base(self) -> Base | None:
        return None if self.outline is None else base_of(self.outline)


def look(folder: Path, model: str | None = None) -> Seen:
    """The base of an adapter folder: `model`, else the one that it names, if that is on this machine and can be read."""
    if model is not None:
        return Seen(model, outline(model))
    name = named_base(folder)
    reason = f"the base {name!r} that it names is not on this machine" if name else "it does not name its base"
    if name is not None and _at_hand(name):
        try:
            return Seen(name, outline(name))
        except FileError as error:
            reason = str(error)
    return Seen(remark=f"{reason}; layers, shapes and vocabulary were not looked at (give the base with --model)")


def _at_hand(name: str) -> bool:
    hub = re.fullmatch(r"[\w\-][\w.\-]*(/[\w.\-]+)?", name) is not None
    return name == "tiny" or (Path(name) / "config.json").is_file() or (hub and named_hub(name))
