"""Write docs/configuration.md from the schema, so that the page and the program have one table of defaults.

python scripts/make_docs.py
"""

import dataclasses
from pathlib import Path
from typing import Any

from deltaw.config import describe, schema
from deltaw.core.method import get, names

PAGE = Path(__file__).parent.parent / "docs" / "configuration.md"
HEAD = """# The configuration

Generated from the schema by `scripts/make_docs.py`; `deltaw schema` prints the same as JSON schema. Unknown keys are
errors with the nearest known one; `section.key=value` on the command line overrides a file.

`model` is a folder, a hub id, or `tiny` (bundled). `output` is the run directory (default `runs/latest`).
"""


def table(properties: dict[str, Any], defaults: dict[str, Any]) -> str:
    lines = ["| field | default | meaning |", "|---|---|---|"]
    for name, described in properties.items():
        shown = "required" if defaults[name] is dataclasses.MISSING else f"`{_yaml(defaults[name])}`"
        lines.append(f"| `{name}` | {shown} | {' '.join(described.get('description', '').split())} |")
    return "\n".join(lines)


def _yaml(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(list(value) if isinstance(value, tuple) else value)


def _defaults(cls: type) -> dict[str, Any]:
    return {f.name: f.default_factory() if callable(f.default_factory) else f.default for f in dataclasses.fields(cls)}


def page() -> str:
    properties = describe.json_schema()["properties"]
    parts = [HEAD]
    for section, cls in (("data", schema.DataConfig), ("train", schema.TrainConfig)):
        parts.append(f"## `{section}`\n\n{table(properties[section]['properties'], _defaults(cls))}\n")
    parts.append(
        f"## `adapter`, for every method\n\n{table(describe.shared(), {**_defaults(schema.AdapterConfig), 'from': None})}\n"
    )
    for alternative in properties["adapter"]["oneOf"]:
        name = alternative["title"]
        own = {k: v for k, v in alternative["properties"].items() if k != "method" and k not in describe.shared()}
        if name in ours() and own:
            parts.append(f"## `adapter` with `method: {name}`\n\n{table(own, _defaults(get(name)))}\n")
    return "\n".join(parts)


def ours() -> list[str]:
    return [name for name in names() if get(name).__module__.startswith("deltaw.")]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
