"""The base as acceptance rules and exports know it: its configuration and the shapes of its layers, never its weights.

A name in an adapter's files counts where nothing has to be downloaded for it; what is given counts always.
"""

import re
from pathlib import Path

from torch import nn

from deltaw.core.base import base_modules
from deltaw.core.errors import UseError
from deltaw.core.host import HostSpec, WeightHost, host_of
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
    return Base({**text, **config, **names}, {path: spec.shape for path, spec in there.items() if is_linear(spec)})


def is_linear(spec: HostSpec) -> bool:
    return len(spec.shape) == 2 and spec.stack is None and spec.linear and not spec.lookup


def name_of(folder: Path, model: str | None) -> tuple[str | None, str | None]:
    """The base to look at for an adapter folder, or None and a remark."""
    name = model or named_base(folder)
    if name is not None and (model is not None or _at_hand(name)):
        return name, None
    known = f"the base {name!r} that it names is not on this machine" if name else "it does not name its base"
    return None, f"{known} (give it with --model): layers, shapes and vocabulary were not looked at"


def needed(folder: Path, model: str | None) -> str:
    """The same where it must be there. UseError says why."""
    name, _ = name_of(folder, model)
    if name is None:
        raise UseError(
            "which modules and layers of the base the adapter lacks is not known without it: give the base with --model "
            f"(its config is enough; the adapter names {named_base(folder) or 'none'}), or export what is there with --no-fill"
        )
    return name


def look_at(folder: Path, model: str | None) -> tuple[Base | None, str | None]:
    """The base of an adapter folder, or None and a remark."""
    name, remark = name_of(folder, model)
    return (None if name is None else base_of(outline(name))), remark


def _at_hand(name: str) -> bool:
    hub = re.fullmatch(r"[\w\-][\w.\-]*(/[\w.\-]+)?", name) is not None
    return name == "tiny" or (Path(name) / "config.json").is_file() or (hub and named_hub(name))
