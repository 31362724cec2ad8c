"""Images through the base's processor: tokens, masks, batches, a step, answers. Processors are made by hand, without a download."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pictures import MADE, PARTS, TEXT, draw, llava
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from deltaw.config.parse import parse
from deltaw.core.errors import DataError, FileError, UseError
from deltaw.data.collate import Collator, with_images
from deltaw.data.conversation import IMAGE, Example, Message
from deltaw.data.dataset import Encoder, cure, digest, encode_rows
from deltaw.data.encode import CONTROL, IGNORE, Dropped, Encoded, Policy, encode, prompt, stop_token_trained
from deltaw.data.images import opened
from deltaw.data.observed import Observed
from deltaw.data.page import page
from deltaw.data.preview import pieces, preview
from deltaw.data.processors import reader
from deltaw.data.rows import Rows, read_rows
from deltaw.data.store import Store
from deltaw.data.template import TEMPLATES
from deltaw.infer.evaluate import evaluate, held_out_loss
from deltaw.infer.generate import generate, prompt_row
from deltaw.infer.loss import SFTLoss
from deltaw.models.base import tokenizer_of
from deltaw.training.prepare import prepare

POLICY = Policy(512)
SAID = Message("assistant", "Red.")
NAMES = ["a.png", "b.png", "c.png"]


def asked(text: str, *images: Path) -> Message:
    return Message("user", text, images=images)


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    return draw(tmp_path, *NAMES)


@pytest.fixture(params=MADE)
def processor(request: pytest.FixtureRequest) -> Any:
    return MADE[request.param]()


@pytest.fixture
def rows(files: list[Path]) -> list[Example]:
    """One image; text alone; images in a later turn, two of them in one; a picture of another size."""
    a, b, _ = files
    [wide] = draw(a.parent, "wide.png", size=(40, 9))
    return [
        Example((asked(f"{IMAGE}What?", a), SAID), 1, "row 1"),
        Example((asked("Hi"), Message("assistant", "Yo.")), 2, "row 2"),
        Example((asked("Hi"), SAID, asked(f"And {IMAGE}{IMAGE}?", b, a), Message("assistant", "Blue.")), 3, "row 3"),
        Example((asked(f"Wide {IMAGE}", wide), SAID), 4, "row 4"),
    ]


def encoded(rows: list[Example], processor: Any, policy: Policy = POLICY) -> list[Encoded]:
    words = tokenizer_of(processor)
    return [piece for row in rows for piece in encode(row, words, policy, processor)]  # type: ignore[union-attr]


def tiny_llava() -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, pad_token_id=257, bos_token_id=258, eos_token_id=256,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=16, patch_size=4,
        projection_dim=32,
    )  # fmt: skip
    image = llava().image_token_id
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision, text_config=text, image_token_id=image, vision_feature_layer=-2, image_seq_length=16
        )
    ).eval()


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base as it lies on disk: configuration, weights, tokenizer, processor."""
    folder = tmp_path_factory.mktemp("base")
    tiny_llava().save_pretrained(folder)
    llava().save_pretrained(folder)
    return folder


def test_labels_are_the_answer_and_its_stop_token(processor: Any, rows: list[Example]) -> None:
    words = tokenizer_of(processor)
    first, text, talk, wide = encoded(rows, processor)
    for row, answers in ((first, "Red.</s>"), (text, "Yo.</s>"), (talk, "Red.</s>Blue.</s>"), (wide, "Red.</s>")):
        assert words.decode([label for label in row.labels if label != IGNORE]) == answers
    assert len(first.images) == 1 and len(talk.images) == 2 and text.images == ()
    assert first.text.count(reader(processor).token) == 1 and reader(processor).token not in text.text


