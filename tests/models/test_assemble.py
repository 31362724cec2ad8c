"""Image-text models put together: what was given is in them unchanged, they open like any base, and faults are told at once."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from towers import LANGUAGES, clip, convnext, language, picture, siglip

from deltaw.core.errors import DeltawError, FileError, UseError
from deltaw.models.assemble import assemble
from deltaw.models.base import read_config

CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Hello there"},
    {"role": "assistant", "content": "Hello"},
]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("given")
    found = {"clip": clip(root / "clip"), "siglip": siglip(root / "siglip"), "detail": convnext(root / "convnext")}
    return found | {"whole": clip(root / "whole", whole=True), "llama": language(root / "llama")}


def opened(folder: Path, **options: Any) -> Any:
    """The model, through transformers' own classes; they know ours because its configuration was read by us."""
    read_config(str(folder))
    model, info = transformers.AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True, **options)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return model.eval()


def batch(folder: Path, count: int = 2) -> Any:
    read_config(str(folder))
    processor = transformers.AutoProcessor.from_pretrained(folder)
    block = {"type": "text", "text": "what is it?"}
    text = processor.apply_chat_template([{"role": "user", "content": [{"type": "image"}, block]}], tokenize=False)
    images = [picture(seed) for seed in range(count)]
    return processor(images=images, text=[text] * count, return_tensors="pt", add_special_tokens=False)


@pytest.mark.parametrize("tower", ["clip", "whole", "siglip"])
@pytest.mark.parametrize("projector", ["linear", "mlp", "mining"])
def test_weights_of_the_bases_are_those_of_their_files(
    given: dict[str, str], tmp_path: Path, tower: str, projector: str
) -> None:
    detail = given["detail"] if projector == "mining" else None
    done = assemble(given[tower], given["llama"], tmp_path / "out", projector=projector, detail=detail)
    body = opened(done.path).model
    text = transformers.AutoModelForCausalLM.from_pretrained(given["llama"])
    for name, weight in text.model.state_dict().items():
        assert torch.equal(body.language_model.state_dict()[name][: len(weight)], weight), name
    low = body.vision_tower.tower if detail else body.vision_tower
    kind = transformers.SiglipVisionModel if tower == "siglip" else transformers.CLIPVisionModel
    there = kind.from_pretrained(given[tower]).state_dict()
    assert {name for name in there if not name.startswith(("head.", "encoder.layers.2."))} == set(low.state_dict())
    assert all(torch.equal(weight, there[name]) for name, weight in low.state_dict().items())
    if detail:
        second = transformers.ConvNextModel.from_pretrained(detail).state_dict()
        assert all(torch.equal(weight, second[name]) for name, weight in body.vision_tower.detail.state_dict().items())
    assert done.parameters["total"] == sum(p.numel() for p in opened(done.path).parameters())


def test_an_untied_head_is_kept_too(given: dict[str, str], tmp_path: Path) -> None:
    untied = language(tmp_path / "untied", tie_word_embeddings=False)
    done = assemble(given["clip"], untied, tmp_path / "out")
    head, there = (
        opened(done.path).lm_head.weight,
        transformers.AutoModelForCausalLM.from_pretrained(untied).lm_head.weight,
    )
    assert torch.equal(head[: len(there)], there) and not torch.equal(
        head, opened(done.path).get_input_embeddings().weight
    )


@pytest.mark.parametrize("kind", LANGUAGES)
def test_of_text_it_says_what_the_language_model_says(given: dict[str, str], tmp_path: Path, kind: str) -> None:
    base = language(tmp_path / "base", kind)
    done = assemble(given["clip"], base, tmp_path / "out", projector="linear")
    ids = torch.tensor([[5, 77, 1234, 900]])
    expected = transformers.AutoModelForCausalLM.from_pretrained(base).eval()(ids).logits
    assert torch.equal(opened(done.path)(ids).logits[..., :4096], expected)


