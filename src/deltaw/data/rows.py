"""Files of rows → conversations. Every fault of every row is found first and said once, with its place and its fix.

    prompt-completion   {"prompt": "…", "completion": "…"}
    messages            {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}
    alpaca              {"instruction": "…", "input": "…", "output": "…"}, also system, history

The form is seen from the rows themselves and must be the same in all of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deltaw.core.errors import DataError, faults
from deltaw.data.files import data_files, records
from deltaw.data.forms import Form, Message, detect, messages_of


@dataclass(frozen=True)
class Example:
    """One row as a conversation that ends with the assistant's turn."""

    messages: tuple[Message, ...]
    line: int
    """Where it stands: line of a .jsonl file, number of the row in a .json file, from 1."""
    where: str = ""
    """The same with the name of the file, for messages to people."""
    completion: bool = False
    """A prompt and its completion, which may be written one after the other where there is no chat template."""


@dataclass(frozen=True)
class Rows:
    """Rows of one form. `source` names the files."""

    form: Form
    rows: list[Example]
    source: str

    def __len__(self) -> int:
        return len(self.rows)


def read_rows(source: str | Path | Sequence[str | Path]) -> Rows:
    """Read a .jsonl or .json file, several of them, or a folder of them. DataError names all faults at once."""
    paths = data_files([source] if isinstance(source, str | Path) else source)
    name = ", ".join(str(path) for path in paths)
    form: Form | None = None
    first, rows, found = "", [], []
    for path in paths:
        for record in records(path):
            if isinstance(record, str):
                found.append(record)
                continue
            here, fault = detect(record.fields)
            if here is None:
                found.append(f"{record.where}: {fault}")
                continue
            if form is None:
                form, first = here, record.where
            if here != form:
                found.append(f"{record.where} is {here}, but {first} is {form}: write all rows of one run in one form")
                continue
            turns, wrong = messages_of(here, record.fields)
            found += [f"{record.where}: {fault}" for fault in wrong]
            rows.append(Example(turns, record.line, record.where, completion=here == "prompt-completion"))
    if found:
        raise faults(DataError, f"{name} cannot be used", found)
    if form is None:
        raise DataError(f"{name} is empty: no row in it")
    return Rows(form, rows, name)
