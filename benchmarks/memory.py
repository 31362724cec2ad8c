"""Predicted memory of training steps beside what runs took: `deltaw train` on a CPU, in processes of their own.

    python -m benchmarks memory [--only "NAME;…"] [--steps 3] [--plain]

The increment of the resident size over the loaded base: predicted from configuration and rows alone (`deltaw plan`), and
measured as the run's own end event has it. Random Llamas of 5 to 75 M parameters; half of the configurations, marked, gave the
constants of the overhead. `given back`: the C library returns what is freed (MALLOC_MMAP_THRESHOLD_=65536), so that the
process is as large as what is alive in it. `as it comes`: glibc keeps freed blocks for itself, in holes that the next tensor
may not fit. --only measures some anew and leaves the others as they were.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from benchmarks._common import RESULTS, keep, parser
from deltaw.models.base import TINY

GIVEN_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536"}


class Case(NamedTuple):
    name: str
    hidden: int
    layers: int
    rows: int
    length: int
    dtype: str
    adapter: str = "lora"
    checkpointing: bool = False
    quantize: str = "none"
    shortest: float = 1.0
    """Of every second row, as a share of the length."""
    accumulation: int = 1
    calibrates: bool = False
    quick: bool = False
    """Is it in `make test`, and not only in `make slow`?"""


METHODS = {"lora": {"method": "lora", "rank": 16}, "dora": {"method": "dora", "rank": 16}, "full": {"method": "full"}}
CASES = (
    Case("lora fp32 4x256", 768, 8, 4, 256, "fp32", calibrates=True, quick=True),
    Case("lora fp32 1x1024", 768, 8, 1, 1024, "fp32"),
    Case("lora fp32 2x1024", 512, 8, 2, 1024, "fp32", calibrates=True, quick=True),
    Case("lora fp32 16x64", 512, 6, 16, 64, "fp32", quick=True),
    Case("lora fp32 2x64", 256, 6, 2, 64, "fp32", calibrates=True),
    Case("lora fp32 8x256, padded", 512, 6, 8, 256, "fp32", shortest=0.5, quick=True),
    Case("lora fp32 4x1024, checkpointing", 512, 8, 4, 1024, "fp32", checkpointing=True),
    Case("lora fp32 16x256, checkpointing", 512, 8, 16, 256, "fp32", checkpointing=True, calibrates=True),
    Case("lora fp32 4x256, accumulated", 512, 6, 4, 256, "fp32", accumulation=2, quick=True),
    Case("lora bf16 4x128", 256, 2, 4, 128, "bf16", calibrates=True, quick=True),
    Case("lora bf16 1x512, checkpointing", 256, 4, 1, 512, "bf16", checkpointing=True, calibrates=True, quick=True),
    Case("dora fp32 4x256", 768, 8, 4, 256, "fp32", "dora", quick=True),
    Case("dora fp32 8x128", 512, 6, 8, 128, "fp32", "dora", quick=True),
    Case("full fp32 4x256", 512, 8, 4, 256, "fp32", "full", quick=True),
    Case("full fp32 8x128", 256, 6, 8, 128, "fp32", "full", calibrates=True, quick=True),
    Case("lora nf4 fp32 4x256", 768, 8, 4, 256, "fp32", quantize="nf4"),
    Case("lora nf4 fp32 8x128", 512, 6, 8, 128, "fp32", quantize="nf4", calibrates=True, quick=True),
)  # fmt: skip


def base(case: Case, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=12288, hidden_size=case.hidden, intermediate_size=case.hidden * 8 // 3, num_hidden_layers=case.layers,
        num_attention_heads=case.hidden // 64, num_key_value_heads=case.hidden // 64, tie_word_embeddings=False,
        max_position_embeddings=2048, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    transformers.utils.logging.disable_progress_bar()
    LlamaForCausalLM(config).save_pretrained(folder)


def rows(case: Case, folder: Path, steps: int) -> Path:
    """Texts of the length, to a token or two."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("the dog ran to the big tree and saw a cat in it . " * case.length)["input_ids"]
    count = case.rows * case.accumulation * steps
    texts = [
        tokenizer.decode(ids[n : n + int(case.length * (case.shortest if n % 2 else 1)) - 2]) for n in range(count)
    ]
    file = folder / "rows.jsonl"
    file.write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")
    return file


def run(case: Case, folder: Path, steps: int, environment: dict[str, str]) -> dict[str, Any]:
    """{predicted, measured, tensors}: bytes of the increment, the last without the overhead."""
    base(case, folder)
    config = {
        "model": str(folder), "quantize": case.quantize,
        "data": {"train": str(rows(case, folder, steps)), "eval": None, "max_length": case.length, "packing": False,
                 "overflow": "cut"},
        "adapter": METHODS[case.adapter],
        "train": {"objective": "text", "batch_size": case.rows, "max_steps": steps, "dtype": case.dtype,
                  "checkpointing": case.checkpointing, "gradient_accumulation": case.accumulation},
        "output": str(folder / "run"),
    }  # fmt: skip
    code = "import json, sys, deltaw; deltaw.train(json.loads(sys.stdin.read()), quiet=True)"
    subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(config), text=True, check=True, stdout=subprocess.DEVNULL,
        env={**os.environ, **environment},
    )  # fmt: skip
    predicted = json.loads((folder / "run" / "plan.json").read_text(encoding="utf-8"))["predicted"]["memory"]
    events = [json.loads(line) for line in (folder / "run" / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    end = next(event for event in events if event["event"] == "end")
    increment = predicted["increment_bytes"]
    return {
        "predicted": increment,
        "tensors": increment - predicted["overhead_bytes"],
        "measured": end["memory_increment"],
        "parts": predicted,
    }


def kept(found: dict[str, Any]) -> None:
    """Written after each case: those measured now, beside those of before."""
    file = RESULTS / "memory.json"
    before = json.loads(file.read_text(encoding="utf-8"))["cases"] if file.exists() else {}
    together = {**before, **{name: {**before.get(name, {}), **one} for name, one in found.items()}}
    cases = {case.name: together[case.name] for case in CASES if case.name in together}
    keep("memory", {"threads": torch.get_num_threads(), "cases": cases})


def main(arguments: list[str]) -> None:
    options = parser(__doc__)
    options.add_argument("--only", default="")
    options.add_argument("--steps", type=int, default=3)
    options.add_argument("--plain", action="store_true", help="as the C library comes, too")
    options.add_argument("--dry", action="store_true", help="print, and keep no result")
    args = options.parse_args(arguments)
    wanted, found = args.only.split(";") if args.only else [case.name for case in CASES], {}
    for case in (case for case in CASES if case.name in wanted):
        with tempfile.TemporaryDirectory() as folder:
            one = run(case, Path(folder) / "back", args.steps, GIVEN_BACK)
            one["error"] = round(one["predicted"] / one["measured"] - 1, 4)
            if args.plain:
                one["as it comes"] = run(case, Path(folder) / "plain", args.steps, {})["measured"]
        found[case.name] = {"calibrates": case.calibrates, **one}
        if not args.dry:
            kept(found)
        shown = {
            key: round(one[key] / 1e6, 1) for key in ("predicted", "tensors", "measured", "as it comes") if key in one
        }
        print(case.name, shown, one["error"], flush=True)
    errors = [abs(one["error"]) for one in found.values()]
    print("median", statistics.median(errors), "worst", max(errors))
