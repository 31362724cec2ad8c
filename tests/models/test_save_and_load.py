"""save and load on plain modules: bit-exact, whole or not at all, the three answers about the base, strict and not."""

import dataclasses
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import deltaw
from deltaw import Full, LoRA
from deltaw.core import method as registry
from deltaw.core.adapter import WeightAdapter
from deltaw.core.base import identify
from deltaw.core.errors import BaseMismatchError, ConfigError, FileError, UseError
from deltaw.core.host import HostSpec
from deltaw.core.method import Method
from deltaw.formats import directory, manifest
from deltaw.models.adapters import layout

WEIGHTS = "adapter_model.safetensors"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8))
        self.norm, self.head = nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.body(x)))


X = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net().eval()


def tuned(method: Method | None = None, targets: Any = ("0", "2")) -> Net:
    model = net()
    deltaw.attach(model, method or LoRA(rank=2, bias="lora_only", modules_to_save=("head",)), targets=targets)
    stir(model)
    return model


@torch.no_grad()
def stir(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter))


def test_bit_exact_and_bytes_are_stable(tmp_path: Path) -> None:
    model = tuned()
    deltaw.save(model, tmp_path / "a", meta={"metrics": {"loss": 0.5}, "parents": ["x"], "note": "küß"})
    deltaw.save(model, tmp_path / "b", meta={"metrics": {"loss": 0.5}, "parents": ["x"], "note": "küß"})
    for file in (WEIGHTS, "adapter_config.json", "deltaw.json", "README.md"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    back = net()
    report = deltaw.load(back, tmp_path / "a", name="again")
    assert torch.equal(back(X), model(X)) and (report.name, report.base, report.left_out) == ("again", "match", ())
    before, after = deltaw.extract(model), deltaw.extract(back, "again")
    assert before.methods == after.methods and before.specs == after.specs and before.base == after.base
    for site, group in before.tensors.items():
        assert all(torch.equal(tensor, after.tensors[site][name]) for name, tensor in group.items())
    state, notes = directory.read(tmp_path / "a")
    assert state.meta["note"] == "küß" and state.meta["metrics"] == {"loss": 0.5} and notes == []
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a", "b"]  # no drafts left


def test_the_report_reads(tmp_path: Path) -> None:
    model = tuned(LoRA(rank=2, alpha=3))
    deltaw.save(model, tmp_path)
    report = deltaw.load(net(), tmp_path)
    state = deltaw.extract(model)
    deltas = [1.5 * group["lora_B"] @ group["lora_A"] for group in state.tensors.values()]
    change = sum(float(delta.norm()) ** 2 for delta in deltas)
    assert report.change == pytest.approx(change**0.5)
    assert f"adapter 'default': 2 sites, {report.parameters:,} parameters, ‖ΔW‖" in str(report)
    assert "trained on this base (Net)" in str(report)


def test_only_the_loaded_adapter_is_live_and_frozen(tmp_path: Path) -> None:
    model = tuned(LoRA(rank=2))
    deltaw.save(model, tmp_path)
    expected = model(X)
    deltaw.attach(model, LoRA(rank=1), targets=["0"], name="other")
    stir(model)
    deltaw.load(model, tmp_path, name="third")
    assert torch.equal(model(X), expected)
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".third." in n)
    with pytest.raises(UseError, match="an adapter 'third' is attached already"):
        deltaw.load(model, tmp_path, name="third")
    assert torch.equal(model(X), expected)


def test_three_answers(tmp_path: Path) -> None:
    deltaw.save(tuned(LoRA(rank=2)), tmp_path / "a")
    assert deltaw.load(net(), tmp_path / "a").base == "match"
    assert deltaw.load(net().bfloat16(), tmp_path / "a").base == "match"
    stranger = net(1)
    with pytest.raises(
        BaseMismatchError, match=r"the shapes agree and the values of.*allow_base_mismatch=True"
    ) as caught:
        deltaw.load(stranger, tmp_path / "a")
    assert "'Net'" in str(caught.value) and type(stranger.body[0]) is nn.Linear
    report = deltaw.load(stranger, tmp_path / "a", allow_base_mismatch=True)
    assert report.base == "mismatch" and "another base, allowed" in str(report)
    (tmp_path / "a/deltaw.json").unlink()
    report = deltaw.load(net(), tmp_path / "a")
    assert report.base == "unknown" and "does not say which base" in str(report)


