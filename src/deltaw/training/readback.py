"""The written adapter, read back onto the bare base, computes what was trained: logits of one batch, before and after.

Of adapters that go part by part: their files hold several methods, trained copies and rows under names of their own, and
what is lost of them is lost without a word.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from deltaw.core.attach import detach
from deltaw.core.errors import TrainError
from deltaw.data.collate import Collator
from deltaw.data.encode import Encoded
from deltaw.models.adapters import load
from deltaw.models.base import Base
from deltaw.ship.check import TOLERANCE


def read_back(base: Base, name: str, folder: Path, rows: Sequence[Encoded]) -> float:
    """The largest difference of the logits; adapter `name` on the base is then the one that was read.

    TrainError, and the folder is deleted, where it is more than rounding. rows: of one batch.
    """
    batch = Collator(base.tokenizer, processor=base.processor)(list(rows))
    trained = _logits(base, batch)
    detach(base.model, name)
    load(base.model, folder, name=name)
    apart = float((_logits(base, batch) - trained).abs().max())
    dtype = next(p.dtype for p in base.model.parameters() if p.is_floating_point())
    allowed = TOLERANCE[dtype] * float(trained.abs().max())
    if not apart <= allowed:
        shutil.rmtree(folder)
        raise TrainError(
            f"the adapter that was written differs from the one that was trained: by {apart:.3g} in its logits when read back, "
            f"more than {allowed:.3g}. {folder} was deleted, the checkpoints are there; please report this"
        )
    return apart


def first_batch(rows: Sequence[Encoded], size: int) -> list[Encoded]:
    """Up to `size` rows, those with images first where some have any."""
    head = [rows[n] for n in range(min(len(rows), 8 * size))]
    return sorted(head, key=lambda row: not row.images)[:size]


@torch.no_grad()
def _logits(base: Base, batch: dict[str, Tensor]) -> Tensor:
    """[N, V] fp32, of the positions that are not padding."""
    device = next(base.model.parameters()).device
    inputs = {key: value.to(device) for key, value in batch.items() if key != "labels"}
    base.model.eval()
    logits: Tensor = base.model(**inputs, use_cache=False).logits
    mask = inputs.get("attention_mask")
    return (logits if mask is None else logits[mask.bool()]).float()
