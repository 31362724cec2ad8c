"""Encoded rows → one batch of tensors. What a step learns does not depend on how its rows are laid out.

    padded   one row a line:      input_ids, attention_mask, labels [B, T]
    packed   short rows share a line, none is cut and none is moved to another batch:
             input_ids, position_ids, labels [G, T], G ≤ B, T the longest row

With images (the base's processor then reads the rows, and each row's tokens are seen to be those it was encoded with) also
pixel_values and whatever else this model takes: token_type_ids, image_grid_thw, pixel_attention_mask … Of packed rows the
images come in the order in which their tokens stand.

In a packed line positions start again with every row and no attention mask is passed: transformers then keeps the rows
apart by their positions. Passing a mask of ones would let them see each other.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deltaw.core.errors import DataError
from deltaw.data.encode import IGNORE, Encoded
from deltaw.data.processors import ASIDE, reader


def padding(tokenizer: Any) -> int:
    """The id to pad with. Any will do: it is neither attended nor scored."""
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(number for number in ids if number is not None)


class Collator:
    """Callable on a list of Encoded. Labels come from spans, so that padding with the stop token is safe."""

    def __init__(self, tokenizer: Any, *, packing: bool = False, processor: Any = None):
        self.pad, self.packing, self.processor = padding(tokenizer), packing, processor

    def __call__(self, batch: Sequence[Encoded]) -> dict[str, Tensor]:
        width = max(len(row.ids) for row in batch)
        lines = pack([len(row.ids) for row in batch], width) if self.packing else [[n] for n in range(len(batch))]
        return self.laid([[batch[number] for number in line] for line in lines], width, self.packing)

    def laid(self, lines: Sequence[Sequence[Encoded]], width: int, packed: bool) -> dict[str, Tensor]:
        """These rows in these lines of `width`; more than one in a line only where they are packed."""
        made = self._texts(lines, width, packed)
        if any(row.images for line in lines for row in line):
            return {**self._beside(lines, width), **made}
        return made if self.processor is None else {**made, **zeros(made["input_ids"], self.processor)}

    def _texts(self, lines: Sequence[Sequence[Encoded]], width: int, packed: bool) -> dict[str, Tensor]:
        result = {
            "input_ids": torch.tensor([_line([row.ids for row in line], width, self.pad) for line in lines]),
            # the first token of a row is predicted from nothing
            "labels": torch.tensor(
                [_line([[IGNORE, *row.labels[1:]] for row in line], width, IGNORE) for line in lines]
            ),
        }
        if packed:
            positions = [[list(range(len(row.ids))) for row in line] for line in lines]
            left = [width - sum(map(len, line)) for line in positions]
            lines_of_positions = [
                _line([*line, list(range(n))], width, 0) for line, n in zip(positions, left, strict=True)
            ]
            return {**result, "position_ids": torch.tensor(lines_of_positions)}
        return {
            **result,
            "attention_mask": torch.tensor([_line([[1] * len(row.ids) for row in line], width, 0) for line in lines]),
        }

    def _beside(self, lines: Sequence[Sequence[Encoded]], width: int) -> dict[str, Tensor]:
        """What the model takes beside ids and masks; what has a number for each token is laid into lines like them."""
        rows = [row for line in lines for row in line]
        made = with_images(rows, self.processor, "right", self.pad)
        shape = made["input_ids"].shape

        def lined(value: Tensor) -> Tensor:
            told = iter(value.tolist())
            return value.new_tensor([_line([next(told)[: len(row.ids)] for row in line], width, 0) for line in lines])

        found = {key: value for key, value in made.items() if key not in ASIDE}
        return {key: lined(value) if value.shape == shape else value for key, value in found.items()}


def with_images(batch: Sequence[Encoded], processor: Any, side: str, pad: int = 0) -> dict[str, Tensor]:
    """What the processor makes of rows, some with images, padded on `side`: all but labels.

    A row of text that was cut has no text that gives its tokens: it is laid in by hand, padded with `pad` on the right.
    DataError where it reads other tokens than the rows were encoded with.
    """
    if processor is None:
        image = next(image for row in batch for image in row.images)
        raise DataError(
            f"the image {str(image)!r} cannot be shown to a model without its processor: give it with the rows"
        )
    made = reader(processor).batch([row.text for row in batch], [row.images for row in batch], side)
    made.pop("labels", None)
    if not all(row.text for row in batch):
        _lay_in(made, batch, pad)
    for row, ids, mask in zip(batch, made["input_ids"], made["attention_mask"], strict=True):
        read = ids[mask.bool()].tolist()
        if read != row.ids:
            raise DataError(
                f"{type(processor).__name__} reads {row.text[:60]!r} as {len(read)} tokens other than the {len(row.ids)} it "
                "was encoded with: this processor writes more than what stands for its images, and cannot be trained with here"
            )
    return made


def _lay_in(made: dict[str, Tensor], batch: Sequence[Encoded], pad: int) -> None:
    shape, width = made["input_ids"].shape, max(len(row.ids) for row in batch)
    for key, value in made.items():
        if value.shape == shape:
            made[key] = F.pad(value, (0, width - shape[1]), value=pad if key == "input_ids" else 0)
    for number, row in enumerate(batch):
        if not row.text:
            made["input_ids"][number, : len(row.ids)] = torch.tensor(row.ids)
            made["attention_mask"][number, : len(row.ids)] = 1


def zeros(ids: Tensor, processor: Any) -> dict[str, Tensor]:
    """What a model with a processor takes of texts alone beside ids [B, T]: token types that are all 0."""
    return {key: torch.zeros_like(ids) for key in reader(processor).beside}


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