def test_not_strict_loads_what_fits_and_says_the_rest(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tuned(LoRA(rank=2))
    deltaw.save(model, tmp_path)
    other = net()
    other.body[2] = nn.Linear(8, 9)
    other.norm, other.head = nn.BatchNorm1d(9), nn.Linear(9, 3)
    with pytest.raises(FileError, match=r"body\.2: lora_B is \(8, 2\), expected \(9, 2\)"):
        deltaw.load(other, tmp_path, allow_base_mismatch=True)
    assert type(other.body[0]) is nn.Linear  # untouched
    report = deltaw.load(other, tmp_path, allow_base_mismatch=True, strict=False)
    assert report.sites == 1 and len(report.left_out) == 1 and "left out: body.2" in str(report)
    assert "left out: body.2" in caplog.text
    with pytest.raises(FileError, match=r"nothing of .* fits this model"):
        deltaw.load(nn.Linear(2, 2), tmp_path, allow_base_mismatch=True, strict=False)


def test_other_files_in_the_folder_stay(tmp_path: Path) -> None:
    model = tuned(LoRA(rank=2))
    deltaw.save(model, tmp_path / "a")
    (tmp_path / "a/tokenizer.json").write_text("{}")
    (tmp_path / "a/extra").mkdir()
    (tmp_path / "a/extra/more.txt").write_text("more")
    (tmp_path / "a/adapter_model.bin").write_text("old")
    stir(model)
    deltaw.save(model, tmp_path / "a")
    assert (tmp_path / "a/tokenizer.json").read_text() == "{}" and (tmp_path / "a/extra/more.txt").read_text() == "more"
    assert not (tmp_path / "a/adapter_model.bin").exists()
    back = net()
    deltaw.load(back, tmp_path / "a")
    assert torch.equal(back(X), model(X))
    (tmp_path / "link").symlink_to(tmp_path / "a")
    deltaw.save(model, tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "a/tokenizer.json").exists()


def test_template_and_tokens_are_the_adapters_own(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A write replaces them by its own, or leaves none: those of the adapter that stood there are another's."""
    model, file = tuned(LoRA(rank=2)), tmp_path / "a" / "tokens.json"
    for text in ('{"a": 1}', '{"b": 2}'):
        deltaw.save(model, tmp_path / "a", beside={"tokens.json": text, "chat_template.jinja": text, "notes.txt": text})
        assert {(file.parent / name).read_text() for name in ("tokens.json", "chat_template.jinja", "notes.txt")} == {
            text
        }
    report = deltaw.load(net(), tmp_path / "a", allow_base_mismatch=True)
    assert "trained with chat_template.jinja and tokens.json: deltaw.data.kept.use_kept(tokenizer, " in str(report)
    deltaw.save(model, tmp_path / "a", beside={"tokens.json": "{}"})
    assert file.read_text() == "{}" and not (file.parent / "chat_template.jinja").exists() and not caplog.text
    assert (file.parent / "notes.txt").read_text() == '{"b": 2}'
    deltaw.save(model, tmp_path / "a")
    assert not file.exists() and "tokens.json went with the adapter that was there" in caplog.text


def test_places_that_are_no_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tuned(LoRA(rank=2))
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileError, match="is a file: an adapter is a folder"):
        deltaw.save(model, tmp_path / "file")
    with pytest.raises(FileError, match=f"is a file: give the adapter's folder, {tmp_path}"):
        deltaw.load(net(), tmp_path / "file")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileError, match="a folder of its own"):
        deltaw.save(model, ".")
    assert os.listdir(tmp_path) == ["file"]


def test_a_write_that_fails_leaves_the_old_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tuned(LoRA(rank=2))
    deltaw.save(model, tmp_path / "a")
    before = (tmp_path / "a" / WEIGHTS).read_bytes()
    stir(model)
    for broken in ("save_file", "card"):
        with monkeypatch.context() as patch:

            def fail(*_: Any, **__: Any) -> None:
                raise OSError(28, "No space left on device")

            patch.setattr(directory, broken, fail)
            with pytest.raises(FileError, match=r"cannot be written to .*No space left"):
                deltaw.save(model, tmp_path / "a")
        assert (tmp_path / "a" / WEIGHTS).read_bytes() == before
        assert [file.name for file in tmp_path.iterdir()] == ["a"]
    with monkeypatch.context() as patch:  # killed between moving the old folder aside and the new one in
        real, calls = os.replace, []

        def second_fails(source: Any, target: Any) -> None:
            calls.append(target)
            if str(source).endswith(".tmp") and Path(target) == tmp_path / "a":
                raise OSError(5, "Input/output error")
            real(source, target)

        patch.setattr(os, "replace", second_fails)
        with pytest.raises(FileError, match="Input/output"):
            deltaw.save(model, tmp_path / "a")
    assert (tmp_path / "a" / WEIGHTS).read_bytes() == before and [f.name for f in tmp_path.iterdir()] == ["a"]
    with pytest.raises(ConfigError, match="meta is kept as JSON"):
        deltaw.save(model, tmp_path / "a", meta={"x": {1, 2}})
    assert (tmp_path / "a" / WEIGHTS).read_bytes() == before


