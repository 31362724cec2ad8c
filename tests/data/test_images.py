"""Images of rows: every form finds its files, marks become places, and what is wrong with an image is said with its row."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pictures import draw
from PIL import Image

from deltaw.config.parse import parse
from deltaw.config.schema import Source
from deltaw.core.errors import DataError, UseError
from deltaw.data.conversation import IMAGE
from deltaw.data.dataset import split
from deltaw.data.images import look, opened
from deltaw.data.rows import Rows, place, read_rows
from deltaw.training.prepare import prepare

ASKED = {"prompt": "What is it?", "completion": "a cat"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    draw(tmp_path, "a.png", "b.png", "c.jpg")
    return tmp_path


def written(folder: Path, *rows: Any, name: str = "rows.jsonl") -> Path:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / name


def said(rows: Rows, number: int = 0) -> list[tuple[str, str, list[str]]]:
    return [(m.role, m.content, [image.name for image in m.images]) for m in rows.rows[number].messages]


def test_llava_json(folder: Path) -> None:
    turns = [
        {"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "a cat"},
        {"from": "human", "value": "And these: <image><image>?"}, {"from": "gpt", "value": "dogs"},
    ]  # fmt: skip
    row = {"id": "1", "image": ["a.png", "b.png", "c.jpg"], "conversations": turns}
    (folder / "rows.json").write_text(json.dumps([row, {"image": "a.png", "conversations": turns[:2]}]))
    rows = read_rows(folder / "rows.json")
    assert said(rows) == [
        ("user", f"{IMAGE}\nWhat is it?", ["a.png"]), ("assistant", "a cat", []),
        ("user", f"And these: {IMAGE}{IMAGE}?", ["b.png", "c.jpg"]), ("assistant", "dogs", []),
    ]  # fmt: skip
    assert rows.rows[0].images == tuple(folder / name for name in ("a.png", "b.png", "c.jpg"))
    assert said(rows, 1)[0] == ("user", f"{IMAGE}\nWhat is it?", ["a.png"]) and rows.form == "sharegpt"


def test_images_beside_every_form(folder: Path) -> None:
    turns = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "a"},
    ]
    forms = [
        {**ASKED, "images": ["a.png"]},
        {"messages": turns, "images": ["a.png"]},
        {"messages": turns[1:2], "image": "a.png", "chosen": "good", "rejected": "bad"},
        {"instruction": "i", "input": "<image>", "output": "o", "images": ["a.png"]},
        {**ASKED, "image": "a.png", "label": True},
        {"text": "a cat", "image": "a.png"},
    ]
    places = [f"{IMAGE}What is it?", f"{IMAGE}u", f"{IMAGE}u", f"i\n{IMAGE}", f"{IMAGE}What is it?", IMAGE]
    for form, content in zip(forms, places, strict=True):
        rows = read_rows(written(folder, form))
        turn = next(m for m in rows.rows[0].messages if m.role == "user")
        assert turn.content == content and [image.name for image in turn.images] == ["a.png"]
        assert not rows.parts[0].unread
    assert rows.form == "caption" and rows.rows[0].messages[-1].content == "a cat"


def test_typed_parts(folder: Path) -> None:
    parts = [
        [{"type": "image", "path": "a.png"}, {"type": "text", "text": "this"}, {"type": "image", "image": "b.png"}],
        [{"type": "image_url", "image_url": {"url": "a.png"}}, {"type": "text", "text": "this"}, {"type": "image", "url": "b.png"}],
        [{"type": "image"}, {"type": "text", "text": "this"}, {"type": "image"}],
    ]  # fmt: skip
    for number, content in enumerate(parts):
        row: dict[str, Any] = {
            "messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "yes"}]
        }
        row |= {"images": ["a.png", "b.png"]} if number == 2 else {}
        assert said(read_rows(written(folder, row)))[0] == ("user", f"{IMAGE}this{IMAGE}", ["a.png", "b.png"])


def test_a_folder_of_images(folder: Path) -> None:
    written(folder, {"file_name": "a.png", **ASKED}, {"file_name": "c.jpg", **ASKED}, name="metadata.jsonl")
    rows = read_rows(folder)
    assert [said(rows, n)[0] for n in (0, 1)] == [
        ("user", f"{IMAGE}What is it?", [name]) for name in ("a.png", "c.jpg")
    ]
    assert rows.parts[0].unread == ()
    (folder / "metadata.jsonl").unlink()
    (folder / "metadata.csv").write_text("file_name,text\nb.png,a dog\n")
    assert said(read_rows(folder)) == [("user", IMAGE, ["b.png"]), ("assistant", "a dog", [])]
    (folder / "metadata.csv").unlink()
    text = read_rows(written(folder, {"file_name": "a.png", **ASKED}))  # a name in another file is a field like others
    assert not text.rows[0].images and text.parts[0].unread == ("file_name",)


def test_names_are_seen_from_the_rows_or_from_a_folder_of_images(folder: Path, tmp_path: Path) -> None:
    draw(tmp_path / "far" / "train", "x.png")
    path = written(folder, {**ASKED, "image": "train/x.png"})
    with pytest.raises(
        DataError, match=r"rows.jsonl line 1: no image .*x.png': names are seen from the folder of the rows"
    ):
        read_rows(path)
    assert read_rows(Source(path=str(path), images=str(tmp_path / "far"))).rows[0].images[0].is_file()
    absolute = written(folder, {**ASKED, "picture": str(tmp_path / "far/train/x.png")})
    assert len(read_rows(Source(path=str(absolute), columns={"image": "picture"})).rows[0].images) == 1


def test_addresses_of_local_files_are_their_names(folder: Path) -> None:
    shutil.copy(folder / "a.png", folder / "a b.png")
    part = {"type": "image_url", "image_url": {"url": f"FILE://localhost{folder}/a.png"}}
    talk = {"messages": [{"role": "user", "content": [part]}, {"role": "assistant", "content": "a cat"}]}
    for row in ({**ASKED, "image": f"file://{folder}/a%20b.png"}, {**ASKED, "image": f"file://{folder}/a b.png"}):
        assert read_rows(written(folder, row)).rows[0].images == (folder / "a b.png",)
    assert read_rows(written(folder, talk)).rows[0].images == (folder / "a.png",)


def test_a_list_of_data_sets_names_its_images(folder: Path) -> None:
    written(
        folder,
        {"conversations": [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "yes"}], "pics": ["a.png"]},
    )
    entry = {"file_name": "rows.jsonl", "formatting": "sharegpt", "columns": {"images": "pics"}}
    (folder / "dataset_info.json").write_text(json.dumps({"own": entry}))
    assert said(read_rows(f"{folder}/dataset_info.json#own"))[0] == ("user", f"{IMAGE}?", ["a.png"])


URL = {"type": "image", "url": "http://x/y"}
TURNS = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
PART = [{"role": "user", "content": [{"type": "image", "path": "a.png"}]}, TURNS[1]]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({**ASKED, "image": "no.png"}, "no image"),
        ({**ASKED, "image": "deep"}, "deep' is a folder, not a file"),
        ({**ASKED, "image": "empty.png"}, "empty.png' is an empty file (0 bytes)"),
        ({**ASKED, "image": "text.png"}, "text.png' is in no format that Pillow knows: save it as PNG or JPEG, or remove the row"),
        ({**ASKED, "image": "half.jpg"}, "half.jpg' cannot be opened (image file is truncated"),
        ({**ASKED, "image": "half.png"}, "half.png' cannot be opened ("),
        ({**ASKED, "image": "parts.tif"}, "parts.tif' cannot be opened (its pixels are no colours of 8 or 16 bits but of"),
        ({**ASKED, "image": "far.tif"}, "far.tif' cannot be opened (its pixels are no colours of 8 or 16 bits but of"),
        ({**ASKED, "image": "a\0.png"}, "no image"),
        ({**ASKED, "image": "n" * 300}, "cannot be opened ("),
        ({**ASKED, "image": "https://some.where/a.png"}, "an address (https://some.where/a.png): images are not fetched"),
        ({**ASKED, "images": ["data:image/png;base64,AAAA"]}, "`images` is written out in the row"),
        ({**ASKED, "images": [{"bytes": "x", "path": "a.png"}]}, "must be the name of a file"),
        ({**ASKED, "image": "a.png", "images": ["b.png"]}, "it has `image` and `images`: keep one"),
        ({**ASKED, "prompt": "<image>", "images": ["a.png", "b.png"]}, "it has 1 place for an image (<image> or a part) and 2 images"),
        ({**ASKED, "prompt": "<image><image>", "images": ["a.png"]}, "it has 2 places for an image (<image> or a part) and 1 image:"),
        ({**ASKED, "prompt": "<image>", "images": []}, "it has 1 place for an image (<image> or a part) and 0 images"),
        ({**ASKED, "completion": "<image>", "images": ["a.png"]}, "message 2 is the assistant's and holds an image"),
        ({**ASKED, "prompt": f"<image>{IMAGE}", "images": ["a.png"]}, "message 1 has the character U+FFFC"),
        ({"messages": [{**PART[0], "content": [{"type": "image"}]}, TURNS[1]]}, "an image in its turns has no file"),
        ({"messages": PART, "images": ["b.png"]}, "it names images in its turns and beside them"),
        ({"messages": [{**PART[0], "content": [URL]}, TURNS[1]]}, "message 1 has an image that is an address"),
        ({"messages": [{**PART[0], "content": [{"type": "video", "path": "a"}]}, TURNS[1]]}, "a part of type 'video'"),
        ({**ASKED, "videos": ["a.mp4"]}, "`videos` cannot be read yet"),
    ],
)  # fmt: skip
def test_a_bad_image_is_named(folder: Path, row: Any, words: str) -> None:
    (folder / "deep").mkdir()
    (folder / "empty.png").touch()
    (folder / "text.png").write_text("no picture")
    Image.new("F", (4, 4), 0.5).save(folder / "parts.tif")
    Image.new("I", (4, 4), 1 << 20).save(folder / "far.tif")
    for name in ("half.jpg", "half.png"):
        Image.effect_noise((64, 64), 80).convert("RGB").save(folder / name)
        (folder / name).write_bytes((folder / name).read_bytes()[:1500])
    with pytest.raises(DataError) as caught:
        read_rows(written(folder, {"messages": PART} if "messages" in row else {**ASKED, "image": "a.png"}, row))
    assert words in str(caught.value) and "rows.jsonl line 2" in str(caught.value) and len(caught.value.faults) == 1


def test_all_faults_are_collected(folder: Path) -> None:
    (folder / "empty.png").touch()
    rows = [{**ASKED, "images": ["no.png", "empty.png"]}, {**ASKED, "image": "a.png"}, {**ASKED, "image": "other.png"}]
    with pytest.raises(DataError) as caught:
        read_rows(written(folder, *rows))
    assert [fault.split(":")[0] for fault in caught.value.faults] == ["rows.jsonl line 1"] * 2 + ["rows.jsonl line 3"]


def test_an_image_is_opened_upright_and_in_rgb(tmp_path: Path) -> None:
    turned = Image.new("L", (20, 10))
    tag = turned.getexif()
    tag[0x0112] = 6
    turned.save(tmp_path / "a.jpg", exif=tag)
    seen = opened(tmp_path / "a.jpg")
    assert seen.mode == "RGB" and seen.size == look(tmp_path / "a.jpg").size == (10, 20)
    Image.new("P", (5, 5)).save(tmp_path / "b.gif")
    assert opened(tmp_path / "b.gif").mode == "RGB"
    (tmp_path / "b.gif").write_bytes(b"")
    with pytest.raises(DataError, match="cannot be opened any more"):
        opened(tmp_path / "b.gif")


def test_grey_of_16_bits_keeps_its_tones(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(2, 0)
    for kind, name in (("<u2", "a.png"), (">u2", "b.tif"), ("<i4", "c.tif")):  # modes I;16, I;16B, I
        Image.fromarray(ramp.astype(kind)).save(tmp_path / name)
        seen = np.asarray(opened(tmp_path / name))
        assert seen.shape == (2, 256, 3) and np.array_equal(seen[0, :, 0], np.arange(256)), name
    Image.fromarray(np.arange(256, dtype=np.int32)[None]).save(tmp_path / "d.tif")  # 8 bits in I
    assert np.array_equal(np.asarray(opened(tmp_path / "d.tif"))[0, :, 2], np.arange(256))


def test_rows_that_differ_in_their_image_only_are_different_rows(folder: Path) -> None:
    shutil.copy(folder / "a.png", folder / "same.png")
    path = written(folder, *({**ASKED, "image": name} for name in ("a.png", "b.png", "same.png")))
    rows = read_rows(path)
    places = [place(row) for row in rows.rows]
    assert places[0] != places[1] and places[0] == places[2]
    train, held_out = split(rows, 0.4)
    assert {row.line for row in train.rows} in ({1, 3}, {2}) and len(train) + len(held_out) == 3


def test_without_pillow(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw(folder, "fresh.png", size=(7, 7))
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(UseError, match=r"^rows with images need Pillow: pip install 'deltaw\[vision\]'$"):
        read_rows(written(folder, {**ASKED, "image": "fresh.png"}))
    assert len(read_rows(written(folder, ASKED))) == 1


def test_a_base_of_text_reads_no_images(folder: Path) -> None:
    given = {"model": "tiny", "data": {"train": str(written(folder, ASKED, {**ASKED, "image": "a.png"})), "eval": None}}
    with pytest.raises(
        DataError, match=r"'tiny' reads no images, and 1 rows hold some \(the first is rows.jsonl line 2\)"
    ):
        prepare(parse(given))
    given["data"]["streaming"] = True  # type: ignore[index]
    with pytest.raises(DataError, match=r"line 2 holds an image, and this base reads none: choose one that does"):
        prepare(parse(given))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("field", ["image_path", "picture", "file", "pixel_values"])
def test_a_field_that_looks_like_an_image_and_is_not_read_is_a_warning(
    folder: Path, field: str, streaming: bool
) -> None:
    value = [[0.5]] if field == "pixel_values" else "a.png"
    path = written(folder, *({**ASKED, "prompt": f"{n}?", field: value} for n in range(3)))
    data = {"train": str(path), "eval": None, "streaming": streaming}
    check = prepare(parse({"model": "tiny", "data": data})).checks[0]
    assert (
        check.verdict == "warning"
        and f"'{field}'; which looks like an image, and rows are learnt without" in check.found
    )
    assert f"to `image`, or map it: columns: {{image: {field}}}, with a base that reads images" in check.fix
    if field == "pixel_values":
        return
    with pytest.raises(DataError, match=r"reads no images|reads none"):  # the fix that is named: now it is read
        prepare(parse({"model": "tiny", "data": {**data, "columns": {"image": field}}}))


def test_fields_beside_an_image_or_of_other_things_are_no_warning(folder: Path) -> None:
    said = {**ASKED, "id": "a.png", "image_url": "https://some.where/a.png", "image": "a.png"}
    assert read_rows(written(folder, said)).parts[0].meant == ()  # has its image
    assert read_rows(written(folder, {**ASKED, "file": "main.py", "photo": 3, "id": 7})).parts[0].meant == ()
    assert read_rows(written(folder, {**ASKED, "files": ["A.JPEG"], "picture": {"bytes": "x"}})).parts[0].meant == (
        "files", "picture",
    )  # fmt: skip
