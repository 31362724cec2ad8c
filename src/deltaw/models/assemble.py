"""An image-text model made of a vision tower, a projector that is new, and a language model: a folder like that of any base.

    linear   one layer                      tower's tokens → embeddings
    mlp      two, as LLaVA has              transformers' LlavaForConditionalGeneration
    mining   two, after patch info mining   a second tower sees the image larger (Mini-Gemini, arXiv 2403.18814)

config.json, weights (those given are not changed in a bit), tokenizer with a token for images, processor, chat template.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deltaw.core.errors import FileError
from deltaw.core.files import must_be_free, whole_folder
from deltaw.models.base import know_our_own, load_tokenizer, require_transformers, resolve, unreadable
from deltaw.models.ingredients import TOWERS, Ingredients, checked
from deltaw.models.placeholder import IMAGE, add_image_token, rows_for, with_blocks

FEATURES = -1
"""Of the layers that are kept (`deltaw.models.ingredients`), the last is read."""
SHARD = "5GB"


@dataclass(frozen=True)
class Assembled:
    """What was made."""

    path: Path
    projector: str
    parameters: dict[str, int]
    """Of each part; of the whole in `total`."""
    image_tokens: int
    """Positions that an image takes."""
    image_token_id: int
    detail_size: int | None
    """Side in pixels of the picture that the second tower sees."""
    weights: bool
    remarks: list[str] = field(default_factory=list)


def assemble(
    vision: str, language: str, output: str | Path, *, projector: str = "mlp", detail: str | None = None,
    detail_size: int | None = None, seed: int = 0, weights: bool = True,
) -> Assembled:  # fmt: skip
    """Write the folder `output`: an image-text model that `load_base` opens like any other base.

    vision, detail: a folder or hub id of CLIP or SigLIP; of ConvNeXt, for `mining` only. language: as for `load_base`.
    detail_size: pixels on a side for the second tower, 32 to each patch of the first by default. seed: of the projector.
    weights=False writes all but these: enough to plan. Every fault of what was given is told at once, as a UseError;
    FileError for what cannot be read.
    """
    target = Path(output)
    must_be_free(target)
    transformers = require_transformers()
    know_our_own()
    parts = checked(vision, language, projector, detail, detail_size)
    tokenizer, _ = load_tokenizer(language)
    token, rows, dtype = add_image_token(tokenizer), parts.language.vocab_size, parts.language.dtype
    parts.language.vocab_size = rows_for(token, rows)
    config = _config(transformers, parts, projector, token)
    remarks = _told(token, rows, parts.language.vocab_size, tokenizer)
    remarks.append(f"of the tower {parts.vision.num_hidden_layers} layers are kept, the last is never read")
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(config)
    with whole_folder(target) as draft:
        _processor(transformers, parts, tokenizer, config).save_pretrained(draft)
        if weights:
            with torch.random.fork_rng(devices=[]):  # the caller's numbers stay as they were
                torch.manual_seed(seed)
                remarks += _fill(transformers, model, parts, (vision, language, detail), dtype or torch.float32)
            model.save_pretrained(draft, max_shard_size=SHARD)
        config.architectures, config.dtype = [type(model).__name__], dtype
        config.save_pretrained(draft)
    counts = _counts(model)
    return Assembled(target, projector, counts, parts.side**2, token, parts.detail_size, weights, remarks)


def _config(transformers: Any, parts: Ingredients, projector: str, token: int) -> Any:
    options = {
        "vision_config": parts.vision,
        "text_config": parts.language,
        "image_token_index": token,
        "image_seq_length": parts.side**2,
        "vision_feature_layer": FEATURES,
        "vision_feature_select_strategy": "default" if TOWERS[parts.vision.model_type][1] else "full",
        "tie_word_embeddings": parts.language.tie_word_embeddings,
    }
    if projector == "mlp":
        return transformers.LlavaConfig(**options)
    layers = 1 if projector == "linear" else 2
    own = {"projector_layers": layers, "detail_config": parts.detail}
    return transformers.AutoConfig.for_model("deltaw_image_text", **options, **own)


def _processor(transformers: Any, parts: Ingredients, tokenizer: Any, config: Any) -> Any:
    tokenizer.chat_template = with_blocks(tokenizer.chat_template)
    options = {
        "image_processor": parts.pictures,
        "tokenizer": tokenizer,
        "patch_size": parts.vision.patch_size,
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
        "num_additional_image_tokens": TOWERS[parts.vision.model_type][1],
        "image_token": IMAGE,
        "chat_template": tokenizer.chat_template,
    }
    if parts.detail is None:
        return transformers.LlavaProcessor(**options)
    kind = transformers.models.auto.processing_auto.PROCESSOR_MAPPING[type(config)]
    return kind(**options, detail=_larger(parts))


def _larger(parts: Ingredients) -> dict[str, Any]:
    """What the tower's image processor is told to make the picture of the second: the same cut, at another size."""

    def scaled(size: Any) -> dict[str, int]:
        return {key: round(value * parts.detail_size / parts.vision.image_size) for key, value in size.items() if value}

    sizes = {key: getattr(parts.pictures, key, None) for key in ("size", "crop_size")}
    colours = {key: list(getattr(parts.detail_pictures, key)) for key in ("image_mean", "image_std")}
    return {key: scaled(dict(size)) for key, size in sizes.items() if size} | colours