def test_features_go_where_the_image_tokens_are(given: dict[str, str], tmp_path: Path) -> None:
    done = assemble(given["clip"], given["llama"], tmp_path / "out", projector="mlp")
    model, inputs = opened(done.path), batch(done.path)
    body = model.model
    tower, projector = transformers.CLIPVisionModel.from_pretrained(given["clip"]).eval(), body.multi_modal_projector
    seen = tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2][:, 1:]
    made = projector.linear_2(torch.nn.functional.gelu(projector.linear_1(seen)))
    embedded = model.get_input_embeddings()(inputs["input_ids"]).clone()
    for row, ids in enumerate(inputs["input_ids"]):
        embedded[row, ids == done.image_token_id] = made[row]
    expected = model.lm_head(body.language_model(inputs_embeds=embedded).last_hidden_state)
    assert (inputs["input_ids"] == done.image_token_id).sum() == 2 * done.image_tokens == 32
    torch.testing.assert_close(model(**inputs).logits, expected)


def test_one_layer_is_one_layer(given: dict[str, str], tmp_path: Path) -> None:
    done = assemble(given["siglip"], given["llama"], tmp_path / "out", projector="linear")
    model, inputs = opened(done.path), batch(done.path)
    tower = transformers.SiglipVisionModel.from_pretrained(given["siglip"]).eval()
    seen = tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2]
    linear = model.model.multi_modal_projector.linear_1
    expected = seen @ linear.weight.T + linear.bias
    torch.testing.assert_close(
        torch.stack(model.model.get_image_features(inputs["pixel_values"]).pooler_output), expected
    )
    assert done.parameters["projector"] == 32 * 32 + 32


