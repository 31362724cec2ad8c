"""Files and plain data → Config, strictly: every unknown key and impossible value is named, all at once.

`parse(record)` takes plain data, `read(path, overrides)` a YAML file; both raise ConfigError.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from deltaw.config.adapter import parse_adapter
from deltaw.config.fields import SECTIONS, build, checked
from deltaw.config.schema import Config, DataConfig, Source, TrainConfig, invalid_pattern
from deltaw.config.stages import Stage, records
from deltaw.core.errors import ConfigError, did_you_mean, faults

SOURCES = ("train", "eval", "general")


def parse(record: Any) -> Config:
    """Plain data → Config. Every unknown key and impossible value is named; ConfigError."""
    if not isinstance(record, Mapping):
        given = "it is empty" if record is None else f"not {record!r}"
        raise ConfigError(f"a configuration is a mapping of sections (model, data, adapter, train, output): {given}")
    found: list[str] = []
    whole = dict(record)
    data, train, adapter, given = (whole.pop(key, None) for key in ("data", "train", "adapter", "stages"))
    listed = _stages(given, found)
    if listed and "train" in listed[0].data and (data is None or isinstance(data, Mapping)):
        data = {"train": listed[0].data["train"], **(data or {})}
    if isinstance(data, Mapping):
        data = {k: _sources(v, f"data.{k}", found) if k in SOURCES else v for k, v in data.items()}
    sections = {
        "data": build(DataConfig, {} if data is None else data, "data.", found),
        "train": build(TrainConfig, {} if train is None else train, "train.", found),
        "adapter": None if adapter is None else parse_adapter(adapter, found),
    }
    values = checked(Config, whole, "", found, [*SECTIONS, "adapter", "stages"])
    if "model" not in whole:
        found.append("model is missing")
    # with defaults in the place of what is wrong, so that all faults are said together
    made = {"data": DataConfig(train="?"), **{key: section for key, section in sections.items() if section is not None}}
    config = Config(**{"model": "?", **values, **made}, stages=tuple(listed))
    found += _impossible(config)
    if not found:  # else each of them would say the same again
        found += _within_stages(config)
    if found:
        raise faults(ConfigError, "configuration", list(dict.fromkeys(found)))
    return config


def stages(config: Config) -> list[Config]:
    """The runs that a configuration stands for, in their order: one for each stage, itself where it has none."""
    if not config.stages:
        return [config]
    return [parse(one) for one in records(config.to_dict(), config.stages)]


def _stages(given: Any, found: list[str]) -> list[Stage]:
    """The list of stages; what is wrong with their form is added to `found`."""
    if given is None:
        return []
    if not isinstance(given, list | tuple):
        found.append(f"stages={given!r} must be a list of sections like {{name: align, parts: {{projector: full}}}}")
        return []
    found += [
        f"stages[{n}].parts is empty" for n, s in enumerate(given) if isinstance(s, Mapping) and s.get("parts") == {}
    ]
    built = [build(Stage, one, f"stages[{number}].", found) for number, one in enumerate(given)]
    listed: list[Stage] = [stage for stage in built if stage is not None]
    for number, stage in enumerate(listed):
        if not re.fullmatch(r"[\w.\-]+", stage.name):
            found.append(f"stages[{number}].name={stage.name!r} names a folder: letters, digits, dots and dashes only")
        if "parts" in stage.adapter and stage.parts:
            found.append(f"stages[{number}].parts and stages[{number}].adapter.parts are one thing: leave one out")
        if number and "from" in stage.adapter:
            found.append(f"stages[{number}].adapter.from: a stage goes on from the one before it: leave it out")
    return listed


def _within_stages(config: Config) -> list[str]:
    """What is wrong with a stage once it is put into its place."""
    found = []
    for number, one in enumerate(records(config.to_dict(), config.stages)):
        try:
            parse(one)
        except ConfigError as error:
            found += [f"stages[{number}] ({config.stages[number].name}): {fault}" for fault in error.faults]
    return found


def _sources(given: Any, where: str, found: list[str]) -> Any:
    """Mappings among the sources of rows → Source; everything else is left to the schema."""
    if isinstance(given, list | tuple):
        return tuple(_sources(one, f"{where}[{number}]", found) for number, one in enumerate(given))
    if not isinstance(given, Mapping):
        return given
    source: Source | None = build(Source, given, f"{where}.", found)
    found += [] if source is None else [f"{where}.{fault}" for fault in source.invalid()]
    return source or Source(path="")


def _impossible(config: Config) -> list[str]:
    """Values that are of the right type and still cannot be."""
    t = config.train
    positive = {"epochs": t.epochs, "learning_rate": t.learning_rate, "batch_size": t.batch_size}
    positive |= {"gradient_accumulation": t.gradient_accumulation, "log_every": t.log_every, "keep": t.keep}
    optional = {"max_steps": t.max_steps, "eval_every": t.eval_every, "save_every": t.save_every}
    positive |= {name: value for name, value in optional.items() if value is not None and value != "auto"}
    found = [f"train.{name}={value!r} must be above 0" for name, value in positive.items() if not value > 0]
    least = {"weight_decay": t.weight_decay, "clip": t.clip, "generate": t.generate}
    found += [f"train.{name}={value!r} must not be negative" for name, value in least.items() if value < 0]
    if not 0 <= t.seed < 2**32:
        found.append(f"train.seed={t.seed!r} must be in [0, 2³²)")
    positive_or_none = {"neftune": t.neftune, "early_stopping": t.early_stopping}
    found += [f"train.{k}={v!r} must be above 0" for k, v in positive_or_none.items() if v is not None and not v > 0]
    found += [f"train.rates[{k!r}]={v!r} must not be negative" for k, v in t.rates.items() if v < 0]
    found += [f"train.rates: {k!r} is not a regular expression" for k in t.rates if not _compiles(k)]
    if (t.best or t.early_stopping) and config.data.eval is None:
        found.append("train.best and train.early_stopping go by held-out rows: set data.eval")
    if t.generate and config.data.eval is None:
        found.append("train.generate answers held-out rows: set data.eval")
    if not 0 <= t.warmup < 1:
        found.append(f"train.warmup={t.warmup!r} is a share of the steps, in [0, 1)")
    empty = {"model": config.model, "output": config.output, "adapter.from": config.adapter.start}
    empty |= {f"data.{key}": getattr(config.data, key) for key in (*SOURCES, "template")}
    found += [f"{name} is empty" for name, value in empty.items() if value in ("", ())]
    found += [f"data.tokens: {t!r} is no token" for t in config.data.tokens if not t.strip()]
    found += [f"data.tokens names {t!r} twice" for t, n in Counter(config.data.tokens).items() if n > 1]
    if config.data.tokens and config.adapter.start:
        found.append("adapter.from brings its own tokens: leave data.tokens out")
    if config.data.max_length is not None and config.data.max_length < 2:
        found.append(f"data.max_length={config.data.max_length!r} must be at least 2")
    if isinstance(config.data.eval, float) and not 0 < config.data.eval < 1:
        found.append(f"data.eval={config.data.eval!r} is a share in (0, 1), a file, or null")
    return found + [f"data.{fault}" for fault in invalid_pattern(config.data.pattern)]


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


class _Loader(yaml.SafeLoader):
    """YAML as it should be: a key that stands twice is a mistake, and 2e-4 is a number."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = next((key for number, key in enumerate(keys) if key in keys[:number]), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        said = " ".join(str(error).replace('in "<unicode string>", ', "").split())
        raise ConfigError(f"{where} is not valid YAML: {said}") from None


