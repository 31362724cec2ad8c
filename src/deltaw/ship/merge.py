"""deltaw merge: base + Σ strength · adapter → a plain Transformers folder, read back from disk and held against the adapters.

    plan     names on disk → changes, on the mapped base; a wrong base or a change that cannot be merged ends here
    compare  logits of the base with the adapters live, fp32                                     (`deltaw.ship.check`)
    write    one tensor after the other: same files, names, dtypes and metadata; memory is one block (`deltaw.ship.disk`)
    check    every target changed; logits of the folder read back; checksums → merge.json

The folder appears only when all of that went well. A merge that cannot be done file by file is done in memory, and says
why (`deltaw.ship.live`). An adapter that was trained on a quantised base can go into the original weights or into those
read back from the quantised ones (`deltaw.ship.roundtrip`); the folder itself is never quantised.
"""

import contextlib
import gc
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from deltaw.core.base import BaseIdentity, identify
from deltaw.core.errors import FileError, MergeError, UseError, faults
from deltaw.core.files import must_be_free, whole_folder, write_text
from deltaw.data.kept import read_kept, together
from deltaw.formats import directory
from deltaw.models.adapters import LoadReport
from deltaw.models.base import load_tokenizer, named_class, named_quantization, read_config
from deltaw.models.checkpoint import Checkpoint, folder_of, open_checkpoint
from deltaw.models.quantize import method_of
from deltaw.ship import disk
from deltaw.ship.beside import DTYPES, REPORT, asked, copy_beside, room
from deltaw.ship.check import Reference
from deltaw.ship.live import Job, corrects, live, loaded, merge_live
from deltaw.ship.private import Private
from deltaw.ship.roundtrip import RoundTrip
from deltaw.ship.shards import Plan, plan, subject

Told = Callable[[int, int], None]
"""Called with bytes done and bytes in all."""


@dataclass(frozen=True)
class Shipped:
    """What was written and how far it is from the adapters."""

    path: Path
    dtype: str
    weights: int
    max_logit_difference: float | None
    """Between the folder read back and the base with the adapters, over all positions; None where that was left out."""
    effect: float | None
    """Largest logit difference between the base with and without the adapters: what the merge must keep."""
    into: str = "original"
    """Which weights of the base it went into: the original ones, or those read back from the quantised base."""
    round_trip: RoundTrip | None = None
    """Of an adapter that was trained on a quantised base: how far both ways are from what training saw."""
    remarks: tuple[str, ...] = ()
    """What loading the adapters said of them and of their base, and what someone must know of the merge."""
    way: str = "shards"
    """shards: file by file; memory: with the whole base in memory."""
    vanished: tuple[str, ...] = ()
    """Weights that were to change and did not: the change was rounded off, or zero."""
    files: dict[str, str] = field(default_factory=dict)
    """SHA-256 of every file that was written."""
    seconds: dict[str, float] = field(default_factory=dict)
    """plan, compare (the adapters' own logits), write, check (reading back, checksums)."""
    private: int | None = None
    """By how many bytes the process's own memory rose while it was written, mapped files left out (Linux)."""


def merge_to_folder(
    model: str, adapter: str | Path | Sequence[tuple[str | Path, float]], output: str | Path, *, dtype: str = "auto",
    into: str = "original", quantize: str | None = None, allow_base_mismatch: bool = False, allow_pickle: bool = False,
    prompts: Sequence[str] = (), check: bool = True, told: Told | None = None,
) -> Shipped:  # fmt: skip
    """Merge one adapter folder, or several (folder, strength), into the base and write `output`.

    W' = W + Σ strength · ΔW, every ΔW from the base's own W; arithmetic is fp32 with one rounding at the end. dtype: fp32,
    bf16, fp16, or auto = each weight as the base's own files have it. quantize: the kind of base that the adapters were
    trained on, None = as their files say; where that is quantised, `into` chooses between the original weights and those
    read back from it (dequantized), and the report compares both. prompts: texts to compare logits on, instead of fixed
    ids; check=False leaves that comparison out, for models that do not fit into memory. Raises MergeError when the result
    does not compute what the adapters do, FileError for files; nothing is left behind then.
    """
    target = Path(output)
    must_be_free(target)
    parts = [(adapter, 1.0)] if isinstance(adapter, str | Path) else list(adapter)
    wanted = asked(dtype)
    job = _job(model, parts, into, quantize, prompts, check, allow_base_mismatch, allow_pickle)
    clock, source = _Clock(), folder_of(model)
    with clock("plan"):
        found = _way(job, open_checkpoint(source))
        if isinstance(found, Plan):
            room(target, found.checkpoint, wanted)
    try:
        with whole_folder(target) as folder:
            out = _Out(source, folder, target, wanted, clock, told or (lambda done, total: None))
            return _in_shards(job, found, out) if isinstance(found, Plan) else _in_memory(job, found, out)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise FileError(
            f"{target} cannot be written: {reason}; nothing was left there: give a disk with more room"
        ) from None


