"""What a merge refuses or survives: a failed one leaves nothing under the final name, nothing beside it, and says why."""

import json
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from test_shards import adapter, llama, opened, raw, stored
from torch import nn

import deltaw
from deltaw.core.errors import BaseMismatchError, DeltawError, FileError, MergeError, UseError
from deltaw.methods.token_rows import TokenRows
from deltaw.models.base import TINY
from deltaw.models.checkpoint import open_checkpoint
from deltaw.ship import beside, disk
from deltaw.ship.merge import merge_to_folder


class Pair(NamedTuple):
    base: Path
    adapter: Path


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("pair")
    base = stored(llama(), folder / "base")
    return Pair(base, adapter(base, folder / "a", deltaw.LoRA(rank=4, alpha=12)))


def fails(error: type[DeltawError], says: str, base: Path, part: Any, folder: Path, **options: Any) -> None:
    with pytest.raises(error, match=says):
        merge_to_folder(str(base), part, folder / "m", **options)
    assert not folder.exists() or list(folder.iterdir()) == []


def test_another_base_is_found_before_anything_is_written(pair: Pair, tmp_path: Path) -> None:
    torch.manual_seed(7)
    other = stored(llama(), tmp_path / "other")
    fails(BaseMismatchError, "another base", other, pair.adapter, tmp_path / "x", check=False)
    assert merge_to_folder(str(other), pair.adapter, tmp_path / "m", allow_base_mismatch=True).effect > 0


@pytest.mark.parametrize("check", [True, False])
def test_an_adapter_without_a_change(check: bool, pair: Pair, tmp_path: Path) -> None:
    zero = adapter(pair.base, tmp_path / "zero", deltaw.LoRA(rank=4), std=0.0)
    fails(MergeError, "would change no weight at all", pair.base, zero, tmp_path / "x", check=check)
    fails(MergeError, "would change no weight", pair.base, [(pair.adapter, 0.0)], tmp_path / "x", check=check)
    both = [(pair.adapter, 0.7), (pair.adapter, -0.7)]  # what rounding leaves of them would still tip single numbers
    fails(MergeError, "would change no weight", pair.base, both, tmp_path / "x", check=check)
    small = adapter(pair.base, tmp_path / "small", deltaw.LoRA(rank=4, alpha=1e-12))
    fails(MergeError, "too small for the weights' dtype", pair.base, small, tmp_path / "x", check=check)


def test_targets_that_are_rounded_off_are_named(pair: Pair, tmp_path: Path) -> None:
    part = adapter(pair.base, tmp_path / "a", deltaw.LoRA(rank=4, alpha_pattern={"k_proj": 1e-12}))
    done = merge_to_folder(str(pair.base), part, tmp_path / "m")
    assert done.vanished == tuple(f"model.layers.{n}.self_attn.k_proj.weight" for n in (0, 1))
    assert any("k_proj" in remark for remark in done.remarks)


def test_a_change_that_overflows(pair: Pair, tmp_path: Path) -> None:
    part = adapter(pair.base, tmp_path / "a", deltaw.LoRA(rank=4, alpha=1e9))
    fails(MergeError, "not finite in the dtype", pair.base, part, tmp_path / "x", dtype="fp16", check=False)


@pytest.mark.parametrize("pickled", [False, True])
def test_a_weight_beside_the_targets_that_overflows(pickled: bool, pair: Pair, tmp_path: Path) -> None:
    """It is cast, not merged: without the comparison of logits nothing else would see it."""
    model = opened(pair.base)
    model.model.norm.weight.data[3] = 1e6
    base = stored(model, tmp_path / "base", torch.float32)
    if pickled:
        torch.save(model.state_dict(), base / "pytorch_model.bin")
        for file in base.glob("*.safetensors*"):
            file.unlink()
        for file in TINY.iterdir():
            if "token" in file.name:
                shutil.copy(file, base)
    options = {"dtype": "fp16", "check": False, "allow_base_mismatch": True}
    fails(MergeError, "model.norm.weight: the weight is not finite", base, pair.adapter, tmp_path / "x", **options)


def test_logits_that_are_not_finite_prove_nothing(pair: Pair, tmp_path: Path) -> None:
    fails(MergeError, "logits that are not finite", pair.base, [(pair.adapter, 1e30)], tmp_path / "x", dtype="fp32")


