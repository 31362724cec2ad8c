"""What one pass over the rows sees of them, for the checks before a run: 8 bytes a row, a number an image, no text, no tokens."""

from array import array
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from deltaw.data.characters import Characters
from deltaw.data.conversation import IMAGE, Example, Message
from deltaw.data.encode import Encoded, Policy
from deltaw.data.images import look


class Observed:
    """What `Encoder` shows it: every row that is kept, with its tokens."""

    def __init__(self, tokenizer: Any, policy: Policy):
        self.policy, self.characters = policy, Characters(tokenizer)
        special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._stops = special | ({tokenizer.eos_token_id} - {None})
        self._last: Example | None = None
        self._digests = array("q")
        self._images: set[int] = set()
        self.stops: Counter[int] = Counter()
        """The special token that is learnt last in a row → rows."""
        self.endless = 0
        """Rows that learn no such token."""

    def add(self, row: Example, pieces: Sequence[Encoded]) -> None:
        """One row that is kept; of a text, all its pieces."""
        if row is self._last:  # a source's `weight` repeats rows on purpose
            return
        self._last = row
        for piece in pieces:
            images = [look(image).digest for image in piece.images]
            self._digests.append(hash((*piece.ids, *images)))
            self._images.update(map(hash, images))
        stop = next((label for label in reversed(pieces[-1].labels) if label in self._stops), None)
        if stop is None:
            self.endless += 1
        else:
            self.stops[stop] += 1
        self.characters.add(*_texts(row, self.policy))

    @property
    def pieces(self) -> int:
        """Rows and pieces of texts, each once however often a source's weight takes it."""
        return len(self._digests)

    def repeated(self) -> int:
        """Rows whose tokens are those of an earlier one."""
        return len(self._digests) - len(np.unique(np.array(self._digests)))

    def shared(self, other: "Observed") -> int:
        """Rows whose tokens are those of a row that `other` saw."""
        return int(np.isin(np.array(self._digests), np.array(other._digests)).sum())

    def shared_images(self, other: "Observed") -> tuple[int, int]:
        """(those that `other` saw too, all): images of these rows, each once."""
        return len(self._images & other._images), len(self._images)


def _texts(row: Example, policy: Policy) -> tuple[str, str]:
    """(what is learnt, the rest) of what a row says."""
    if row.text is not None:
        return row.text, ""
    answers = [m for m in row.messages if m.role == "assistant" and m.learn]
    learnt = answers if policy.turns == "all" else answers[-1:]
    if policy.train_on_prompt:
        learnt = list(row.messages)
    rest = [m for m in row.messages if not any(m is one for one in learnt)]
    return " ".join(map(_text, learnt)), " ".join([*map(_text, rest), *row.tools])


def _text(message: Message) -> str:
    content = message.content.replace(IMAGE, "") if message.images else message.content
    said = (message.reasoning, content, *(text for call in message.calls for text in call))
    return " ".join(text for text in said if text)