def _fill(
    transformers: Any, model: Any, parts: Ingredients, names: tuple[str, str, str | None], dtype: torch.dtype
) -> list[str]:
    """The weights of the bases in the place of the outline's, and a new projector. Returns what is to be told."""
    vision, language, detail = names
    body = model.model
    _fresh(body.multi_modal_projector, dtype)
    text = _loaded(transformers.AutoModelForCausalLM, language)
    _grown(text, parts.language.vocab_size)
    body.language_model = text.base_model
    tower = _loaded(getattr(transformers, TOWERS[parts.vision.model_type][0]), vision, parts.vision)
    if detail is None:
        body.vision_tower = tower
    else:
        body.vision_tower.tower = tower
        body.vision_tower.detail = _loaded(transformers.ConvNextModel, detail)
    model.lm_head = text.get_output_embeddings()
    model.tie_weights()
    model.generation_config = text.generation_config
    kinds = {name: str(next(m.parameters()).dtype).removeprefix("torch.") for name, m in body.named_children()}
    told = ", ".join(f"{name} {kind}" for name, kind in kinds.items())
    return [f"every part keeps the dtype of its files: {told}"] if len(set(kinds.values())) > 1 else []


def _loaded(kind: Any, name: str, config: Any = None) -> Any:
    """A base in the dtype of its files, whole."""
    options = {} if config is None else {"config": config}
    try:
        model, info = kind.from_pretrained(resolve(name), dtype="auto", output_loading_info=True, **options)
    except Exception as error:
        raise unreadable(name, error) from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise FileError(f"{name!r} lacks {len(missing)} of the weights of a {kind.__name__}, {missing[0]} among them")
    return model


def _grown(model: Any, rows: int) -> None:
    """Rows for new tokens at the end of the embeddings and of the head: the mean of all, which is never the likeliest word."""
    tables = model.get_input_embeddings, model.get_output_embeddings
    before, means = len(tables[0]().weight), [table().weight.detach().float().mean(0) for table in tables]
    if rows == before:
        return
    model.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        for table, mean in zip(tables, means, strict=True):
            table().weight[before:] = mean.to(table().weight.dtype)


def _fresh(projector: nn.Module, dtype: torch.dtype) -> None:
    """Start values as torch gives them to its layers."""
    projector.to_empty(device="cpu").to(dtype)
    for module in projector.modules():
        if isinstance(module, (nn.Linear, nn.LayerNorm)):
            module.reset_parameters()


def _told(token: int, before: int, after: int, tokenizer: Any) -> list[str]:
    told = []
    if after > before:
        told.append(f"{IMAGE} is token {token}: the embeddings grew from {before} to {after} rows, a multiple of 64")
    else:
        told.append(f"{IMAGE} is token {token}, one of {before} rows that the embeddings have already")
    if tokenizer.chat_template is None:
        told.append("the language model has no chat template: rows of chats need one of their own (data.template)")
    return told


def _counts(model: Any) -> dict[str, int]:
    body = model.model
    parts = {"vision": body.vision_tower, "projector": body.multi_modal_projector, "language": body.language_model}
    return {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()} | {
        "total": sum(p.numel() for p in model.parameters())
    }
