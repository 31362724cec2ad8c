"""Patch info mining against a plain loop, and the model around it: images, text, cache, checkpointing, bf16, its files."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from towers import clip, convnext, language, picture, siglip

from deltaw.models.assemble import Assembled, assemble
from deltaw.models.base import know_our_own, read_config
from deltaw.models.image_text.mining import Mining, joined, windows


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Assembled:
    root = tmp_path_factory.mktemp("mining")
    bases = clip(root / "clip"), language(root / "gemma", "gemma")
    return assemble(*bases, root / "out", projector="mining", detail=convnext(root / "convnext"))


def opened(made: Assembled, **options: Any) -> Any:
    read_config(str(made.path))
    return transformers.AutoModelForImageTextToText.from_pretrained(made.path, **options).eval()


def batch(made: Assembled, seeds: tuple[int, ...] = (0, 1)) -> Any:
    processor = transformers.AutoProcessor.from_pretrained(made.path)
    texts = ["<image> what is it?", "look: <image> what is shown there?"][: len(seeds)]
    return processor(
        images=[[picture(seed)] for seed in seeds], text=texts, return_tensors="pt", padding=True, padding_side="left",
        add_special_tokens=False,
    )  # fmt: skip


def test_every_token_looks_into_its_own_window() -> None:
    torch.manual_seed(0)
    mining, tokens, fine = Mining(6, 5), torch.randn(2, 9, 6), torch.randn(2, 5, 12, 12)
    expected = torch.empty_like(tokens)
    for image in range(2):
        for token in range(9):
            row, column = divmod(token, 3)
            cells = [fine[image, :, 4 * row + i, 4 * column + j] for i in range(4) for j in range(4)]
            query = mining.query(tokens[image, token])
            scores = torch.stack([query @ mining.key(cell) / math.sqrt(6) for cell in cells])
            values = torch.stack([mining.value(cell) for cell in cells])
            expected[image, token] = tokens[image, token] + (scores.softmax(0)[:, None] * values).sum(0)
    torch.testing.assert_close(mining(tokens, fine), expected)


def test_windows_are_whole() -> None:
    fine = torch.arange(36.0).reshape(1, 1, 6, 6)
    assert windows(fine, 3)[0, 4, :, 0].tolist() == [14, 15, 20, 21]
    with pytest.raises(ValueError, match="6 x 6 cells cannot be cut into 4 x 4"):
        windows(fine, 4)
    assert joined([torch.zeros(1, 2, 8, 8), torch.ones(1, 3, 4, 4)]).shape == (1, 5, 8, 8)


def test_features_are_mined_and_projected(made: Assembled) -> None:
    model, inputs = opened(made), batch(made)
    body = model.model
    low, detail, projector = body.vision_tower.tower, body.vision_tower.detail, body.multi_modal_projector
    seen = low(inputs["pixel_values"]).last_hidden_state[:, 1:]
    maps, x = [], detail.embeddings(inputs["pixel_values_detail"])
    for stage in detail.encoder.stages:
        x = stage(x)
        maps.append(x)
    fine = torch.cat([torch.nn.functional.interpolate(m, size=(32, 32), mode="bilinear") for m in maps], 1)
    mined = projector.mining(seen, fine)
    expected = projector.linear_2(torch.nn.functional.gelu(projector.linear_1(mined)))
    found = body.get_image_features(inputs["pixel_values"], inputs["pixel_values_detail"]).pooler_output
    assert inputs["pixel_values"].shape == (2, 3, 16, 16) and inputs["pixel_values_detail"].shape == (2, 3, 128, 128)
    torch.testing.assert_close(torch.stack(found), expected)
    embedded = model.get_input_embeddings()(inputs["input_ids"]).clone()
    for row, ids in enumerate(inputs["input_ids"]):
        embedded[row, ids == made.image_token_id] = expected[row]
    by_hand = model(inputs_embeds=embedded, attention_mask=inputs["attention_mask"])
    torch.testing.assert_close(model(**inputs).logits, by_hand.logits)


def test_both_pictures_show_the_same(made: Assembled) -> None:
    """The processor of the second tower would squeeze a wide picture where that of the first crops it."""
    wide = picture(size=(8, 16)).resize((512, 256))
    processor = transformers.AutoProcessor.from_pretrained(made.path)

    def alike(picture: Any) -> float:
        low = processor(images=wide, text="<image>", return_tensors="pt")["pixel_values"][0].mean(0)
        high = processor(images=picture, text="<image>", return_tensors="pt")["pixel_values_detail"].mean(1)
        small = torch.nn.functional.adaptive_avg_pool2d(high, 16)[0]
        return float(torch.corrcoef(torch.stack([low.flatten(), small.flatten()]))[0, 1])

    assert alike(wide) > 0.95 and alike(wide.resize((256, 256))) < 0.8


def test_detail_changes_what_is_said_and_is_asked_for(made: Assembled) -> None:
    model, inputs = opened(made), batch(made)
    other = {**inputs, "pixel_values_detail": inputs["pixel_values_detail"].flip(-1)}
    assert not torch.allclose(model(**inputs).logits, model(**other).logits)
    del other["pixel_values_detail"]
    with pytest.raises(ValueError, match="pixel_values_detail is missing"):
        model(**other)


def test_text_alone_and_its_loss(made: Assembled) -> None:
    model = opened(made)
    ids = torch.tensor([[5, 77, 900, 4]])
    found = model(input_ids=ids, labels=ids)
    expected = torch.nn.functional.cross_entropy(found.logits[0, :-1], ids[0, 1:])
    torch.testing.assert_close(found.loss, expected)


def test_generation_with_the_cache_and_without(made: Assembled) -> None:
    model, inputs = opened(made), batch(made)
    options = {"max_new_tokens": 6, "do_sample": False}
    cached = model.generate(**inputs, **options)
    assert torch.equal(cached, model.generate(**inputs, use_cache=False, **options))
    step = inputs["input_ids"]
    mask = inputs["attention_mask"]
    for _ in range(3):  # by hand: all of it again for every token
        logits = model(**{**inputs, "input_ids": step, "attention_mask": mask}).logits[:, -1]
        step = torch.cat([step, logits.argmax(-1, keepdim=True)], 1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    assert torch.equal(cached[:, : step.shape[1]], step)
    beams = model.generate(**inputs, num_beams=2, **options)
    assert beams.shape[0] == 2


def test_past_keys_go_on_where_a_prompt_with_an_image_ended(made: Assembled) -> None:
    model, inputs = opened(made), batch(made, (0,))
    first = model(**inputs, use_cache=True)
    more = torch.tensor([[10, 11]])
    mask = torch.ones(1, inputs["input_ids"].shape[1] + 2, dtype=torch.long)
    went_on = model(input_ids=more, past_key_values=first.past_key_values, attention_mask=mask).logits
    whole = model(**{**inputs, "input_ids": torch.cat([inputs["input_ids"], more], 1), "attention_mask": mask}).logits
    torch.testing.assert_close(went_on, whole[:, -2:], rtol=1e-4, atol=1e-5)


def test_its_files_hold_it_whole(made: Assembled, tmp_path: Path) -> None:
    model, inputs = opened(made), batch(made)
    model.save_pretrained(tmp_path / "again")
    again, info = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(again.eval()(**inputs).logits, model(**inputs).logits)
    processor = transformers.AutoProcessor.from_pretrained(made.path)
    processor.save_pretrained(tmp_path / "processor")
    read = transformers.AutoProcessor.from_pretrained(tmp_path / "processor")
    found = read(images=[picture()], text=["<image>"], return_tensors="pt")
    assert torch.equal(found["pixel_values_detail"], batch(made, (0,))["pixel_values_detail"])


def test_gradients_reach_every_part_and_are_the_same_when_checkpointed(made: Assembled) -> None:
    model, inputs = opened(made), batch(made)
    grads = []
    for on in (False, True):
        model.train().zero_grad()
        if on:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-4, atol=1e-7)
    dead = {name for name, _ in model.named_parameters()} - grads[0].keys()
    pooled = ("tower.post_layernorm", "detail.layernorm")  # norms of what stands for the whole image
    assert {name.removeprefix("model.vision_tower.").rpartition(".")[0] for name in dead} == set(pooled)


def test_bf16(made: Assembled) -> None:
    model, inputs = opened(made, dtype=torch.bfloat16), batch(made)
    found = model(**inputs, labels=inputs["input_ids"])
    assert found.logits.dtype is torch.bfloat16 and torch.isfinite(found.loss)
    reference = opened(made)(**inputs, labels=inputs["input_ids"])
    torch.testing.assert_close(found.loss.float(), reference.loss, rtol=0.02, atol=0.02)
    found.loss.backward()
    assert model.model.multi_modal_projector.mining.query[1].weight.grad.abs().sum() > 0


def test_siglip_has_no_token_that_stands_for_no_patch(tmp_path: Path) -> None:
    bases = siglip(tmp_path / "siglip"), language(tmp_path / "qwen", "qwen2")
    made = assemble(*bases, tmp_path / "out", projector="mining", detail=convnext(tmp_path / "c"), detail_size=64)
    model, inputs = opened(made), batch(made)
    assert inputs["pixel_values_detail"].shape[-1] == 64 and (inputs["input_ids"] == made.image_token_id).sum() == 32
    assert torch.isfinite(model(**inputs).logits).all()


def test_outline_has_the_parts_that_are_looked_for(made: Assembled) -> None:
    know_our_own()
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(read_config(str(made.path)))
    assert model.get_encoder(modality="image") is model.model.vision_tower
    assert model.get_decoder() is model.model.language_model and model.get_output_embeddings() is model.lm_head
    inputs = {name: value.to("meta") for name, value in batch(made).items()}
    del inputs["attention_mask"]  # transformers looks into it
    assert model(**inputs).logits.shape == (*inputs["input_ids"].shape, 4160)
