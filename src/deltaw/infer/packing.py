"""May rows of a batch share a line with this model, and is it worth it?

A packed line is right only where the model keeps its rows apart by their positions. That is a property of the model's
code, so it is tried: two rows in one line must give the logits that they give alone.
"""

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.core.base import quantization
from deltaw.core.errors import UseError

WASTE = 0.1  # share of padding above which packing pays for its mask


def use_packing(choice: bool | str, model: nn.Module, lengths: Sequence[int], batch: int) -> bool:
    """Resolve data.packing (true, false, auto) for this model and rows of these lengths, `batch` at a time.

    UseError where it is asked for and the model would let rows see each other.
    """
    if choice is False or (choice == "auto" and padding(lengths, batch) < WASTE):
        return False
    if keeps_apart(model):
        return True
    if choice is True:
        raise UseError(
            f"data.packing: {type(model).__name__} does not keep rows of one line apart by their positions, they would "
            "see each other: set it to false"
        )
    return False


def padding(lengths: Sequence[int], batch: int) -> float:
    """Share of padding in random batches of these rows."""
    order = random.Random(0).sample(list(lengths), min(len(lengths), 64 * batch))
    batches = [order[i : i + batch] for i in range(0, len(order), batch)]
    return 1 - sum(order) / max(1, sum(max(part) * len(part) for part in batches))


@torch.no_grad()
def keeps_apart(model: nn.Module) -> bool:
    """Do two rows in one line give the logits they give alone?"""
    device = next(model.parameters()).device
    table: Any = model.get_input_embeddings()  # type: ignore[operator]
    size = table.weight.shape[0]
    rows = [torch.arange(start, start + 7, device=device) % size for start in (3, 11)]

    def logits(ids: Tensor, positions: Tensor) -> Tensor:
        return model(input_ids=ids.unsqueeze(0), position_ids=positions.unsqueeze(0), use_cache=False).logits[0].float()

    training = model.training
    model.eval()
    try:
        alone = torch.cat([logits(row, torch.arange(7, device=device)) for row in rows])
        together = logits(torch.cat(rows), torch.arange(7, device=device).repeat(2))
    except (TypeError, ValueError, RuntimeError):  # takes no positions, or not such ones
        return False
    finally:
        model.train(training)
    exact = next(p.dtype for p in model.parameters() if p.is_floating_point()) == torch.float32
    exact = exact and quantization(model) is None  # 8-bit layers round their input
    return bool((together - alone).abs().max() <= (1e-4 if exact else 3e-2) * alone.abs().max())
