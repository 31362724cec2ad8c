"""What an adapter folder is, by its content: a digest, and the facts that a list of adapters shows.

    digest = sha256 over    adapter_config.json    without PEFT's version; lists of names in order, PEFT writes sets
                            deltaw.json            without our version and `meta` (recipe, metrics, parents)
                            chat_template.jinja, tokens.json, as they are
                            the digest of the tensors: names, dtypes, shapes, bytes (`deltaw.formats.manifest`)

All that decides what the adapter computes is in it, and nothing that depends on who writes or reads it: it is taken from
what the files say, not from what this version makes of them. Two folders with one digest are one adapter. `rank_pattern` and
`alpha_pattern` keep their order, the first hit wins in them. Parents in `meta` are digests of tensors alone, which a mix
or a run knows; one of those can belong to several adapters of a library (the same tensors under another α).
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltaw.analysis.norms import norms
from deltaw.core.errors import FileError
from deltaw.core.files import read_json
from deltaw.formats import manifest
from deltaw.formats.directory import CARD, CONFIG, OURS, TEMPLATE, TOKENS, Stored
from deltaw.formats.weights import read_tensors

TEXTS = (CONFIG, OURS, TEMPLATE, TOKENS, CARD)
"""Files of an adapter beside its tensors; the last, a model card, is kept but means nothing."""
FORMAT = 1


@dataclass(frozen=True)
class Record:
    """Facts about one adapter of a library, taken when it was added."""

    digest: str
    tensors: str
    """Digest of the tensors alone: what the parents of other adapters name."""
    added: str
    """When, UTC, ISO 8601."""
    bytes: int
    """Of its files."""
    parameters: int
    sites: int
    methods: tuple[str, ...]
    ranks: tuple[int, ...]
    """The different ranks, ascending."""
    change: float | None
    """‖ΔW‖ over the sites where it can be told without the base (low-rank ones); None where there are none."""
    base: str | None
    """What the files call it."""
    layer: str | None
    """Class of the base's model; None where the files do not tell which base it was, beyond a name."""
    quantized: str | None
    meta: Mapping[str, Any]
    """What deltaw.json keeps of its making: recipe, metrics, parents, task type."""
    outside: tuple[str, ...] = ()
    """Parents that were not in the library when it was added."""

    @property
    def parents(self) -> tuple[str, ...]:
        found = self.meta.get("parents")
        return tuple(map(str, found)) if isinstance(found, list | tuple) else ()


def texts(folder: Path) -> dict[str, bytes]:
    """The files of an adapter beside its tensors, those that are there."""
    return {name: (folder / name).read_bytes() for name in TEXTS if (folder / name).is_file()}


def digest(files: Mapping[str, bytes], tensors: str) -> str:
    """Digest of an adapter's content. files: name → bytes, as `texts` reads them; tensors: digest of its tensors."""
    parts = {name: files[name] for name in (TEMPLATE, TOKENS) if name in files}
    if CONFIG in files:
        parts[CONFIG] = _canonical({k: _names(v) for k, v in _json(files, CONFIG).items() if k != "peft_version"})
    if OURS in files:
        parts[OURS] = _canonical({k: v for k, v in _json(files, OURS).items() if k not in ("deltaw", "meta")})
    total = hashlib.sha256(f"deltaw adapter {FORMAT}\n{tensors}\n".encode())
    for name, data in sorted(parts.items()):
        total.update(f"{name} {len(data)}\n".encode() + data)
    return f"sha256:{total.hexdigest()}"


def of_folder(folder: Path) -> str:
    """Digest of the content of an adapter folder of the library, from the files alone. FileError."""
    return digest(texts(folder), manifest.digest(read_tensors(folder, False)))


def _json(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    try:
        found = json.loads(files[name])
    except ValueError as error:
        raise FileError(f"{name} is not JSON: {error}; fetch the folder again") from None
    if not isinstance(found, dict):
        raise FileError(f"{name} is a {type(found).__name__}, expected an object: fetch the folder again")
    return found


def _names(value: Any) -> Any:
    return sorted(value) if isinstance(value, list) and all(isinstance(one, str) for one in value) else value


def _canonical(record: Mapping[str, Any]) -> bytes:
    """Keys at the top in order; tables inside keep theirs, which may mean something."""
    return json.dumps(dict(sorted(record.items())), ensure_ascii=False, separators=(",", ":")).encode()


def record(stored: Stored, content: str, size: int, added: str, known: set[str]) -> Record:
    """The facts of an adapter that was read. content: its digest; known: digests of tensors that the library has."""
    state = stored.state
    sizes = [norm for norm in norms(state).values() if norm is not None]
    found = Record(
        digest=content,
        tensors=stored.digest,
        added=added,
        bytes=size,
        parameters=state.parameters,
        sites=len(state.methods),
        methods=tuple(sorted({method.name for method in state.methods.values()})),
        ranks=tuple(sorted({rank for m in state.methods.values() if (rank := getattr(m, "rank", None)) is not None})),
        change=sum(norm**2 for norm in sizes) ** 0.5 if sizes else None,
        base=stored.base_name,
        layer=state.base.layer if state.base else None,
        quantized=state.base.quantized if state.base else None,
        meta=dict(state.meta),
    )
    return dataclasses.replace(found, outside=tuple(p for p in found.parents if p not in {*known, found.tensors}))


KINDS: Mapping[str, Any] = {
    **dict.fromkeys(("digest", "tensors", "added", "methods", "outside"), str),
    **dict.fromkeys(("bytes", "parameters", "sites", "ranks"), int),
    **dict.fromkeys(("base", "layer", "quantized"), str | None),
    "change": int | float | None,
    "meta": Mapping,
}
"""Field → the type of what it holds, of tuples each."""


def to_dict(one: Record) -> dict[str, Any]:
    return {"format": FORMAT, **dataclasses.asdict(one)}


def from_file(path: Path) -> Record:
    """The record that `to_dict` made of an adapter; FileError where it is none, or of a newer format."""
    found = read_json(path, "`deltaw adapters verify` looks at the whole library")
    version = found.pop("format", None)
    if type(version) is int and version > FORMAT:
        raise FileError(f"{path} is of format {version}, this deltaw reads up to {FORMAT}: upgrade deltaw")
    try:
        fields: dict[str, Any] = found | {key: tuple(found[key]) for key in ("methods", "ranks", "outside")}
        record = Record(**fields)
    except (KeyError, TypeError) as error:
        raise FileError(f"{path} is no record of an adapter: {error}") from None
    wrong = [
        key for key, kind in KINDS.items() if not all(isinstance(one, kind) for one in _each(getattr(record, key)))
    ]
    if wrong:
        raise FileError(f"{path} is no record of an adapter: {', '.join(wrong)} hold what they cannot; add it again")
    return record


def _each(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)
