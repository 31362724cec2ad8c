"""What an adapter's files say of how it came to be, for people: (name, text) pairs of `AdapterState.meta`.

Known facts are put into words; others are shown as section.key, so that nothing that is kept stays unseen.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

TASK = {"CAUSAL_LM": "language model", "SEQ_CLS": "classification", "FEATURE_EXTRACTION": "embedding"}
MAIN = (
    "data.train", "adapter.method", "adapter.rank", "adapter.alpha", "adapter.targets", "train.objective", "train.epochs",
    "train.max_steps", "train.learning_rate", "train.batch_size", "train.gradient_accumulation", "train.seed",
)  # fmt: skip
"""Of a recipe, what tells runs apart."""


def history(meta: Mapping[str, Any], whole: bool = False) -> list[tuple[str, str]]:
    """What it was trained for and how, what was measured, what it was made of, and whatever else is kept.

    whole: every setting of the recipe, not the main ones alone.
    """
    left, found = dict(meta), list[tuple[str, str]]()
    if task := left.pop("task_type", None):
        found.append(("task", TASK.get(task, str(task))))
    if mask := left.pop("mask", None):
        found.append(("learnt", str(mask)))
    if template := left.pop("chat_template", None):
        found.append(("chat template", f"sha256 {str(template)[:12]}…"))
    if recipe := left.pop("recipe", None):
        known = {name: value for name, value in _flat(recipe) if _said(value)}
        shown = {name: value for name, value in known.items() if whole or name in MAIN} or known
        more = f", and {len(known) - len(shown)} more" if len(shown) < len(known) else ""
        found.append(("recipe", ", ".join(f"{name} {_short(value)}" for name, value in shown.items()) + more))
    if metrics := left.pop("metrics", None):
        found += [("measured", ", ".join(f"{name} {_short(value)}" for name, value in _flat(metrics)))]
    parents, weights = left.pop("parents", None) or [], left.pop("weights", None)
    if parents and weights and len(parents) == len(weights):
        found.append(
            ("mixed from", " + ".join(f"{_short(w)} × {_digest(p)}" for w, p in zip(weights, parents, strict=True)))
        )
    elif parents:
        how = "made from" if "converted" in left else "continues"
        found.append((how, ", ".join(map(_digest, parents))))
    if isinstance(cut := left.pop("cut", None), Mapping) and {"rank", "relative_error"} <= cut.keys():
        found.append(
            ("cut", f"to rank {cut['rank']}, at most {cut['relative_error']:.2%} of a module's change was lost")
        )
    elif cut is not None:
        left["cut"] = cut
    return found + [(name, _short(value)) for name, value in _flat(left) if _said(value)]


def _flat(record: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(record, Mapping):
        for key, value in record.items():
            yield from _flat(value, f"{name}.{key}" if name else str(key))
    else:
        yield name, record


def _said(value: Any) -> bool:
    return value is not None and value != [] and value != ()


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(_short, value))
    return str(value)


def _digest(value: Any) -> str:
    """sha256:0123456789ab…"""
    text = str(value)
    return f"{text[:19]}…" if len(text) > 32 else text
