"""The `adapter` section: `method` names a registered Method, whose fields stand beside those of every adapter; its parts."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from deltaw.config.fields import build, checked
from deltaw.config.parts import FROZEN, PartConfig, everything
from deltaw.config.schema import AdapterConfig
from deltaw.core.errors import ConfigError, did_you_mean
from deltaw.core.method import Method, get, names

APART = ("targets", "exclude", "layers")
"""What each part says for itself."""


def parse_adapter(record: Any, found: list[str]) -> AdapterConfig | None:
    """The section as an AdapterConfig; None, or less than the whole, and what is wrong in `found`."""
    if not isinstance(record, Mapping):
        found.append(f"adapter={record!r} must be a section like {{method: lora, rank: 16}}")
        return None
    if "from" in record and "start" in record:
        found.append("adapter.from and adapter.start are one thing: leave start out")
    if "from" in record:  # a word of Python, so the field has another name
        record = {"start" if key == "from" else key: value for key, value in record.items()}
    own = [f.name for f in dataclasses.fields(AdapterConfig) if f.name != "method"]
    record = {key: value for key, value in record.items() if key not in ("parts", "modules") or value is not None}
    others = [key for key in record if key != "start"]
    if record.get("start") and others and "parts" not in record:
        found.append(f"adapter.from brings its own method and targets: leave out {', '.join(map(repr, others))}")
    if "modules" in record and "parts" not in record:
        found.append("adapter.modules names parts for adapter.parts: say there how they are trained, or leave it out")
    method = _method(record.get("method") or "lora", "adapter.method", found)
    if method is None:
        return None
    options = {key: value for key, value in record.items() if key not in own and key != "method"}
    built: Method | None = build(method, options, "adapter.", found, own)
    known = {key: value for key, value in record.items() if key in own and key != "parts"}
    if isinstance(known.get("modules"), Mapping):  # one path is a list of one
        known["modules"] = {k: (v,) if isinstance(v, str) else v for k, v in known["modules"].items()}
    values = checked(AdapterConfig, known, "adapter.", found)
    if built is None:
        return None
    if "parts" in record:
        found += [
            f"adapter.{key}: each part has its own: adapter.parts.language.{key}" for key in APART if key in record
        ]
        values["parts"] = _parts(record["parts"], built, options, found)
    return AdapterConfig(method=built, **values)


def _parts(given: Any, whole: Method, options: Mapping[str, Any], found: list[str]) -> dict[str, PartConfig | None]:
    """{part: how it is trained}. whole: the section's own method, made of `options`."""
    if not isinstance(given, Mapping) or not given:
        found.append(f"adapter.parts={given!r} must be a section like {{projector: full, language: {{rank: 64}}}}")
        return {}
    parts: dict[str, PartConfig | None] = {}
    for name, one in given.items():
        record = {"method": one} if isinstance(one, str) else one
        where = f"adapter.parts.{name}"
        if not isinstance(record, Mapping):
            found.append(f"{where}={one!r} is none of {FROZEN}, a method's name, or a section of its fields")
        elif record.get("method") == FROZEN:
            others = ", ".join(repr(key) for key in record if key != "method")
            found += [f"{where} is {FROZEN}: leave out {others}, or give it a method"] if others else []
            parts[str(name)] = None
        elif (part := _part(record, whole, options, where, found)) is not None:
            parts[str(name)] = part
    if len(parts) == len(given) and not any(parts.values()):
        found.append("adapter.parts trains nothing, every part is frozen: give one a method, e.g. {projector: full}")
    return parts


def _part(
    record: Mapping[str, Any], whole: Method, options: Mapping[str, Any], where: str, found: list[str]
) -> PartConfig | None:
    """One part that is trained; None where it cannot be, as `found` says."""
    method = _method(record.get("method") or whole.name, where, found, [FROZEN])
    if method is None:
        return None
    own = [f.name for f in dataclasses.fields(PartConfig) if f.name != "method"]
    fields = {key: value for key, value in record.items() if key not in own and key != "method"}
    inherited = options if method is type(whole) else {}
    built: Method | None = build(method, {**inherited, **fields}, f"{where}.", found, own)
    values = checked(PartConfig, {key: value for key, value in record.items() if key in own}, f"{where}.", found)
    rate = values.get("learning_rate")
    if rate is not None and not rate > 0:
        found.append(f"{where}.learning_rate={rate!r} must be above 0; {FROZEN} trains nothing")
    return None if built is None else PartConfig(method=built, **{"targets": everything(method), **values})


def _method(name: Any, where: str, found: list[str], others: Sequence[str] = ()) -> type[Method] | None:
    """The method of a name; others: what may stand there instead."""
    try:
        return get(str(name))
    except ConfigError:
        known = [*others, *names()]
        found.append(f"{where}: no method {name!r}{did_you_mean(str(name), known)}; known: {', '.join(known)}")
        return None