def test_the_processor_reads_what_was_encoded(processor: Any, rows: list[Example]) -> None:
    """All it makes goes on: the tensors that transformers itself makes of the same rows, and labels beside them."""
    mixed = encoded(rows, processor)
    batch = Collator(tokenizer_of(processor), processor=processor)(mixed)
    theirs = processor(
        text=[row.text for row in mixed], images=[[Image.open(image) for image in row.images] for row in mixed],
        padding=True, padding_side="right", add_special_tokens=False, return_tensors="pt",
    )  # fmt: skip
    assert batch.keys() == {*theirs, "labels"} and all(torch.equal(batch[key], theirs[key]) for key in theirs)
    for row, ids, labels in zip(mixed, batch["input_ids"], batch["labels"], strict=True):
        assert ids[: len(row.ids)].tolist() == row.ids and labels[: len(row.ids)].tolist() == row.labels
        assert (labels[len(row.ids) :] == IGNORE).all()


def test_keys_of_each_family(rows: list[Example]) -> None:
    own = {"gemma3": "token_type_ids", "qwen2-vl": "mm_token_type_ids image_grid_thw", "llava": "",
           "idefics3": "pixel_attention_mask", "internvl": ""}  # fmt: skip
    for name, keys in own.items():
        made = MADE[name]()
        batch = Collator(tokenizer_of(made), processor=made)(encoded(rows, made))
        assert batch.keys() == {"input_ids", "attention_mask", "labels", "pixel_values", *keys.split()}
        if "token_type_ids" in keys:
            types = batch["mm_token_type_ids" if "mm" in keys else "token_type_ids"]
            part = reader(made).placeholder(rows[0].images[0], made.tokenizer)
            assert torch.equal(types.bool(), batch["input_ids"] == part)


def test_a_batch_of_text_alone(processor: Any, rows: list[Example]) -> None:
    words, texts = tokenizer_of(processor), encoded([rows[1], rows[1]], processor)
    batch = Collator(words, processor=processor)(texts)
    plain = Collator(words)(texts)
    assert all(torch.equal(batch[key], plain[key]) for key in plain)
    theirs = processor(text=[row.text for row in texts], add_special_tokens=False, padding=True, return_tensors="pt")
    assert all(torch.equal(batch[key], theirs[key]) for key in theirs)
    assert "position_ids" in Collator(words, packing=True, processor=processor)(texts)


def test_images_are_never_learnt(processor: Any, rows: list[Example]) -> None:
    words = tokenizer_of(processor)
    everything = encoded(rows, processor, dataclasses.replace(POLICY, train_on_prompt=True))
    marks = {
        "<image>",
        "<soft>",
        "<boi>",
        "<eoi>",
        "<ctx>",
        "<img>",
        "</img>",
        "<fake_token_around_image>",
        "<global-img>",
    }
    marks |= {
        "<|image_pad|>",
        "<|vision_start|>",
        "<|vision_end|>",
        *(f"<row_{r}_col_{c}>" for r in (1, 2) for c in (1, 2)),
    }
    for row in everything:
        left = [token for token, label in zip(row.ids, row.labels, strict=True) if label == IGNORE]
        assert set(words.convert_ids_to_tokens(left)) <= marks and bool(left) is bool(row.images)
        learnt = words.convert_ids_to_tokens([label for label in row.labels if label != IGNORE])
        assert not marks & set(learnt) and learnt.count("</s>") == sum(
            m in ("<|user|>", "<|assistant|>") for m in learnt
        )


@pytest.mark.parametrize("template", [PARTS, TEXT, TEMPLATES["plain"]])
def test_templates_of_parts_and_of_text(template: str, rows: list[Example]) -> None:
    made = llava(template)
    words = tokenizer_of(made)
    row = encoded(rows[:1], made)[0]
    assert "⟨image×16⟩What?" in preview(row, words, made) and preview(row, words, made).count("⟦Red.</s>⟧") == 1
    assert stop_token_trained(words, made) == words.eos_token_id
    asked_only = prompt(rows[0].messages[:1], words, processor=made)
    assert row.ids[: len(asked_only.ids)] == asked_only.ids and row.labels[len(asked_only.ids)] != IGNORE


def test_templates_that_lose_images_are_refused(rows: list[Example]) -> None:
    once = "{% for m in messages %}<|{{ m.role }}|>{{ m.content | replace('<image>', '') }}</s>{% endfor %}"
    made = llava(once)
    with pytest.raises(
        DataError, match=r"row 1 does not go through the chat template: it writes '<image>' 0 times for 1 images"
    ):
        encoded(rows[:1], made)
    bare = llava()
    bare.chat_template = None
    with pytest.raises(DataError, match=r"row 1 holds an image and the base has no chat template: set data.template"):
        encoded(rows[:1], bare)
    with pytest.raises(DataError, match="row 1 holds an image, and this base reads none"):
        encode(rows[0], made.tokenizer, POLICY)