def test_templates_by_other_names_go_along(pair: Pair, tmp_path: Path) -> None:
    base = Path(shutil.copytree(pair.base, tmp_path / "base"))
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates/rag.jinja").write_text("{{ messages }}")
    done = merge_to_folder(str(base), pair.adapter, tmp_path / "m", check=False)
    assert (tmp_path / "m/additional_chat_templates/rag.jinja").read_text() == "{{ messages }}"
    assert "additional_chat_templates/rag.jinja" in done.files and "model.safetensors.index.json" in done.files


def test_missing_and_cut_shards(pair: Pair, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(pair.base, base)
    shards = sorted(base.glob("*.safetensors"))
    shards[1].write_bytes(shards[1].read_bytes()[:-10])
    fails(FileError, "00002-of-.* is corrupt or cut short", base, pair.adapter, tmp_path / "x")
    shards[1].unlink()
    shards[2].unlink()
    fails(FileError, r"not whole .*2 faults", base, pair.adapter, tmp_path / "x")
    shutil.copytree(pair.base, base, dirs_exist_ok=True)
    index = json.loads((base / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.nowhere.weight"] = index["weight_map"]["model.norm.weight"]
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    fails(FileError, "model.nowhere.weight is not in", base, pair.adapter, tmp_path / "x")


def test_an_index_that_vanishes_is_missed(pair: Pair, tmp_path: Path) -> None:
    base = Path(shutil.copytree(pair.base, tmp_path / "base"))
    (tmp_path / "m").mkdir()
    checkpoint = open_checkpoint(base)
    assert checkpoint is not None and len(checkpoint.files) > 1
    (base / "model.safetensors.index.json").unlink()
    with pytest.raises(FileError, match=r"index.json cannot be read: No such file"):
        disk.write(checkpoint, tmp_path / "m", None, {}, lambda _: None)


def test_a_disk_without_room_is_seen_before(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beside.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    fails(
        FileError,
        "takes 0.0 MB and .* has 0.0 MB left: nothing was written",
        pair.base,
        pair.adapter,
        tmp_path / "x",
        check=False,
    )


def limited() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))


def merging(pair: Pair, target: Path, before: Callable[[], None] | None = None) -> subprocess.Popen[str]:
    words = ["-m", "deltaw", "merge", pair.adapter, "--model", pair.base, "--output", target, "--no-check"]
    code = [sys.executable, *map(str, words)]
    return subprocess.Popen(code, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=before)


def test_a_disk_that_is_full_half_way(pair: Pair, tmp_path: Path) -> None:
    """The system itself refuses to write past a limit."""
    process = merging(pair, tmp_path / "x/m", limited)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 1 and "m cannot be written: File too large; nothing was left there" in said
    assert said.count("\n") == 1 and list((tmp_path / "x").iterdir()) == []


def test_what_cannot_be_read_is_not_said_of_writing(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of the base that goes away between the plan and the writing."""
    base = Path(shutil.copytree(pair.base, tmp_path / "base"))
    (lost,), write = base.glob("model-00002*"), disk.write

    def late(*given: Any) -> set[str]:
        lost.unlink()
        return write(*given)

    monkeypatch.setattr(disk, "write", late)
    fails(FileError, f"{lost} cannot be read: No such file", base, pair.adapter, tmp_path / "x", check=False)


def test_an_interrupt_half_way(pair: Pair, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if 0 < done < total:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        merge_to_folder(str(pair.base), pair.adapter, tmp_path / "x/m", check=False, told=stop)
    assert list((tmp_path / "x").iterdir()) == []


def test_keys_of_another_model_do_not_give_the_base(pair: Pair, tmp_path: Path) -> None:
    """Other tools load such a file with a warning and export the base."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(pair.adapter, tmp_path / "a")
    (tmp_path / "a/deltaw.json").unlink()
    tensors = load_file(tmp_path / "a/adapter_model.safetensors")
    renamed = {key.replace("model.layers", "model.blocks"): tensor for key, tensor in tensors.items()}
    save_file(renamed, tmp_path / "a/adapter_model.safetensors")
    fails(FileError, "no such module", pair.base, tmp_path / "a", tmp_path / "x", check=False)


def test_tied_heads(tmp_path: Path) -> None:
    """The head is not on disk and stays away; a change of it alone is refused, rows of the table act in both."""
    base = stored(llama(tie_word_embeddings=True), tmp_path / "base", torch.float32)
    assert "lm_head.weight" not in raw(base)
    for target in ("lm_head", "embed_tokens"):
        part = adapter(base, tmp_path / target, deltaw.LoRA(rank=2), target)
        fails(MergeError, "is tied to", base, part, tmp_path / "x")
    rows = adapter(base, tmp_path / "rows", TokenRows(tokens=(5, 9)), "embed_tokens")
    done = merge_to_folder(str(base), rows, tmp_path / "m")
    assert done.way == "shards" and done.max_logit_difference < 1e-5 < done.effect
    before, after = raw(base), raw(tmp_path / "m")
    assert before.keys() == after.keys()
    moved = (before["model.embed_tokens.weight"] != after["model.embed_tokens.weight"]).any(1)
    assert moved.nonzero().flatten().tolist() == [5, 9]


def test_a_head_that_the_config_ties_and_the_files_do_not(tmp_path: Path) -> None:
    """transformers goes by the files; so does a merge."""
    base = stored(llama(), tmp_path / "base", torch.float32)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    part = adapter(base, tmp_path / "a", deltaw.LoRA(rank=2), "lm_head")
    done = merge_to_folder(str(base), part, tmp_path / "m")
    assert done.max_logit_difference < 1e-5 < done.effect and done.weights == 1


def test_quantised_files_are_no_base(pair: Pair, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(pair.base, base)
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (base / "config.json").write_text(json.dumps(config))
    fails(UseError, "quantised themselves .*: give the unquantised base", base, pair.adapter, tmp_path / "x")


def test_what_cannot_go_by_files_goes_through_memory_and_says_why(pair: Pair, tmp_path: Path) -> None:
    base = tmp_path / "base"
    model = opened(pair.base)
    for file in TINY.iterdir():
        if "token" in file.name:
            shutil.copy(file, model_folder(base) / file.name)
    shutil.copy(pair.base / "config.json", base)
    torch.save(model.state_dict(), base / "pytorch_model.bin")
    parts = [(pair.adapter, 0.5), (pair.adapter, 0.25)]
    done = merge_to_folder(str(base), parts, tmp_path / "m")
    assert done.way == "memory" and "merged in memory: the base has no safetensors file" in done.remarks
    by_files = merge_to_folder(str(pair.base), parts, tmp_path / "n")
    assert by_files.way == "shards"
    found, wanted = opened(tmp_path / "m").state_dict(), opened(tmp_path / "n").state_dict()
    for path, tensor in wanted.items():
        torch.testing.assert_close(found[path].float(), tensor.float(), rtol=2**-7, atol=1e-6)
    nothing = [(pair.adapter, 1.0), (pair.adapter, -1.0)]
    fails(MergeError, "would change no weight at all", base, nothing, tmp_path / "x", check=False)
    bent = adapter(pair.base, tmp_path / "dora", deltaw.DoRA(rank=2))
    fails(UseError, "only exact sums are merged", base, [(bent, 0.5)], tmp_path / "x", check=False)


def model_folder(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder


def test_parts_without_a_change_of_a_weight(pair: Pair, tmp_path: Path) -> None:
    from deltaw.core.method import get

    part = adapter(pair.base, tmp_path / "a", get("bottleneck")(), "all-linear")
    fails(MergeError, "bottleneck has no ΔW", pair.base, part, tmp_path / "x", check=False)


def test_peft_computes_what_was_written(pair: Pair, tmp_path: Path) -> None:
    """rsLoRA with a rank pattern: the scale is α/√r of each module."""
    from peft import PeftModel

    method = deltaw.LoRA(rank=8, alpha=8, rslora=True, rank_pattern={"down_proj": 3})
    base = stored(llama(), tmp_path / "base", torch.float32)
    part = adapter(base, tmp_path / "a", method)
    merge_to_folder(str(base), part, tmp_path / "m")
    wanted: nn.Module = PeftModel.from_pretrained(opened(base), part).merge_and_unload()
    found = opened(tmp_path / "m").state_dict()
    for path, tensor in wanted.state_dict().items():
        torch.testing.assert_close(found[path], tensor, rtol=0, atol=1e-6)
