"""A training step beside the frozen base and PEFT: time, and bytes kept for the backward pass.

    python -m benchmarks step [--dtypes fp32] [--shapes 4x256,1x1024] [--rounds 7] [--dropout 0.05] [--sides ours,bound]
                              [--memory] [--device cuda --hidden 4096 --layers 4]

Llama of 75 M parameters (hidden 768, 8 layers, random), LoRA r 16 on all linear layers, stock loss on all positions.
    bound       the frozen base, with gradients for activations alone: what every adapter pays
    peft        PEFT as it comes       peft_cast    with autocast_adapter_dtype=False
    ours        deltaw as it trains    plain        deltaw, nothing fused     full    all weights
    dora        deltaw's DoRA          peft_dora    PEFT's
A step is forward and backward; sides take turns, each side's time is the median over rounds, given as a ratio. Bytes are
those of distinct storages held by saved tensors, parameters left out, per token and layer. From one start, five AdamW
steps of ours and PEFT's give equal losses, and gradients are not zero: asserted. Memory is the highest resident size of a process
of its own during two steps, above what it was with the model loaded; on a CUDA device, of the memory allocated there.
"""

import atexit
import contextlib
import copy
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import deltaw
from benchmarks._common import DTYPES, dtypes, highest, keep, measured, parser
from deltaw.core.attach import adapters

SIDES = ("bound", "ours", "plain", "peft", "peft_cast", "full", "dora", "peft_dora")
RANK, ALPHA = 16, 32
VOCABULARY = 12288
DEVICE, HIDDEN, LAYERS = "cpu", 768, 8
FUSED = contextlib.ExitStack()  # until the process ends
atexit.register(FUSED.close)
PAIRS = (("ours", "peft"), ("dora", "peft_dora"))
Side = tuple[nn.Module, list[nn.Parameter]]


def base(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    heads = HIDDEN // 64 if HIDDEN < 2048 else HIDDEN // 128
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=HIDDEN * 8 // 3, num_hidden_layers=LAYERS,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=2048, tie_word_embeddings=False,
        use_cache=False,
    )  # fmt: skip
    with torch.device(DEVICE):
        return LlamaForCausalLM(config).to(dtype).requires_grad_(False).train()


def wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def ids_of(count: int, rows: int, length: int) -> Tensor:
    drawn = torch.randint(0, VOCABULARY, (count, rows, length), generator=torch.Generator().manual_seed(0))
    return drawn.to(DEVICE)


def build(side: str, model: nn.Module, dropout: float) -> Side:
    model = copy.deepcopy(model)
    torch.manual_seed(1)
    if side == "bound":
        model.get_input_embeddings().register_forward_hook(lambda _, __, output: output.requires_grad_())  # type: ignore[operator]
    elif side == "full":
        model.requires_grad_(True)
    elif side in ("ours", "plain", "dora"):
        method = deltaw.DoRA if side == "dora" else deltaw.LoRA
        deltaw.attach(model, method(rank=RANK, alpha=ALPHA, dropout=dropout), targets="all-linear")
        if side != "plain":
            assert FUSED.enter_context(deltaw.fused(model)) == LAYERS
    else:
        config = peft.LoraConfig(
            r=RANK, lora_alpha=ALPHA, lora_dropout=dropout, target_modules="all-linear", use_dora=side == "peft_dora"
        )
        model = peft.get_peft_model(model, config, autocast_adapter_dtype=side != "peft_cast")  # type: ignore[arg-type, assignment]
    return model, [p for p in model.parameters() if p.requires_grad]


def same_start(ours: nn.Module, theirs: nn.Module) -> None:
    """PEFT's A from ours; B is zero on both sides."""
    there = dict(theirs.named_modules())
    for site, adapter in adapters(ours).items():
        a: Any = adapter.get_parameter("lora_A")
        there[f"base_model.model.{site.path}"].lora_A["default"].weight.data.copy_(a.data)  # type: ignore[index, union-attr, operator]


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, labels=ids).loss  # type: ignore[no-any-return]


def step(side: Side, ids: Tensor) -> float:
    model, parameters = side
    wait()
    began = time.perf_counter()
    loss_of(model, ids).backward()
    wait()
    seconds = time.perf_counter() - began
    for parameter in parameters:
        parameter.grad = None
    return seconds


def saved_bytes(side: Side, ids: Tensor) -> float:
    """Per token and layer, of what autograd keeps between forward and backward."""
    model, _ = side
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = model.get_base_model().model if hasattr(model, "get_base_model") else model.model  # type: ignore[operator, union-attr]
        output = hidden(input_ids=ids).last_hidden_state  # type: ignore[operator]
    del output
    return sum(found.values()) / ids.numel() / LAYERS


