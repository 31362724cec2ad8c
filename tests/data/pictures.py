"""Tiny processors made by hand, as the real ones are, without a download: a byte-level tokenizer, 16 × 16 pixels, a template."""

from pathlib import Path
from typing import Any

from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    GotOcr2ImageProcessorPil,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    InternVLProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessorPil,
    Qwen2VLProcessor,
)

PARTS = (
    "{% for m in messages %}<|{{ m.role }}|>{% for c in m.content %}{% if c.type == 'image' %}IMAGE"
    "{% else %}{{ c.text }}{% endif %}{% endfor %}</s>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""Takes typed parts only. IMAGE is what it writes for an image."""
TEXT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""Takes text only."""
ROLES = ["<|user|>", "<|assistant|>", "<|system|>"]


def tokenizer(**own: str) -> PreTrainedTokenizerFast:
    """One token a byte. own: special tokens under the names that a processor looks for."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bare = Tokenizer(models.BPE(vocab={letter: n for n, letter in enumerate(letters)}, merges=[]))
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bare.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=bare, eos_token="</s>", pad_token="<pad>", bos_token="<s>", extra_special_tokens=own,
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip
    made.add_special_tokens({"additional_special_tokens": ROLES}, replace_extra_special_tokens=False)
    return made


SIZE = {"height": 16, "width": 16}


def llava(template: str = PARTS) -> Any:
    words = tokenizer(image_token="<image>")
    pictures = CLIPImageProcessorPil(size=SIZE, do_center_crop=False, do_convert_rgb=True)
    return LlavaProcessor(
        pictures, words, patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=template.replace("IMAGE", "<image>"),
    )  # fmt: skip


def gemma3() -> Any:
    words = tokenizer(image_token="<soft>", boi_token="<boi>", eoi_token="<eoi>")
    return Gemma3Processor(
        Gemma3ImageProcessorPil(size=SIZE), words, image_seq_length=4, chat_template=PARTS.replace("IMAGE", "<boi>")
    )


def idefics3(pieces: bool = False) -> Any:
    words = tokenizer(image_token="<image>")
    marks = ["<fake_token_around_image>", "<global-img>", *(f"<row_{r}_col_{c}>" for r in (1, 2) for c in (1, 2))]
    words.add_special_tokens({"additional_special_tokens": marks}, replace_extra_special_tokens=False)
    pictures = Idefics3ImageProcessorPil(
        size={"longest_edge": 32}, max_image_size={"longest_edge": 16}, do_image_splitting=pieces
    )
    return Idefics3Processor(pictures, words, image_seq_len=4, chat_template=PARTS.replace("IMAGE", "<image>"))


def internvl() -> Any:
    words = tokenizer(
        start_image_token="<img>", end_image_token="</img>", context_image_token="<ctx>", video_token="<v>"
    )
    pictures = GotOcr2ImageProcessorPil(size=SIZE, crop_to_patches=False)
    return _InternVL(pictures, words, image_seq_length=4, chat_template=PARTS.replace("IMAGE", "<ctx>"))


def qwen2() -> Any:
    marks = {"vision_start": "<|vision_start|>", "vision_end": "<|vision_end|>"}
    words = tokenizer(image_token="<|image_pad|>", video_token="<|video_pad|>", **marks)
    pictures = Qwen2VLImageProcessorPil(
        size={"shortest_edge": 64, "longest_edge": 1024}, patch_size=4, merge_size=2, temporal_patch_size=2
    )
    return _Qwen2VL(
        pictures, words, chat_template=PARTS.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    )


class _NoVideo:
    """Without torchvision, which reads videos, transformers cannot check that there is no processor of them."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        return (
            None
            if argument_name == "video_processor"
            else super().check_argument_for_proper_class(argument_name, argument)
        )  # type: ignore[misc]


class _InternVL(_NoVideo, InternVLProcessor):
    pass


class _Qwen2VL(_NoVideo, Qwen2VLProcessor):
    pass


MADE = {"llava": llava, "gemma3": gemma3, "idefics3": idefics3, "idefics3-pieces": lambda: idefics3(True),
        "internvl": internvl, "qwen2-vl": qwen2}  # fmt: skip


def draw(folder: Path, *names: str, size: tuple[int, int] = (20, 12)) -> list[Path]:
    """Image files, each of its own colour."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        Image.new("RGB", size, ((37 * number + 40) % 256, 90, 160)).save(folder / name)
    return [folder / name for name in names]
