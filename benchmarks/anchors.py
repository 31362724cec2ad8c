"""Published peaks of memory beside what their own stack takes on the meta device: nothing but configurations is read.

    python -m benchmarks anchors

Each row is rehearsed as its source says it was run: PEFT's LoRA on transformers' model, with the loss, dtypes, optimizer and
checkpointing of that stack; bytes of tensors, and no allocator, context or fragments. Where a source leaves conditions
out, they are named and the row is no target. Sources: README files of torchtune, LitGPT (config_hub) and Qwen, 2023 to 2026.
"""

from typing import Any, NamedTuple

import peft
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks._common import keep, parser
from deltaw.models.quantize import layers
from deltaw.planner.memory import weight_bytes
from deltaw.training.meter import Meter, attention
from deltaw.training.outlook import base_weights
from deltaw.training.rehearsal import QuantizedOutline

GiB, GB = 2**30, 10**9
QV = ("q_proj", "v_proj")
VO = ("q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Anchor(NamedTuple):
    source: str
    name: str
    model: str
    published: float
    """Bytes."""
    rows: int
    length: int
    """0: it is not said."""
    targets: tuple[str, ...]
    rank: int
    checkpointing: bool
    loss: str
    """full: logits of all positions, widened; half: kept as they are, widened in pieces; chunked: piece by piece, checkpointed."""
    trained: int
    """Bytes of a trained value with its gradient and the optimizer's states."""
    quantize: str = "none"
    missing: str = ""
    """What its source does not say."""


MODELS: dict[str, dict[str, Any]] = {
    "llama-2-7b": {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32},
    "llama-3.1-8b": {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                     "num_key_value_heads": 8},
    "mistral-7b": {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                   "num_key_value_heads": 8},
    "llama-3.2-1b": {"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
                     "num_key_value_heads": 8},  # tied as published; LitGPT copies the embedding into its head
    "llama-3.2-3b": {"vocab_size": 128256, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28,
                     "num_attention_heads": 24, "num_key_value_heads": 8},
    "qwen-7b": {"vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32},
}  # fmt: skip
LOADED = "what else is there while the checkpoint is quantised: its peak is taken from the start of the process"
TABLE = "LitGPT tables of 2023, A100-40G"
LIT, TUNE, QWEN = "LitGPT config_hub, A10G", "torchtune README, RTX 4090", "Qwen README, A100-80G"
ANCHORS = (
    Anchor(TUNE, "LoRA r 8, 2 × 2048", "llama-3.1-8b", 16.2 * GiB, 2, 2048, VO, 8, True, "chunked", 8),
    Anchor(TUNE, "QLoRA r 8, 2 × 2048", "llama-3.1-8b", 7.4 * GiB, 2, 2048, VO, 8, True, "chunked", 8, "nf4-double"),
    Anchor(LIT, "LoRA r 32, 2 × 512", "llama-2-7b", 19.77 * GB, 2, 512, QV, 32, False, "half", 8),
    Anchor(LIT, "QLoRA r 32, 2 × 512", "llama-2-7b", 13.68 * GB, 2, 512, QV, 32, False, "half", 8, "nf4", LOADED),
    Anchor(LIT, "LoRA r 32, 1 × 512", "llama-3.1-8b", 19.73 * GB, 1, 512, QV, 32, False, "half", 8),
    Anchor(LIT, "QLoRA r 32, 2 × 512", "llama-3.1-8b", 17.41 * GB, 2, 512, QV, 32, False, "half", 8, "nf4", LOADED),
    Anchor(LIT, "LoRA r 32, 2 × 512", "mistral-7b", 20.66 * GB, 2, 512, QV, 32, False, "half", 8),
    Anchor(LIT, "QLoRA r 32, 2 × 512", "mistral-7b", 14.29 * GB, 2, 512, QV, 32, False, "half", 8, "nf4", LOADED),
    Anchor(LIT, "LoRA r 32, 1 × 512", "llama-3.2-1b", 4.49 * GB, 1, 512, QV, 32, False, "half", 8),
    Anchor(LIT, "LoRA r 32, 1 × 512", "llama-3.2-3b", 9.67 * GB, 1, 512, QV, 32, False, "half", 8),
    Anchor(TABLE, "LoRA r 8, 1 × 1304", "llama-2-7b", 21.30 * GB, 1, 1304, QV, 8, False, "half", 8),
    Anchor(TABLE, "LoRA r 8, 2 × 1304", "llama-2-7b", 29.07 * GB, 2, 1304, QV, 8, False, "half", 8),
    Anchor(TABLE, "QLoRA r 8, 1 × 1304", "llama-2-7b", 14.14 * GB, 1, 1304, QV, 8, False, "half", 8, "nf4", LOADED),
    *(
        Anchor(QWEN, f"LoRA r 64, 1 × {n}", "qwen-7b", gb * GB, 1, n, ALL, 64, True, "full", 16)
        for n, gb in ((256, 20.1), (512, 20.4), (1024, 21.5), (2048, 23.8), (4096, 29.7), (8192, 36.6))
    ),
    *(
        Anchor("torchtune tutorials", name, "llama-2-7b", gb * GB, 2, 0, t, r, True, "chunked", 8, q,
               "lengths of the rows, reserved or allocated")
        for name, gb, t, r, q in (
            ("LoRA r 8 on q, v", 15.57, QV, 8, "none"), ("LoRA r 8 on all", 15.87, ALL, 8, "none"),
            ("LoRA r 64 on q, v", 15.86, QV, 64, "none"), ("LoRA r 64 on all", 17.04, ALL, 64, "none"),
            ("QLoRA r 8 on q, v", 9.29, QV, 8, "nf4"),
        )
    ),
    *(
        Anchor("LLaMA-Factory wiki, 2024", name, "llama-2-7b", gb * GB, 4, 0, ALL, 8, True, "full", 16, q, "card, versions, checkpointing")
        for name, gb, q in (
            ("LoRA r 8, 4 × 1024", 18, "none"), ("LoRA r 8, 4 × 1024, FlashAttention", 17, "none"),
            ("QLoRA r 8, 4 × 1024", 9, "nf4"),
        )
    ),
    Anchor(QWEN, "Q-LoRA r 64, 1 × 2048", "qwen-7b", 13.9 * GB, 1, 0, ALL, 64, True, "full", 16, "gptq", "the bytes of its GPTQ files"),
)  # fmt: skip


def loss_of(model: Any, ids: Tensor, kind: str) -> Tensor:
    hidden = model.base_model.model.model(input_ids=ids, use_cache=False)[0]
    head, labels = model.get_output_embeddings(), ids[:, 1:].flatten()

    def part(rows: Tensor, wanted: Tensor) -> Tensor:
        return F.cross_entropy(head(rows).float(), wanted, reduction="sum")

    if kind == "chunked":
        pieces = zip(hidden[:, :-1].flatten(0, 1).chunk(8), labels.chunk(8), strict=True)
        return torch.stack([checkpoint(part, *piece, use_reentrant=False) for piece in pieces]).sum()
    logits = head(hidden)
    if kind == "full":
        return F.cross_entropy(logits.float()[:, :-1].flatten(0, 1), labels)
    pieces = zip(logits[:, :-1].flatten(0, 1).split(128), labels.split(128), strict=True)
    return torch.stack([F.cross_entropy(rows, wanted, reduction="sum") for rows, wanted in pieces]).sum()


def peak(anchor: Anchor) -> int:
    """Bytes of tensors at most, in a step of the stack that was measured."""
    heads = {"num_attention_heads": 32, "tie_word_embeddings": False, "use_cache": False}
    config = LlamaConfig(**{**heads, **MODELS[anchor.model]})
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config).to(torch.bfloat16).requires_grad_(False)
        base = weight_bytes(base_weights(model), 2, anchor.quantize)
        if anchor.quantize != "none":
            for layer in layers(model):
                layer.__class__ = QuantizedOutline
        lora = peft.LoraConfig(r=anchor.rank, lora_alpha=2 * anchor.rank, target_modules=list(anchor.targets))
        model = peft.get_peft_model(model, lora, autocast_adapter_dtype=anchor.trained == 16)
    model.train()
    if anchor.checkpointing:
        model.base_model.model.activation_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    trained = [p for p in model.parameters() if p.requires_grad]
    size = sum(p.numel() for p in trained)
    ids = torch.empty(anchor.rows, anchor.length, dtype=torch.int64, device="meta")
    with attention("cuda"), Meter(model) as meter:
        loss_of(model, ids, anchor.loss).backward()
    gradient = trained[0].element_size()
    return base + size * (anchor.trained - gradient) + max(meter.peak, gradient * size)


def main(arguments: list[str]) -> None:
    options = parser(__doc__)
    options.add_argument("--dry", action="store_true")
    args = options.parse_args(arguments)
    found = []
    for anchor in ANCHORS:
        if not anchor.length:  # nobody says what was run: listed, and not rehearsed
            found.append({**anchor._asdict(), "predicted": None, "error": None})
            continue
        ours = peak(anchor)
        error = ours / anchor.published - 1
        found.append({**anchor._asdict(), "predicted": ours, "error": round(error, 4)})
        print(
            f"{anchor.source}: {anchor.model} {anchor.name}: {ours / GB:.2f} of {anchor.published / GB:.2f} GB, {error:+.1%}",
            flush=True,
        )
    if not args.dry:
        keep("anchors", {"rows": found})
