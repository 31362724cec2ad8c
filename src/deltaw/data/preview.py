"""A row as the model will see it, with what it learns between ⟦ and ⟧: the mask, shown before anything is paid for."""

from itertools import groupby
from typing import Any

from deltaw.data.encode import IGNORE, Encoded

OPEN, CLOSE = "⟦", "⟧"


def preview(encoded: Encoded, tokenizer: Any) -> str:
    """The text of a row, special tokens too, with every supervised span between ⟦ and ⟧."""
    parts = []
    for learnt, run in groupby(zip(encoded.ids, encoded.labels, strict=True), key=lambda pair: pair[1] != IGNORE):
        ids = [number for number, _ in run]
        text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        parts.append(f"{OPEN}{text}{CLOSE}" if learnt else text)
    return "".join(parts)
