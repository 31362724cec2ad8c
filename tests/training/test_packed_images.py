"""Rows with images share a line where the model keeps them apart: the same logits, loss and gradients as row by row."""

import json
from pathlib import Path
from typing import Any

import pictured
import pytest
import torch
import vlm
from PIL import Image
from torch import Tensor

import deltaw
from deltaw.config.schema import Source
from deltaw.core.errors import UseError
from deltaw.data.collate import Collator
from deltaw.data.dataset import encode_rows
from deltaw.data.encode import Encoded, Policy
from deltaw.data.rows import read_rows
from deltaw.infer.loss import SFTLoss
from deltaw.infer.packing import alike, keeps_apart, use_packing
from deltaw.models.base import Base, load_base
from deltaw.runs.directory import RunDirectory

PACKS = ("llava", "gemma3", "idefics3", "smolvlm", "internvl")
"""Qwen-VL's positions are those of the images' rows and columns; PaliGemma's prefix sees all of its line."""


def lines(family: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(two rows padded, the same in one line), labels with them."""
    padded = vlm.inputs(family)
    shape = padded["input_ids"].shape
    packed = {key: value.reshape(1, -1) if value.shape == shape else value for key, value in padded.items()}
    packed["labels"] = packed["labels"].index_fill(1, torch.tensor(shape[1]), -100)
    del packed["attention_mask"]
    return padded, {**packed, "position_ids": torch.arange(shape[1]).repeat(2)[None]}


def one(batch: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """A row of two: half of everything, its pixels too."""
    return {key: value.chunk(2)[row] for key, value in batch.items() if key != "labels"}


@pytest.mark.parametrize("family", vlm.FAMILIES)
def test_which_families_keep_images_apart(family: str) -> None:
    padded, packed = lines(family)
    packed.pop("labels")
    assert alike(vlm.model(family), [one(padded, 0), one(padded, 1)], packed) == (family in PACKS)


@pytest.mark.parametrize("family", PACKS)
def test_loss_and_gradients_are_those_of_rows_alone(family: str) -> None:
    model = vlm.model(family)
    torch.manual_seed(0)
    deltaw.attach(model, deltaw.LoRA(rank=4, init="gaussian"), targets={"language": "all-linear"})
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn_like(p))
    model.train()
    found = []
    for batch in lines(family):
        total, count = SFTLoss(model)(batch)
        (total / count).backward()
        found.append((total.detach(), int(count), [p.grad.clone() for p in model.parameters() if p.grad is not None]))
        model.zero_grad()
    (a, n, first), (b, m, second) = found
    assert n == m == 8 and torch.allclose(a, b, rtol=1e-5) and any(bool(g.any()) for g in first)
    assert all(torch.allclose(x, y, rtol=1e-3, atol=1e-6) for x, y in zip(first, second, strict=True))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictured.base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Long and short rows in turns: of text, with one image, with two."""
    names = list(pictured.COLOURS)
    for name, colour in pictured.COLOURS.items():
        Image.new("RGB", (16, 16), colour).save(tmp_path / f"{name}.png")
    rows: list[dict[str, Any]] = []
    for n in range(16):
        images = [f"{names[(n + k) % 4]}.png" for k in range(n % 3)]
        prompt = "<image>" * len(images) + ("Which colour does this picture have? " * 4 if n % 4 == 0 else "Colour?")
        rows.append({"prompt": prompt, "completion": f"{names[n % 4]}.", "images": images})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return tmp_path / "rows.jsonl"


def encoded(base: Base, file: Path) -> list[Encoded]:
    rows, report = encode_rows(read_rows(Source(path=str(file))), base.tokenizer, Policy(256), processor=base.processor)
    assert report.kept == 16
    return list(rows)


def test_images_come_in_the_order_of_their_tokens(base: Path, file: Path) -> None:
    """With images in another order, or positions that go on, the loss is another one."""
    loaded = load_base(str(base), dtype="fp32")
    rows, loss = encoded(loaded, file), SFTLoss(loaded.model)
    padded, packed = (
        Collator(loaded.tokenizer, packing=packing, processor=loaded.processor)(rows) for packing in (False, True)
    )
    assert len(packed["input_ids"]) < len(padded["input_ids"]) == 16
    assert len(packed["pixel_values"]) == len(padded["pixel_values"]) == sum(len(row.images) for row in rows)
    with torch.no_grad():
        wanted = loss(padded)
        assert torch.allclose(loss(packed)[0], wanted[0], rtol=1e-5) and loss(packed)[1] == wanted[1]
        other = {**packed, "pixel_values": packed["pixel_values"].flip(0)}
        assert abs(float(loss(other)[0] - wanted[0])) > 1e-3
        places = torch.arange(packed["input_ids"].shape[1]).expand_as(packed["position_ids"])
        assert abs(float(loss({**packed, "position_ids": places})[0] - wanted[0])) > 1e-3


def test_a_model_that_mixes_images_is_not_packed(base: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_base(str(base), dtype="fp32")
    collate = Collator(loaded.tokenizer, processor=loaded.processor)
    rows = encoded(loaded, file)
    some, lengths = [row for row in rows if row.images][:2], [len(row.ids) for row in rows]
    assert use_packing("auto", loaded.model, lengths, 8, some, collate)
    inner = loaded.model.model
    forward = inner.get_image_features

    def blended(*args: Any, **kwargs: Any) -> Any:  # every image sees the others of its batch
        found = forward(*args, **kwargs)
        found.pooler_output = [one + sum(x.mean() for x in found.pooler_output) for one in found.pooler_output]
        return found

    monkeypatch.setattr(inner, "get_image_features", blended)
    assert keeps_apart(loaded.model)
    assert not use_packing("auto", loaded.model, lengths, 8, some, collate)
    with pytest.raises(UseError, match="does not keep rows with images of one line apart"):
        use_packing(True, loaded.model, lengths, 8, some, collate)


def test_a_run_is_the_same_packed_and_padded(base: Path, file: Path, tmp_path: Path) -> None:
    losses = []
    for packing in (True, False):
        record = pictured.config(base, file, tmp_path / str(packing), {"language": "lora"}, batch_size=8)
        run = deltaw.train({**record, "data": {**record["data"], "packing": packing}}, quiet=True)
        losses.append([event["loss"] for event in RunDirectory(run.adapter.parent).events("step")])
    assert len(losses[0]) == 2 and losses[0] == pytest.approx(losses[1], rel=1e-5)
