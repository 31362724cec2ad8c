"""Every error a user can meet. The command line prints the sentence and exits with `code`; a traceback is for us.

DeltawError (ValueError)      one sentence: what was given, what was expected, the fix        code 1
├── UseError                  the request itself is wrong; nothing was touched                 code 2
│   ├── ConfigError           a key or value of a configuration or of a Method
│   ├── TargetError           targets that match nothing, or modules that cannot carry the method
│   ├── DataError             rows that cannot be read or have nothing to learn from
│   └── NotFoundError         a name that is not there
├── FileError                 adapter or model files that are missing, corrupt or do not fit
├── BaseMismatchError         an adapter put on a base it was not trained on
├── ConflictError             what was to be changed was changed by another in the meantime
├── MergeError                a merge that cannot be done exactly, or that would change nothing
└── TrainError                a run that cannot go on
"""

import difflib
import re
from collections.abc import Iterable, Sequence


class DeltawError(ValueError):
    code = 1
    faults: tuple[str, ...] = ()
    """The single faults, where several were collected."""


class UseError(DeltawError):
    code = 2


class ConfigError(UseError):
    pass


class TargetError(UseError):
    pass


class DataError(UseError):
    pass


class NotFoundError(UseError):
    pass


class FileError(DeltawError):
    pass


class BaseMismatchError(DeltawError):
    pass


class ConflictError(DeltawError):
    pass


class MergeError(DeltawError):
    pass


class TrainError(DeltawError):
    pass


class Interrupted(TrainError):
    """Stopped by the user, with all that is needed to go on."""


def faults(error: type[DeltawError], head: str, found: Sequence[str], limit: int = 12) -> DeltawError:
    """One error for all `found` faults: a single fault reads as one sentence, several as a list.

    The same fault in repeated layers is one line: `layers.*.q_proj (12 times): …`.
    """
    alike: dict[str, list[str]] = {}
    for fault in found:
        alike.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "*", fault), []).append(fault)
    lines = []
    for pattern, same in alike.items():
        path, colon, rest = pattern.partition(": ")
        rest = re.sub(r"('[^']*')(?: or \1)+", r"\1", rest)  # suggestions that differed in their layer only
        lines += [f"{path} ({len(same)} times){colon}{rest}"] if len(same) > 2 else same
    shown = [f"  - {line}" for line in lines[:limit]]
    if len(lines) > limit:
        shown.append(f"  - … and {len(lines) - limit} more")
    many = "\n".join([f"{head} ({len(found)} faults):", *shown])
    result = error(f"{head}: {found[0]}" if len(found) == 1 else many)
    result.faults = tuple(found)
    return result


def meant_to_be(wanted: str, given: Iterable[str]) -> str:
    """'; is 'promt' meant to be 'prompt'?' where something given is a near miss of what is wanted, else ''."""
    near = difflib.get_close_matches(wanted, list(dict.fromkeys(given)), n=1, cutoff=0.6)
    return f"; is {near[0]!r} meant to be {wanted!r}?" if near else ""


def did_you_mean(given: str, known: Iterable[str], limit: int = 3) -> str:
    """'; did you mean 'x'?' for near misses of `given` among `known`, else ''."""
    near = difflib.get_close_matches(given, list(dict.fromkeys(known)), n=limit, cutoff=0.6)
    return f"; did you mean {' or '.join(repr(name) for name in near)}?" if near else ""
