"""Encoded rows → one batch of tensors. What a step learns does not depend on how its rows are laid out.

    padded   one row a line:      input_ids, attention_mask, labels [B, T]
    packed   short rows share a line, none is cut and none is moved to another batch:
             input_ids, position_ids, labels [G, T], G ≤ B, T the longest row

In a packed line positions start again with every row and no attention mask is passed: transformers then keeps the rows
apart by their positions. Passing a mask of ones would let them see each other.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deltaw.data.encode import IGNORE, Encoded


def padding(tokenizer: Any) -> int:
    """The id to pad with. Any will do: it is neither attended nor scored."""
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(number for number in ids if number is not None)


class Collator:
    """Callable on a list of Encoded. Labels come from spans, so that padding with the stop token is safe."""

    def __init__(self, tokenizer: Any, *, packing: bool = False):
        self.pad, self.packing = padding(tokenizer), packing

    def __call__(self, batch: Sequence[Encoded]) -> dict[str, Tensor]:
        width = max(len(row.ids) for row in batch)
        lines = pack([len(row.ids) for row in batch], width) if self.packing else [[n] for n in range(len(batch))]
        rows = [[batch[number] for number in line] for line in lines]
        result = {
            "input_ids": torch.tensor([_line([row.ids for row in line], width, self.pad) for line in rows]),
            # the first token of a row is predicted from nothing
            "labels": torch.tensor(
                [_line([[IGNORE, *row.labels[1:]] for row in line], width, IGNORE) for line in rows]
            ),
        }
        if self.packing:
            positions = [[list(range(len(row.ids))) for row in line] for line in rows]
            left = [width - sum(map(len, line)) for line in positions]
            lines_of_positions = [
                _line([*line, list(range(n))], width, 0) for line, n in zip(positions, left, strict=True)
            ]
            return {**result, "position_ids": torch.tensor(lines_of_positions)}
        return {
            **result,
            "attention_mask": torch.tensor([_line([[1] * len(row.ids) for row in line], width, 0) for line in rows]),
        }


def pack(lengths: Sequence[int], width: int) -> list[list[int]]:
    """Best-fit decreasing: numbers of the rows that share each line of `width`. No row may be longer than that."""
    lines: list[list[int]] = []
    room: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        fits = [line for line in range(len(lines)) if room[line] >= lengths[number]]
        if fits:
            best = min(fits, key=lambda line: room[line])
            lines[best].append(number)
            room[best] -= lengths[number]
        else:
            lines.append([number])
            room.append(width - lengths[number])
    return lines


def _line(parts: Sequence[list[int]], width: int, filler: int) -> list[int]:
    joined = [value for part in parts for value in part]
    return joined + [filler] * (width - len(joined))
