"""Files that are missing, broken, foreign or of another base: one sentence each, and the model is left as it was."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from families import build, outputs, randomise
from safetensors.torch import load_file, save_file

import deltaw
from deltaw.core.errors import BaseMismatchError, ConfigError, DeltawError, FileError
from deltaw.formats import directory
from deltaw.formats.peft_config import check, method_of
from deltaw.formats.weights import read_file

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters") / "good"
    model = build("llama")
    deltaw.attach(model, deltaw.LoRA(rank=4), targets="all-linear")
    randomise(model)
    deltaw.save(model, folder)
    return folder


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "adapter"))


def refused(folder: Path, error: type[DeltawError], *words: str, **options: bool) -> None:
    model = build("llama")
    base = outputs("llama", model)
    with pytest.raises(error) as caught:
        deltaw.load(model, folder, **options)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert type(model.model.layers[0].self_attn.q_proj) is torch.nn.Linear
    assert torch.equal(outputs("llama", model), base)


def edit(folder: Path, change) -> None:
    """Change the tensors, and drop the manifest that would notice."""
    tensors = {key: tensor.clone() for key, tensor in load_file(folder / WEIGHTS).items()}  # not mapped to the file
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    (folder / "deltaw.json").unlink()


def test_a_file_that_cannot_be_read_is_said_so(tmp_path: Path) -> None:
    """No user may read it, whatever his rights: it is a folder."""
    (tmp_path / WEIGHTS).mkdir()
    with pytest.raises(FileError, match=f"{WEIGHTS} cannot be read: Is a directory; make it readable"):
        read_file(tmp_path / WEIGHTS, False)


def test_missing_folder_and_file(folder: Path) -> None:
    refused(folder / "nowhere", FileError, "no adapter folder")
    (folder / WEIGHTS).unlink()
    refused(folder, FileError, f"holds no {WEIGHTS}", "adapter_config.json")
    (folder / "config.json").write_text("{}")
    refused(folder, FileError, "it holds a model, not an adapter")
    (folder.parent / "sub").mkdir()
    shutil.move(folder, folder.parent / "sub" / "named")
    refused(folder.parent / "sub", FileError, "adapters in its folders named")


@pytest.mark.parametrize("keep", [10, 200, -8])
def test_truncated(folder: Path, keep: int) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:keep])
    refused(folder, FileError, "not a safetensors file", "corrupt or cut short")


def test_truncated_where_the_size_of_the_header_begins_as_a_pickle_does(folder: Path) -> None:
    header = b"{" + b" " * 0x17E + b"}"  # 0x180 bytes: the file begins with 0x80
    (folder / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header[:100])
    refused(folder, FileError, "corrupt or cut short")


def test_pickle_where_safetensors_belongs(folder: Path) -> None:
    tensors = {key: tensor.clone() for key, tensor in load_file(folder / WEIGHTS).items()}  # not mapped to the file
    torch.save(tensors, folder / WEIGHTS)
    refused(folder, FileError, "pickle under another name")
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    (folder / "deltaw.json").unlink()
    refused(folder, FileError, "allow_pickle=True")
    deltaw.load(build("llama"), folder, allow_pickle=True)
    torch.save({"model": torch.nn.Linear(2, 2)}, folder / "adapter_model.bin")
    refused(folder, FileError, "holds more than tensors", allow_pickle=True)


def test_keys_that_do_not_fit_are_all_named(folder: Path) -> None:
    def change(tensors: dict) -> None:
        key = "base_model.model.model.layers.0.self_attn.{}.lora_{}.weight"
        tensors[key.format("q_prj", "A")] = tensors.pop(key.format("q_proj", "A"))
        tensors[key.format("q_prj", "B")] = tensors.pop(key.format("q_proj", "B"))
        tensors[key.format("k_proj", "A")] = torch.zeros(4, 5)

    edit(folder, change)
    refused(folder, FileError, "2 faults", "did you mean 'model.layers.0.self_attn.q_proj'", "(4, 5), expected (4, 32)")
    model = build("llama")
    report = deltaw.load(model, folder, strict=False)
    assert (
        len([fault for fault in report.left_out if "k_proj" in fault or "q_prj" in fault]) == 2 and report.sites == 12
    )


def test_half_a_pair_foreign_prefix_and_nan(folder: Path, tmp_path: Path) -> None:
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    other = Path(shutil.copytree(folder, tmp_path / "b"))
    third = Path(shutil.copytree(folder, tmp_path / "c"))
    edit(folder, lambda tensors: tensors.pop(key.format("B")))
    refused(folder, FileError, "missing lora_B")
    edit(other, lambda tensors: tensors.update({"q_proj.lora_A.weight": torch.zeros(4, 32)}))
    refused(other, FileError, "does not begin with 'base_model.model.'")
    edit(third, lambda tensors: tensors[key.format("A")].fill_(float("nan")))
    refused(third, FileError, "NaN or infinite")


def test_changed_tensors_and_manifest(folder: Path) -> None:
    tensors = {key: tensor.clone() for key, tensor in load_file(folder / WEIGHTS).items()}  # not mapped to the file
    next(iter(tensors.values())).add_(1)
    save_file(tensors, folder / WEIGHTS)
    refused(folder, FileError, "not those that deltaw.json describes")
    manifest = json.loads((folder / "deltaw.json").read_text())
    (folder / "deltaw.json").write_text(json.dumps({**manifest, "format": 99}))
    refused(folder, FileError, "format 99", "upgrade")
    (folder / "deltaw.json").write_text(json.dumps({**manifest, "methods": [{"method": "lroa"}]}))
    refused(folder, ConfigError, "no method 'lroa'", "did you mean 'lora'")
    (folder / "deltaw.json").write_text(json.dumps({**manifest, "methods": [{"method": "lora", "version": 9}]}))
    refused(folder, ConfigError, "version 9", "upgrade")
    (folder / "deltaw.json").write_text("{")
    refused(folder, FileError, "not JSON")
    (folder / "deltaw.json").write_text("{}")
    refused(folder, FileError, "not a manifest of deltaw")


def test_config_that_is_no_json_or_missing(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{")
    refused(folder, FileError, "adapter_config.json is not JSON")
    (folder / "adapter_config.json").unlink()
    refused(folder, FileError, "holds no adapter_config.json")


def test_another_base_of_the_same_shape(folder: Path) -> None:
    torch.manual_seed(99)
    stranger = type(build("llama"))(build("llama").config).eval()
    with pytest.raises(BaseMismatchError, match="the shapes agree and the values of"):
        deltaw.load(stranger, folder)
    report = deltaw.load(stranger, folder, allow_base_mismatch=True)
    assert report.base == "mismatch" and "another base, allowed" in str(report)
    half = build("llama").to(torch.bfloat16)
    assert deltaw.load(half, folder).base == "match"  # another dtype is not another base


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"lora_bias": True}, "lora_bias"),
        ({"use_qalora": True}, "use_qalora"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"init_lora_weights": "pissa"}, "'pissa'"),
        ({"init_lora_weights": "olora"}, "'olora'"),
        ({"brand_new_switch": 3}, "brand_new_switch=3"),
        ({"peft_type": "HRA"}, "HRA"),
    ],
)
def test_unsupported_features_are_refused_by_name(change: dict, word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        check({"peft_type": "LORA", **change})


def test_minimal_and_legacy_configs() -> None:
    method = method_of({"peft_type": "LORA", "target_modules": ["q_proj"], "enable_lora": None, "merge_weights": False})
    assert (method.rank, method.alpha, method.scale) == (8, 8.0, 1.0)
    assert method_of({"peft_type": "PeftType.LORA", "r": 4}).scale == 2.0
    assert check({"peft_type": "LORA", "brand_new_switch": None}) != []
    with pytest.raises(ConfigError, match="no peft_type"):
        check({})


def test_legacy_key_with_the_adapters_name(folder: Path) -> None:
    expected = directory.read(folder)[0]

    def rename(tensors: dict) -> None:
        for key in list(tensors):
            tensors[key.replace(".weight", ".default.weight")] = tensors.pop(key)

    edit(folder, rename)
    found = directory.read(folder)[0]
    assert found.tensors.keys() == expected.tensors.keys()


def test_writing_never_replaces_a_strangers_folder(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    model = build("llama")
    deltaw.attach(model, deltaw.LoRA(rank=2), targets=["q_proj"])
    with pytest.raises(FileError, match="not an adapter"):
        deltaw.save(model, tmp_path / "mine")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
