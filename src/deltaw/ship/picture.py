"""A row with a picture, for merges of a base that reads images: on text alone its tower and projector compute nothing.

a pseudo-random picture, the base's own template or its placeholder → the processor → ids, pixels and what goes with them
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deltaw.core.errors import DeltawError
from deltaw.models.base import load_processor

SIDE = 64
WORDS = "a picture"


@dataclass(frozen=True)
class Picture:
    row: Mapping[str, Tensor] | None = None
    """What the model's forward takes; None for a base that reads text only, and where it could not be made."""
    lacking: str | None = None
    """Why it could not be made."""


def picture(name: str) -> Picture:
    """The row for a base; the same every time."""
    try:
        processor = load_processor(name)
    except DeltawError as error:
        return Picture(lacking=str(error))
    if processor is None:
        return Picture()
    try:
        made = processor(text=[_text(processor)], images=[[_image()]], return_tensors="pt")
    except Exception as error:  # whatever a foreign processor raises, it is one thing: no picture to compare on
        return Picture(lacking=" ".join(f"{type(error).__name__}: {error}".split())[:200])
    return Picture({key: value for key, value in made.items() if isinstance(value, Tensor)})


def _text(processor: Any) -> str:
    if getattr(processor, "chat_template", None):
        said = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": WORDS}]}]
        return str(processor.apply_chat_template(said, add_generation_prompt=True))
    return f"{getattr(processor, 'boi_token', None) or processor.image_token}{WORDS}"


def _image() -> Any:
    from PIL import Image

    values = torch.randint(0, 256, (SIDE, SIDE, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return Image.fromarray(values.numpy())
