"""The one schema of a training configuration: a dataclass per section, a sentence per field, one set of defaults.

`read(path, overrides)` validates a YAML file strictly; `Config.to_dict()` is what a run directory keeps; `json_schema()`
describes it all. The `adapter` section takes the fields of whichever Method its `method` names, from the registry.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import TypeAdapter, ValidationError

from deltaw.core.errors import ConfigError, did_you_mean, faults
from deltaw.core.method import Method, get

STRICT: dict[str, Any] = {"extra": "forbid", "arbitrary_types_allowed": True}


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    __pydantic_config__ = STRICT
    train: str | tuple[str, ...]
    """Training rows: a .jsonl or .json file, several of them, or a folder of such files."""
    eval: float | str | None = 0.05
    """Held-out rows: a share of the training rows (0.05), a file, or null for none."""
    max_length: int | None = None
    """Longest row in tokens; longer rows are dropped and counted. Default: what the model can read, at most 2048."""
    train_on_prompt: bool = False
    """Supervise the prompt too, not only the answers."""


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    __pydantic_config__ = STRICT
    method: Method
    """Any registered method with its fields beside it, e.g. method: lora, rank: 16, alpha: 32."""
    targets: str | tuple[str, ...] = "all-linear"
    """Modules to adapt: all-linear, attention, mlp, names, full paths or regular expressions."""
    exclude: str | tuple[str, ...] = ()
    """Modules taken away from the targets."""
    layers: str | tuple[int, ...] | None = None
    """Only these layers: "0-3,7"."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    __pydantic_config__ = STRICT
    objective: Literal["sft"] = "sft"
    """What is learnt: sft = the answers of the rows, by cross-entropy."""
    epochs: float = 1.0
    """Passes over the training rows."""
    max_steps: int | None = None
    """Optimizer steps; overrides epochs."""
    learning_rate: float = 2e-4
    """Peak learning rate; about ten times that of full fine-tuning."""
    batch_size: int = 8
    """Rows per step and process."""
    gradient_accumulation: int = 1
    """Batches summed into one optimizer step; the loss is normalised by supervised tokens over all of them."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after warm-up."""
    warmup: float = 0.03
    """Share of the steps over which the learning rate rises."""
    weight_decay: float = 0.0
    """Decoupled weight decay of AdamW on the adapter's tensors."""
    clip: float = 1.0
    """Largest norm of the gradient; 0 for no clipping."""
    seed: int = 0
    """Seed of initial values, order of rows and dropout."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Dtype of the frozen base: auto = bf16 on an accelerator that has it, else fp32. Adapters are fp32 always."""
    eval_every: int | Literal["auto"] = "auto"
    """Steps between evaluations: auto = about five in a run."""
    save_every: int | Literal["auto"] = "auto"
    """Steps between checkpoints: auto = as often as evaluation."""
    log_every: int = 10
    """Steps between lines of the event log."""
    keep: int = 2
    """Checkpoints kept, newest last."""


@dataclass(frozen=True, kw_only=True)
class Config:
    __pydantic_config__ = STRICT
    model: str
    """The base: a folder, a hub id, or `tiny` (bundled)."""
    data: DataConfig
    adapter: AdapterConfig = field(default_factory=lambda: AdapterConfig(method=get("lora")()))
    train: TrainConfig = field(default_factory=TrainConfig)
    output: str = "runs/latest"
    """The run directory; must not hold another run."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `parse` reads back to an equal Config."""
        record = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for section in ("data", "train"):
            record[section] = dataclasses.asdict(record[section])
        adapter = {f.name: getattr(self.adapter, f.name) for f in dataclasses.fields(self.adapter)}
        record["adapter"] = {"method": self.adapter.method.name, **dataclasses.asdict(adapter.pop("method")), **adapter}
        return _plain(record)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(v) for key, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, tuple | list) else value


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
