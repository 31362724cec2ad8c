"""Encoded rows → one padded batch of tensors. Labels come from spans, so that padding with the stop token is safe."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deltaw.data.encode import IGNORE, Encoded


class Collator:
    """Callable on a list of Encoded: input_ids, attention_mask and labels [B, T], padded on the right."""

    def __init__(self, tokenizer: Any, pad_to_multiple_of: int = 1):
        ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)  # any id will do: it is neither attended nor scored
        self.pad = next(number for number in ids if number is not None)
        self.multiple = pad_to_multiple_of

    def __call__(self, batch: Sequence[Encoded]) -> dict[str, Tensor]:
        longest = max(len(row.ids) for row in batch)
        width = -(-longest // self.multiple) * self.multiple
        return {
            "input_ids": torch.tensor([_padded(row.ids, width, self.pad) for row in batch]),
            "attention_mask": torch.tensor([_padded([1] * len(row.ids), width, 0) for row in batch]),
            "labels": torch.tensor([_padded(row.labels, width, IGNORE) for row in batch]),
        }


def _padded(values: list[int], width: int, filler: int) -> list[int]:
    return values + [filler] * (width - len(values))
