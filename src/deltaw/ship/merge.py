"""deltaw merge: base + adapter → a plain Transformers folder, reloaded from disk and checked against the adapter.

    reference = logits(base with the adapter live)       fp32
    merged    = logits(what was written, read back)      fp32 arithmetic on the written weights

The folder appears only when the check passes. A ΔW of zero is refused: the folder would be the base under another name.
An adapter that was trained on a quantised base can go into the original weights or into those read back from the
quantised ones (`deltaw.ship.roundtrip`); both are held against the adapter on the quantised base.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from deltaw.core.attach import adapters, detach, extract, insert
from deltaw.core.errors import MergeError, UseError
from deltaw.core.files import must_be_free, whole_folder
from deltaw.core.merge import merge as merge_live
from deltaw.core.route import use
from deltaw.data.kept import use_kept
from deltaw.methods.token_rows import TokenRowsAdapter
from deltaw.models.adapters import LoadReport, load
from deltaw.models.base import load_base, named_quantization, pick_dtype, read_config, require_transformers
from deltaw.models.quantize import method_of
from deltaw.ship.roundtrip import RoundTrip, decoded, put, round_trip

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest accepted logit difference, as a share of the largest logit; rounding of the weights makes most of it."""


@dataclass(frozen=True)
class Shipped:
    """What was written and how far it is from the adapter."""

    path: Path
    dtype: str
    weights: int
    max_logit_difference: float
    """Between the folder read back and the base with the adapter, over all probe positions."""
    effect: float
    """Largest logit difference between the base with and without the adapter: what the merge must keep."""
    into: str = "original"
    """Which weights of the base it went into: the original ones, or those read back from the quantised base."""
    round_trip: RoundTrip | None = None
    """Of an adapter that was trained on a quantised base: how far both ways are from what training saw."""
    remarks: tuple[str, ...] = ()
    """What loading the adapter said of it and of its base."""


def merge_to_folder(
    model: str, adapter: str | Path, output: str | Path, *, dtype: str = "auto", into: str = "original",
    quantize: str | None = None, allow_base_mismatch: bool = False, allow_pickle: bool = False,
) -> Shipped:  # fmt: skip
    """Merge the adapter folder into the base and write `output` in `dtype`: fp32, bf16, or auto = the base's own files.

    Arithmetic is fp32 with one rounding at the end. quantize: the kind of base that the adapter was trained on, None = as
    its files say; where that is quantised, `into` chooses between the original weights and those read back from it
    (dequantized), and the report compares both. The folder itself is never quantised. Raises MergeError when the result
    does not compute what the adapter does; nothing is left behind then.
    """
    target = Path(output)
    must_be_free(target)
    written = _dtype(model, dtype)
    quantize = named_quantization(Path(adapter), model) if quantize is None else quantize
    _possible(model, into, quantize)
    allowed_files = {"allow_base_mismatch": allow_base_mismatch, "allow_pickle": allow_pickle}
    found = _trained_on(model, adapter, quantize, into, allowed_files) if quantize != "none" else None
    base = load_base(model, dtype="fp32", device=torch.device("cpu"))
    checked = {"allow_base_mismatch": True} if found is not None else {}  # it is the right one for the quantised base
    report = load(base.model, adapter, name="merged", **{**allowed_files, **checked})
    remarks = tuple((report if found is None else found[2]).remarks)
    use_kept(base.tokenizer, Path(adapter))
    ids = _probe(base.model, "merged")
    known = (ids < base.model.get_input_embeddings().weight.shape[0]).all(1)
    ways: dict[str, Mapping[str, Tensor]] = {}
    if found is not None:
        ways = {"original": put(base.model, found[0]), "dequantized": found[0]}
        put(base.model, ways[into])
    tuned = logits(base.model, ids)
    with use(base.model, {}):
        plain = logits(base.model, ids[known])
    effect = float((tuned[known][..., : plain.shape[-1]] - plain).abs().max())
    _grow(base.model, "merged")
    compared = None
    if found is not None:
        distances = round_trip(base.model, "merged", ways, found[1], lambda: logits(base.model, ids))
        compared = RoundTrip(quantize, **distances)
        put(base.model, ways[into])
    merged = merge_live(base.model, "merged")
    base.model.to(written)
    transformers = require_transformers()
    with whole_folder(target) as folder:
        base.model.save_pretrained(folder)
        base.tokenizer.save_pretrained(folder)
        again = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        difference = float((logits(again, ids) - tuned).abs().max())
        allowed = TOLERANCE[written] * float(tuned.abs().max())
        if not difference <= allowed:
            raise MergeError(
                f"the merged model differs from the adapter by {difference:.3g} in its logits, more than {allowed:.3g}: "
                f"nothing was written. Merge with dtype fp32 to see whether rounding is the cause"
            )
    kind = str(written).removeprefix("torch.")
    return Shipped(target, kind, merged.weights, difference, effect, into, compared, remarks)


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


