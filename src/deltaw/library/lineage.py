"""Where adapters come from: what they were mixed from or continued from, as `meta["parents"]` says. Pure.

Parents are digests of tensors; every adapter of the library with these tensors answers to one.

    sql-mix   sha256:7b1f…
    ├── 0.7 × sql   sha256:02aa…
    │   └── sha256:c9d0…  not in the library
    └── 0.3 × tone   sha256:5e11…
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from deltaw.library.content import Record


@dataclass(frozen=True)
class Node:
    digest: str
    """Of the adapter; of its tensors where the library does not have it."""
    there: bool
    weight: float | None
    """In a mix, how much of it went into the adapter above."""
    parents: tuple["Node", ...] = ()


def by_tensors(records: Mapping[str, Record]) -> dict[str, list[str]]:
    """Digest of tensors → digests of the adapters that hold them."""
    found: dict[str, list[str]] = {}
    for digest, record in records.items():
        found.setdefault(record.tensors, []).append(digest)
    return found


def tree(digest: str, records: Mapping[str, Record]) -> Node:
    """The ancestors of an adapter. One that would be its own (a mix of one, unchanged) is not followed again."""
    return _node(digest, None, records, by_tensors(records), frozenset())


def _node(
    digest: str,
    weight: float | None,
    records: Mapping[str, Record],
    held: Mapping[str, list[str]],
    above: frozenset[str],
) -> Node:
    record, above = records[digest], above | {digest}
    parents = []
    for parent, share in zip(record.parents, weights(record), strict=True):
        known = [one for one in held.get(parent, ()) if one not in above]
        if known:
            parents.append(_node(known[0], share, records, held, above))
        elif parent != record.tensors:
            parents.append(Node(parent, False, share))
    return Node(digest, True, weight, tuple(parents))


def weights(record: Record) -> Sequence[float | None]:
    """The weights of a mix, one per parent; None each where it was not mixed."""
    found = record.meta.get("weights")
    right = isinstance(found, list | tuple) and len(found) == len(record.parents)
    return [float(one) for one in found] if right and found is not None else [None] * len(record.parents)


def reachable(digests: Iterable[str], records: Mapping[str, Record]) -> set[str]:
    """`digests` and all their ancestors, as far as the library has them."""
    held, found, todo = by_tensors(records), set[str](), list(digests)
    while todo:
        digest = todo.pop()
        if digest in records and digest not in found:
            found.add(digest)
            todo += [one for parent in records[digest].parents for one in held.get(parent, ())]
    return found


def children(digest: str, records: Mapping[str, Record]) -> list[str]:
    """Adapters that were made from this one."""
    tensors = records[digest].tensors
    return [other for other, record in records.items() if tensors in record.parents and other != digest]


def drawn(node: Node, label: Mapping[str, str], lead: str = "", mark: str = "") -> list[str]:
    """The tree as lines of text. label: digest → how to write an adapter of the library."""
    share = "" if node.weight is None else f"{node.weight:g} × "
    text = label.get(node.digest, node.digest) if node.there else f"{node.digest[:19]}  not in the library"
    lines = [f"{lead}{mark}{share}{text}"]
    below = lead + {"": "", "├── ": "│   ", "└── ": "    "}[mark]
    for number, parent in enumerate(node.parents):
        lines += drawn(parent, label, below, "└── " if number == len(node.parents) - 1 else "├── ")
    return lines