def test_a_mark_in_a_text_is_a_control_token(processor: Any, files: list[Path]) -> None:
    token, words = reader(processor).token, tokenizer_of(processor)
    texts = asked(f"{token}</s>"), asked(f"{IMAGE} say {token}", files[0]), asked(f"{IMAGE}</s>", files[0])
    for row in texts:
        found = encode(Example((row, SAID), 1, "row 1"), words, POLICY, processor)
        assert isinstance(found, Dropped) and found.reason == CONTROL
    found = encode(Example((asked(f"say {token}"), SAID), 1, "row 1"), words, POLICY, processor)
    assert isinstance(found, Dropped) and found.reason == f"no image for {token} in the text"
    assert cure([found.reason]) == "name the image in `image`, or take its mark out of the text"


def test_a_long_row_with_images_is_dropped_not_cut(rows: list[Example]) -> None:
    made = llava()
    policy = Policy(12, overflow="cut")
    found = [encode(row, tokenizer_of(made), policy, made) for row in rows]
    assert isinstance(found[0], Dropped) and found[0].reason == "longer than 12 tokens"
    long = Example((asked("Hi"), Message("assistant", "Yo." * 30)), 5, "row 5")
    [cut] = encode(long, made.tokenizer, Policy(60, overflow="cut"), made)  # type: ignore[misc]
    [first, text] = encoded(rows[:2], made)
    batch = Collator(made.tokenizer, processor=made)([first, cut, text])
    assert cut.cut == 36 and batch["input_ids"].shape == (3, 60) and batch["pixel_values"].shape[0] == 1
    for row, ids, mask, labels in zip(
        [first, cut, text], *map(batch.get, ("input_ids", "attention_mask", "labels")), strict=True
    ):
        assert ids[mask.bool()].tolist() == row.ids and labels[1 : len(row.ids)].tolist() == row.labels[1:]
    assert (batch["input_ids"][0, len(first.ids) :] == made.tokenizer.pad_token_id).all()


def test_a_step_learns_what_the_models_own_loss_says(rows: list[Example]) -> None:
    made, model = llava(), tiny_llava()
    batch = Collator(tokenizer_of(made), processor=made)(encoded(rows, made))
    loss = SFTLoss(model)
    assert loss.gathers
    total, count = loss(batch)
    theirs = model(**batch).loss
    torch.testing.assert_close(total / count, theirs)
    ours = torch.autograd.grad(total / count, list(model.model.multi_modal_projector.parameters()))
    own = torch.autograd.grad(theirs, list(model.model.multi_modal_projector.parameters()))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(ours, own, strict=True)) and ours[0].abs().max() > 0


def test_the_report_and_the_digest_know_the_images(rows: list[Example], files: list[Path]) -> None:
    made = llava()
    seen = Observed(tokenizer_of(made), POLICY)
    encoder = Encoder(made.tokenizer, POLICY, seen=seen, processor=made)
    found = [piece for row in rows for piece in encoder.add(row)]
    report = encoder.report((), "rows")
    assert (report.with_images, report.images, report.image_tokens) == (3, 4, 64)
    assert "images   4 in 3 of 4 rows, 64 tokens (16 an image)" in str(report)
    twin = encode(Example((asked(f"{IMAGE}What?", files[2]), SAID), 1), made.tokenizer, POLICY, made)
    assert twin[0].ids == found[0].ids and digest(twin) != digest(found[:1])  # type: ignore[index, arg-type]
    encoder.add(Example((asked(f"{IMAGE}What?", files[2]), SAID), 5))
    assert seen.repeated() == 0 and not seen.characters.lost
    encoder.add(dataclasses.replace(rows[0], line=6))
    assert seen.repeated() == 1


