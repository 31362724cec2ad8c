"""What an image-text model is put together from, read and checked: all that does not fit is told at once."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from deltaw.core.errors import FileError, UseError, did_you_mean, faults
from deltaw.models.base import limit_of, read_config, require_transformers, resolve, unreadable

PROJECTORS = ("linear", "mlp", "mining")
TOWERS = {"clip_vision_model": ("CLIPVisionModel", 1), "siglip_vision_model": ("SiglipVisionModel", 0)}
"""Kind of tower → its class, and how many of its tokens stand for no patch."""
LANGUAGES = ("llama", "mistral", "gemma", "qwen2", "qwen3")
"""Those whose head is one matrix after the body, as LLaVA's is: the assembled model says of text what they say."""
DETAIL = "convnext"


@dataclass(frozen=True)
class Ingredients:
    """The configurations of what was given, and how the towers see an image."""

    vision: Any
    language: Any
    detail: Any
    pictures: Any
    """The tower's image processor."""
    detail_pictures: Any
    detail_size: int | None

    @property
    def side(self) -> int:
        """Patches on a side."""
        return int(self.vision.image_size) // int(self.vision.patch_size)


def checked(vision: str, language: str, projector: str, detail: str | None, detail_size: int | None) -> Ingredients:
    """The parts, read and fitting; UseError with all that does not."""
    found = []
    if projector not in PROJECTORS:
        found.append(f"projector {projector!r} is none of {', '.join(PROJECTORS)}{did_you_mean(projector, PROJECTORS)}")
    elif projector == "mining" and detail is None:
        found.append("mining needs a second tower: give the folder or hub id of a ConvNeXt as detail")
    elif projector != "mining" and not (detail is None and detail_size is None):
        found.append(f"detail is for the projector 'mining': leave it out, {projector!r} reads one tower")
    tower, text = _vision_config(vision), read_config(language)
    second = None if detail is None else read_config(detail)
    if tower is None:
        found.append(f"vision {vision!r} has no tower of CLIP or SigLIP in its config.json: give one of these")
    if text.model_type not in LANGUAGES:
        found.append(f"language {language!r} is a {text.model_type!r}, known are {', '.join(LANGUAGES)}")
    if getattr(text, "quantization_config", None) is not None:
        found.append(f"language {language!r} is quantised: give the original, which is quantised when it is loaded")
    if second is not None and second.model_type != DETAIL:
        found.append(f"detail {detail!r} is a {second.model_type!r}, expected a ConvNeXt")
    if found or tower is None:
        raise faults(UseError, "this cannot be assembled", found)
    pictures = _image_processor(vision)
    size = None
    if second is not None:
        size, wrong = _detail_size(tower, second, detail_size)
        second.image_size = size
        found += wrong
    found += _fits(vision, tower, pictures, language, text)
    if found:
        raise faults(UseError, "this cannot be assembled", found)
    for one in (tower, text, second):
        if one is not None:
            one._name_or_path = ""  # a path of this machine
    return Ingredients(tower, text, second, pictures, None if detail is None else _image_processor(detail), size)


def _vision_config(vision: str) -> Any:
    """The configuration of the tower in a folder or hub id, without what no feature comes from; None where there is none.

    Features are what the last layer but one gives, as LLaVA and Mini-Gemini take them: the last would never get a gradient.
    """
    config = read_config(vision)
    tower = getattr(config, "vision_config", config)
    if getattr(tower, "model_type", None) not in TOWERS:
        return None
    tower.num_hidden_layers -= 1
    if getattr(tower, "vision_use_head", False):
        tower.vision_use_head = False  # pools all tokens into one
    return tower


def _image_processor(name: str) -> Any:
    try:
        return require_transformers().AutoImageProcessor.from_pretrained(resolve(name))
    except ImportError as error:
        raise UseError(f"images need more than is installed: pip install 'deltaw[vision]' ({error})") from None
    except Exception as error:
        reason = unreadable(name, error)
        raise FileError(f"{reason}; its preprocessor_config.json says how a picture is brought to its size") from error


def _detail_size(tower: Any, detail: Any, given: int | None) -> tuple[int, list[str]]:
    """Pixels on a side for the second tower: by default so many that each patch has one cell of its coarsest map."""
    side, stride = tower.image_size // tower.patch_size, detail.patch_size
    found = []
    if tower.image_size % tower.patch_size:
        found.append(
            f"the tower's image of {tower.image_size} pixels is no multiple of its patch of {tower.patch_size}: "
            "windows would not lie over the patches; take another tower for mining"
        )
    size = given or side * stride * 2 ** (len(detail.hidden_sizes) - 1)
    if size % (side * stride):
        found.append(
            f"detail_size {size} gives a map that cannot be cut into {side} x {side} windows: give a multiple of {side * stride}"
        )
    return size, found


def _fits(vision: str, tower: Any, pictures: Any, language: str, text: Any) -> list[str]:
    """Faults between the tower and what feeds it, and between its tokens and what reads them."""
    found = []
    if tower.num_hidden_layers < 1:
        found.append(
            f"the tower of {vision!r} has one layer: features come from the last but one, give one of several layers"
        )
    made = pictures(np.zeros((40, 60, 3), np.uint8), return_tensors="np")["pixel_values"].shape[-2:]
    if tuple(made) != (tower.image_size, tower.image_size):
        found.append(
            f"the image processor of {vision!r} makes {made[0]} x {made[1]} pixels of a picture of 40 x 60, "
            f"its tower reads {tower.image_size} x {tower.image_size}"
        )
    tokens, limit = (tower.image_size // tower.patch_size) ** 2, limit_of(text)
    if limit is not None and tokens >= limit:
        found.append(f"an image takes {tokens} positions, {language!r} reads {limit}: take a tower of fewer patches")
    return found
