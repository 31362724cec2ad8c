"""What a name pointed to, in order: one generation a change, numbered from 1 and never used again.

    add, alias     a new generation that points to a digest
    rollback       a new generation too, a copy of an earlier one, with what came before that: twice back is two steps
                   back, never to and fro
    remove         takes generations away; their numbers stay used

All functions are pure; `deltaw.library.store` keeps a history as a small JSON file. As numbers only grow, "change it if it
is still at generation 3" (`expected`) cannot be fooled by a name that went away and came back.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deltaw.core.errors import ConflictError, FileError, NotFoundError, UseError
from deltaw.library.names import DIGEST


@dataclass(frozen=True)
class Generation:
    number: int
    digest: str
    time: str
    """When, UTC, ISO 8601."""
    how: str
    """What made it, for people."""
    of: int
    """Of a rollback the generation that it repeats, else itself."""
    before: int | None
    """The generation that a rollback from here goes to."""


@dataclass(frozen=True)
class History:
    name: str
    generations: tuple[Generation, ...] = ()
    last: int = 0
    """The highest number that was ever used."""

    @property
    def current(self) -> Generation | None:
        """What the name points to; None where there is no such name."""
        return self.generations[-1] if self.generations else None

    @property
    def digests(self) -> set[str]:
        return {one.digest for one in self.generations}

    def at(self, number: int | None = None) -> Generation:
        """Generation `number`, or the current one; NotFoundError."""
        found = self.current if number is None else next((g for g in self.generations if g.number == number), None)
        if found is None:
            there = ", ".join(str(one.number) for one in self.generations[-12:])
            raise NotFoundError(
                f"{self.name} has no generation {'at all' if number is None else number}; it has {there or 'none'}"
            )
        return found

    def expect(self, number: int | None) -> None:
        """ConflictError where the name is not at generation `number`; 0: it must be a new name; None: anything goes."""
        now = self.current.number if self.current else 0
        if number is not None and number != now:
            is_at = f"is at generation {now}" if now else "does not exist"
            wanted = f"at generation {number}" if number else "new"
            raise ConflictError(
                f"{self.name} {is_at}, expected it {wanted}: it was changed in the meantime; look at it and try again"
            )

    def moved(self, digest: str, time: str, how: str) -> "History":
        """Pointing to `digest`; itself where it does so already."""
        if self.current is not None and self.current.digest == digest:
            return self
        number, now = self.last + 1, self.current
        return self._with(Generation(number, digest, time, how, of=number, before=now.of if now else None))

    def rolled_back(self, number: int | None, time: str) -> "History":
        """Pointing to what generation `number` did, or to what came before the current content."""
        now = self.at()
        then = self._before(now) if number is None else self.at(number)
        while number is None and then is not None and then.digest == now.digest:  # what lay between them was removed
            then = self._before(then)
        if then is None:
            raise UseError(f"{self.name} has nothing before generation {now.of} to go back to")
        if then.digest == now.digest:
            raise UseError(f"{self.name} points to what generation {number} holds already: nothing to go back to")
        return self._with(dataclasses.replace(then, number=self.last + 1, time=time, how=f"rollback to {then.of}"))

    def without(self, number: int | None) -> "History":
        """Without generation `number`, which must not be the current one; or without any."""
        if number is None:
            self.at()
            return dataclasses.replace(self, generations=())
        gone = self.at(number)
        if gone == self.current:
            raise UseError(
                f"{self.name} points to generation {number} now: roll it back first, or remove the name as a whole"
            )
        kept = [one for one in self.generations if one != gone]
        if all(one.of != gone.of for one in kept):  # nothing of that content is left: a rollback goes one further
            kept = [dataclasses.replace(g, before=gone.before) if g.before == gone.of else g for g in kept]
        return dataclasses.replace(self, generations=tuple(kept))

    def _before(self, one: Generation) -> Generation | None:
        return next((other for other in self.generations if other.of == one.before), None)

    def _with(self, new: Generation) -> "History":
        return dataclasses.replace(self, generations=(*self.generations, new), last=new.number)

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "last": self.last, "generations": [dataclasses.asdict(g) for g in self.generations]}


def from_dict(record: Mapping[str, Any], name: str, source: str) -> History:
    """What `to_dict` wrote, for the name of its file; FileError where it is something else."""
    try:
        found = tuple(Generation(**one) for one in record["generations"])
        numbers = [one.number for one in found]
        whole = all(type(n) is int for n in (record["last"], *numbers))
        right = whole and record["name"] == name and all(DIGEST.fullmatch(one.digest) for one in found)
        right = right and numbers == sorted(set(numbers)) and max(numbers, default=0) <= record["last"]
        right = right and {one.before for one in found} <= {None, *(one.of for one in found)}
    except (KeyError, TypeError) as error:
        raise FileError(f"{source} is not the history of a name: {type(error).__name__} {error}") from None
    if not right:
        raise FileError(f"{source} is not the history of the name {name!r}, or was edited: restore it")
    return History(name, found, record["last"])