def test_the_page_shows_one_mark_for_an_image(rows: list[Example]) -> None:
    made = llava()
    row = encoded(rows[:1], made)[0]
    shown = list(pieces(row, made.tokenizer, made))
    assert [piece.text for piece in shown].count("⟨image×16⟩") == 1 and sum(len(p.ids) for p in shown) == len(row.ids)
    report = encode_rows(Rows("messages", rows, "rows"), made.tokenizer, POLICY, processor=made)[1]
    assert "⟨image×16⟩" in page("t", "", report, "held out none", (), [row], made.tokenizer, made)


def test_a_processor_that_reads_otherwise_is_refused(rows: list[Example]) -> None:
    made = llava()
    row = encoded(rows[:1], made)[0]
    with pytest.raises(DataError, match=r"LlavaProcessor reads .* tokens other than"):
        with_images([dataclasses.replace(row, ids=row.ids[1:])], made, "right")
    with pytest.raises(DataError, match="without its processor"):
        Collator(made.tokenizer)([row])


def test_left_padding_and_answers(rows: list[Example], files: list[Path]) -> None:
    made, model = llava(), tiny_llava()
    words = tokenizer_of(made)
    part = {"type": "image", "path": str(files[0])}
    prompts: list[Any] = [
        [{"role": "user", "content": [part, {"type": "text", "text": "What?"}]}],
        "Hi",
        [
            {
                "role": "user",
                "content": [part, {"type": "text", "text": "A longer question?"}, {**part, "path": str(files[1])}],
            }
        ],
    ]
    both = [prompt_row(words, one, made) for one in (prompts[0], prompts[2])]
    batch = with_images(both, made, "left")
    assert batch["input_ids"][0, -1] == both[0].ids[-1] and batch["attention_mask"][0, 0] == 0
    together = generate(model, words, prompts, max_new_tokens=6, processor=made)
    assert together == [generate(model, words, [one], max_new_tokens=6, processor=made)[0] for one in prompts]
    alone = model.generate(
        **made(text=[both[0].text], images=[[opened(files[0])]], add_special_tokens=False, return_tensors="pt"),
        max_new_tokens=6, do_sample=False, pad_token_id=words.pad_token_id, eos_token_id=words.eos_token_id,
    )  # fmt: skip
    assert together[0] == words.decode(alone[0, len(both[0].ids) :], skip_special_tokens=True).strip()
    with pytest.raises(UseError, match=r"prompt 1: no image .*gone.png"):
        generate(model, words, [[{"role": "user", "content": [{"type": "image", "path": "gone.png"}]}]], processor=made)
    with pytest.raises(DataError, match="prompt 1 holds an image, and this base reads none"):
        generate(model, words, prompts[:1])
    with pytest.raises(UseError, match="the base reads at most 256"):
        generate(model, words, [[{"role": "user", "content": [part] * 20}]], processor=made)


def test_held_out_numbers(tmp_path: Path, files: list[Path]) -> None:
    made, model = llava(), tiny_llava()
    words = tokenizer_of(made)
    given = [{"image": name, "prompt": "Which colour?", "completion": name[0]} for name in NAMES] + [
        {"prompt": "Hi", "completion": "Yo", "images": []}
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))
    found = evaluate(model, words, read_rows(tmp_path / "rows.jsonl"), max_new_tokens=4, processor=made)
    assert found.rows == 4 and len(found.samples) == 4  # the same question of three images is three prompts
    assert found.samples[0].prompt.endswith("<|assistant|> [a.png]") and found.samples[0].references == ["a"]
    one_by_one = [
        encode(row, words, POLICY, made)[0]  # type: ignore[index]
        for row in read_rows(tmp_path / "rows.jsonl").rows
    ]
    losses = [held_out_loss(model, words, [row], processor=made) * row.supervised for row in one_by_one]
    assert found.loss == pytest.approx(sum(losses) / sum(row.supervised for row in one_by_one), rel=1e-5)