def test_the_projector_comes_from_the_seed(given: dict[str, str], tmp_path: Path) -> None:
    weights = []
    for number, seed in enumerate([0, 0, 1]):
        before = torch.get_rng_state()
        done = assemble(given["clip"], given["llama"], tmp_path / str(number), seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        weights.append(opened(done.path).model.multi_modal_projector.linear_1.weight)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_a_free_row_is_taken_before_the_embeddings_grow(given: dict[str, str], tmp_path: Path) -> None:
    wide = assemble(given["clip"], language(tmp_path / "wide", vocab_size=4200), tmp_path / "a")
    assert wide.image_token_id == 4096 and "rows that the embeddings have already" in wide.remarks[0]
    assert read_config(str(wide.path)).text_config.vocab_size == 4200
    full = assemble(given["clip"], given["llama"], tmp_path / "b")
    assert "grew from 4096 to 4160 rows" in full.remarks[0]
    model = opened(full.path)
    table = model.get_input_embeddings().weight
    torch.testing.assert_close(table[4096:], table[:4096].mean(0).expand(64, -1))
    assert model(torch.tensor([[5, 6]])).logits[0, :, 4096:].amax() < model(torch.tensor([[5, 6]])).logits.amax()


def test_a_token_that_is_there_is_used(given: dict[str, str], tmp_path: Path) -> None:
    base = language(tmp_path / "base", vocab_size=4200)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<other>", "<image>"], special_tokens=True)
    tokenizer.save_pretrained(base)
    assert assemble(given["clip"], base, tmp_path / "out").image_token_id == 4097


def test_dtypes_are_kept_and_told(given: dict[str, str], tmp_path: Path) -> None:
    done = assemble(given["clip"], "tiny", tmp_path / "out")
    assert "vision_tower float32, multi_modal_projector bfloat16, language_model bfloat16" in done.remarks[-1]
    assert "of the tower 2 layers are kept" in done.remarks[1]
    assert read_config(str(done.path)).dtype is torch.bfloat16
    written = (done.path / "config.json").read_text(encoding="utf-8")
    assert str(Path(given["clip"]).parent) not in written


def test_large_weights_are_written_in_shards(
    given: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deltaw.models.assemble.SHARD", "200KB")
    done = assemble(given["clip"], given["llama"], tmp_path / "out")
    assert len(list(done.path.glob("model-*.safetensors"))) > 1
    opened(done.path)


def test_the_template_takes_blocks_and_renders_text_as_before(given: dict[str, str], tmp_path: Path) -> None:
    done = assemble(given["clip"], "tiny", tmp_path / "out")
    before = transformers.AutoTokenizer.from_pretrained(read_config("tiny")._name_or_path)
    processor = transformers.AutoProcessor.from_pretrained(done.path)
    for options in ({}, {"add_generation_prompt": True}, {"tools": [{"type": "function", "function": {"name": "f"}}]}):
        for made in (processor, processor.tokenizer):
            expected = before.apply_chat_template(CHAT, tokenize=False, **options)
            assert made.apply_chat_template(CHAT, tokenize=False, **options) == expected
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}
    calls = [*CHAT[:2], {**call, "content": ""}, CHAT[2]]
    assert processor.apply_chat_template(calls, tokenize=False) == before.apply_chat_template(calls, tokenize=False)
    image = {"type": "image"}
    blocks = [{"role": "user", "content": [image, {"type": "text", "text": " and "}, image]}]
    text = [{"role": "user", "content": "<image> and <image>"}]
    rendered = processor.apply_chat_template(blocks, tokenize=False, add_generation_prompt=True)
    assert rendered == before.apply_chat_template(text, tokenize=False, add_generation_prompt=True)


@pytest.mark.parametrize(
    "template", ["\n hello {{ messages|length }}", "{%- for m in messages %}\n{{ m.content }}{% endfor %}"]
)
def test_no_template_is_changed_at_its_beginning(given: dict[str, str], tmp_path: Path, template: str) -> None:
    base = language(tmp_path / "base")
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(base)
    expected = tokenizer.apply_chat_template(CHAT, tokenize=False)
    done = assemble(given["clip"], base, tmp_path / "out", weights=False)
    made = transformers.AutoProcessor.from_pretrained(done.path)
    assert made.apply_chat_template(CHAT, tokenize=False) == expected


def test_a_base_without_a_template_is_told(given: dict[str, str], tmp_path: Path) -> None:
    base = language(tmp_path / "base")
    (Path(base) / "chat_template.jinja").unlink()
    done = assemble(given["clip"], base, tmp_path / "out", weights=False)
    assert "no chat template" in done.remarks[1] and not (done.path / "chat_template.jinja").exists()


def test_faults_are_told_together(given: dict[str, str], tmp_path: Path) -> None:
    bert = tmp_path / "bert"
    transformers.BertConfig(hidden_size=32, num_attention_heads=4).save_pretrained(bert)
    with pytest.raises(UseError) as caught:
        assemble(str(bert), str(bert), tmp_path / "out", projector="minning", detail=str(bert))
    text = str(caught.value)
    assert "did you mean 'mining'" in text and "has no tower of CLIP or SigLIP" in text
    assert "language" in text and "is a 'bert'" in text and "expected a ConvNeXt" in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"projector": "mining"}, "mining needs a second tower"),
        ({"detail": "detail"}, "'mlp' reads one tower"),
        ({"projector": "linear", "detail_size": 128}, "'linear' reads one tower"),
        ({"projector": "mining", "detail": "detail", "detail_size": 100}, "give a multiple of 16"),
    ],
)
def test_detail_is_for_mining(given: dict[str, str], tmp_path: Path, options: dict[str, Any], says: str) -> None:
    chosen = {**options, **({"detail": given["detail"]} if "detail" in options else {})}
    with pytest.raises(UseError, match=says):
        assemble(given["clip"], given["llama"], tmp_path / "out", **chosen)


