"""What it costs to have adapters, beside PEFT: attach, load, switch, switch off, detach; decode steps; mixes; the import.

    python -m benchmarks lifecycle [--layers 32,80] [--rounds 5] [--adapters 8,16,32] [--device cuda --hidden 4096 --depth 4]

Toy Llama (hidden 32, 7 linear layers a block), LoRA r 4 on all of them: times of Python and dispatch, not of arithmetic. A
decode step is one token for each row of a model of 75 M parameters, in bf16 (fp32 where the CPU has no units for that), with as
many adapters r 16: the bare base, the base with one of them merged, one adapter for all rows, and an adapter for each row (PEFT's
adapter_names; routing included). A mix is four adapters r 16 of a layer of 2048 × 2048 in one of rank 16. Sides take turns;
medians of rounds. That the row of an adapter gives what the adapter alone gives, and that both mixes are one change, is
asserted. On a CUDA device decoding alone is measured.
"""

import copy
import gc
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import deltaw
from benchmarks import step
from benchmarks._common import DTYPES, dtypes, keep, measured, parser
from deltaw.core.attach import adapters
from deltaw.core.method import Site
from deltaw.core.state import delta
from deltaw.mixing import svd


def toy(layers: int) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=2, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).requires_grad_(False).eval()


def timed(act: Callable[[], Any]) -> float:
    step.wait()
    began = time.perf_counter()
    act()
    step.wait()
    return time.perf_counter() - began


def ours(model: nn.Module, folder: Path) -> dict[str, float]:
    found = {"attach": timed(lambda: deltaw.attach(model, deltaw.LoRA(rank=4), targets="all-linear", name="a"))}
    if not folder.exists():
        deltaw.save(model, folder, name="a")
    found["load"] = timed(lambda: deltaw.load(model, folder, name="b"))
    deltaw.use(model, "a")  # the first call lists the modules
    found["switch"] = timed(lambda: deltaw.use(model, "b"))

    def off() -> None:
        with deltaw.use(model, {}):
            pass

    found["off and on"] = timed(off)
    found["detach"] = timed(lambda: (deltaw.detach(model, "a"), deltaw.detach(model, "b")))
    return found


def theirs(model: nn.Module, folder: Path) -> dict[str, float]:
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    made: list[Any] = []
    found = {"attach": timed(lambda: made.append(peft.get_peft_model(model, config, adapter_name="a")))}  # type: ignore[arg-type]
    tuned = made[0]
    if not folder.exists():
        tuned.save_pretrained(str(folder))
    found["load"] = timed(lambda: tuned.load_adapter(str(folder / "a"), adapter_name="b"))
    found["switch"] = timed(lambda: tuned.set_adapter("b"))

    def off() -> None:
        with tuned.disable_adapter():
            pass

    found["off and on"] = timed(off)
    found["detach"] = timed(tuned.unload)
    return found


def middle(samples: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(sample[key] for sample in samples) for key in samples[0]}


def overheads(layers: int, rounds: int) -> dict[str, Any]:
    base, sides = toy(layers), {"deltaw": ours, "peft": theirs}
    samples: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds + 1):
            for side in sides if number % 2 else [*sides][::-1]:
                model = copy.deepcopy(base)
                gc.collect()  # of what the copy left, not in the first thing that is timed
                samples[side].append(sides[side](model, Path(folder) / side))
    found = {side: middle(values[1:]) for side, values in samples.items()}
    milliseconds = {side: {key: round(1e3 * t, 3) for key, t in times.items()} for side, times in found.items()}
    ratios = {key: round(found["deltaw"][key] / found["peft"][key], 4) for key in found["deltaw"]}
    return {"adapted_layers": 7 * layers, "milliseconds": milliseconds, "deltaw / peft": ratios}


@torch.no_grad()
def decode(count: int, rounds: int, dtype: str) -> dict[str, Any]:
    base = step.base(DTYPES[dtype]).eval()
    mine, names = copy.deepcopy(base), [f"a{number}" for number in range(count)]
    config = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    other: Any = peft.get_peft_model(copy.deepcopy(base), config, adapter_name=names[0])  # type: ignore[arg-type]
    for name in names:
        deltaw.attach(mine, deltaw.LoRA(rank=16, alpha=32), targets="all-linear", name=name)
        if name != names[0]:
            other.add_adapter(name, config)
        for adapter in adapters(mine, name).values():
            nn.init.normal_(adapter.lora_B, std=0.02)  # type: ignore[arg-type]
    mine.requires_grad_(False)
    for key, parameter in other.named_parameters():
        if "lora_B" in key:
            nn.init.normal_(parameter, std=0.02)
    other.eval()
    ids = step.ids_of(1, count, 1)[0]

    def mixed() -> torch.Tensor:
        with deltaw.use(mine, [{name: 1.0} for name in names]):
            return mine(input_ids=ids).logits  # type: ignore[no-any-return]

    with deltaw.use(mine, "a3"):
        alone = mine(input_ids=ids).logits[3].float()
    apart = float((mixed()[3].float() - alone).abs().max() / alone.abs().max())
    assert apart < 0.05, apart
    deltaw.use(mine, "a0")
    other.set_adapter("a0")
    merged = copy.deepcopy(base)
    deltaw.insert(merged, deltaw.extract(mine, "a0"))
    deltaw.merge(merged)
    acts: dict[str, Callable[[], Any]] = {
        "base": lambda: base(input_ids=ids), "merged": lambda: merged(input_ids=ids),
        "one adapter": lambda: mine(input_ids=ids), "an adapter a row": mixed,
        "peft, one adapter": lambda: other(input_ids=ids),
        "peft, an adapter a row": lambda: other(input_ids=ids, adapter_names=names),
    }  # fmt: skip
    times: dict[str, list[float]] = {name: [] for name in acts}
    for number in range(rounds + 1):
        for name in acts if number % 2 else [*acts][::-1]:
            times[name].append(timed(acts[name]))
    seconds = {name: statistics.median(values[1:]) for name, values in times.items()}
    ratios = {
        "merged / base": seconds["merged"] / seconds["base"],
        "one adapter / base": seconds["one adapter"] / seconds["base"],
        "an adapter a row / one adapter": seconds["an adapter a row"] / seconds["one adapter"],
        "an adapter a row / base": seconds["an adapter a row"] / seconds["base"],
        "the same of peft / one adapter": seconds["peft, an adapter a row"] / seconds["peft, one adapter"],
        "the same of peft / base": seconds["peft, an adapter a row"] / seconds["base"],
    }
    return {
        "milliseconds": {name: round(1e3 * t, 2) for name, t in seconds.items()},
        "ratios": {name: round(ratio, 3) for name, ratio in ratios.items()},
    }


