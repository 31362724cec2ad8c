"""Sources → rows. Every fault of every row is found first and said once, with its place and its fix.

The form of the rows (`deltaw.data.forms`) is seen from the rows themselves and must be the same within a source.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from deltaw.config.schema import Source
from deltaw.core.errors import DataError, faults
from deltaw.data import images, sources
from deltaw.data.conversation import Example
from deltaw.data.forms import Form, detect, example, unread
from deltaw.data.sources import Given

SEEN = (
    "names are seen from the folder of the rows, or from that which the source's `images` gives (deltaw eval: --images)"
)
"""Said of images that are not there."""


@dataclass(frozen=True)
class Part:
    """What one source gave."""

    source: str
    form: Form
    rows: int
    weight: float = 1.0
    unread: tuple[str, ...] = ()
    """Fields of its rows that are not read."""
    meant: tuple[str, ...] = ()
    """Those of them that look like images, of rows that hold none."""

    def __str__(self) -> str:
        weight = "" if self.weight == 1.0 else f", taken {self.weight:g} times"
        return f"{self.source}: {self.rows:,} rows of {self.form}{weight}"


@dataclass(frozen=True)
class Rows:
    """Rows in order. `source` names the files."""

    form: Form
    rows: list[Example]
    source: str
    parts: tuple[Part, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)


def read_rows(given: Given | Sequence[Given]) -> Rows:
    """Read one source or several. DataError names all faults at once.

    given: paths of files or folders, hub ids, `dataset_info.json#entry`, or Sources with columns, pattern and weight.
    """
    listed = [sources.named(one) for one in ([given] if isinstance(given, sources.Given) else given)]
    name = ", ".join(source.path for source in listed)
    found = [f"{source.path}: {fault}" for source in listed for fault in source.invalid()]
    rows: list[Example] = []
    parts: list[Part] = []
    for source in [] if found else listed:
        left: dict[str, bool] = {}
        form, examples, wrong = _read(source, left)
        found += wrong
        if form is None or wrong:
            continue
        parts.append(Part(source.path, form, len(examples), source.weight, *beside(left)))
        times = sources.repeated([place(row, "weight") for row in examples], source.weight)
        rows += [row for row, count in zip(examples, times, strict=True) for _ in range(count)]
    if found:
        raise faults(DataError, f"{name} cannot be used", found)
    if not rows:
        raise DataError(f"{name} is empty: no row in it" if listed else "no data was given")
    return Rows(parts[0].form, rows, name, tuple(parts))


def beside(left: Mapping[str, bool]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What `examples` left: names of all fields that are not read, and of those that look like images."""
    return tuple(sorted(left)), tuple(name for name in sorted(left) if left[name])


def _read(source: Source, left: dict[str, bool]) -> tuple[Form | None, list[Example], list[str]]:
    form: Form | None = None
    rows, found = [], []
    for one in examples(source, left=left):
        if isinstance(one, str):
            found.append(one)
        else:
            form, row = one
            rows.append(row)
    return form, rows, found


def examples(
    source: Source, streaming: bool = False, left: dict[str, bool] | None = None
) -> Iterator[tuple[Form, Example] | str]:
    """The rows of a source one by one, with their form; in the place of one that cannot be used, the fault.

    left: is given the names of fields that are not read, and whether one looks like the image of a row that holds none.
    """
    form: Form | None = None
    first, inside = "", {theirs.split(".")[0] for theirs in source.columns.values()}
    for record in sources.read(source, streaming):
        if isinstance(record, str):
            yield record
            continue
        here, fault = detect(record.fields)
        if here is None:
            yield f"{record.where}: {fault}"
            continue
        if form is None:
            form, first = here, record.where
        if here != form:
            yield f"{record.where} is {here}, but {first} is {form}: write all rows of one source in one form"
            continue
        row, wrong = example(here, record.fields, record.line, record.where)
        if not wrong:
            folder = record.file.parent if record.file is not None else None
            folder = folder if source.images is None else Path(source.images)
            row, wrong = images.placed(row, record.fields, folder, SEEN)
        for name in () if left is None else unread(here, record.fields) - inside:
            left[name] = left.get(name, False) or (not row.images and images.meant(name, record.fields[name]))
        yield from (f"{record.where}: {fault}" for fault in wrong)
        yield here, row


def place(row: Example, salt: str = "") -> float:
    """A number in [0, 1) that depends on the content of a row only; another salt gives an unrelated one."""
    turns = [[m.role, m.content, m.reasoning, *([c.name, c.arguments] for c in m.calls)] for m in row.messages]
    if not any(m.reasoning or m.calls for m in row.messages):
        turns = [[m.role, m.content] for m in row.messages]
    if row.images:
        turns.append([images.look(image).digest for image in row.images])
    text = json.dumps(turns if row.text is None else row.text)
    return int.from_bytes(hashlib.sha256(f"{salt}{text}".encode()).digest()[:8], "big") / 2**64
