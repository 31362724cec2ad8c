"""The processor of a model with detail: LLaVA's, and every image once more, larger, for the second tower.

Both are cut from the image in the same way, or the windows of the finer map would not lie over the patches: the second is
made by the same image processor at another size, with the colours' mean and spread that the second tower was trained on.
"""

from typing import Any

from transformers import AutoProcessor
from transformers.models.llava.processing_llava import LlavaProcessor

from deltaw.models.image_text.config import ImageTextConfig


class DetailProcessor(LlavaProcessor):
    """detail: what the image processor is told for the second picture: size, crop_size, image_mean, image_std."""

    def __init__(
        self, image_processor: Any = None, tokenizer: Any = None, patch_size: int | None = None,
        vision_feature_select_strategy: str | None = None, chat_template: str | None = None, image_token: str = "<image>",
        num_additional_image_tokens: int = 0, detail: dict[str, Any] | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(
            image_processor, tokenizer, patch_size, vision_feature_select_strategy, chat_template, image_token,
            num_additional_image_tokens, **kwargs,
        )  # fmt: skip
        self.detail = detail

    def _process_images(self, images: Any, **kwargs: Any) -> tuple[Any, list[str]]:
        found, replacements = super()._process_images(images, **kwargs)
        found["pixel_values_detail"] = self.image_processor(images, **{**kwargs, **(self.detail or {})})["pixel_values"]
        return found, replacements

    @property
    def model_input_names(self) -> list[str]:
        return [*super().model_input_names, "pixel_values_detail"]


AutoProcessor.register(ImageTextConfig, DetailProcessor, exist_ok=True)
