"""Files and plain data → Config, strictly: every unknown key and impossible value is named, all at once.

`parse(record)` takes plain data, `read(path, overrides)` a YAML file; both raise ConfigError.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from deltaw.config.schema import AdapterConfig, Config, Source, invalid_pattern
from deltaw.core.errors import ConfigError, did_you_mean, faults
from deltaw.core.method import get


def parse(record: Any) -> Config:
    """Plain data → Config. Every unknown key and impossible value is named; ConfigError."""
    if not isinstance(record, Mapping):
        raise ConfigError(
            f"a configuration is a mapping of sections (model, data, adapter, train, output), not {type(record).__name__}"
        )
    record, found = dict(record), []
    adapter = record.pop("adapter", None)
    sections: dict[str, Any] = {}
    if adapter is not None:
        try:
            sections["adapter"] = parse_adapter(adapter)
        except ConfigError as error:
            found += error.faults or [f"adapter: {error}"]
    if isinstance(record.get("data"), Mapping):
        record["data"] = {**record["data"]}
        for key in ("train", "eval"):
            if key in record["data"]:
                record["data"][key] = _sources(record["data"][key], f"data.{key}", found)
    try:
        config = _validated(Config, record, "")
    except ConfigError as error:
        raise faults(ConfigError, "configuration", [*error.faults, *found]) from None
    if found:
        raise faults(ConfigError, "configuration", found)
    config = dataclasses.replace(config, **sections)
    _check(config)
    return config


def parse_adapter(record: Any) -> AdapterConfig:
    """The `adapter` section: `method` names a registered Method, whose fields stand beside targets, exclude, layers."""
    if not isinstance(record, Mapping):
        raise ConfigError(f"adapter: must be a mapping like {{method: lora, rank: 16}}, not {record!r}")
    own = {f.name for f in dataclasses.fields(AdapterConfig)} - {"method"}
    method = get(str(record.get("method", "lora")))
    options = {key: value for key, value in record.items() if key not in own and key != "method"}
    built = _validated(method, options, "adapter.", extra=own)
    return _validated(AdapterConfig, {"method": built, **{k: v for k, v in record.items() if k in own}}, "adapter.")


def _sources(given: Any, where: str, found: list[str]) -> Any:
    """Mappings among the sources of rows → Source; everything else is left to the schema."""
    if isinstance(given, list | tuple):
        return tuple(_sources(one, f"{where}[{number}]", found) for number, one in enumerate(given))
    if not isinstance(given, Mapping):
        return given
    try:
        source: Source = _validated(Source, given, f"{where}.")
    except ConfigError as error:
        found += error.faults
        return Source(path="")
    found += [f"{where}.{fault}" for fault in source.invalid()]
    return source


def _validated(cls: type, record: Mapping[str, Any], prefix: str, extra: Sequence[str] | set[str] = ()) -> Any:
    known = [f.name for f in dataclasses.fields(cls)]
    unknown = [key for key in record if key not in known]
    found = [f"no key {prefix + str(key)!r}{did_you_mean(str(key), [*known, *extra])}" for key in unknown]
    try:
        result = TypeAdapter(cls).validate_python({key: value for key, value in record.items() if key in known})
    except ValidationError as error:
        for fault in error.errors():
            names = [f.name for f in dataclasses.fields(cls)]
            where = prefix + ".".join(str(part) for part in fault["loc"][:1] if part in names)
            if len(fault["loc"]) > 1 and dataclasses.is_dataclass(
                next(f for f in dataclasses.fields(cls) if f.name == fault["loc"][0]).type
            ):
                where += f".{fault['loc'][1]}"
            inner = fault.get("ctx", {}).get("error")
            if fault["type"] == "missing":
                found.append(f"{where} is missing")
            elif isinstance(inner, ConfigError):
                found += [f"{prefix.rstrip('.')}: {line}" for line in inner.faults]
            elif fault["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
                section = next(f for f in dataclasses.fields(cls) if f.name == str(fault["loc"][0]))
                inside = (
                    [f.name for f in dataclasses.fields(section.type)] if dataclasses.is_dataclass(section.type) else []
                )
                found.append(f"no key {where!r}{did_you_mean(str(fault['loc'][-1]), inside)}")
            else:
                found.append(f"{where}={fault['input']!r}: {fault['msg'][0].lower() + fault['msg'][1:]}")
    if found:
        raise faults(ConfigError, "faults", list(dict.fromkeys(found)))
    return result


def _check(config: Config) -> None:
    """Values that are of the right type and still impossible."""
    t, found = config.train, []
    positive = {"epochs": t.epochs, "learning_rate": t.learning_rate, "batch_size": t.batch_size}
    positive |= {"gradient_accumulation": t.gradient_accumulation, "log_every": t.log_every, "keep": t.keep}
    optional = {"max_steps": t.max_steps, "eval_every": t.eval_every, "save_every": t.save_every}
    positive |= {name: value for name, value in optional.items() if value is not None and value != "auto"}
    found += [f"train.{name}={value!r} must be above 0" for name, value in positive.items() if not value > 0]
    found += [
        f"train.{name}={getattr(t, name)!r} must not be negative"
        for name in ("weight_decay", "clip")
        if getattr(t, name) < 0
    ]
    if not 0 <= t.warmup < 1:
        found.append(f"train.warmup={t.warmup!r} is a share of the steps, in [0, 1)")
    if config.data.max_length is not None and config.data.max_length < 2:
        found.append(f"data.max_length={config.data.max_length!r} must be at least 2")
    if isinstance(config.data.eval, float) and not 0 < config.data.eval < 1:
        found.append(f"data.eval={config.data.eval!r} is a share in (0, 1), a file, or null")
    found += [f"data.{fault}" for fault in invalid_pattern(config.data.pattern)]
    if found:
        raise faults(ConfigError, "configuration", found)


def read(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """A YAML file, with `section.key=value` overrides applied in order."""
    file = Path(path)
    try:
        record = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"no configuration file {str(path)!r}{did_you_mean(file.name, _neighbours(file))}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    return parse(override(record, overrides))


def override(record: Any, overrides: Sequence[str]) -> Any:
    """Plain data with `section.key=value` written into it; values are read as YAML."""
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ConfigError(
                f"{text!r} is not an override: write section.key=value, for example train.learning_rate=1e-4"
            )
        place = record = dict(record or {})
        *path, last = key.split(".")
        for part in path:
            below = place.get(part)
            place[part] = place = dict(below) if isinstance(below, Mapping) else {}
        place[last] = yaml.safe_load(value) if value else None
    return record


def _neighbours(file: Path) -> list[str]:
    return [p.name for p in file.parent.iterdir()] if file.parent.is_dir() else []
