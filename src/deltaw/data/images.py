"""Images of rows: where they stand in the turns, which files they are, and whether these can be opened.

    {"image": "a.png", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"}, …]}    a mark for each image
    {"images": ["a.png"], "prompt": "What is it?", "completion": "…"}      no mark: before the first turn of the user
    {"messages": [{"role": "user", "content": [{"type": "image", "path": "a.png"}, …]}, …]}           typed parts

A file is read and decoded once before a run: half of a JPEG opens well and fails in the middle of an epoch.
"""

import functools
import hashlib
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from deltaw.core.errors import DataError, UseError
from deltaw.core.text import counted
from deltaw.data.conversation import IMAGE, Example, Message
from deltaw.data.turns import MARK, NEXT, Unreadable, image_name

FIELDS = ("image", "images")
"""Fields of a row that name images beside its turns."""
MEANT = (
    "image_path", "image_paths", "image_file", "image_files", "image_name", "image_url", "image_urls", "img", "imgs",
    "img_path", "picture", "pictures", "photo", "photos", "pixel_values",
)  # fmt: skip
"""Names that others give to a field of images, whatever stands in it."""
FILE = re.compile(r"\.(png|jpe?g|webp|gif|bmp|tiff?)$", re.IGNORECASE)
TURNED = 0x0112
"""EXIF's tag of how a picture was held; from 5 on width and height change places."""


@dataclass(frozen=True)
class Look:
    """What is known of an image that opened: (width, height) as it is seen, sha256 of the file."""

    size: tuple[int, int]
    digest: str


def held(row: Mapping[str, Any]) -> bool:
    """Does a row name images beside its turns?"""
    return any(row.get(key) for key in FIELDS)


def meant(name: str, value: Any) -> bool:
    """Does a field that is not read look like one of images, by its name or as its value is the name of an image file?"""
    first = value[0] if isinstance(value, list | tuple) and value else value
    first = (first.get("path") or first.get("url")) if isinstance(first, Mapping) else first
    named = name.lower() in MEANT and isinstance(value, str | list | tuple | Mapping)
    return named or (isinstance(first, str) and FILE.search(first) is not None)


def placed(row: Example, fields: Mapping[str, Any], folder: Path | None, seen: str = "") -> tuple[Example, list[str]]:
    """The row with the files of its images in its turns, and what is wrong with them. Rows of text stay as they are.

    fields: the row as it stands in its file; folder: where its images lie, None for the working directory; seen: where names
    are seen from and how to change that, said of files that are not there.
    """
    try:
        names = _beside(fields)
    except Unreadable as error:
        return row, [str(error)]
    if names is None and not any(m.images for m in row.messages):
        return row, []
    turns, found = _filled(list(row.messages), names)
    if found or not any(m.images for m in turns):
        return row, found
    for number, turn in enumerate(turns, 1):
        if turn.content.count(IMAGE) != len(turn.images):
            found.append(f"message {number} has the character U+FFFC, which stands for an image here: take it out")
        elif turn.images and turn.role == "assistant":
            found.append(f"message {number} is the assistant's and holds an image: only text can be learnt")
    there = [replace(m, images=tuple((folder or Path()) / image for image in m.images)) for m in turns]
    found += [fault for m in there for image in m.images if (fault := unfit(image, seen))]
    return replace(row, messages=tuple(there)), list(dict.fromkeys(found))


def _beside(fields: Mapping[str, Any]) -> list[str] | None:
    """Names of the images beside the turns; None where no field is for them."""
    given = {key: fields[key] for key in FIELDS if fields.get(key) is not None}
    if len([key for key, value in given.items() if value]) > 1:
        raise Unreadable("it has `image` and `images`: keep one of them")
    if not given:
        return None
    key, value = next(((k, v) for k, v in given.items() if v), next(iter(given.items())))
    try:
        return [image_name(one) for one in (value if isinstance(value, list | tuple) else [value] if value else [])]
    except Unreadable as error:
        raise Unreadable(f"`{key}` {error}") from None