def test_sizes_must_fit(given: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(UseError, match="makes 24 x 24 pixels of a picture of 40 x 60, its tower reads 16 x 16"):
        assemble(clip(tmp_path / "other", size=24), given["llama"], tmp_path / "out")
    with pytest.raises(UseError, match=r"an image takes 16 positions, .* reads 16"):
        assemble(given["clip"], language(tmp_path / "short", max_position_embeddings=16), tmp_path / "out")
    odd = Path(siglip(tmp_path / "odd"))
    record = json.loads((odd / "config.json").read_text(encoding="utf-8"))
    (odd / "config.json").write_text(json.dumps({**record, "patch_size": 5}), encoding="utf-8")
    with pytest.raises(UseError, match="16 pixels is no multiple of its patch of 5"):
        assemble(str(odd), given["llama"], tmp_path / "out", projector="mining", detail=given["detail"])


def test_what_cannot_be_read_is_named(given: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(DeltawError, match="no base 'nowhere'"):
        assemble("nowhere", given["llama"], tmp_path / "out")
    bare = Path(siglip(tmp_path / "bare"))
    (bare / "preprocessor_config.json").unlink()
    with pytest.raises(FileError, match=r"its preprocessor_config\.json says how"):
        assemble(str(bare), given["llama"], tmp_path / "out")
    empty = Path(siglip(tmp_path / "empty"))
    (empty / "model.safetensors").unlink()
    with pytest.raises(FileError, match="cannot be loaded"):
        assemble(str(empty), given["llama"], tmp_path / "out")
    part = Path(siglip(tmp_path / "part"))
    model = transformers.SiglipVisionModel.from_pretrained(part)
    kept = {name: weight for name, weight in model.state_dict().items() if "layers.1" not in name}
    model.save_pretrained(part, state_dict=kept)
    with pytest.raises(FileError, match="lacks 16 of the weights of a SiglipVisionModel"):
        assemble(str(part), given["llama"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nothing_is_written_over(given: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(UseError, match="exists and is not an empty folder"):
        assemble(given["clip"], given["llama"], tmp_path / "out")


def test_gemma_with_clip_and_convnext_has_the_size_of_mini_gemini(tmp_path: Path) -> None:
    """Gemma-2B, CLIP ViT-L/14-336, ConvNeXt-L: their configurations are enough, nothing of that size is held in memory."""
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    transformers.CLIPVisionConfig(**vision, image_size=336, patch_size=14).save_pretrained(tmp_path / "clip")
    crop = {"height": 336, "width": 336}
    transformers.CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size=crop).save_pretrained(tmp_path / "clip")
    transformers.ConvNextConfig(depths=[3, 3, 27, 3], hidden_sizes=[192, 384, 768, 1536]).save_pretrained(
        tmp_path / "conv"
    )
    transformers.ConvNextImageProcessorPil().save_pretrained(tmp_path / "conv")
    transformers.AutoTokenizer.from_pretrained(read_config("tiny")._name_or_path).save_pretrained(tmp_path / "gemma")
    transformers.GemmaConfig(
        hidden_size=2048, num_hidden_layers=18, num_attention_heads=8, num_key_value_heads=1, head_dim=256,
        intermediate_size=16384, vocab_size=256000, dtype="bfloat16",
    ).save_pretrained(tmp_path / "gemma")  # fmt: skip
    done = assemble(
        str(tmp_path / "clip"), str(tmp_path / "gemma"), tmp_path / "out", projector="mining",
        detail=str(tmp_path / "conv"), weights=False,
    )  # fmt: skip
    clip_size, convnext_size, layers = (
        303_507_456 - 12_596_224,  # its last layer is not kept
        196_230_336,
        1024 * 1024 + 2 * 2880 * 1024 + 3 * 1024 + 2 * (1024 + 2 * 2880),
    )
    assert done.parameters == {
        "vision": clip_size + convnext_size,
        "projector": layers + 1024 * 2048 + 2048 + 2048 * 2048 + 2048,
        "language": 2_506_172_416,
        "total": sum(list(done.parameters.values())[:3]),
    }
    assert done.image_tokens == 576 and done.detail_size == 768
    assert not list(done.path.glob("*.safetensors")) and read_config(str(done.path)).dtype is torch.bfloat16


def test_without_weights_nothing_of_them_is_read(given: dict[str, str], tmp_path: Path) -> None:
    done = assemble(given["clip"], given["llama"], tmp_path / "out", weights=False)
    assert {p.name for p in done.path.iterdir()} == {
        "config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
    }  # fmt: skip
    assert np.isfinite(done.parameters["total"])
