"""ADAPTION_PROMPT in PEFT's files: LLaMA-Adapter with one plain gate per layer.

    adaption_prompt [1, K, width], adaption_gate [1]     on the topmost `adapter_layers` modules whose path ends with
                                                         target_modules; PEFT has it for Llama, Mistral and GPT-2

On GPT-2 PEFT adds what the heads read behind the output projection and not before: another function, which is refused.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from deltaw.core.host import HostSpec
from deltaw.core.method import Method, Site
from deltaw.core.state import AdapterState
from deltaw.formats.layout import Layout
from deltaw.formats.peft_kind import Kind, Piece
from deltaw.formats.peft_valid import WHOLE
from deltaw.methods.llama_adapter import LlamaAdapter

MODULE = "self_attn"
BASES = ("Llama", "Mistral")


@dataclass(frozen=True, kw_only=True)
class PromptKind(Kind):
    def targets(self, config: Mapping[str, Any]) -> Any:
        given = config.get("target_modules")
        return [given] if isinstance(given, str) else given

    def method(self, config: Mapping[str, Any]) -> Method:
        return LlamaAdapter(length=config.get("adapter_len") or 10, gate="plain")

    def read(
        self, config: Mapping[str, Any], path: str, found: Mapping[str, Tensor], shared: Mapping[str, Tensor]
    ) -> Piece | str:
        prompt, gate = found["adaption_prompt"], found["adaption_gate"]
        if path.rpartition(".")[2] != MODULE:
            return f"not a {MODULE}: on GPT-2 PEFT's prompts go past the output projection, which is another function"
        if prompt.ndim != 3 or prompt.shape[0] != 1 or gate.shape != (1,):
            return f"adaption_prompt is {tuple(prompt.shape)} and adaption_gate {tuple(gate.shape)}, not [1, K, width] and [1]"
        claimed, length = config.get("adapter_len"), prompt.shape[1]
        said = (
            [] if claimed in (None, length) else [f"{path}: {length} tokens by its tensors and {claimed} by the config"]
        )
        method = LlamaAdapter(length=length, gate="plain")
        return Piece(method, {"prompt": prompt[0].float(), "gate": gate.float()}, None, said)

    def unheld(self, method: Method, spec: HostSpec | None, transposed: bool) -> str | None:
        plain = isinstance(method, LlamaAdapter) and method.gate == "plain"
        return None if plain else "PEFT has one plain gate per layer: train with gate: plain for its files"

    def unplaced(self, state: AdapterState, adapted: Collection[Site], layout: Layout | None) -> list[str]:
        base = None if state.base is None else state.base.layer
        if base is None or layout is None or not base.startswith(BASES):
            return [f"PEFT has prompts on {' and '.join(BASES)} only, this is {base or 'an unknown base'}"]
        there = [path for path in layout.entries if path.endswith(MODULE)][-len(adapted) :]
        if there != [site.path for site in sorted(adapted, key=lambda site: list(layout.entries).index(site.path))]:
            return ["PEFT has prompts on the topmost layers only"]
        lengths = {len(state.tensors[site]["prompt"]) for site in adapted}
        return [] if len(lengths) == 1 else [f"{', '.join(map(str, sorted(lengths)))} tokens: PEFT has one number"]

    def tensors(self, method: Method, group: Mapping[str, Tensor], spec: HostSpec | None) -> dict[str, Tensor]:
        return {"adaption_prompt": group["prompt"][None], "adaption_gate": group["gate"]}

    def options(self, methods: Mapping[str, Any], specs: Mapping[str, HostSpec | None]) -> dict[str, Any]:
        lengths = {method.length for method in methods.values()}
        return {"adapter_len": max(lengths), "adapter_layers": len(methods), "target_modules": MODULE}


PROMPTS = PromptKind(
    type="ADAPTION_PROMPT",
    label="LLaMA-Adapter",
    names=("llama_adapter",),
    keys={"adaption_prompt": "prompt", "adaption_gate": "gate"},
    slot="heads",
    valid={"adapter_len": WHOLE, "adapter_layers": WHOLE},
    for_training={"adapter_layers": "a number of layers from the top (adapter_layers: name them in layers)"},
    lacks=("modules_to_save",),
    same=("length", "gate"),
)