def _filled(turns: list[Message], names: Sequence[str] | None) -> tuple[list[Message], list[str]]:
    """The turns with a name for every image in them."""
    inside = [image for m in turns for image in m.images]
    if names is None:
        nameless = NEXT in inside
        return turns, ["an image in its turns has no file: give it as path, or list the files in `images`"] * nameless
    if any(image != NEXT for image in inside):
        return turns, ["it names images in its turns and beside them: keep one of them"]
    if not inside:
        turns = _marked(turns, len(names))
        inside = [image for m in turns for image in m.images]
    if len(inside) != len(names):
        written, files = counted(len(inside), "place"), counted(len(names), "image")
        return turns, [f"it has {written} for an image ({MARK} or a part) and {files}: write one for each"]
    files = iter(map(Path, names))
    return [replace(m, images=tuple(next(files) for _ in m.images)) for m in turns], []


def _marked(turns: Sequence[Message], images: int) -> list[Message]:
    """Marks in texts as places for images; without any, all images before the first turn of the user."""
    marks = [m.content.count(MARK) for m in turns]
    first = next((number for number, m in enumerate(turns) if m.role == "user"), 0)
    if not any(marks):
        marks[first] = images
        before = IMAGE * images
        return [replace(m, content=before + m.content, images=(NEXT,) * images) if n == first and images else m
                for n, m in enumerate(turns)]  # fmt: skip
    return [
        replace(m, content=m.content.replace(MARK, IMAGE), images=(NEXT,) * count) if count else m
        for m, count in zip(turns, marks, strict=True)
    ]


def unfit(path: Path, seen: str = "") -> str:
    """A sentence where a file is no image that opens, else "". seen: as for `placed`."""
    try:
        if path.is_dir():
            return f"the image {str(path)!r} is a folder, not a file"
        if not path.exists():
            return f"no image {str(path)!r}: {seen or 'there is no such file'}"
        if not path.stat().st_size:
            return f"the image {str(path)!r} is an empty file (0 bytes)"
        look(path)
    except UseError:
        raise
    except Exception as error:  # whatever a foreign file raises, it is one thing: an image that cannot be opened
        if isinstance(error, pillow().UnidentifiedImageError):
            return (
                f"the image {str(path)!r} is in no format that Pillow knows: save it as PNG or JPEG, or remove the row"
            )
        reason = " ".join(str(error).split())[:120]
        return f"the image {str(path)!r} cannot be opened ({reason}): save it again, or remove the row"
    return ""


def look(path: Path) -> Look:
    """Open and decode a file once. Raises whatever Pillow does where that fails."""
    state = path.stat()
    return _looked(path, state.st_mtime_ns, state.st_size)


@functools.lru_cache(1 << 18)  # some 150 MB; of more files some are read twice
def _looked(path: Path, changed: int, length: int) -> Look:
    data = path.read_bytes()
    with pillow().open(io.BytesIO(data)) as image:
        width, height = image.size
        if not width * height:
            raise ValueError(f"it has {width} × {height} pixels")
        if image.getexif().get(TURNED, 1) >= 5:
            width, height = height, width
        image.draft("RGB", (1, 1))  # a JPEG is decoded small: all of it is read, in half the time
        image.load()
        _toned(image)
    return Look((width, height), hashlib.sha256(data).hexdigest())


def opened(path: Path) -> Any:
    """The image as people see it, turned upright, as RGB. DataError where it no longer opens."""
    images = pillow()
    from PIL import ImageOps

    try:
        with images.open(path) as image:
            return _toned(ImageOps.exif_transpose(image)).convert("RGB")
    except Exception as error:
        raise DataError(f"the image {str(path)!r} cannot be opened any more: {error}") from None


def _toned(image: Any) -> Any:
    """A grey image of 16 bits with its high 8, as Pillow reads colours of 16 bits; others as they are. ValueError for
    pixels whose white nobody knows: fractions, or numbers beyond 16 bits. Pillow itself makes all above 255 white."""
    if image.mode != "F" and not image.mode.startswith("I"):
        return image
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 0xFFFF:
        raise ValueError(f"its pixels are no colours of 8 or 16 bits but of Pillow's mode {image.mode}")
    wide = image.mode != "I" or values.max() > 0xFF  # older Pillows read 16 bits as I
    return pillow().fromarray((values >> 8 if wide else values).astype(np.uint8))


def pillow() -> Any:
    """PIL.Image, or one line that says how to install it."""
    try:
        from PIL import Image
    except ImportError:
        raise UseError("rows with images need Pillow: pip install 'deltaw[vision]'") from None
    return Image


def split(message: Message) -> Iterator[str | None]:
    """The texts of a message in order, None in the place of each image; no empty texts."""
    if not message.images:
        yield message.content
        return
    for number, text in enumerate(message.content.split(IMAGE)):
        if number:
            yield None
        if text:
            yield text
