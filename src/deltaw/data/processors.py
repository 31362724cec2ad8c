"""What a base's processor makes of images: the text with a token for every part of an image, and the tensors of a batch.

    rendered    <|user|> <image> What is it?            one placeholder an image; the processor reads this
    expanded    <|user|> <image> … <image> What is it?  what it becomes, and what is tokenised here

How many tokens an image has, and which words stand around them, is asked of the processor once for each size. Templates
take images as typed parts or not at all: then the placeholder is written into the text.
"""

import functools
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from torch import Tensor

from deltaw.core.errors import DataError, UseError
from deltaw.data.conversation import IMAGE, Message
from deltaw.data.images import look, opened, pillow, split
from deltaw.data.template import Unfit, render

Content = Callable[[Message], Any]
"""A message → its content as a template takes it."""
ASIDE = ("input_ids", "attention_mask", "labels")
SEEN = "hello"
BLANK = (60, 40)
"""Pixels of the image that a processor is tried on."""


def typed(message: Message) -> list[dict[str, str]]:
    """Content in typed parts; an empty text where there is nothing."""
    parts = [{"type": "image"} if text is None else {"type": "text", "text": text} for text in split(message)]
    return parts or [{"type": "text", "text": ""}]


class Reader:
    """A processor of images beside the tokenizer that texts go through; made by `reader`, once for each."""

    def __init__(self, processor: Any):
        self.processor, self.name = weakref.proxy(processor), type(processor).__name__
        self.token = getattr(processor, "image_token", None)
        if self.token is None:
            raise UseError(
                f"{self.name} has no token that stands for an image: rows with images cannot be learnt with this base"
            )
        self._expanded: dict[tuple[int, int], str] = {}
        self._typed: dict[str, bool] = {}
        self._parts: dict[str, int] = {}
        self._silent: dict[tuple[str, str], frozenset[int]] = {}

    def written(self, message: Message) -> str:
        """Content as text, with the placeholder where an image stands."""
        return message.content.replace(IMAGE, self.token) if message.images else message.content

    def content(self, messages: Sequence[Message], tokenizer: Any, tools: Sequence[str] = ()) -> Content:
        """How the template takes these messages: so that it writes a placeholder for each image. Unfit where it does not."""
        wanted = sum(len(m.images) for m in messages)
        ways: list[Content] = [typed, self.written] if self.takes_parts(tokenizer) else [self.written, typed]
        if not wanted:
            return ways[0]
        found = []
        for way in ways:
            found.append(self._placeholders(messages, tokenizer, tools, way))
            if found[-1] == wanted:
                return way
        raise Unfit(
            f"it writes {self.token!r} {' or '.join(map(str, dict.fromkeys(found)))} times for {wanted} images: set "
            "data.template to one that writes the content as it is (plain), or change the row"
        )

    def takes_parts(self, tokenizer: Any) -> bool:
        """Does the tokenizer's template write a placeholder for a typed part that is an image?"""
        template = str(tokenizer.chat_template)
        if template not in self._typed:
            asked = [Message("user", IMAGE + SEEN, images=(Path(),)), Message("assistant", SEEN)]
            self._typed[template] = self._placeholders(asked, tokenizer, (), typed) == 1
        return self._typed[template]

    def _placeholders(self, messages: Sequence[Message], tokenizer: Any, tools: Sequence[str], way: Content) -> int:
        """How many stand in the text; 0 where the template does not take the messages so."""
        try:
            return render(messages, tokenizer, tools, content=way).count(self.token)
        except (TemplateError, TypeError):  # some add texts up, which lists are not
            if way is self.written:
                raise
            return 0

    def expanded(self, text: str, images: Sequence[Path]) -> str:
        """A rendered text with what the processor writes in the place of each image."""
        first, *rest = text.split(self.token) if images else [text]
        if len(rest) != len(images):
            raise Unfit(f"it writes {self.token!r} {len(rest)} times for {len(images)} images once turns are left out")
        return first + "".join(self.replacement(image) + part for image, part in zip(images, rest, strict=True))

    def replacement(self, image: Path) -> str:
        """What the processor writes for an image. DataError where it does not take one of this size."""
        return self.expansion(look(image).size, repr(str(image)))

    def expansion(self, size: tuple[int, int], name: str) -> str:
        """The same for an image of (width, height) that is called `name`."""
        if size not in self._expanded:
            blank = pillow().new("RGB", size)
            options = {"add_special_tokens": False, "return_tensors": "pt", "return_text_replacement_offsets": True}
            try:
                made = self.processor(text=[self.token], images=[[blank]], **options)
                self._expanded[size] = made["text_replacement_offsets"][0][0]["replacement"]
            except NotImplementedError:
                raise UseError(f"{self.name} does not say which tokens an image has: choose another base") from None
            except (ValueError, KeyError, IndexError, TypeError) as error:
                raise DataError(
                    f"the base's processor does not take {name}, {size[0]} × {size[1]} pixels: {error}"
                ) from None
        return self._expanded[size]

    def placeholder(self, image: Path, tokenizer: Any) -> int:
        """The id that stands for the parts of an image: the most frequent one of its tokens."""
        text = self.replacement(image)
        if text not in self._parts:
            ids = _ids(text, tokenizer)
            known = [number for number in ids if number in self.image_ids]
            self._parts[text] = Counter(known or ids).most_common(1)[0][0]
        return self._parts[text]

    def never_learnt(self, image: Path, tokenizer: Any) -> frozenset[int]:
        """Ids that stand for parts of an image, or mark where one begins and ends; not words that stand beside it."""
        key = self.replacement(image), str(tokenizer.chat_template)
        if key not in self._silent:
            own = _ids(key[0] + self._around(tokenizer), tokenizer)
            special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
            self._silent[key] = frozenset((special & {*own}) | {*self.image_ids})
        return self._silent[key]

    @functools.cached_property
    def image_ids(self) -> tuple[int, ...]:
        return tuple(number for number in getattr(self.processor, "image_token_ids", ()) if number is not None)

    def _around(self, tokenizer: Any) -> str:
        """What the template itself writes for an image: what a text has more than the same one without."""
        turn = Message("user", IMAGE + SEEN, images=(Path(),))
        way = typed if self.takes_parts(tokenizer) else self.written
        whole, bare = (render([one], tokenizer, content=way) for one in (turn, Message("user", SEEN)))
        head = _shared(whole, bare)
        tail = _shared(whole[head:][::-1], bare[head:][::-1])
        return whole[head : len(whole) - tail]

    @functools.cached_property
    def beside(self) -> tuple[str, ...]:
        """What the model takes with a text alone, as long as it and all zeros: token_type_ids and the like."""
        try:
            made = self.processor(text=[SEEN], add_special_tokens=False, return_tensors="pt")
        except ValueError:  # takes no text without an image
            return ()
        shape = made["input_ids"].shape
        return tuple(
            key for key, value in made.items() if key not in ASIDE and value.shape == shape and not value.any()
        )

    def batch(self, texts: Sequence[str], images: Sequence[Sequence[Path]], side: str) -> dict[str, Tensor]:
        """All that the model takes: input_ids, attention_mask [B, T], padded on `side`, and the processor's own of images.

        texts: rendered, not expanded; images: of each.
        """
        made = self.processor(
            text=list(texts), images=[[opened(image) for image in row] for row in images], padding=True,
            padding_side=side, add_special_tokens=False, return_tensors="pt",
        )  # fmt: skip
        return dict(made)


