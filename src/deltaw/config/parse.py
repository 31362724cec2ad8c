"""Files and plain data → Config, strictly: every unknown key and impossible value is named, all at once.

`parse(record)` takes plain data, `read(path, overrides)` a YAML file; both raise ConfigError.
"""

import dataclasses
import re
import types
import typing
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from deltaw.config.schema import AdapterConfig, Config, DataConfig, Source, TrainConfig, invalid_pattern
from deltaw.core.errors import ConfigError, did_you_mean, faults
from deltaw.core.method import Method, get
from deltaw.core.method import names as methods

SECTIONS: dict[str, type] = {"data": DataConfig, "train": TrainConfig}
SOURCES = ("train", "eval", "general")
OTHER_NAMES: Mapping[str, str] = {
    "r": "rank", "lora_r": "rank", "lora_rank": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout",
    "target_modules": "targets", "lora_target": "targets", "use_rslora": "rslora", "init_lora_weights": "init",
    "num_train_epochs": "epochs", "per_device_train_batch_size": "batch_size", "gradient_accumulation_steps": "gradient_accumulation",
    "lr": "learning_rate", "lr_scheduler_type": "schedule", "warmup_ratio": "warmup", "max_grad_norm": "clip",
    "cutoff_len": "max_length", "max_seq_length": "max_length", "model_name_or_path": "model", "output_dir": "output",
    "dataset": "train", "val_size": "eval", "logging_steps": "log_every", "save_steps": "save_every", "eval_steps": "eval_every",
    "quantization_bit": "quantize",
}  # fmt: skip
"""What PEFT, transformers and LLaMA-Factory call our fields: for hints alone, none of these is read."""


def parse(record: Any) -> Config:
    """Plain data → Config. Every unknown key and impossible value is named; ConfigError."""
    if not isinstance(record, Mapping):
        given = "it is empty" if record is None else f"not {record!r}"
        raise ConfigError(f"a configuration is a mapping of sections (model, data, adapter, train, output): {given}")
    found: list[str] = []
    whole = dict(record)
    data, train, adapter = (whole.pop(key, None) for key in ("data", "train", "adapter"))
    if isinstance(data, Mapping):
        data = {k: _sources(v, f"data.{k}", found) if k in SOURCES else v for k, v in data.items()}
    sections = {
        "data": _section(DataConfig, {} if data is None else data, "data.", found),
        "train": _section(TrainConfig, {} if train is None else train, "train.", found),
        "adapter": None if adapter is None else parse_adapter(adapter, found),
    }
    values = _values(Config, whole, "", found, [*SECTIONS, "adapter"])
    if "model" not in whole:
        found.append("model is missing")
    # with defaults in the place of what is wrong, so that all faults are said together
    made = {"data": DataConfig(train="?"), **{key: section for key, section in sections.items() if section is not None}}
    config = Config(**{"model": "?", **values, **made})
    found += _impossible(config)
    if found:
        raise faults(ConfigError, "configuration", list(dict.fromkeys(found)))
    return config


def parse_adapter(record: Any, found: list[str]) -> AdapterConfig | None:
    """The `adapter` section: `method` names a registered Method, whose fields stand beside targets, exclude, layers."""
    if not isinstance(record, Mapping):
        found.append(f"adapter={record!r} must be a section like {{method: lora, rank: 16}}")
        return None
    if "from" in record and "start" in record:
        found.append("adapter.from and adapter.start are one thing: leave start out")
    if "from" in record:  # a word of Python, so the field has another name
        record = {"start" if key == "from" else key: value for key, value in record.items()}
    own = [f.name for f in dataclasses.fields(AdapterConfig) if f.name != "method"]
    if record.get("start") and len(record) > 1:
        others = ", ".join(map(repr, (key for key in record if key != "start")))
        found.append(f"adapter.from brings its own method and targets: leave out {others}")
    try:
        method = get(str(record.get("method") or "lora"))
    except ConfigError as error:
        found.append(f"adapter.method: {error}")
        return None
    options = {key: value for key, value in record.items() if key not in own and key != "method"}
    built: Method | None = _section(method, options, "adapter.", found, own)
    values = _values(AdapterConfig, {k: v for k, v in record.items() if k in own}, "adapter.", found)
    return None if built is None else AdapterConfig(method=built, **values)


