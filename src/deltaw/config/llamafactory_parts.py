"""The parts of a model with images in a LLaMA-Factory configuration: its `freeze_*` keys → `adapter.parts`.

    freeze_language_model: false          language: the method
    freeze_vision_tower: false            vision: the method
    additional_target: merger             projector: full (it, and the head, are parts of their own here)
    freeze_multi_modal_projector: false   nothing: LoRA there never reaches the projector by this key, and it is said

Absent, tower and projector are frozen and the language model is not. A model that reads images is known by the keys that only
such models have. Facts: LLaMA-Factory 0.9.6, `model/model_utils/visual.py` and `misc.py` (the projector is none of `lora_target: all`).
"""

from collections.abc import Mapping
from typing import Any

from deltaw.config.given import Given, words
from deltaw.core.parts import PROJECTORS

FREEZE = {"freeze_vision_tower": True, "freeze_multi_modal_projector": True, "freeze_language_model": False}
"""Its keys, and what they are where they are absent."""
IMAGES = words("image_max_pixels image_min_pixels video_max_pixels video_min_pixels video_fps video_maxlen")
"""Further keys that only models with images have."""
APART = ("targets", "exclude", "layers")


def by_part(given: Given, section: Mapping[str, Any]) -> dict[str, Any]:
    """The adapter section part by part, where the model has any; takes the keys of FREEZE."""
    saved = section.get("modules_to_save")
    saved = [str(name) for name in saved] if isinstance(saved, list) else []
    owners = {name: part for name in saved if (part := _apart(name))}
    parted = any(key in given for key in (*FREEZE, *IMAGES)) or "projector" in owners.values()
    frozen = {key: _flag(given, key) for key in FREEZE}
    if "from" in section:
        for key in (key for key, value in frozen.items() if value != FREEZE[key]):
            given.left_out(key, frozen[key], "the adapter that training goes on from brings its own")
    if "from" in section or not parted:
        return dict(section)
    if not frozen["freeze_multi_modal_projector"] and "projector" not in owners.values():
        why = "LoRA there leaves the projector as it is, unless additional_target names it: adapter.parts.projector trains it"
        given.left_out("freeze_multi_modal_projector", False, why)
    where = {key: section[key] for key in APART if section.get(key, "all-linear") != "all-linear"}
    rest = [name for name in saved if name not in owners]
    language = {**where, **({"modules_to_save": rest} if rest else {})}
    parts: dict[str, Any] = {} if frozen["freeze_language_model"] else {"language": language or section["method"]}
    if rest and not parts:
        given.left_out("additional_target", rest, "it is no part of its own, and the language model is frozen")
    parts |= {} if frozen["freeze_vision_tower"] else {"vision": where or section["method"]}
    parts |= dict.fromkeys(owners.values(), "full")
    kept = {key: value for key, value in section.items() if key not in (*APART, "modules_to_save")}
    return {**kept, "parts": parts}


def _apart(name: str) -> str | None:
    """The part of its own that a module is, by its name."""
    last = name.rpartition(".")[2]
    return "projector" if last in PROJECTORS else "head" if last == "lm_head" else None


def _flag(given: Given, key: str) -> bool:
    value = given.take(key, FREEZE[key])
    if isinstance(value, bool):
        return value
    given.left_out(key, value, f"it is neither true nor false: taken as {str(FREEZE[key]).lower()}")
    return FREEZE[key]
