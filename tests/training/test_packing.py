"""Packed, padded and accumulated steps learn the same: equal loss and gradients to rounding, on several architectures."""

import json
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GPT2Config, LlamaConfig, Qwen3Config

import deltaw
from deltaw.core.errors import UseError
from deltaw.data.collate import Collator, pack
from deltaw.data.encode import IGNORE, Encoded
from deltaw.infer import packing
from deltaw.infer.loss import SFTLoss
from deltaw.runs.directory import RunDirectory

SMALL = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIGS = {
    "llama": LlamaConfig(**SMALL, num_key_value_heads=2, max_position_embeddings=64),
    "qwen3": Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=8, max_position_embeddings=64),
    "gemma3": Gemma3TextConfig(
        **SMALL, num_key_value_heads=2, head_dim=8, max_position_embeddings=64, sliding_window=8
    ),
    "gpt2": GPT2Config(
        vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    ),
}


class Tokens:
    pad_token_id, eos_token_id = 0, 1


def rows(count: int, longest: int = 40) -> list[Encoded]:
    rng = random.Random(count)
    result = []
    for _ in range(count):
        ids = [rng.randrange(2, 96) for _ in range(rng.choice([4, 7, 9, longest]))]
        first = rng.randrange(0, len(ids) - 2)  # 0: a row that is learnt from its first token on
        result.append(Encoded(ids, [IGNORE] * first + ids[first:]))
    return result


@pytest.mark.parametrize("seed", range(20))
def test_lines_hold_every_row_once_and_none_is_too_long(seed: int) -> None:
    rng = random.Random(seed)
    lengths = [rng.randint(1, 50) for _ in range(rng.randint(1, 30))]
    lines = pack(lengths, max(lengths))
    assert sorted(n for line in lines for n in line) == list(range(len(lengths)))
    assert all(sum(lengths[n] for n in line) <= max(lengths) for line in lines)
    assert len(lines) <= max(1, 2 * -(-sum(lengths) // max(lengths)))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_equals_padded(name: str, attention: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation=attention)
    assert packing.keeps_apart(model)
    deltaw.attach(model, deltaw.LoRA(rank=4), targets="all-linear")
    given, loss = rows(8), SFTLoss(model)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn_like(p))
    model.train()
    results = []
    for packed in (False, True):
        total, count = loss(Collator(Tokens(), packing=packed)(given))
        (total / count).backward()
        results.append((total.detach(), int(count), [p.grad.clone() for p in model.parameters() if p.grad is not None]))
        model.zero_grad()
    (a, n, ga), (b, m, gb) = results
    assert n == m == sum(row.supervised for row in given)
    assert torch.allclose(a, b, rtol=1e-5) and any(bool(g.any()) for g in ga)
    assert all(torch.allclose(x, y, rtol=1e-3, atol=1e-6) for x, y in zip(ga, gb, strict=True))
    assert Collator(Tokens(), packing=True)(given)["input_ids"].numel() < Collator(Tokens())(given)["input_ids"].numel()


def test_a_mask_of_ones_would_let_rows_see_each_other() -> None:
    """Why packed batches carry none."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"])
    batch, loss = Collator(Tokens(), packing=True)(rows(8)), SFTLoss(model)
    assert "attention_mask" not in batch
    right, _ = loss(batch)
    wrong, _ = loss({**batch, "attention_mask": torch.ones_like(batch["input_ids"])})
    assert abs(float((wrong - right).detach())) > 1e-2


class Blind(torch.nn.Module):
    """A language model that takes positions and lets every token see all before it in the line."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = torch.nn.Embedding(96, 8), torch.nn.Linear(8, 96)

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.table

    def forward(self, input_ids, position_ids=None, use_cache=None):  # type: ignore[no-untyped-def]
        return type("Out", (), {"logits": self.head(self.table(input_ids).cumsum(1))})


def test_a_model_that_mixes_rows_is_not_packed() -> None:
    model, lengths = Blind(), [3, 40] * 16
    assert packing.padding(lengths, 8) > 0.2
    assert packing.use_packing("auto", model, lengths, 8) is False is packing.use_packing(False, model, lengths, 8)
    with pytest.raises(UseError, match="does not keep rows of one line apart"):
        packing.use_packing(True, model, lengths, 8)
    llama = AutoModelForCausalLM.from_config(CONFIGS["llama"])
    assert packing.use_packing("auto", llama, lengths, 8) is True
    assert packing.use_packing("auto", llama, [40] * 32, 8) is False  # nothing to gain


def test_runs_are_the_same_packed_padded_and_accumulated(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    words = ["river", "castle", "garden", "church", "mill", "bridge"]
    text = [
        {"prompt": f"say {a}", "completion": f"{b}, " * (1 + 9 * (i % 3 == 0)) + a}
        for i, a in enumerate(words)
        for b in words
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in text))
    curves = []
    for name, data, sizes in (("padded", False, (8, 1)), ("packed", True, (8, 1)), ("accumulated", True, (2, 4))):
        run = deltaw.train(
            {
                "model": "tiny", "data": {"train": str(file), "eval": 0.2, "packing": data}, "adapter": {"rank": 4},
                "train": {"max_steps": 4, "batch_size": sizes[0], "gradient_accumulation": sizes[1], "log_every": 1,
                          "learning_rate": 3e-3, "eval_every": 4},
                "output": str(tmp_path / name),
            },
            quiet=True,
        )  # fmt: skip
        curves.append([e["loss"] for e in RunDirectory(run.path).events("step")] + [run.losses["held_out"]])
    assert curves[0] == pytest.approx(curves[1], rel=1e-4) and curves[0] == pytest.approx(curves[2], rel=1e-4)
