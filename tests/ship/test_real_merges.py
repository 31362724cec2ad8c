"""Bases and adapters as they come: strangers' files, the hub's cache, classes other than language models, tables that grow."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from test_shards import adapter, llama, llava, mixtral, opened, qwen2_moe, raw, stored

import deltaw
from deltaw.core.method import get
from deltaw.data.kept import Kept
from deltaw.methods.token_rows import TokenRows
from deltaw.models.base import TINY
from deltaw.ship.merge import merge_to_folder


def distilbert() -> torch.nn.Module:
    config = transformers.DistilBertConfig(num_labels=2, vocab_size=1000, hidden_dim=64)
    return transformers.DistilBertForSequenceClassification(config)


def gpt2_classifier() -> torch.nn.Module:
    config = transformers.GPT2Config(
        vocab_size=1000, n_inner=64, bos_token_id=0, eos_token_id=0, num_labels=6, pad_token_id=999
    )
    return transformers.GPT2ForSequenceClassification(config)


@pytest.mark.shared
@pytest.mark.parametrize(
    ("folder", "build"),
    [("Tashu014__lora-imdb-distilbert", distilbert), ("anirudh-ak__peft-gpt2/model/lora_model", gpt2_classifier)],
)
def test_a_strangers_adapter_with_a_head_of_its_own(folder: str, build, shared: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    part, base = shared / "adapters" / folder, stored(build(), tmp_path / "base", torch.float32, "20MB")
    done = merge_to_folder(str(base), part, tmp_path / "m", allow_base_mismatch=True)
    assert done.way == "shards" and any("does not say which base" in remark for remark in done.remarks)
    model = opened(tmp_path / "m", torch.float32)
    assert type(model) is type(build())
    theirs = PeftModel.from_pretrained(opened(base), str(part)).merge_and_unload().state_dict()
    for path, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, theirs[path], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("build", [mixtral, qwen2_moe, llava])
def test_these_bases_have_other_names_on_disk(build, tmp_path: Path) -> None:
    """What makes their cases in test_shards.py worth something."""
    base = stored(build(), tmp_path / "base")
    assert raw(base).keys() - opened(base).state_dict().keys()


def test_copies_of_stacked_experts_go_through_memory(tmp_path: Path) -> None:
    base = stored(mixtral(), tmp_path / "base", torch.float32)
    for file in TINY.iterdir():
        if "token" in file.name:
            (base / file.name).write_bytes(file.read_bytes())
    method = deltaw.LoRA(rank=2, modules_to_save=("mlp",))
    done = merge_to_folder(str(base), adapter(base, tmp_path / "a", method, "q_proj"), tmp_path / "m")
    assert done.way == "memory" and any("lies on disk in pieces" in remark for remark in done.remarks)
    assert done.max_logit_difference < 1e-5 < done.effect


def test_grown_tables_of_several(tmp_path: Path) -> None:
    parts = []
    for name, method, targets in (
        ("rows", TokenRows(tokens=(7, 4096)), "embed_tokens"),
        ("lora", deltaw.LoRA(rank=4), "mlp"),
    ):
        model = deltaw.load_base("tiny", dtype="fp32", device=torch.device("cpu")).model
        deltaw.attach(model, method, targets=targets)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_(std=0.05)
        beside = Kept(tokens={"<new>": 4096}).files if name == "rows" else {}
        deltaw.save(model, tmp_path / name, beside=beside)
        parts.append((tmp_path / name, 1.0))
    merged = merge_to_folder("tiny", parts[1:] + parts[:1], tmp_path / "m", dtype="fp32")
    assert merged.way == "memory" and any("no place for" in remark for remark in merged.remarks)
    assert merged.max_logit_difference < 1e-3 < merged.effect
    assert opened(tmp_path / "m").get_input_embeddings().weight.shape[0] == 4097
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "m")("<new>")["input_ids"] == [4096]


def test_the_template_goes_to_the_tokenizer_by_files_too(tmp_path: Path) -> None:
    model = deltaw.load_base("tiny", dtype="fp32", device=torch.device("cpu")).model
    deltaw.attach(model, get("ia3")(), targets="mlp")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(1.0, 0.2)
    deltaw.save(model, tmp_path / "a", beside=Kept(template="{{ messages[0]['content'] }}<|end|>").files)
    done = merge_to_folder("tiny", tmp_path / "a", tmp_path / "m")
    assert done.way == "shards"
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "m").chat_template.startswith("{{ messages[0]")


def test_a_base_in_the_hubs_cache(tmp_path: Path) -> None:
    """Offline, as links to blobs: what is written are files."""
    base = stored(llama(), tmp_path / "base")
    part = adapter(base, tmp_path / "a", deltaw.LoRA(rank=2))
    cache = tmp_path / "hub/models--some--one"
    snapshot = cache / "snapshots/0123"
    snapshot.mkdir(parents=True)
    (cache / "refs").mkdir()
    (cache / "refs/main").write_text("0123")
    for file in base.iterdir():
        (snapshot / file.name).symlink_to(file)
    words = ["merge", part, "--model", "some/one", "--output", tmp_path / "m", "--json"]
    there = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub")}
    done = subprocess.run(
        [sys.executable, "-m", "deltaw", *map(str, words)], capture_output=True, text=True, env=there, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["way"] == "shards"
    assert not any(file.is_symlink() for file in (tmp_path / "m").iterdir())
    assert json.loads((tmp_path / "m/merge.json").read_text())["base"]["name"] == "some/one"