def _job(
    model: str, parts: Sequence[tuple[str | Path, float]], into: str, quantize: str | None, prompts: Sequence[str],
    check: bool, mismatch: bool, pickle: bool,
) -> Job:  # fmt: skip
    if not parts:
        raise UseError("give at least one adapter to merge")
    folders = [(Path(folder), strength) for folder, strength in parts]
    wrong = [repr(strength) for _, strength in folders if not _number(strength)]
    if wrong:
        raise UseError(f"strengths must be finite numbers, not {', '.join(wrong)}")
    if quantize is None:
        kinds = list(dict.fromkeys(named_quantization(folder, model) for folder, _ in folders))
        if len(kinds) > 1:
            raise UseError(
                f"these adapters were trained on differently quantised bases ({', '.join(kinds)}): merge them one after "
                f"the other, or say which base to go by, --quantize {kinds[0]}"
            )
        quantize = kinds[0]
    _possible(model, into, quantize)
    kept = together([read_kept(folder) for folder, _ in folders])
    allowed = {"allow_base_mismatch": mismatch, "allow_pickle": pickle}
    layers = {layer for folder, _ in folders if (layer := named_class(folder)) is not None}
    layer = next(iter(layers)) if len(layers) == 1 else None
    return Job(model, folders, kept, into, quantize, allowed, tuple(prompts), check, layer)


def _number(strength: object) -> bool:
    return isinstance(strength, int | float) and not isinstance(strength, bool) and math.isfinite(strength)


def _possible(model: str, into: str, quantize: str) -> None:
    """Refuse ways of merging that there are not for this base."""
    if into not in ("original", "dequantized"):
        raise UseError(f"into={into!r} is neither original nor dequantized")
    if into == "dequantized" and quantize == "none":
        raise UseError(
            "the adapter's files do not say that its base was quantised, there is nothing to read back: "
            "say how with quantize (--quantize nf4), or merge into the original"
        )
    own = method_of(read_config(model))
    if own is not None:
        raise UseError(
            f"the files of the base {model!r} are quantised themselves ({own}): give the unquantised base, --model …"
        )


def _way(job: Job, checkpoint: Checkpoint | None) -> Plan | str:
    """The plan of the shards, or why the merge needs the whole base in memory."""
    if job.quantize != "none" and job.into == "original":
        pickle = job.allowed["allow_pickle"]
        states = [directory.open_directory(folder, allow_pickle=pickle).state for folder, _ in job.parts]
        if corrects(states):
            raise UseError(
                "this adapter makes up for what quantising rounds off (init: loftq), the original weights would be "
                "corrected for what they do not lack: merge with into dequantized (--into dequantized)"
            )
    if job.into == "dequantized":
        return "the weights are read back from a quantised base"
    if checkpoint is None:
        return "the base has no safetensors file"
    return plan(job, checkpoint)


@dataclass(frozen=True)
class _Out:
    """Where a merge goes, and who hears of it."""

    source: Path
    """Folder of the base."""
    folder: Path
    """Draft of the target."""
    target: Path
    dtype: torch.dtype | None
    """None for each weight's own."""
    clock: "_Clock"
    told: Told