def _shared(a: str, b: str) -> int:
    """How many characters two texts begin with alike."""
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _ids(text: str, tokenizer: Any) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


_readers: "weakref.WeakKeyDictionary[Any, Reader]" = weakref.WeakKeyDictionary()


def reader(processor: Any) -> Reader:
    """The one Reader of a processor. UseError where it has no images to read."""
    if processor not in _readers:
        _readers[processor] = Reader(processor)
    return _readers[processor]


def fitting(processor: Any, config: Any, name: str, images: bool = True) -> None:
    """UseError where the processor is not that of the model whose configuration is that of `name`: it marks images with
    another token, or (where there are images) does not make of one what the tower reads."""
    wanted = getattr(config, "image_token_id", None)
    wanted = getattr(config, "image_token_index", None) if wanted is None else wanted
    known = reader(processor).image_ids
    if wanted is not None and known and wanted not in known:
        raise UseError(
            f"{name}: its processor marks images with token {', '.join(map(str, known))}, its configuration with {wanted}: "
            "they are not of one base, save the right processor in its folder"
        )
    if images and (unlike := _unlike(processor, config)):
        raise UseError(f"{name}: the processor in its folder is not the model's: {unlike}")


def _unlike(processor: Any, config: Any) -> str:
    """What differs between the images that the processor makes and those that a tower of one size reads, with the fix; ""
    where nothing does, and for models other than LLaVA's, whose towers take several sizes or count their tokens otherwise."""
    from transformers import CLIPVisionConfig, LlavaConfig, SiglipVisionConfig

    tower = getattr(config, "vision_config", None)
    if not isinstance(config, LlavaConfig) or not isinstance(tower, CLIPVisionConfig | SiglipVisionConfig):
        return ""
    side = tower.image_size
    pictures = processor.image_processor([pillow().new("RGB", BLANK)], return_tensors="pt")["pixel_values"]
    height, width = pictures.shape[-2:]
    if (height, width) != (side, side):
        return (
            f"it makes images of {height} × {width} pixels, the model reads {side} × {side}: save the right one there, or "
            "set size and crop_size in its processor_config.json (or preprocessor_config.json)"
        )
    read = reader(processor)
    written = read.expansion(BLANK, "an image").count(read.token)
    before = isinstance(tower, CLIPVisionConfig)  # a token of the class stands before those of the patches
    given = (side // tower.patch_size) ** 2 + before - (config.vision_feature_select_strategy == "default")
    if written == given:
        return ""
    return (
        f"it writes {written} tokens for an image, the model gives {given}: save the right one there, or set in its "
        f"processor_config.json patch_size to {tower.patch_size}, vision_feature_select_strategy to "
        f"{config.vision_feature_select_strategy} and num_additional_image_tokens to {int(before)}"
    )
