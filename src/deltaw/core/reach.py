"""Modules that never get a gradient: the layers of a tower after the one whose output the model reads.

    config.vision_feature_layer -2, a tower of 24 layers  →  hidden_states[23], the output of layer 22: layer 23 and what
                                                             the tower does after its layers change nothing

hidden_states[0] is what enters the first layer, so that a tower of n layers has n + 1 of them. Where several are read, the
last counts.
"""

import dataclasses
from collections.abc import Mapping, Sequence

from torch import nn

from deltaw.core.base import base_modules
from deltaw.core.facts import ModuleFact
from deltaw.core.parts import Parts

SAID = ("vision_feature_layer", "vision_feature_layers")
"""Where a configuration has it, as one number or several."""


def unreached(model: nn.Module, parts: Parts | None) -> dict[str, str]:
    """Path → why no gradient ever arrives there; empty where the model does not say what it reads."""
    config = getattr(model, "config", None)
    said = next((value for name in SAID if (value := getattr(config, name, None)) is not None), None)
    found: dict[str, str] = {}
    if parts is None or said is None:
        return found
    for root in parts.roots.get("vision", ()):
        inside = {p: m for p, m in base_modules(model) if parts.of(p) == "vision" and p.startswith(f"{root}.")}
        stacks = {path: len(module) for path, module in inside.items() if isinstance(module, nn.ModuleList)}
        stack, depth = max(stacks.items(), key=lambda each: each[1], default=("", 0))
        used = max((depth + 1 + n if n < 0 else n for n in _numbers(said)), default=depth)
        if not 0 <= used < depth:
            continue
        late = [f"{stack}.{index}" for index in range(used, depth)]
        last = max(place for place, path in enumerate(inside) if path.startswith(f"{stack}."))
        late += list(inside)[last + 1 :]  # what is registered after the layers runs after them
        why = f"the model reads its vision tower after {used} of {depth} layers (vision_feature_layer {said}), no gradient "
        why += f"ever comes here: give layers 0-{used - 1}, or a preset" if used else "ever comes here"
        found |= {path: why for path in inside if any(path == each or path.startswith(f"{each}.") for each in late)}
    return found


def refused(known: Sequence[ModuleFact], reasons: Mapping[str, str]) -> list[ModuleFact]:
    """The facts, with these reasons why adapters are refused."""
    return [dataclasses.replace(f, refusal=f.refusal or reasons[f.path]) if f.path in reasons else f for f in known]


def _numbers(said: object) -> list[int]:
    return [n for n in (said if isinstance(said, Sequence) else [said]) if isinstance(n, int)]
