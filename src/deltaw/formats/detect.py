"""Whose file is this? Every tool has a grammar of keys; a file is a tool's where all its keys are of that grammar.

    peft        base_model.model.<path>.<end>                               an adapter_config.json with a peft_type
    kohya       lora_unet_…, lora_te…, lycoris_…  .<end>                    kohya's sd-scripts, LyCORIS
    diffusers   [part.]<path>.lora_A.weight, .lora.down.weight, …           diffusers' pipelines, transformers' own save
    loralib     <path>.lora_A, .lora_B                                      microsoft/LoRA
    mlx         <path>.lora_a, .lora_b                                      mlx-lm
    torchtune   layers.N.attn.q_proj.lora_a.weight                          torchtune

No substring decides, and no file name. Where two tools could have written it, the user says which (--from).
"""

import re
from collections.abc import Callable, Collection, Iterable
from typing import Any

from deltaw.core.errors import FileError, UseError
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
    """The tool whose keys these are. FileError says of each why not, UseError where several could have written them."""
    if not keys:
        raise FileError("the file holds no tensor")
    apart = {tool: [key for key in keys if not grammar(key)] for tool, grammar in GRAMMARS.items()}
    fit = [tool for tool, others in apart.items() if not others]
    if "peft" in fit:  # its prefix stands in front of a whole key, which other grammars then take for a path
        return "peft"
    if len(fit) == 1:
        return fit[0]
    if fit:
        raise UseError(f"its keys are as {' and as '.join(fit)} write them: say which, with --from {fit[0]}")
    raise FileError("its keys are of no tool that deltaw knows: " + "; ".join(_why(apart, len(keys))))


def _why(apart: dict[str, list[str]], count: int) -> Iterable[str]:
    """The nearest tools first."""
    for tool, others in sorted(apart.items(), key=lambda item: len(item[1])):
        share = f"{len(others)} of {count} are not" if len(others) < count else "none is"
        yield f"{tool}: {share} ({others[0]!r})" if len(others) < count else f"{tool}: {share}"