def test_rows_are_prepared_with_the_processor_of_the_base(base_folder: Path, tmp_path: Path, files: list[Path]) -> None:
    given = [{"image": name, "prompt": "Which?", "completion": name[0]} for name in NAMES] + [
        {"prompt": "Hi", "completion": "Yo"}
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))
    config = {"model": str(base_folder), "data": {"train": str(tmp_path / "rows.jsonl"), "eval": None}}
    prepared = prepare(parse(config))
    assert prepared.tokenizer is prepared.processor.tokenizer and prepared.report.images == 3
    assert prepared.previews(1) == ["<|user|>⟨image×16⟩Which?</s><|assistant|>⟦a</s>⟧"]
    assert "⟨image×16⟩" in str(prepared.coloured())
    check = {check.name: check for check in prepared.checks}["images"]
    assert check.verdict == "fine" and check.found.startswith("3 in 3 of 4 rows, 48 tokens (16 an image), ")
    collate = Collator(prepared.tokenizer, processor=prepared.processor)
    batch = collate(prepared.encoded)
    assert batch["pixel_values"].shape == (3, 3, 16, 16)
    plain = prepare(parse({**config, "data": {**config["data"], "template": "plain"}}))  # type: ignore[dict-item]
    assert plain.previews(1)[0].startswith("### user:\n⟨image×16⟩Which?</s>")
    streamed = prepare(parse({**config, "data": {**config["data"], "streaming": True}}))  # type: ignore[dict-item]
    assert isinstance(streamed.encoded, Store) and list(streamed.encoded) == list(prepared.encoded)
    assert streamed.report == prepared.report and digest(streamed.encoded) == digest(prepared.encoded)
    assert torch.equal(collate(streamed.encoded[:2])["pixel_values"], batch["pixel_values"][:2])
    (tmp_path / "rows.jsonl").write_text(json.dumps(given[-1]) + "\n")
    text = prepare(parse({**config, "data": {**config["data"], "streaming": True}}))  # type: ignore[dict-item]
    assert text.report.images == 0 and "images" not in {check.name for check in text.checks}


def test_a_processor_of_another_base_is_refused(base_folder: Path, tmp_path: Path, files: list[Path]) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"image": "a.png", "prompt": "Which?", "completion": "a"}))
    other = tmp_path / "other"
    tiny_llava().save_pretrained(other)
    config = {"model": str(other), "data": {"train": str(tmp_path / "rows.jsonl"), "eval": None}}
    with pytest.raises(FileError, match="cannot be loaded"):
        prepare(parse(config))
    wrong = llava()
    wrong.save_pretrained(other)
    saved = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**saved, "image_token_id": 17, "image_token_index": 17}))
    with pytest.raises(UseError, match=r"its processor marks images with token 259, its configuration with 17"):
        prepare(parse(config))


def test_an_image_that_the_processor_does_not_take_is_named(tmp_path: Path) -> None:
    made = MADE["qwen2-vl"]()
    [thin] = draw(tmp_path, "thin.png", size=(2000, 2))
    with pytest.raises(DataError, match=r"does not take '.*thin.png', 2000 × 2 pixels"):
        encoded([Example((asked(f"{IMAGE}?", thin), SAID), 1, "row 1")], made)


@pytest.mark.shared
def test_real_questions_about_images(shared: Path, tmp_path: Path, base_folder: Path) -> None:
    source = shared / "data/easy_vqa/train"
    asked_of = json.loads((source / "questions.json").read_text())[:40]
    lines = (
        {"image": f"{number}.png", "prompt": question, "completion": answer} for question, answer, number in asked_of
    )
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    given = {"path": str(tmp_path / "rows.jsonl"), "images": str(source / "images")}
    prepared = prepare(parse({"model": str(base_folder), "data": {"train": given, "eval": 0.2}}))
    assert len(prepared.encoded) + len(prepared.held_out) == 40 and prepared.report.images == len(prepared.encoded)
    for row in prepared.encoded:
        answer = prepared.tokenizer.decode([label for label in row.labels if label != IGNORE])
        assert answer.removesuffix("</s>") in (source.parent / "answers.txt").read_text().split()
    batch: dict[str, Tensor] = Collator(prepared.tokenizer, processor=AutoProcessor.from_pretrained(base_folder))(
        prepared.encoded[:8]
    )
    loss, count = SFTLoss(tiny_llava())(batch)
    assert batch["pixel_values"].shape == (8, 3, 16, 16) and torch.isfinite(loss / count)
