"""What an image-text model of ours is: LLaVA's configuration, with one layer more or less and a second tower.

    projector_layers 1, no detail       linear
    projector_layers 2, detail_config   mining (`deltaw.models.image_text.mining`)

One of two layers without detail is transformers' own LlavaForConditionalGeneration.
"""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, LlavaConfig
from transformers.configuration_utils import SubConfigSpec

MODEL_TYPE = "deltaw_image_text"


@strict
class ImageTextConfig(LlavaConfig):
    model_type = MODEL_TYPE
    sub_configs_defaults = {  # noqa: RUF012  transformers' own way of saying what a configuration holds
        **LlavaConfig.sub_configs_defaults,
        "detail_config": SubConfigSpec(config_class=AutoConfig, model_type="convnext", optional=True),
    }
    detail_config: Any = None
    projector_layers: int = 2


AutoConfig.register(MODEL_TYPE, ImageTextConfig, exist_ok=True)