def mixes(rounds: int) -> dict[str, Any]:
    """Seconds from four adapters in the model to their weighted sum in rank 16 in it."""
    size, weights, names = 2048, [0.4, 0.3, 0.2, 0.1], [f"a{number}" for number in range(4)]
    torch.manual_seed(0)
    mine, config = nn.Sequential(nn.Linear(size, size)), peft.LoraConfig(r=16, lora_alpha=32, target_modules=["0"])
    other: Any = peft.get_peft_model(copy.deepcopy(mine), config, adapter_name=names[0])  # type: ignore[arg-type]
    for name in names:
        if name != names[0]:
            other.add_adapter(name, config)
        deltaw.attach(mine, deltaw.LoRA(rank=16, alpha=32), targets="0", name=name)
        layer, own = other.base_model.model[0], adapters(mine, name)[Site("0")]
        nn.init.normal_(own.lora_B, std=0.02)  # type: ignore[arg-type]
        layer.lora_A[name].weight.data.copy_(own.lora_A.data)  # type: ignore[union-attr, operator]
        layer.lora_B[name].weight.data.copy_(own.lora_B.data)  # type: ignore[union-attr, operator]

    def ours() -> None:
        mixed, _ = svd([deltaw.extract(mine, name) for name in names], weights, 16)
        deltaw.insert(mine, mixed, name="mix")

    def theirs() -> None:
        other.add_weighted_adapter(names, weights, "mix", combination_type="svd", svd_rank=16)

    times: dict[str, list[float]] = {"deltaw": [], "peft": []}
    for _ in range(rounds):
        times["deltaw"].append(timed(ours))
        times["peft"].append(timed(theirs))
        changes = [delta(deltaw.extract(mine, "mix"), "0", torch.zeros(size, size)), layer.get_delta_weight("mix")]
        apart = float((changes[0] - changes[1]).norm() / changes[1].norm())
        assert apart < 1e-3, apart
        deltaw.detach(mine, "mix")
        other.delete_adapter("mix")
    seconds = {side: statistics.median(values) for side, values in times.items()}
    return {
        "milliseconds": {side: round(1e3 * t, 2) for side, t in seconds.items()},
        "deltaw / peft": round(seconds["deltaw"] / seconds["peft"], 5),
    }


def imports(rounds: int) -> dict[str, float]:
    """Seconds of `import deltaw` and of its attach and LoRA after `import torch`, in new processes."""
    code = "import time, torch; t = time.perf_counter(); import deltaw{}; print(time.perf_counter() - t)"
    found = {}
    for what, more in {"import deltaw": "", "deltaw.attach, deltaw.LoRA": "; deltaw.attach, deltaw.LoRA"}.items():
        runs = [
            subprocess.run([sys.executable, "-c", code.format(more)], capture_output=True, text=True, check=True)
            for _ in range(rounds)
        ]
        found[what] = round(statistics.median(float(run.stdout) for run in runs), 4)
    return found


def main(arguments: list[str]) -> None:
    options = parser(__doc__)
    options.add_argument("--layers", default="32,80")
    options.add_argument("--adapters", default="8,16,32")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--device", default=step.DEVICE)
    options.add_argument("--hidden", type=int, default=step.HIDDEN)
    options.add_argument("--depth", type=int, default=step.LAYERS)
    args = options.parse_args(arguments)
    step.DEVICE, step.HIDDEN, step.LAYERS = args.device, args.hidden, args.depth
    if args.device == "cuda":
        name = f"{torch.cuda.get_device_name()}, hidden {args.hidden}, {args.depth} layers"
        found = {count: decode(int(count), 4 * args.rounds, "bf16") for count in args.adapters.split(",")}
        return keep("lifecycle_cuda", {"device": name, "decode": found})
    dtype = dtypes()[0]
    decoded = {count: decode(int(count), 4 * args.rounds, dtype) for count in args.adapters.split(",")}
    keep("lifecycle", {
        "measured": measured(args.rounds), "imports": imports(args.rounds),
        "layers": {layers: overheads(int(layers), args.rounds) for layers in args.layers.split(",")},
        "decode": {dtype: {"measured": measured(4 * args.rounds), "rows": decoded}}, "mix": mixes(args.rounds),
    }, beside=("decode",))  # fmt: skip