def _trained_on(
    model: str, adapter: str | Path, quantize: str, into: str, allowed: Mapping[str, bool]
) -> tuple[dict[str, Tensor], Tensor, LoadReport]:
    """Weights read back from the quantised base, the logits of the adapter on it, and what loading it said."""
    base = load_base(model, dtype="fp32", device=torch.device("cpu"), quantize=quantize)
    report = load(base.model, adapter, name="merged", **allowed)
    if into == "original" and any(one.method.corrects for one in adapters(base.model, "merged").values()):
        raise UseError(
            "this adapter makes up for what quantising rounds off (init: loftq), the original weights would be corrected "
            "for what they do not lack: merge with into dequantized (--into dequantized)"
        )
    return decoded(base.model), logits(base.model, _probe(base.model, "merged")), report


def _grow(model: nn.Module, name: str) -> None:
    """Where adapter `name` brings rows of new tokens, make the base's tables as large as they need."""
    size = max(_tokens(model, name), default=-1) + 1
    if size > model.get_input_embeddings().weight.shape[0]:  # type: ignore[operator]
        state = extract(model, name)
        detach(model, name)
        model.resize_token_embeddings(size, mean_resizing=False)  # type: ignore[operator]
        insert(model, state, name=name)


def _tokens(model: nn.Module, name: str) -> list[int]:
    """The tokens whose rows adapter `name` brings."""
    rows = [a for a in adapters(model, name).values() if isinstance(a, TokenRowsAdapter)]
    return sorted({token for adapter in rows for token in adapter.tokens})


def _probe(model: nn.Module, name: str, most: int = 96) -> Tensor:
    """`probe`, and rows in which every second id is a token of adapter `name`: else nothing would read their rows."""
    tokens, first = _tokens(model, name), probe(model)
    tokens = tokens[:: -(-len(tokens) // most)] if tokens else []
    width = first.shape[1]
    more = probe(model, -(-len(tokens) // (width // 2)), width)
    places = torch.arange(more.numel()).view(more.shape)[:, 1::2].flatten()[: len(tokens)]
    more.view(-1)[places] = torch.tensor(tokens, dtype=more.dtype)
    return torch.cat([first, more])


def probe(model: nn.Module, rows: int = 4, length: int = 24) -> Tensor:
    """Fixed pseudo-random token ids, [rows, length]: any input will do to compare two models."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, model.get_input_embeddings().weight.shape[0], (rows, length), generator=generator)  # type: ignore[operator]


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor) -> Tensor:
    return model.eval()(input_ids=ids, use_cache=False).logits.float()


def _dtype(model: str, dtype: str) -> torch.dtype:
    """The dtype to write: as asked, or that of the base's own files."""
    if dtype != "auto":
        return pick_dtype(dtype)
    own = read_config(model).dtype
    return own if own in TOLERANCE else torch.float32
