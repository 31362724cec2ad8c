"""What training Gemma-2B with CLIP ViT-L/14-336 and ConvNeXt-L takes, by stage and method, and what of it fits in 24 GB.

No weights: configurations are assembled (`deltaw assemble --no-weights`), and a step of rows with one image and TEXT tokens
is rehearsed as `deltaw plan` does. Nothing is measured here.

    python -m benchmarks mini_gemini [--rows 1 4] [--device rtx4090-24g]
"""

import json
import random
import tempfile
from pathlib import Path
from typing import Any

from benchmarks._common import keep, parser
from deltaw.config.parse import parse
from deltaw.models.assemble import assemble
from deltaw.models.base import TINY, require_transformers
from deltaw.planner.devices import named
from deltaw.training.forecast import Looks
from deltaw.training.prepare import prepare

TEXT = 512
LORA = {"method": "lora", "rank": 64, "targets": "all-linear"}
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "1 align: projector": ("none", {"projector": "full"}),
    "2 instruct: LoRA r64 on the language model": ("none", {"language": LORA}),
    "2 instruct: LoRA r64, projector trained too": ("none", {"language": LORA, "projector": "full"}),
    "2 instruct: LoRA r64 on vision, projector and language": (
        "none", {"vision": LORA, "projector": LORA, "language": LORA}
    ),
    "2 instruct: QLoRA r64 on the language model": ("nf4", {"language": LORA}),
    "2 instruct: everything of the language model, and the projector": ("none", {"language": "full", "projector": "full"}),
}  # fmt: skip


def bases(folder: Path) -> dict[str, str]:
    """Configurations as published, with the bundled base's tokenizer: its rows are Gemma's, its words are not."""
    transformers = require_transformers()
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    transformers.CLIPVisionConfig(**vision, image_size=336, patch_size=14).save_pretrained(folder / "clip")
    crop = {"height": 336, "width": 336}
    transformers.CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size=crop).save_pretrained(folder / "clip")
    sizes = {"depths": [3, 3, 27, 3], "hidden_sizes": [192, 384, 768, 1536]}
    transformers.ConvNextConfig(**sizes).save_pretrained(folder / "convnext")
    transformers.ConvNextImageProcessorPil().save_pretrained(folder / "convnext")
    transformers.GemmaConfig(
        hidden_size=2048, num_hidden_layers=18, num_attention_heads=8, num_key_value_heads=1, head_dim=256,
        intermediate_size=16384, vocab_size=256000, dtype="bfloat16",
    ).save_pretrained(folder / "gemma")  # fmt: skip
    transformers.AutoTokenizer.from_pretrained(TINY).save_pretrained(folder / "gemma")
    return {"vision": str(folder / "clip"), "language": str(folder / "gemma"), "detail": str(folder / "convnext")}


def rows(folder: Path, count: int) -> Path:
    """Rows of one image and an answer of TEXT tokens and some more."""
    from PIL import Image

    Image.effect_noise((640, 480), 60).convert("RGB").save(folder / "image.png")
    words = random.Random(0)
    answer = " ".join(words.choice(["red", "blue", "one", "two"]) for _ in range(TEXT))
    row = {
        "image": "image.png",
        "conversations": [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": answer}],
    }
    (folder / "rows.json").write_text(json.dumps([row] * count), encoding="utf-8")
    return folder / "rows.json"


def lines(result: dict[str, Any]) -> list[str]:
    """The result as a table for docs/multimodal.md."""
    head = ["weights", "trained tensors", "optimizer", "gradients", "activations and the rest", "at most"]
    found = [
        "| stage and method | rows | " + " | ".join(head) + " | fits |",
        "|---|" + "---:|" * (len(head) + 1) + "---|",
    ]
    for arm in result["arms"]:
        m = {key.removesuffix("_bytes"): value / 1e9 for key, value in arm["memory"].items()}
        rest = m["peak"] - sum(m[key] for key in ("weights", "adapters", "optimizer", "gradients"))
        sizes = m["weights"], m["adapters"], m["optimizer"], m["gradients"], rest, m["peak"]
        cells = [arm["arm"], str(arm["rows"]), *(f"{size:.1f}" for size in sizes), "yes" if arm["fits"] else "no"]
        found.append(f"| {' | '.join(cells)} |")
    return found


def main(arguments: list[str]) -> None:
    options = parser(__doc__)
    options.add_argument("--rows", type=int, nargs="+", default=[1, 4])
    options.add_argument("--device", default="rtx4090-24g")
    given = options.parse_args(arguments)
    with tempfile.TemporaryDirectory() as there:
        keep("mini_gemini", table(Path(there), given.rows, given.device))


def table(folder: Path, counts: list[int], device: str) -> dict[str, Any]:
    """Every arm with every number of rows in a batch."""
    made = assemble(**bases(folder), output=folder / "base", projector="mining", weights=False)
    found = []
    for arm, (quantize, parts) in ARMS.items():
        for count in counts:
            config = parse(
                {
                    "model": str(made.path), "data": {"train": str(rows(folder, 8)), "max_length": 2048, "eval": None},
                    "adapter": {"parts": parts}, "quantize": quantize, "output": str(folder / "run"),
                    "train": {"batch_size": count, "checkpointing": True, "dtype": "bf16"},
                }
            )  # fmt: skip
            data = prepare(config)
            one = Looks().forecast(config, data, named(device, None), None)
            found.append(
                {
                    "arm": arm, "rows": count, "tokens": one.batch.length, "fits": one.fits,
                    "memory": one.memory.record(), "warnings": one.warnings, "notes": list(one.notes),
                }
            )  # fmt: skip
    return {"device": device, "parameters": made.parameters, "image_tokens": made.image_tokens, "arms": found}
