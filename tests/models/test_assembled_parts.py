"""An assembled model in the hands of the rest: its parts are found, every target gets a gradient, rows with images become batches."""

from pathlib import Path

import pytest
import torch
import transformers
from towers import clip, convnext, language, picture

import deltaw
from deltaw.core.parts import find
from deltaw.data.collate import Collator
from deltaw.data.conversation import IMAGE, Example, Message
from deltaw.data.encode import Encoded, Policy, encode
from deltaw.models.assemble import Assembled, assemble
from deltaw.models.base import load_processor, load_tokenizer, read_config


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Assembled:
    root = tmp_path_factory.mktemp("parts")
    bases = clip(root / "clip"), language(root / "llama")
    return assemble(*bases, root / "out", projector="mining", detail=convnext(root / "convnext"), detail_size=64)


def opened(made: Assembled) -> torch.nn.Module:
    read_config(str(made.path))
    model = transformers.AutoModelForImageTextToText.from_pretrained(made.path)
    return model.eval().requires_grad_(False)  # type: ignore[no-any-return]


def test_both_towers_are_vision_and_mining_is_of_the_projector(made: Assembled) -> None:
    parts = find(opened(made))
    assert parts is not None and parts.unowned == ()
    assert parts.roots == {
        "vision": ("model.vision_tower",),
        "projector": ("model.multi_modal_projector",),
        "language": ("model.language_model",),
        "head": ("lm_head",),
    }
    assert parts.of("model.vision_tower.detail.encoder.stages.0") == "vision"
    assert parts.of("model.multi_modal_projector.mining.query.1") == "projector"


def test_every_adapted_layer_gets_a_gradient(made: Assembled, tmp_path: Path) -> None:
    model = opened(made)
    targets = dict.fromkeys(("vision", "projector", "language"), "all-linear")
    deltaw.attach(model, deltaw.LoRA(rank=2), targets=targets)
    batch = collated(made, tmp_path)
    model.train()
    model(**batch).loss.backward()
    names = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    dead = [name for name, grad in names.items() if ".B" in name and (grad is None or not grad.any())]
    assert len(names) == 2 * (2 * 6 + 5 * 2 + 3 + 2 + 2 * 7) and not dead


def collated(made: Assembled, folder: Path) -> dict[str, torch.Tensor]:
    picture().save(folder / "a.png")
    tokenizer, _ = load_tokenizer(str(made.path))
    processor = load_processor(str(made.path))
    asked = Message("user", f"{IMAGE}What is it?", images=(folder / "a.png",))
    said = Message("assistant", "Noise.")
    texts = (Message("user", "Hi"), Message("assistant", "Hello."))
    rows = [Example((asked, said), 1, "row 1"), Example(texts, 2, "row 2")]
    encoded: list[Encoded] = []
    for row in rows:
        made_of = encode(row, tokenizer, Policy(128), processor)
        assert isinstance(made_of, list)
        encoded += made_of
    return Collator(tokenizer, processor=processor)(encoded)


def test_a_batch_has_both_pictures_and_no_image_token_is_labelled(made: Assembled, tmp_path: Path) -> None:
    batch = collated(made, tmp_path)
    assert batch["pixel_values"].shape == (1, 3, 16, 16) and batch["pixel_values_detail"].shape == (1, 3, 64, 64)
    images = batch["input_ids"] == made.image_token_id
    assert images.sum() == made.image_tokens and (batch["labels"][images] == -100).all()
    assert torch.isfinite(opened(made)(**batch).loss)