def losses(side: Side, ids: Sequence[Tensor]) -> list[float]:
    """Five steps of AdamW; a gradient that is not zero."""
    model, parameters = side
    before = [p.detach().clone() for p in parameters]
    optimizer, found = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0), []
    for batch in ids:
        loss = loss_of(model, batch)
        loss.backward()
        norm = sum(float(p.grad.float().square().sum()) for p in parameters if p.grad is not None)
        assert norm > 0, "no gradient"
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss.detach()))
    with torch.no_grad():
        for parameter, value in zip(parameters, before, strict=True):
            parameter.copy_(value)
    return found


def compare(dtype: str, sides: Sequence[str], rows: int, length: int, rounds: int, dropout: float) -> dict[str, Any]:
    model = base(DTYPES[dtype])
    batches = list(ids_of(5, rows, length))
    built = {side: build(side, model, dropout) for side in sides}
    for side, twin in (("peft", "ours"), ("peft_cast", "ours"), ("peft_dora", "dora")):
        if side in built and twin in built:
            same_start(built[twin][0], built[side][0])
    result: dict[str, Any] = {"saved_bytes": {side: round(saved_bytes(built[side], batches[0])) for side in sides}}
    for ours, theirs in PAIRS if not dropout else ():
        if {ours, theirs} <= set(sides):
            pair = [losses(built[side], batches) for side in (ours, theirs)]
            off = max(abs(a - b) for a, b in zip(*pair, strict=True))
            assert off < (2e-2 if model.dtype == torch.bfloat16 else 1e-4), (ours, pair)
            result.setdefault("loss_difference", {})[f"{ours}, {theirs}"] = off
    times: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(rounds + 1):
        for side in sides if number % 2 else sides[::-1]:
            gc.collect()
            times[side].append(step(built[side], batches[0]))
    middle = {side: statistics.median(values[1:]) for side, values in times.items()}
    result["seconds"] = {side: round(seconds, 4) for side, seconds in middle.items()}
    pairs = [*(("ours", other) for other in sides if other != "ours"), ("dora", "peft_dora")]
    result["ratios"] = {f"{a} / {b}": round(middle[a] / middle[b], 3) for a, b in pairs if {a, b} <= set(sides)}
    return result


def peak(side: str, dtype: str, rows: int, length: int, dropout: float) -> int:
    """Highest resident size during two steps above that of the loaded model, in this process."""
    one = build(side, base(DTYPES[dtype]), dropout)
    ids = ids_of(1, rows, length)[0]
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        for _ in range(2):
            step(one, ids)
        return torch.cuda.max_memory_allocated() - before
    with highest() as size:
        for _ in range(2):
            step(one, ids)
    return size[0]


def apart(function: str, *given: Any) -> Any:
    """A function of this file in a process of its own, which leaves no memory to the next; its result as JSON."""
    call = (
        f"import json; from benchmarks import step; step.DEVICE, step.HIDDEN, step.LAYERS = {DEVICE, HIDDEN, LAYERS}; "
        f"print(json.dumps(step.{function}({', '.join(map(repr, given))})))"
    )
    done = subprocess.run([sys.executable, "-c", call], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main(arguments: list[str]) -> None:
    options = parser(__doc__)
    options.add_argument("--dtypes", help="bf16,fp32; those that the CPU has units for")
    options.add_argument("--shapes", default="4x256,1x1024")
    options.add_argument("--sides", default=",".join(SIDES))
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--dropout", type=float, default=0.0)
    options.add_argument("--memory", action="store_true", help="the peak of the resident size too")
    options.add_argument("--dry", action="store_true", help="print, and keep no result")
    options.add_argument("--device", default=DEVICE)
    options.add_argument("--hidden", type=int, default=HIDDEN)
    options.add_argument("--layers", type=int, default=LAYERS)
    args = options.parse_args(arguments)
    globals().update(DEVICE=args.device, HIDDEN=args.hidden, LAYERS=args.layers)
    found: dict[str, Any] = {"threads": torch.get_num_threads(), "rounds": args.rounds, "dropout": args.dropout}
    sides = args.sides.split(",")
    if args.device == "cuda":
        found["device"] = f"{torch.cuda.get_device_name()}, hidden {args.hidden}, {args.layers} layers"
    for dtype in args.dtypes.split(",") if args.dtypes else dtypes():
        for shape in args.shapes.split(","):
            rows, length = map(int, shape.split("x"))
            one = apart("compare", dtype, sides, rows, length, args.rounds, args.dropout)
            if args.memory:
                peaks = {side: apart("peak", side, dtype, rows, length, args.dropout) for side in sides}
                one["peak_megabytes"] = {side: round(size / 1e6, 1) for side, size in peaks.items()}
            if args.device == "cpu":
                one["measured"] = measured(args.rounds)
            found[f"{dtype} {shape}"] = one
            print(dtype, shape, one, flush=True)
    name = "_".join(["step", *["dropout"] * bool(args.dropout), *["cuda"] * (args.device == "cuda")])
    if not args.dry:
        keep(name, found, beside=None if args.device == "cuda" else ())
