"""Sources → stores of tokens, in one pass with one row in memory at a time; the same rows in the same order as without.

.jsonl, lines of .txt, .parquet and hub ids are read row by row; .json, .csv and .tsv files whole, one file at a time.
Held-out rows are drawn by the same hash of what they say. Every fault is found before the run begins, as ever.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from deltaw.config.schema import Source
from deltaw.core.errors import DataError, faults
from deltaw.data.conversation import Example
from deltaw.data.dataset import EVALUATE, LEARN, DataReport, Encoder, fitting
from deltaw.data.encode import Encoded
from deltaw.data.observed import Observed
from deltaw.data.rows import Part, Rows, beside, examples, place
from deltaw.data.sources import named, repeated
from deltaw.data.store import Store

MOST = 100  # faults of rows to collect before giving up


@dataclass(frozen=True)
class Side:
    """What is trained on, or held out."""

    encoded: Sequence[Encoded]
    report: DataReport
    rows: Rows
    """The first few, for those who show or answer them."""
    seen: Observed | None = None


def stream(
    given: Sequence[Source], encoder: Callable[[], Encoder], objective: str, pairs: str | None, *,
    share: float | None = None, keep: int = 0, purpose: str = LEARN,
) -> tuple[Side, Side | None]:  # fmt: skip
    """(training rows, held-out rows): `share` of the rows held out, or none. DataError names what is wrong with them.

    purpose: of the first, for messages.
    """
    listed = [named(one) for one in given]
    name = ", ".join(source.path for source in listed)
    found = [f"{source.path}: {fault}" for source in listed for fault in source.invalid()]
    encoders, stores, kept = [encoder(), encoder()], [Store(), Store()], ([], [])  # type: ignore[var-annotated]
    parts: list[Part] = []
    for source in [] if found else listed:
        counts: Counter[str] = Counter()
        left: dict[str, bool] = {}
        for one in examples(source, streaming=True, left=left):
            if isinstance(one, str):
                found.append(one)
                if len(found) >= MOST:
                    break
                continue
            form, row = one
            if not counts:
                fitting({form}, name, objective, pairs)
            counts[form] += 1
            side = int(share is not None and row.good is not False and place(row) < share)
            for _ in range(repeated([place(row, "weight")], source.weight)[0]):
                stores[side].extend(encoders[side].add(row))
                if len(kept[side]) < keep:
                    kept[side].append(row)
        parts += [Part(source.path, form, count, source.weight, *beside(left)) for form, count in counts.items()]
    if found:
        raise faults(DataError, f"{name} cannot be used", found)
    if not parts:
        raise DataError(f"{name} is empty: no row in it" if listed else "no data was given")
    train, held_out = (
        (store, account, rows, tuple(parts), name) for store, account, rows in zip(stores, encoders, kept, strict=True)
    )
    return _side(*train, purpose), None if share is None else _side(*held_out, EVALUATE)


def _side(
    store: Store, encoder: Encoder, kept: list[Example], parts: tuple[Part, ...], name: str, purpose: str
) -> Side:
    store.close()
    return Side(store, encoder.report(parts, name, purpose), Rows(parts[0].form, kept, name, parts), encoder.seen)
