"""Merging into a folder: it computes what the adapter computed, in any dtype; a failed check leaves nothing behind."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

import deltaw
from deltaw.core.errors import BaseMismatchError, FileError, MergeError, UseError
from deltaw.data.kept import Kept, Tokens
from deltaw.methods.token_rows import TokenRowsAdapter
from deltaw.models.base import TINY
from deltaw.ship import check as checking
from deltaw.ship.check import logits, probe
from deltaw.ship.merge import merge_to_folder
from deltaw.training.rows import attach_rows


def trained(model: torch.nn.Module, folder: Path, targets: object = "all-linear", std: float = 0.05) -> Path:
    """An adapter that does something, without paying for training."""
    deltaw.attach(model, deltaw.LoRA(rank=4, alpha=16), targets=targets)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_(std=std)
    deltaw.save(model, folder)
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(deltaw.load_base("tiny").model, tmp_path_factory.mktemp("adapter") / "a")


@pytest.mark.parametrize(("dtype", "bound"), [("fp32", 1e-4), ("bf16", 0.5), ("auto", 0.5)])
def test_folder_computes_what_the_adapter_does(adapter: Path, tmp_path: Path, dtype: str, bound: float) -> None:
    done = merge_to_folder("tiny", adapter, tmp_path / "merged", dtype=dtype)
    assert done.weights == 42 and done.max_logit_difference < bound < done.effect
    assert done.dtype == ("float32" if dtype == "fp32" else "bfloat16")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    base = deltaw.load_base("tiny", dtype="fp32")
    deltaw.load(base.model, adapter)
    ids = probe(plain)
    assert float((logits(plain, ids) - logits(base.model, ids)).abs().max()) < bound
    assert plain.state_dict().keys() == AutoModelForCausalLM.from_pretrained(TINY).state_dict().keys()
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template


def test_the_template_of_the_adapter_goes_along(tmp_path: Path) -> None:
    folder = trained(deltaw.load_base("tiny").model, tmp_path / "a")
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}<|end|>")
    merge_to_folder("tiny", folder, tmp_path / "merged")
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template.startswith("{{ messages[0]")


def test_a_folder_that_is_not_empty(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "x").write_text("mine")
    with pytest.raises(UseError, match="is not an empty folder"):
        merge_to_folder("tiny", adapter, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_a_failed_check_leaves_nothing(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checking, "TOLERANCE", {torch.float32: 1e-12})
    with pytest.raises(MergeError, match="differs from the adapter by"):
        merge_to_folder("tiny", adapter, tmp_path / "merged", dtype="fp32")
    assert list(tmp_path.iterdir()) == []


def test_another_base_and_a_cut_file_are_refused(adapter: Path, tmp_path: Path) -> None:
    base = deltaw.load_base("tiny", dtype="fp32")
    with torch.no_grad():
        base.model.model.layers[0].mlp.up_proj.weight.add_(1.0)
        base.model.model.embed_tokens.weight.add_(1.0)
    base.model.save_pretrained(tmp_path / "other")
    base.tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(BaseMismatchError):
        merge_to_folder(str(tmp_path / "other"), adapter, tmp_path / "merged")
    allowed = merge_to_folder(str(tmp_path / "other"), adapter, tmp_path / "merged", allow_base_mismatch=True)
    assert allowed.effect > 0
    weights = tmp_path / "other" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(FileError, match="corrupt or cut short"):
        merge_to_folder(str(tmp_path / "other"), adapter, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_conv1d_with_a_tied_head(tmp_path: Path) -> None:
    config = GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=4096, n_positions=64, bos_token_id=4, eos_token_id=4)
    model = GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path / "gpt2")
    AutoTokenizer.from_pretrained(TINY).save_pretrained(tmp_path / "gpt2")
    done = merge_to_folder(str(tmp_path / "gpt2"), trained(model, tmp_path / "a"), tmp_path / "merged")
    assert done.dtype == "float32" and done.max_logit_difference < 1e-4 < done.effect


def test_rows_of_new_tokens_are_verified_where_nothing_ties_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=4096, n_positions=64, tie_word_embeddings=False)
    model = GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path / "gpt2")
    AutoTokenizer.from_pretrained(TINY).save_pretrained(tmp_path / "gpt2")
    attach_rows(model, Tokens({"<end>": 7, "<new>": 4096}, {4096: [5, 6]}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    deltaw.save(model, tmp_path / "a", beside=Kept(tokens={"<new>": 4096}).files)
    assert merge_to_folder(str(tmp_path / "gpt2"), tmp_path / "a", tmp_path / "merged").effect > 0
    whole = TokenRowsAdapter.merged

    def without_input_rows(self: TokenRowsAdapter, weight: torch.Tensor) -> torch.Tensor:
        return weight if self.spec.lookup else whole(self, weight)

    monkeypatch.setattr(TokenRowsAdapter, "merged", without_input_rows)
    with pytest.raises(MergeError):
        merge_to_folder(str(tmp_path / "gpt2"), tmp_path / "a", tmp_path / "again")
