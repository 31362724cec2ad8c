"""The pieces of the digits experiment, all made here: images and questions, a CLIP tower, a small language model.

Images are scikit-learn's handwritten digits (1,797, 8 × 8, real scans), drawn at 16 × 16. The language model learns four
questions about number words from text and never sees an image; two more questions are new to it until stage 2.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import deltaw
from benchmarks._vqa import Asked

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
SIZE, PATCH = 16, 4
TRAIN, VALID = 1200, 100


def _yes(said: bool) -> str:
    return "yes" if said else "no"


KNOWN: dict[str, Callable[[int], str]] = {
    "which digit is this ?": lambda n: WORDS[n],
    "is it odd ?": lambda n: _yes(n % 2 == 1),
    "is it greater than five ?": lambda n: _yes(n > 5),
    "what comes after ?": lambda n: WORDS[n + 1],
}
"""Questions that the language model can answer about a number word."""
NEW: dict[str, Callable[[int], str]] = {
    "is it prime ?": lambda n: _yes(n in (2, 3, 5, 7)),
    "what comes before ?": lambda n: WORDS[n - 1] if n else "none",
}
"""Questions of which it knows nothing."""
ALL = {**KNOWN, **NEW}
NAMING = next(iter(KNOWN))
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ ' ' + m.content + ' </s>' }}{% else %}"
    "{{ m.content + ' :' }}{% endif %}{% endfor %}"
)


@dataclass(frozen=True)
class Digits:
    """Images [N, 8, 8] of 0 to 16 and what they show; the lists are numbers of images, none is in two of them."""

    images: np.ndarray
    shown: np.ndarray
    train: list[int]
    valid: list[int]
    test: list[int]


def digits() -> Digits:
    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.images)).tolist()
    return Digits(found.images, found.target, order[:TRAIN], order[TRAIN : TRAIN + VALID], order[TRAIN + VALID :])


def drawn(image: np.ndarray) -> Image.Image:
    """8 × 8 of 0 to 16 → a picture of SIZE × SIZE."""
    grey = Image.fromarray((image * 255 / 16).round().astype(np.uint8))
    return grey.resize((SIZE, SIZE), Image.Resampling.BILINEAR).convert("RGB")


def write_images(data: Digits, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(data.images):
        drawn(image).save(folder / f"{number}.png")


def asked(data: Digits, numbers: Sequence[int], questions: Sequence[str]) -> list[Asked]:
    """Every question about every image."""
    return [(f"images/{n}.png", question, ALL[question](int(data.shown[n]))) for n in numbers for question in questions]


def image_processor() -> CLIPImageProcessorPil:
    half = [0.5, 0.5, 0.5]
    size = {"height": SIZE, "width": SIZE}
    return CLIPImageProcessorPil(size=size, crop_size=size, do_center_crop=False, image_mean=half, image_std=half)


def tokenizer() -> PreTrainedTokenizerFast:
    """A word is a token."""
    special = ["<pad>", "<unk>", "</s>", "<image>"]
    words = sorted({*WORDS, "none", "yes", "no", ":", *(word for question in ALL for word in question.split())})
    model = models.WordLevel({word: n for n, word in enumerate([*special, *words])}, unk_token="<unk>")
    inner = Tokenizer(model)
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>", eos_token="</s>", chat_template=TEMPLATE,
        extra_special_tokens=["<image>"], clean_up_tokenization_spaces=False,
    )  # fmt: skip


def tower(data: Digits, seed: int, steps: int) -> tuple[CLIPModel, float]:
    """CLIP trained on digits and their captions; and the share of test images whose caption it finds."""
    torch.manual_seed(seed)
    size = {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 4}
    vision = {**size, "num_hidden_layers": 3, "image_size": SIZE, "patch_size": PATCH}
    places = {"max_position_embeddings": 4, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    text = {**size, "num_hidden_layers": 1, "vocab_size": 16, **places}
    model = CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=32))
    captions = torch.tensor([[0, 2 + n, 1] for n in range(10)])
    pixels, shown = _pixels(data), torch.from_numpy(data.shown)
    order = random.Random(seed)

    def loss() -> Tensor:
        chosen = order.sample(data.train, 64)
        found = model(input_ids=captions, pixel_values=pixels[chosen]).logits_per_image
        return nn.functional.cross_entropy(found, shown[chosen])

    descend(model, loss, steps, 1e-3)
    with torch.no_grad():
        found = model.eval()(input_ids=captions, pixel_values=pixels[data.test]).logits_per_image.argmax(1)
    return model, float((found == shown[data.test]).float().mean())


def _pixels(data: Digits) -> Tensor:
    return image_processor()([drawn(image) for image in data.images], return_tensors="pt").pixel_values


def language(words: PreTrainedTokenizerFast, seed: int, steps: int) -> tuple[LlamaForCausalLM, float]:
    """A Llama that knows four facts about each number word, from text alone; and its last loss."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=words.pad_token_id, bos_token_id=None,
        eos_token_id=words.eos_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    facts = [(f"{WORDS[n]}\n{q} :", f" {answer(n)} </s>") for n in range(10) for q, answer in KNOWN.items()]
    batch = words([question + answer for question, answer in facts], padding=True, return_tensors="pt")
    prompts = torch.tensor([len(words(question).input_ids) for question, _ in facts])
    places = torch.arange(batch.input_ids.shape[1])
    labels = batch.input_ids.masked_fill((places < prompts[:, None]) | (batch.attention_mask == 0), -100)

    def loss() -> Tensor:
        return model(batch.input_ids, batch.attention_mask, labels=labels).loss

    return model, descend(model, loss, steps, 2e-3)


def assembled(data: Digits, seed: int, folder: Path, steps: tuple[int, int] = (350, 300)) -> dict[str, float]:
    """Tower and language model joined by a new projector: folder/base. Returns how good its parts are. steps: of training each."""
    words = tokenizer()
    clip, found = tower(data, seed, steps[0])
    llama, loss = language(words, seed, steps[1])
    for part, model, beside in (("tower", clip, image_processor()), ("language", llama, words)):
        model.save_pretrained(folder / part)
        beside.save_pretrained(folder / part)
    deltaw.assemble(str(folder / "tower"), str(folder / "language"), folder / "base", projector="mlp", seed=seed)
    return {"tower": found, "language": loss}


def descend(model: nn.Module, loss: Callable[[], Tensor], steps: int, rate: float) -> float:
    """Train all weights with AdamW at one cycle of rates; the last loss."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    last: Any = None
    for _ in range(steps):
        last = loss()
        last.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval().requires_grad_(False)
    return float(last.detach())
