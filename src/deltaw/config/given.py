"""Another tool's configuration on its way to ours: every key of it is carried over, agrees anyway, or is left, with the reason.

given = Given(record)
given.take("lora_rank", 8)              its value, or the default where it is absent or null
given.leave("template", "why")          named among what was left; nothing where it is absent, null or switched off
given.finish(known, reasons)            all the rest: left by their reason, or as unknown
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from deltaw.core.errors import did_you_mean

OFF: tuple[Any, ...] = (None, False, "", "none", "no", [], {}, ())
SECRET = ("token", "api_key", "access_key", "secret", "password", "credentials", "webhook_url")


class Left(NamedTuple):
    key: str
    """A key of the other tool; of ours where something is missing that no key of theirs says."""
    value: Any
    """None of what is missing, and of secrets."""
    why: str


class Given:
    def __init__(self, record: Mapping[str, Any]):
        self._rest = dict(record)
        self.left: list[Left] = []

    def __contains__(self, key: str) -> bool:
        return self._rest.get(key) is not None

    def peek(self, key: str) -> Any:
        return self._rest.get(key)

    def take(self, key: str, default: Any = None) -> Any:
        value = self._rest.pop(key, None)
        return default if value is None else value

    def agrees(self, key: str, *values: Any) -> None:
        """Nothing to do where the key has one of `values`: that is how it is here."""
        if key in self._rest and any(self._rest[key] == value for value in values):
            del self._rest[key]

    def leave(self, key: str, why: str) -> None:
        value = self._rest.pop(key, None)
        if not any(value == off and type(value) is type(off) for off in OFF):
            self.left.append(Left(key, shown(key, value), why))

    def left_out(self, key: str, value: Any, why: str) -> None:
        """Of a key that was taken, and cannot be carried over with this value."""
        self.left.append(Left(key, value, why))

    def finish(self, reasons: Mapping[str, str], known: Iterable[str], tool: str) -> list[Left]:
        """reasons: key → why it cannot be carried over; known: further keys of the tool, for near misses."""
        names = [*reasons, *known]
        for key in list(self._rest):
            why = reasons.get(key)
            if why is not None:
                self.leave(key, why)
            else:
                value = self._rest.pop(key)
                near = did_you_mean(str(key), names)
                self.left.append(Left(str(key), shown(key, value), f"not known here as a key of {tool}{near}"))
        return self.left


def shown(key: Any, value: Any) -> Any:
    """`value`, or None where it is a secret or holds one."""
    if str(key).lower().endswith(SECRET):
        return None
    inside = (
        value.items() if isinstance(value, Mapping) else (("", v) for v in value) if isinstance(value, list) else ()
    )
    return None if any(one is not None and shown(name, one) is None for name, one in inside) else value


def number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def said(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Without what says nothing: null, false, and empty lists and tables. Zero says something."""
    return {k: v for k, v in fields.items() if v is not None and v is not False and v != [] and v != {}}


def words(*lines: str) -> list[str]:
    return " ".join(lines).split()


def explained(table: Mapping[str, str]) -> dict[str, str]:
    """{why: "key key …"} → {key: why}"""
    return {key: why for why, keys in table.items() for key in words(keys)}