def test_a_config_edited_after_saving_is_noticed(tmp_path: Path) -> None:
    """PEFT would follow adapter_config.json and we deltaw.json: two functions in one folder."""
    deltaw.save(tuned(LoRA(rank=2, alpha=4)), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    for change, words in (
        ({"lora_alpha": 40}, "scale 20 by adapter_config.json, 2 by deltaw.json"),
        ({"use_rslora": True}, "scale"),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | change))
        with pytest.raises(FileError, match=words):
            deltaw.load(net(), tmp_path)
    (tmp_path / "deltaw.json").unlink()
    model = net()
    deltaw.load(model, tmp_path)
    assert deltaw.extract(model).methods != {}


@dataclass(frozen=True, kw_only=True)
class Shift(Method):
    """W' = W + a constant, in `steps` steps: a method of a third party, without a format in PEFT."""

    steps: int = 1

    def build(self, spec: HostSpec) -> WeightAdapter:
        return ShiftAdapter(self.steps)


class ShiftAdapter(WeightAdapter):
    def __init__(self, steps: int):
        super().__init__()
        self.deep = nn.ModuleDict({"er": nn.ParameterDict({"shift": nn.Parameter(torch.zeros(steps))})})

    def merged(self, weight: Tensor) -> Tensor:
        return weight + self.deep["er"]["shift"].sum()  # type: ignore[index]


@pytest.fixture
def shift() -> Iterator[None]:
    registry.register("shift")(Shift)
    yield
    registry._METHODS.pop("shift", None)


@pytest.mark.usefixtures("shift")
def test_a_method_that_peft_does_not_have(tmp_path: Path) -> None:
    model = tuned(Shift(steps=3))
    deltaw.attach(model, Full(), targets=["norm"])
    stir(model)
    deltaw.save(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "DELTAW_SHIFT"
    assert "body.0:weight:deep.er.shift" in load_file(tmp_path / WEIGHTS)
    back = net()
    assert deltaw.load(back, tmp_path).base == "match" and torch.equal(back(X), model(X))
    record = json.loads((tmp_path / "deltaw.json").read_text())
    record["methods"][0]["version"] = 2
    (tmp_path / "deltaw.json").write_text(json.dumps(record))
    with pytest.raises(ConfigError, match=r"deltaw\.json: method 'shift' was saved in version 2.*upgrade"):
        deltaw.load(net(), tmp_path)
    registry._METHODS.pop("shift")
    with pytest.raises(ConfigError, match="no method 'shift'"):
        deltaw.load(net(), tmp_path)


def test_manifest_says_what_is_wrong_with_it() -> None:
    state = deltaw.extract(tuned(LoRA(rank=2)))
    text = manifest.write(state, "peft", {})
    assert manifest.read(text, "x").methods == state.methods and manifest.read(text, "x").specs == state.specs
    record = json.loads(text)
    for change, words in (
        ({"format": 2}, "format 2, this deltaw reads up to 1: upgrade"),
        ({"layout": "cubist"}, "layout 'cubist', known are peft and native"),
        ({"sites": [["body.0", "weight", 7, {"shape": [8, 6]}]]}, "not a manifest of deltaw: IndexError"),
        ({"base": {"name": "x"}}, "not a manifest of deltaw: KeyError"),
        ({"methods": None}, "not a manifest of deltaw"),
        ({"meta": 3}, "not a manifest of deltaw"),
    ):
        with pytest.raises(FileError, match=words):
            manifest.read(json.dumps(record | change), "x")
    with pytest.raises(FileError, match="x, line 2: not JSON"):
        manifest.read("{\n,", "x")


def test_digest_sees_names_dtypes_shapes_and_bits() -> None:
    tensor = torch.arange(6.0)
    seen = {
        manifest.digest(tensors)
        for tensors in (
            {"a": tensor},
            {"b": tensor},
            {"a": tensor.view(2, 3)},
            {"a": tensor.double()},
            {"a": -tensor},
            {"a": tensor.int()},
        )
    }
    assert len(seen) == 6
    assert manifest.digest({"a": tensor, "b": tensor}) == manifest.digest({"b": tensor, "a": tensor.clone()})
    assert manifest.digest({"a": tensor.bfloat16()}).startswith("sha256:")


def test_layout_of_a_base_leaves_adapters_out() -> None:
    plain, adapted = layout(net()), layout(tuned())
    assert plain == adapted
    assert sorted(plain.entries["norm"]) == ["bias", "num_batches_tracked", "running_mean", "running_var", "weight"]
    assert plain.entries["body"] == [] and not plain.transposed


def test_a_state_written_and_read_without_any_model(tmp_path: Path) -> None:
    state = dataclasses.replace(deltaw.extract(tuned()), base=identify(net()))
    directory.write(state, tmp_path)
    again, notes = directory.read(tmp_path)
    assert again.methods.keys() == state.methods.keys() and again.base == state.base and notes == []
