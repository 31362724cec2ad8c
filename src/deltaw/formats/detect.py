"""Whose file is this? Every tool has a grammar of keys; a file is a tool's where all its keys are of that grammar.

    peft        base_model.model.<path>.<end>                               an adapter_config.json with a peft_type
    kohya       lora_unet_…, lora_te…, lycoris_…  .<end>                    kohya's sd-scripts, LyCORIS
    diffusers   [part.]<path>.lora_A.weight, .lora.down.weight, …           diffusers' pipelines, transformers' own save
    loralib     <path>.lora_A, .lora_B                                      microsoft/LoRA
    mlx         <path>.lora_a, .lora_b                                      mlx-lm
    torchtune   layers.N.attn.q_proj.lora_a.weight                          torchtune

No substring decides, and no file name; a user who knows better says which (--from).
"""

import re
from collections.abc import Callable, Collection, Iterable
from typing import Any

from deltaw.core.errors import FileError
from deltaw.formats import diffusers, kohya, loralib, mlx, torchtune
from deltaw.formats.peft_write import PREFIX

GRAMMARS: dict[str, Callable[[str], Any]] = {
    "peft": re.compile(re.escape(PREFIX) + ".+").fullmatch,
    "kohya": kohya.KEY.fullmatch,
    "diffusers": diffusers.KEY.fullmatch,
    "loralib": loralib.KEY.fullmatch,
    "mlx": mlx.KEY.fullmatch,
    "torchtune": torchtune.KEY.fullmatch,
}
TOOLS = ("deltaw", *GRAMMARS)


def detect(keys: Collection[str]) -> str:
    """The tool whose keys these are. FileError says of each why not."""
    if not keys:
        raise FileError("the file holds no tensor")
    apart = {tool: [key for key in keys if not grammar(key)] for tool, grammar in GRAMMARS.items()}
    fit = [tool for tool, others in apart.items() if not others]
    if (
        fit
    ):  # peft's and kohya's prefixes stand in front of a whole key, which the others take for a path: they come first
        return fit[0]
    raise FileError("its keys are of no tool that deltaw knows: " + "; ".join(_why(apart, len(keys))))


def _why(apart: dict[str, list[str]], count: int) -> Iterable[str]:
    """The nearest tools first."""
    for tool, others in sorted(apart.items(), key=lambda item: len(item[1])):
        share = f"{len(others)} of {count} are not" if len(others) < count else "none is"
        yield f"{tool}: {share} ({others[0]!r})" if len(others) < count else f"{tool}: {share}"