def _sources(given: Any, where: str, found: list[str]) -> Any:
    """Mappings among the sources of rows → Source; everything else is left to the schema."""
    if isinstance(given, list | tuple):
        return tuple(_sources(one, f"{where}[{number}]", found) for number, one in enumerate(given))
    if not isinstance(given, Mapping):
        return given
    source: Source | None = _section(Source, given, f"{where}.", found)
    found += [] if source is None else [f"{where}.{fault}" for fault in source.invalid()]
    return source or Source(path="")


def _section(cls: type, record: Any, prefix: str, found: list[str], others: Collection[str] = ()) -> Any:
    """An object of the dataclass `cls`, or None and what is wrong in `found`."""
    fields = dataclasses.fields(cls)
    if not isinstance(record, Mapping):
        found.append(f"{prefix[:-1]}={record!r} must be a section with {', '.join(f.name for f in fields[:4])}, …")
        return None
    values = _values(cls, record, prefix, found, others)
    needed = [f.name for f in fields if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING]
    found += [f"{prefix}{name} is missing" for name in needed if name not in record]
    if any(name not in values for name in needed):
        return None
    try:
        return cls(**values)
    except ConfigError as error:  # a Method's own opinion of its fields
        found += [f"adapter: {fault}" for fault in error.faults]
        return None


def _values(
    cls: type, record: Mapping[str, Any], prefix: str, found: list[str], others: Collection[str] = ()
) -> dict[str, Any]:
    """The fields that a record gives, as the types of `cls` want them; one fault for each that cannot be."""
    hints, values = typing.get_type_hints(cls), {}
    names = [f.name for f in dataclasses.fields(cls)]
    for key, value in record.items():
        if key not in names:
            found.append(f"no key {prefix + str(key)!r}{_meant(cls, str(key), prefix, [*names, *others])}")
            continue
        kinds = _kinds(hints[key])
        if isinstance(value, bool) and bool not in kinds and kinds & {int, float}:
            found.append(f"{prefix}{key}={value!r}: must be a number")
            continue
        if isinstance(value, str) and bool in kinds and value not in kinds:
            found.append(f"{prefix}{key}={value!r}: must be true or false")
            continue
        try:
            rules = ConfigDict(arbitrary_types_allowed=True, allow_inf_nan=False)
            values[key] = TypeAdapter(
                hints[key], config=None if dataclasses.is_dataclass(hints[key]) else rules
            ).validate_python(value)
        except ValidationError as error:
            said = dict.fromkeys(fault["msg"][0].lower() + fault["msg"][1:] for fault in error.errors())
            found.append(f"{prefix}{key}={value!r}: {', or '.join(said).replace(', or input should be', ', or')}")
    return values


def _meant(cls: type, key: str, prefix: str, here: Sequence[str]) -> str:
    """A hint for an unknown key: whose field it is, near names, what other tools call it, the section it belongs to."""
    if issubclass(cls, Method) and any(key in {f.name for f in dataclasses.fields(get(name))} for name in methods()):
        own = ", ".join(f.name for f in dataclasses.fields(cls))
        return f", a field of other methods: {cls.name} has {own}; adapter={{method: {cls.name}}} starts afresh"
    ours = OTHER_NAMES.get(key)
    if ours in here:
        return f"; here it is called {prefix + ours!r}"
    near = did_you_mean(key, here)
    fields = {
        name: {f.name for f in dataclasses.fields(cls)} for name, cls in {**SECTIONS, "adapter": AdapterConfig}.items()
    }
    homes = [
        f"{name}.{ours or key}" for name, inside in fields.items() if (ours or key) in inside and f"{name}." != prefix
    ]
    return f"; it belongs to its section: {homes[0]!r}" if homes and not near else near


def _kinds(hint: Any) -> set[Any]:
    """The types, and the values of literals, that a hint allows at its top."""
    parts = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return set(parts)
    if parts and typing.get_origin(hint) in (typing.Union, types.UnionType):
        return set().union(*map(_kinds, parts))
    return {hint}


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
    """Plain data with `section.key=value` written into it; values are read as YAML."""
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
        place = record = dict(record or {})
        *path, last = key.split(".")
        for part in path:
            below = place.get(part)
            place[part] = place = dict(below) if isinstance(below, Mapping) else {}
        place[last] = _yaml(value, f"the value of {key}") if value else None
    return record


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
