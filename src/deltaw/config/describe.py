"""The schema described: JSON schema with a sentence per field, for `deltaw schema`, editors and the documentation.

The sentences are the docstrings under the fields, of the sections and of every registered Method.
"""

import ast
import dataclasses
import inspect
import textwrap
from typing import Any, get_type_hints

from pydantic import TypeAdapter

from deltaw.config.parts import FROZEN, PartConfig
from deltaw.config.schema import AdapterConfig, Config, DataConfig, TrainConfig
from deltaw.config.stages import Stage
from deltaw.core.method import get
from deltaw.core.method import names as methods


def json_schema() -> dict[str, Any]:
    """JSON schema of a configuration file; `adapter` is one alternative per registered method."""
    said, hints = sentences(Config), get_type_hints(Config)
    properties: dict[str, Any] = {
        "model": {"type": "string", "description": said["model"]},
        "quantize": {
            **TypeAdapter(hints["quantize"]).json_schema(),
            "default": "none",
            "description": said["quantize"],
        },
        "data": section(DataConfig),
        "adapter": {"oneOf": [adapter(name) for name in methods()]},
        "train": section(TrainConfig),
        "output": {"type": "string", "default": "runs/latest", "description": said["output"]},
        "stages": {"type": "array", "items": section(Stage), "description": said["stages"]},
    }
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "deltaw training configuration"}
    required = ["model", "data"]
    return {**head, "type": "object", "properties": properties, "required": required, "additionalProperties": False}


def section(cls: type) -> dict[str, Any]:
    """JSON schema of one dataclass, every field with its sentence."""
    schema = TypeAdapter(cls).json_schema()
    said = sentences(cls)
    for name, field in schema.get("properties", {}).items():
        field["description"] = said.get(name, "")
    return schema


def adapter(name: str) -> dict[str, Any]:
    """The `adapter` section with method `name`: the method's fields beside those that every method shares."""
    properties = {"method": {"const": name}, **section(get(name)).get("properties", {}), **shared()}
    return {"title": name, "type": "object", "properties": properties, "additionalProperties": False}


def shared() -> dict[str, Any]:
    """Fields of the `adapter` section that every method has."""
    said = sentences(AdapterConfig)
    names = [f.name for f in dataclasses.fields(AdapterConfig) if f.name != "method"]
    fields: dict[str, Any] = {"from" if name == "start" else name: {"description": said[name]} for name in names}
    own = {name: {"description": sentence} for name, sentence in part().items()}
    forms = [{"enum": [FROZEN, *methods()]}, {"type": "object", "properties": own}]  # and the fields of its method
    fields["parts"] |= {"type": "object", "additionalProperties": {"oneOf": forms}}
    return fields


def part() -> dict[str, str]:
    """Fields of a part of `adapter.parts`, each with its sentence."""
    return {f.name: sentences(PartConfig)[f.name] for f in dataclasses.fields(PartConfig)}


def sentences(cls: type) -> dict[str, str]:
    """The docstring under each field of a dataclass, inherited fields included."""
    found: dict[str, str] = {}
    for base in reversed([b for b in cls.__mro__ if dataclasses.is_dataclass(b)]):
        try:
            source = inspect.getsource(base)
        except (OSError, TypeError):  # a method written at a prompt has no file to read its sentences from
            continue
        body = ast.parse(textwrap.dedent(source)).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, after in zip(body.body, body.body[1:], strict=False):
            said = after.value if isinstance(after, ast.Expr) else None
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(said, ast.Constant)
            ):
                found[field.target.id] = " ".join(str(said.value).split())
    return found