def load(path: str | Path, overrides: Sequence[str] = ()) -> Any:
    """The plain data of a YAML file, with `section.key=value` overrides applied in order."""
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"no configuration file {str(path)!r}{did_you_mean(file.name, _neighbours(file))}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    return override(_yaml(text, str(path)), overrides)


def read(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """A YAML file, with overrides, as a Config."""
    return parse(load(path, overrides))


def override(record: Any, overrides: Sequence[str]) -> Any:
    """Plain data with `section.key=value` written into it; values are read as YAML. Entries of a list go by their number,
    `stages[0].train.max_steps=2`; ConfigError for one that is not there."""
    if record is not None and not isinstance(record, Mapping):
        raise ConfigError(
            f"a configuration is a mapping of sections (model, data, adapter, train, output): not {record!r}"
        )
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ConfigError(
                f"{text!r} is not an override: write section.key=value, for example train.learning_rate=1e-4"
            )
        record = _written(record, _steps(key), _yaml(value, f"the value of {key}") if value else None)
    return record


def _steps(key: str) -> list[str | int]:
    """stages[0].name → stages, 0, name"""
    steps: list[str | int] = []
    for part in key.split("."):
        name, numbers = re.fullmatch(r"(.*?)((?:\[\d+\])*)", part, re.DOTALL).groups()  # type: ignore[union-attr]
        steps += [name, *map(int, re.findall(r"\d+", numbers))]
    return steps


def _written(place: Any, steps: Sequence[str | int], value: Any, where: str = "") -> Any:
    """A copy of `place` with `value` at the end of these steps. where: the steps to it, for errors."""
    if not steps:
        return value
    step, *rest = steps
    if isinstance(step, str):
        there = dict(place) if isinstance(place, Mapping) else {}
        return {**there, step: _written(there.get(step), rest, value, f"{where}.{step}" if where else step)}
    if not isinstance(place, list | tuple) or step >= len(place):
        listed = isinstance(place, list | tuple) and len(place) > 0
        there = f"has {where}[0] to {where}[{len(place) - 1}]" if listed else "is no list with entries"
        raise ConfigError(f"{where}[{step}] is not there: {where} {there}")
    return [_written(one, rest, value, f"{where}[{n}]") if n == step else one for n, one in enumerate(place)]


def values(text: str, where: str) -> list[Any]:
    """1e-4,1e-3 or [q_proj, v_proj],all-linear → the values of a sweep."""
    if not text:
        raise ConfigError(
            f"{where!r} is no sweep: write section.key=value,value, for example train.learning_rate=1e-4,1e-3"
        )
    found: list[Any] = _yaml(f"[{text}]", where)
    return found


def dump(value: Any) -> str:
    """A value as one line of YAML, as overrides take it."""
    return (
        yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True).removesuffix("...\n").strip()
    )


def _neighbours(file: Path) -> list[str]:
    return [p.name for p in file.parent.iterdir()] if file.parent.is_dir() else []
