"""May rows of a batch share a line with this model, and is it worth it?

A packed line is right only where the model keeps its rows apart by their positions. That is a property of the model's
code, so it is tried: two rows in one line must give the logits that they give alone; where there are images, two with images.
"""

import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.core.base import quantization
from deltaw.core.errors import UseError
from deltaw.data.collate import Collator
from deltaw.data.encode import Encoded

WASTE = 0.1  # share of padding above which packing pays for its mask


def use_packing(
    choice: bool | str, model: nn.Module, lengths: Sequence[int], batch: int, pictured: Sequence[Encoded] = (),
    collate: Collator | None = None,
) -> bool:  # fmt: skip
    """Resolve data.packing (true, false, auto) for this model and rows of these lengths, `batch` at a time.

    pictured: two of the rows that hold images, where there are any; collate: lays them out.
    UseError where it is asked for and the model would let rows see each other.
    """
    if choice is False or (choice == "auto" and padding(lengths, batch) < WASTE):
        return False
    if keeps_apart(model) and (not pictured or alike(model, *_with_images(model, pictured, collate))):
        return True
    if choice is True:
        raise UseError(
            f"data.packing: {type(model).__name__} does not keep rows {'with images ' if pictured else ''}of one line apart by "
            "their positions, they would see each other: set it to false"
        )
    return False


def padding(lengths: Sequence[int], batch: int) -> float:
    """Share of padding in random batches of these rows."""
    order = random.Random(0).sample(list(lengths), min(len(lengths), 64 * batch))
    batches = [order[i : i + batch] for i in range(0, len(order), batch)]
    return 1 - sum(order) / max(1, sum(max(part) * len(part) for part in batches))


def keeps_apart(model: nn.Module) -> bool:
    """Do two rows of text in one line give the logits they give alone?"""
    device = next(model.parameters()).device
    table: Any = model.get_input_embeddings()  # type: ignore[operator]
    size, places = table.weight.shape[0], torch.arange(7, device=device)
    rows = [(places + start) % size for start in (3, 11)]

    def given(ids: Tensor, positions: Tensor) -> dict[str, Tensor]:
        return {"input_ids": ids.unsqueeze(0), "position_ids": positions.unsqueeze(0)}

    return alike(model, [given(row, places) for row in rows], given(torch.cat(rows), places.repeat(2)))


def _with_images(
    model: nn.Module, rows: Sequence[Encoded], collate: Any
) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """(each row alone, without positions, which some models make of the images themselves; all in one line)."""
    device = next(model.parameters()).device

    def given(line: Sequence[Encoded], packed: bool) -> dict[str, Tensor]:
        made = collate.laid([line], sum(len(row.ids) for row in line), packed)
        return {key: value.to(device) for key, value in made.items() if key != "labels"}

    return [given([row], False) for row in rows], given(rows, True)


@torch.no_grad()
def alike(model: nn.Module, alone: Sequence[Mapping[str, Tensor]], together: Mapping[str, Tensor]) -> bool:
    """Does a line give the logits that its rows give alone?"""

    def logits(given: Mapping[str, Tensor]) -> Tensor:
        return model(**given, use_cache=False).logits[0].float()  # type: ignore[no-any-return]

    training = model.training
    model.eval()
    try:
        wanted, found = torch.cat([logits(one) for one in alone]), logits(together)
    except (TypeError, ValueError, RuntimeError):  # takes no positions, or not such ones
        return False
    finally:
        model.train(training)
    exact = next(p.dtype for p in model.parameters() if p.is_floating_point()) == torch.float32
    exact = exact and quantization(model) is None  # 8-bit layers round their input
    return bool((found - wanted).abs().max() <= (1e-4 if exact else 3e-2) * wanted.abs().max())
