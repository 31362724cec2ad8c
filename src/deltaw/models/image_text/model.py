"""The model: LLaVA's, with a projector of one layer, or with a second tower whose map is mined.

    model.vision_tower            the tower; with detail: .tower, .detail
    model.multi_modal_projector   with detail: .mining; linear_1, linear_2
    model.language_model
    lm_head

Everything but what makes image features is transformers' LLaVA: where they are put, the loss, the cache, generation.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForImageTextToText
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import LlavaForConditionalGeneration, LlavaModel

from deltaw.models.image_text.config import ImageTextConfig
from deltaw.models.image_text.mining import Mining, joined


class Towers(nn.Module):
    """The tower that gives tokens and the one that gives the finer map: one encoder, for what asks for that of images."""

    def __init__(self, tower: nn.Module, detail: nn.Module):
        super().__init__()
        self.tower, self.detail = tower, detail


class Projector(nn.Module):
    """Features of the tower (b, n, width) → embeddings of the language model (b, n, hidden)."""

    def __init__(self, config: ImageTextConfig):
        super().__init__()
        vision: Any = config.vision_config
        text: Any = config.text_config
        bias, width, hidden = config.multimodal_projector_bias, vision.hidden_size, text.hidden_size
        if config.detail_config is not None:
            self.mining = Mining(width, sum(config.detail_config.hidden_sizes))
        self.linear_1 = nn.Linear(width, hidden, bias=bias)
        if config.projector_layers == 2:
            self.act, self.linear_2 = ACT2FN[config.projector_hidden_act], nn.Linear(hidden, hidden, bias=bias)

    def forward(self, features: Tensor, fine: Tensor | None = None) -> Tensor:
        if fine is not None:
            features = self.mining(features, fine)
        projected = self.linear_1(features)
        return self.linear_2(self.act(projected)) if hasattr(self, "linear_2") else projected


class ImageTextModel(LlavaModel):
    config_class = ImageTextConfig

    def __init__(self, config: ImageTextConfig):
        super(LlavaModel, self).__init__(config)  # which would build its own projector
        tower = AutoModel.from_config(config.vision_config)
        detail = config.detail_config
        self.vision_tower = tower if detail is None else Towers(tower, AutoModel.from_config(detail))
        self.multi_modal_projector: nn.Module = Projector(config)  # type: ignore[assignment]  # another class than LLaVA's
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def get_image_features(
        self, pixel_values: Tensor, pixel_values_detail: Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """pixel_values (b, 3, s, s), pixel_values_detail (b, 3, t, t) → pooler_output: for each image (n, hidden)."""
        config, towers = self.config, self.vision_tower
        tower = towers.tower if config.detail_config is not None else towers
        layer = config.vision_feature_layer
        found = tower(pixel_values.to(tower.dtype), output_hidden_states=[layer], return_dict=True)
        features = found.hidden_states[layer]
        if config.vision_feature_select_strategy == "default":
            features = features[:, 1:]  # the first stands for the whole image, not for a patch
        fine = None
        if config.detail_config is not None:
            if pixel_values_detail is None:
                raise ValueError("this model reads every image twice: pixel_values_detail is missing")
            seen = towers.detail(pixel_values_detail.to(towers.detail.dtype), output_hidden_states=True)
            fine = joined(seen.hidden_states[-len(config.detail_config.hidden_sizes) :])
        return BaseModelOutputWithPooling(
            last_hidden_state=found.last_hidden_state,
            pooler_output=list(self.multi_modal_projector(features, fine)),  # type: ignore[arg-type]  # a list, as LLaVA's
        )

    def get_placeholder_mask(
        self, input_ids: torch.LongTensor | None, inputs_embeds: Tensor, image_features: Tensor
    ) -> Tensor:
        """Where features go, (rows, length, 1); on the meta device, where a step is only planned, they cannot be counted."""
        if input_ids is not None and input_ids.is_meta:
            return (input_ids == self.config.image_token_id).unsqueeze(-1)
        ids: Any = input_ids
        return super().get_placeholder_mask(ids, inputs_embeds, image_features)  # type: ignore[no-any-return]

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: Tensor | None = None,
        pixel_values_detail: Tensor | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        if pixel_values is not None:
            features = self.get_image_features(pixel_values, pixel_values_detail)
            mm_encoder_outputs = {**(mm_encoder_outputs or {}), "image": features}
        return super().forward(input_ids=input_ids, mm_encoder_outputs=mm_encoder_outputs, **kwargs)


class ImageTextForConditionalGeneration(LlavaForConditionalGeneration):
    config_class = ImageTextConfig

    def __init__(self, config: ImageTextConfig):
        super(LlavaForConditionalGeneration, self).__init__(config)  # which would build its own body
        self.model = ImageTextModel(config)
        text: Any = config.text_config
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: Tensor | None = None,
        pixel_values_detail: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | Tensor = 0,
        mm_encoder_outputs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """As LLaVA's; generation reads from the names above what the model takes, so that they are written out."""
        return super().forward(
            input_ids=input_ids, pixel_values=pixel_values, pixel_values_detail=pixel_values_detail,
            attention_mask=attention_mask, position_ids=position_ids, past_key_values=past_key_values,
            inputs_embeds=inputs_embeds, labels=labels, logits_to_keep=logits_to_keep,
            mm_encoder_outputs=mm_encoder_outputs, **kwargs,
        )  # fmt: skip


AutoModel.register(ImageTextConfig, ImageTextModel, exist_ok=True)
AutoModelForImageTextToText.register(ImageTextConfig, ImageTextForConditionalGeneration, exist_ok=True)