def _in_shards(job: Job, found: Plan, out: _Out) -> Shipped:
    held, reports = None, found.reports
    if job.check:
        with out.clock("compare"):
            there = live(job, tokenizer=False)
            held, reports = there.reference, there.reports
            del there
            gc.collect()
    with out.clock("write"), Private() as memory:
        total, done = found.checkpoint.bytes, [0]

        def count(size: int) -> None:
            done[0] += size
            out.told(done[0], total)

        copy_beside(out.source, out.folder, out.dtype)
        if job.kept.files:
            words = load_tokenizer(job.model)[0]
            job.kept.give(words)
            words.save_pretrained(out.folder)
        infinite = disk.write(found.checkpoint, out.folder, out.dtype, found.changed, count)
    gone = found.vanished(subject(job), infinite)
    return _checked(
        job, out, found.dtype(out.dtype), held, reports, found.base.identity,
        weights=len(found.targets), way="shards", vanished=tuple(gone), private=memory.rise,
    )  # fmt: skip


def _in_memory(job: Job, reason: str, out: _Out) -> Shipped:
    with out.clock("compare"):
        there = live(job, tokenizer=True)
    base, remarks = identify(there.model), [f"merged in memory: {reason}"]
    with out.clock("write"), Private() as memory:
        merged = merge_live(there, job)
        own = getattr(read_config(job.model), "dtype", None)
        written = out.dtype or (own if own in DTYPES.values() else torch.float32)
        finite = {name for name, tensor in there.model.state_dict().items() if tensor.isfinite().all()}
        there.model.to(written)
        lost = [name for name, t in there.model.state_dict().items() if name in finite and not t.isfinite().all()]
        if lost:
            said = [f"{name}: the weight is not finite in {out.dtype or written}" for name in lost]
            raise faults(MergeError, f"{subject(job)} cannot be merged", said)
        copy_beside(out.source, out.folder, None)
        there.model.save_pretrained(out.folder)
        there.tokenizer.save_pretrained(out.folder)
    held, reports = there.reference, there.reports
    del there
    gc.collect()
    if merged.changed < merged.weights:
        remarks.append(
            f"{merged.weights - merged.changed} of {merged.weights} weights did not change, their ΔW is zero"
        )
    return _checked(
        job, out, written, held, reports, base,
        weights=merged.weights, way="memory", private=memory.rise, remarks=tuple(remarks),
    )  # fmt: skip


def _checked(
    job: Job, out: _Out, dtype: torch.dtype, held: Reference | None, reports: Sequence[LoadReport], base: BaseIdentity,
    remarks: tuple[str, ...] = (), **facts: Any,
) -> Shipped:  # fmt: skip
    """Read back what was written, hold it against the reference, and write the report beside it."""
    difference = None
    with out.clock("check"):
        there = sorted(file for file in out.folder.rglob("*") if file.is_file())
        files = {file.relative_to(out.folder).as_posix(): _digest(file) for file in there}
        if held is not None:
            difference = held.held(loaded(str(out.folder), job.layer), dtype)
            gc.collect()
    said = list(dict.fromkeys(remark for report in reports for remark in report.remarks))
    if held is None:
        said.append("its logits were not compared with the adapters' (check left out)")
    else:
        said += held.remarks
    if facts.get("vanished"):
        first = ", ".join(facts["vanished"][:6])
        said.append(
            f"rounding leaves no change of {len(facts['vanished'])} weights ({first}{', …' if len(facts['vanished']) > 6 else ''})"
        )
    done = Shipped(
        out.target, str(dtype).removeprefix("torch."), facts.pop("weights"), difference, held.effect if held else None,
        job.into, held.round_trip if held else None, (*said, *remarks), files=files, seconds=out.clock.seconds, **facts,
    )  # fmt: skip
    parts = [
        {"adapter": str(folder), "strength": strength, "digest": report.digest}
        for (folder, strength), report in zip(job.parts, reports, strict=True)
    ]
    record = {"base": base.to_dict(), "adapters": parts, **asdict(done)}
    del record["path"]
    record["positions"] = held.positions if held is not None else 0
    write_text(out.folder / REPORT, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    return done


def _digest(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


class _Clock:
    """Seconds of each stage by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] = round(time.perf_counter() - start, 3)
