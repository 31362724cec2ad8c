"""One Kind per peft_type that we read and write. Facts: PEFT 0.21, `peft/tuners/*/{config,layer,model}.py`.

    peft_type        ours           keys after the module's path                                               in
    LORA             lora, dora     lora_A.weight, lora_B.weight | lora_embedding_A, _B; lora_magnitude_vector  peft_lora
    ADALORA          adalora        lora_A, lora_E, lora_B                                                     peft_adalora
    LOHA             loha           hada_w1_a, hada_w1_b, hada_w2_a, hada_w2_b                                 peft_lycoris
    LOKR             lokr           lokr_w1 | lokr_w1_a, _b; lokr_w2 | lokr_w2_a, _b                           peft_lycoris
    OFT              oft            oft_R.weight                                                               peft_rotations
    BOFT             boft           boft_R, boft_s                                                             peft_rotations
    IA3              ia3            ia3_l                                                                      peft_scales
    VERA             vera           vera_lambda_b, vera_lambda_d; base_model.vera_A, base_model.vera_B         peft_scales
    ADAPTION_PROMPT  llama_adapter  adaption_prompt, adaption_gate                                             peft_prompts

What is converted and what is refused is said there.
"""

from collections.abc import Mapping
from typing import Any

from deltaw.core.errors import ConfigError, did_you_mean
from deltaw.core.method import Method
from deltaw.formats.peft_adalora import ADALORA
from deltaw.formats.peft_kind import Kind
from deltaw.formats.peft_lora import LORA
from deltaw.formats.peft_lycoris import LOHA, LOKR
from deltaw.formats.peft_prompts import PROMPTS
from deltaw.formats.peft_rotations import BOFT, OFT
from deltaw.formats.peft_scales import IA3, VERA

OURS = "DELTAW_"
"""A peft_type that begins with this is unknown to PEFT: the folder is in our own layout."""
KINDS: Mapping[str, Kind] = {kind.type: kind for kind in (LORA, ADALORA, LOHA, LOKR, OFT, BOFT, IA3, VERA, PROMPTS)}


def kind_of(config: Mapping[str, Any]) -> Kind:
    """The Kind of a config. ConfigError where there is none."""
    word = str(config.get("peft_type") or "").upper().removeprefix("PEFTTYPE.")
    if not word:
        raise ConfigError("adapter_config.json has no peft_type: is it PEFT's?")
    if word.startswith(OURS):
        raise ConfigError(
            f"peft_type {word} is deltaw's own layout, which deltaw.json describes, and that is missing: "
            "fetch the folder again, whole"
        )
    if word not in KINDS:
        raise ConfigError(
            f"peft_type {word} is not supported yet{did_you_mean(word, KINDS)}; supported are {', '.join(KINDS)}"
        )
    return KINDS[word]


def kind_for(method: Method) -> Kind | None:
    """The Kind that holds a method, or None where PEFT has no format for it."""
    return next((kind for kind in KINDS.values() if kind.holds(method)), None)
