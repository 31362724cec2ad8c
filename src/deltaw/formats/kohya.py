"""kohya's and LyCORIS' single file ↔ states by part.   <name>.<end>: `kohya_names` says which module, `lycoris` what it holds.

    lora_unet_mid_block_attentions_0_proj_in.lora_down.weight   [r, in, 1, 1]
    lora_unet_mid_block_attentions_0_proj_in.lora_up.weight     [out, r, 1, 1]
    lora_unet_mid_block_attentions_0_proj_in.alpha              []

Reading needs the base: its modules are the only key to the underscores. Each module has its own rank and its own α.
"""

import re
from collections import Counter
from collections.abc import Mapping

from torch import Tensor

from deltaw.core.errors import UseError, faults
from deltaw.core.state import AdapterState
from deltaw.formats import lycoris
from deltaw.formats.foreign import Parts, Reading, States, number
from deltaw.formats.kohya_names import PREFIXES, names, table
from deltaw.methods.dora import DoRA
from deltaw.methods.loha import LoHa
from deltaw.methods.lokr import LoKr

_STARTS = "|".join(sorted({prefix for some in PREFIXES.values() for prefix in some}, key=len, reverse=True))
_ENDS = "|".join(map(re.escape, sorted([*lycoris.ENDS, *lycoris.UNREAD], key=len, reverse=True)))
KEY = re.compile(rf"(?P<name>(?:{_STARTS})_[^.]+)\.(?P<end>{_ENDS})")
"""Every key of such a file."""


def from_kohya(tensors: Mapping[str, Tensor], parts: Parts) -> tuple[States, list[str]]:
    """(states by part, notes). FileError names every key that is unknown, ambiguous, incomplete or does not fit."""
    reading, known = Reading(parts), table(parts)
    groups: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        hit = KEY.fullmatch(key)
        if hit is None:
            reading.found.append(f"key {key!r} is not one of kohya's or LyCORIS' files")
        elif hit["end"] in lycoris.UNREAD:
            reading.found.append(f"key {key!r}: {lycoris.UNREAD[hit['end']]} is not supported")
        else:
            groups.setdefault(hit["name"], {})[hit["end"]] = tensor
    without: list[str] = []
    for name, group in groups.items():
        places = known.get(name, [])
        if len(places) != 1:
            several = f"may mean {' or '.join(path for _, path in places)}" if places else "is no module"
            reading.found.append(f"{name!r} {several} of the base{'' if places else reading.near(name, known)}")
            continue
        ((role, path),) = places
        spec = reading.spec(role, path, name)
        piece = None if spec is None else lycoris.read(group, spec)
        if isinstance(piece, str):
            reading.found.append(f"{path}: {piece}")
        elif piece is not None:
            reading.put(role, path, *piece)
            full = isinstance(piece[0], LoKr) and {"lokr_w1", "lokr_w2"} <= group.keys()
            without += [path] if lycoris.ALPHA not in group and not full else []
    if without:
        more = f" and {len(without) - 1} more" if len(without) > 1 else ""
        reading.notes.append(
            f"no alpha for {without[0]}{more}: read as alpha = rank, a scale of 1, as kohya's tools do"
        )
    return reading.done("kohya's or LyCORIS' layout")


def to_kohya(states: Mapping[str, AdapterState], parts: Parts) -> tuple[dict[str, Tensor], dict[str, str], list[str]]:
    """(tensors, header, notes) of one file. UseError names every site that the format has no form for.

    α is scale · rank, so that rsLoRA keeps its scale. Where the modules of a part differ in it, all get the usual one and
    the rest of the scale goes into lora_up: diffusers 0.42 reads a module's own α and then loses it. notes: such things.
    """
    written, tensors, found, kinds = names(parts), dict[str, Tensor](), list[str](), set[type]()
    notes, known = list[str](), table(parts)
    for role, state in states.items():
        groups: dict[str, dict[str, Tensor]] = {}
        for site, method in state.methods.items():
            name = written.get((role, site.path)) if site.slot == "weight" else None
            if name is None:
                found.append(f"{role} {site}: only changes of weights that the base has go into kohya's files")
            elif len(known[name]) > 1:
                found.append(f"{role} {site}: two modules of the base have the name {name!r} in kohya's files")
            else:
                try:
                    groups[name] = lycoris.write(method, state.tensors[site], parts[role].specs[site])
                    kinds.add(type(method))
                except UseError as error:
                    found.append(f"{role} {site}: {error}")
        notes += _one_alpha(role, groups)
        if role.startswith("text_encoder") and not any(name.endswith("_out_proj") for name in groups):
            notes.append(
                f"diffusers 0.42 knows the layers of a {role} in this layout by out_proj, and refuses this file"
            )
        tensors |= {f"{name}.{end}": tensor for name, ends in groups.items() for end, tensor in ends.items()}
    if found:
        raise faults(UseError, "this adapter has no form in kohya's files", found)
    if DoRA in kinds:
        notes.append("diffusers 0.42 leaves dora_scale out and applies the rest: use diffusers' layout there")
    if kinds & {LoHa, LoKr}:
        notes.append("diffusers 0.42 reads no LoHa or LoKr in this layout")
    module = "lycoris.kohya" if kinds & {LoHa, LoKr} else "networks.lora"
    return tensors, {"format": "pt", "ss_network_module": module}, notes


def _one_alpha(role: str, groups: Mapping[str, dict[str, Tensor]]) -> list[str]:
    """Give all LoRAs of a part its usual α, in place, without changing what they compute; a note where that did anything."""
    alphas = {name: number(ends[lycoris.ALPHA]) for name, ends in groups.items() if lycoris.UP in ends}
    if len(set(alphas.values())) < 2:
        return []
    usual = Counter(alphas.values()).most_common(1)[0][0]
    others = {name: alpha for name, alpha in alphas.items() if alpha != usual}
    for name, alpha in others.items():
        groups[name][lycoris.UP] = groups[name][lycoris.UP].float() * (alpha / usual)
        groups[name][lycoris.ALPHA] = groups[next(n for n in alphas if n not in others)][lycoris.ALPHA]
    more = (
        f"{len(others)} of {len(alphas)} layers had another (from {min(alphas.values()):g} to {max(alphas.values()):g})"
    )
    return [f"{role}: written with alpha {usual:g} everywhere; {more}, whose part is in lora_up now: the same change"]
