"""An assembled model in the hands of the rest: its parts are found, every target gets a gradient, rows with images become batches."""

import json
import sys
from pathlib import Path

import pytest
import torch
import transformers
from towers import clip, convnext, language, picture

import deltaw
from deltaw.cli.main import main
from deltaw.core.attach import adapters
from deltaw.core.parts import find
from deltaw.data.collate import Collator
from deltaw.data.conversation import IMAGE, Example, Message
from deltaw.data.encode import Encoded, Policy, encode
from deltaw.models.assemble import Assembled, assemble
from deltaw.models.base import load_processor, load_tokenizer, read_config
from deltaw.ship.merge import merge_to_folder


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


def test_it_opens_like_any_other_base(made: Assembled, tmp_path: Path) -> None:
    base = deltaw.load_base(str(made.path), dtype="fp32", device=torch.device("cpu"))
    assert base.processor.image_token_id == made.image_token_id and base.max_length == 128
    deltaw.attach(base.model, deltaw.LoRA(rank=2), targets={"language": "all-linear", "projector": "all-linear"})
    with torch.no_grad():
        for parameter in base.model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    deltaw.save(base.model, tmp_path / "adapter")
    merged = merge_to_folder(str(made.path), [(str(tmp_path / "adapter"), 1.0)], tmp_path / "merged", dtype="auto")
    assert merged.effect is not None and merged.effect > 1e-3 > merged.max_logit_difference
    batch = {name: value for name, value in collated(made, tmp_path).items() if name != "labels"}
    again = deltaw.load_base(str(tmp_path / "merged"), dtype="fp32", device=torch.device("cpu"))
    assert again.processor is not None
    torch.testing.assert_close(again.model(**batch).logits, base.model(**batch).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("projector", ["mlp", "linear", "mining"])
def test_plan_needs_no_weights(
    tmp_path: Path, projector: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    detail = convnext(tmp_path / "convnext") if projector == "mining" else None
    bases = clip(tmp_path / "clip"), language(tmp_path / "llama")
    done = assemble(*bases, tmp_path / "out", projector=projector, detail=detail, weights=False)
    words = ["plan", f"model={done.path}", "adapter.parts.language=lora", "adapter.parts.projector=full", "--json"]
    monkeypatch.setattr(sys, "argv", ["deltaw", *words])
    with pytest.raises(SystemExit) as caught:
        main()
    out, err = capsys.readouterr()
    assert caught.value.code in (0, None), err
    record = json.loads(out)
    assert record["parameters"]["total"] == done.parameters["total"]
    assert record["parameters"]["trainable"] > done.parameters["projector"] and record["memory"]["peak_bytes"] > 0


def test_it_is_trained_in_stages_and_answers(made: Assembled, tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"prompt": "Hi", "completion": "Hello."}]
    for seed in range(5):
        picture(seed).save(tmp_path / f"{seed}.png")
        asked = {
            "role": "user",
            "content": [{"type": "image", "path": f"{seed}.png"}, {"type": "text", "text": "What?"}],
        }
        rows.append({"messages": [asked, {"role": "assistant", "content": f"Noise {seed}."}]})
    for name, some in (("texts", rows[:1]), ("rows", rows[1:])):
        (tmp_path / f"{name}.json").write_text(json.dumps(some), encoding="utf-8")
    stages = [
        {"name": "align", "adapter": {"parts": {"projector": "full"}}},
        {"name": "instruct", "adapter": {"parts": {"projector": "frozen", "language": "lora", "vision": "lora"}}},
    ]
    train = {"max_steps": 1, "batch_size": 3, "checkpointing": True}
    files = [str(tmp_path / "texts.json"), str(tmp_path / "rows.json")]
    config = {"model": str(made.path), "data": {"train": files, "eval": None}, "train": train, "stages": stages}
    run = deltaw.train({**config, "output": str(tmp_path / "run")}, quiet=True)
    base = deltaw.load_base(str(made.path), dtype="fp32", device=torch.device("cpu"))
    deltaw.load(base.model, str(run.adapter))
    parts = find(base.model)
    assert parts is not None and {parts.of(site.path) for site in adapters(base.model)} == {
        "vision",
        "projector",
        "language",
    }
    prompts = [[{"role": "user", "content": [{"type": "image", "path": str(tmp_path / "0.png")}]}], "Hi"]
    answers = deltaw.generate(base.model, base.tokenizer, prompts, processor=base.processor, max_new_tokens=3)
    assert len(answers) == 2
