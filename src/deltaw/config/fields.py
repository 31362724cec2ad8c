"""Plain data → the dataclasses of the schema, field by field: what cannot be is a sentence in a list, not an exception."""

import dataclasses
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from deltaw.config.schema import AdapterConfig, DataConfig, TrainConfig
from deltaw.core.errors import ConfigError, did_you_mean
from deltaw.core.method import Method, get
from deltaw.core.method import names as methods

SECTIONS: dict[str, type] = {"data": DataConfig, "train": TrainConfig}
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


def build(cls: type, record: Any, prefix: str, found: list[str], others: Collection[str] = ()) -> Any:
    """An object of the dataclass `cls`, or None and what is wrong in `found`."""
    fields = dataclasses.fields(cls)
    if not isinstance(record, Mapping):
        found.append(f"{prefix[:-1]}={record!r} must be a section with {', '.join(f.name for f in fields[:4])}, …")
        return None
    values = checked(cls, record, prefix, found, others)
    needed = [f.name for f in fields if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING]
    found += [f"{prefix}{name} is missing" for name in needed if name not in record]
    if any(name not in values for name in needed):
        return None
    try:
        return cls(**values)
    except ConfigError as error:  # a Method's own opinion of its fields
        found += [f"{prefix[:-1]}: {fault}" for fault in error.faults]
        return None


def checked(
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
