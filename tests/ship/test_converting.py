"""deltaw convert on the bundled base: there and back with equal logits, what is missing is asked for, nothing half-written."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import deltaw
from deltaw import DoRA, LoRA
from deltaw.cli import main as cli
from deltaw.config import parse
from deltaw.core.errors import FileError, MergeError, UseError
from deltaw.formats import directory
from deltaw.models.base import load_base
from deltaw.ship import convert as module
from deltaw.ship.convert import convert
from deltaw.ship.export import export

IDS = torch.randint(1, 500, (2, 8), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits


@pytest.fixture(scope="module")
def base() -> Any:
    return load_base("tiny", dtype="fp32", device=torch.device("cpu")).model


def save(base: Any, method: Any, folder: Path, targets: Any = "all-linear") -> torch.Tensor:
    """An adapter with an effect, saved; the base's logits with it."""
    deltaw.attach(base, method, targets=targets)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    deltaw.save(base, folder, meta={"task_type": "CAUSAL_LM"})
    found = logits(base)
    deltaw.detach(base)
    return found


def loaded(base: Any, folder: Path) -> torch.Tensor:
    deltaw.load(base, folder)
    found = logits(base)
    deltaw.detach(base)
    return found


METHODS: dict[str, Any] = {
    "lora": LoRA(rank=4, alpha=6, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 5}),
    "rslora": LoRA(rank=4, alpha=6, rslora=True),
    "pissa": LoRA(rank=2, init="pissa"),
    "dora": DoRA(rank=4, alpha=6),
}


@pytest.mark.parametrize("name", METHODS)
def test_there_and_back(name: str, base: Any, tmp_path: Path) -> None:
    wanted, plain = save(base, METHODS[name], tmp_path / "a"), logits(base)
    there = convert(tmp_path / "a", tmp_path / "k", to="kohya", model="tiny")
    back = convert(tmp_path / "k" / "k.safetensors", tmp_path / "p", to="peft", model="tiny")
    assert (there.tool, back.tool, there.parts) == ("deltaw", "kohya", back.parts) and back.error <= 1e-6
    found = loaded(base, tmp_path / "p")
    assert float((wanted - plain).abs().max()) > 1e-2 and float((found - wanted).abs().max()) <= 1e-4
    header = module.read_file(tmp_path / "k" / "k.safetensors", False)[1]
    first, second = (directory.open_directory(tmp_path / f) for f in "ap")
    assert json.loads(header["deltaw"])["parents"] == [first.digest]
    assert second.state.meta["converted"] == {"from": "kohya", "file": "k.safetensors"}
    assert second.state.base is None  # a file that does not say which weights it was trained on
    kept = convert(tmp_path / "a", tmp_path / "d")  # a folder of ours needs no base, and keeps what it knows of its own
    assert kept.error == 0.0 and directory.read(tmp_path / "d")[0].base is not None


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["deltaw", "convert", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    return call


def test_an_adapter_that_changes_nothing_is_converted_and_said(run: Any, base: Any, tmp_path: Path) -> None:
    deltaw.attach(base, LoRA(rank=2), targets=["q_proj"])
    deltaw.save(base, tmp_path / "zero")
    deltaw.detach(base)
    code, _, err = run(tmp_path / "zero", "--output", tmp_path / "out", "--to", "peft")
    assert code == 0 and "its change is zero everywhere" in err and (tmp_path / "out/adapter_config.json").is_file()


def own(base: Any, rank: int = 2) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Random factors for the q and v layers of the bundled base, by path."""
    paths = [p for p, _ in base.named_modules() if p.endswith(("q_proj", "v_proj"))]
    shapes = {p: base.get_submodule(p).weight.shape for p in paths}
    return {p: (torch.randn(rank, shape[1]), torch.randn(shape[0], rank)) for p, shape in shapes.items()}


def test_loralib_on_the_command_line(run: Any, base: Any, tmp_path: Path) -> None:
    pairs = own(base)
    tensors = {f"{p}.lora_{x}": t for p, pair in pairs.items() for x, t in zip("AB", pair, strict=True)}
    torch.save(tensors, tmp_path / "lora.pt")
    given = [tmp_path / "lora.pt", "--output", tmp_path / "out", "--json"]
    for more, words in (
        ([], "read it with allow_pickle=True (--allow-pickle)"),
        (["--allow-pickle"], "looked up in the base: say which, --model"),
        (["--allow-pickle", "--model", "tiny"], "say the lora_alpha that it was trained with (--alpha 16)"),
        (
            ["--allow-pickle", "--model", "tiny", "--alpha", 4, "--enable-lora", "yes"],
            "'yes' is neither true nor false",
        ),
        (
            ["--allow-pickle", "--model", "tiny", "--alpha", 4, "--to", "gguf"],
            "written are deltaw, peft, kohya, diffusers",
        ),
        (["--allow-pickle", "--model", "nope/nope/x"], "no base 'nope/nope/x'"),
    ):
        code, out, err = run(*given, *more)
        assert code in (1, 2) and out == "" and err.startswith("error: ") and words in err, err
        assert [file.name for file in tmp_path.iterdir()] == ["lora.pt"]
    code, out, _ = run(*given, "--allow-pickle", "--model", "tiny", "--alpha", 4)
    found = json.loads(out)
    assert code == 0 and found["tool"] == "loralib" and found["parts"] == {"model": len(pairs)}
    plain = logits(base)
    with torch.no_grad():
        before = {p: base.get_submodule(p).weight.clone() for p in pairs}
        for p, (a, b) in pairs.items():
            base.get_submodule(p).weight.add_(2 * b @ a)
        wanted = logits(base)
        for p, weight in before.items():
            base.get_submodule(p).weight.copy_(weight)
    found = loaded(base, tmp_path / "out")
    assert float((found - wanted).abs().max()) <= 1e-4 * float(wanted.abs().max()) and not torch.equal(wanted, plain)
    code, _, err = run(*given, "--allow-pickle", "--model", "tiny", "--alpha", 4)
    assert code == 2 and "exists and is not an empty folder" in err


def test_a_folder_of_mlx_names_its_base(run: Any, base: Any, tmp_path: Path) -> None:
    pairs = own(base)
    tensors = {f"{p}.lora_a": a.T.contiguous() for p, (a, _) in pairs.items()}
    (tmp_path / "mlx").mkdir()
    save_file(
        tensors | {f"{p}.lora_b": b.T.contiguous() for p, (_, b) in pairs.items()},
        tmp_path / "mlx/adapters.safetensors",
    )
    config = {"model": "tiny", "fine_tune_type": "lora", "lora_parameters": {"rank": 2, "scale": 20.0}}
    (tmp_path / "mlx/adapter_config.json").write_text(json.dumps(config))
    code, out, _ = run(tmp_path / "mlx", "--output", tmp_path / "out", "--to", "peft", "--json")
    assert code == 0 and json.loads(out)["tool"] == "mlx"
    written = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"]) == (2, 40)


def test_torchtune_takes_alpha_from_the_config_beside(base: Any, tmp_path: Path) -> None:
    names = {"self_attn.q_proj": "attn.q_proj", "self_attn.v_proj": "attn.v_proj"}
    tensors: dict[str, torch.Tensor] = {}
    for path, (a, b) in own(base).items():
        number, inside = path.removeprefix("model.layers.").split(".", 1)
        tensors |= {f"layers.{number}.{names[inside]}.lora_{x}.weight": t for x, t in (("a", a), ("b", b))}
    torch.save(tensors, tmp_path / "adapter_0.pt")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 6}))
    done = convert(tmp_path, tmp_path / "out", model="tiny", allow_pickle=True)
    state = directory.read(tmp_path / "out")[0]
    assert done.tool == "torchtune" and {m.scale for m in state.methods.values()} == {3.0}  # type: ignore[attr-defined]


def test_a_wrong_base_and_a_wrong_place_are_errors(base: Any, tmp_path: Path) -> None:
    save(base, LoRA(rank=2), tmp_path / "a", targets=["q_proj"])
    other = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_layer": 1,
        "n_embd": 8,
        "n_head": 2,
        "vocab_size": 16,
    }
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2/config.json").write_text(json.dumps(other))
    with pytest.raises(FileError, match=r"has no module 'model.layers.0.self_attn.q_proj'"):
        convert(tmp_path / "a", tmp_path / "out", to="kohya", model=str(tmp_path / "gpt2"))
    with pytest.raises(UseError, match="a model is no part of a diffusers pipeline"):
        convert(tmp_path / "a", tmp_path / "out", to="diffusers", model="tiny")
    with pytest.raises(UseError, match="--alpha is for files that hold none"):
        convert(tmp_path / "a", tmp_path / "out", alpha=4)
    with pytest.raises(FileError, match="neither a file nor a folder"):
        convert(tmp_path / "b", tmp_path / "out")
    (tmp_path / "two").mkdir()
    for name in "xy":
        save_file({"t": torch.ones(1)}, tmp_path / "two" / f"{name}.safetensors")
    with pytest.raises(FileError, match=r"holds x.safetensors, y.safetensors: give the adapter's file itself"):
        convert(tmp_path / "two", tmp_path / "out", model="tiny")
    with pytest.raises(UseError, match=r"without its adapter_config.json: give the folder of both"):
        convert(tmp_path / "a/adapter_model.safetensors", tmp_path / "out", model="tiny")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_a_change_that_was_lost_on_the_way_leaves_nothing(
    base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(base, LoRA(rank=2), tmp_path / "a", targets=["q_proj"])
    right = module.to_kohya

    def wrong(states: Any, parts: Any) -> Any:
        tensors, header, notes = right(states, parts)
        key = next(key for key in tensors if key.endswith(".alpha"))
        return {**tensors, key: tensors[key] * 1.001}, header, notes

    monkeypatch.setattr(module, "FILES", {**module.FILES, "kohya": wrong})
    with pytest.raises(MergeError, match=r"the change read back differs by 0.001"):
        convert(tmp_path / "a", tmp_path / "out", to="kohya", model="tiny")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a"]
    half = {key: t for key, t in load_file(tmp_path / "a/adapter_model.safetensors").items() if "layers.0." in key}
    monkeypatch.setattr(module, "FILES", {"kohya": lambda s, p: (_renamed(half), {"format": "pt"}, [])})
    with pytest.raises(MergeError, match="in one of the two only"):
        convert(tmp_path / "a", tmp_path / "out", to="kohya", model="tiny")


def _renamed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    result = {}
    for key, tensor in tensors.items():
        path, _, end = key.removeprefix("base_model.model.").rpartition(".lora_")
        result[f"lycoris_{path.replace('.', '_')}.lora_{'down' if end[0] == 'A' else 'up'}.weight"] = tensor
    return result


def test_export_writes_the_same_file(base: Any, tmp_path: Path) -> None:
    wanted = save(base, LoRA(rank=4, alpha=6, rank_pattern={"q_proj": 2}), tmp_path / "a", "attention")
    done = export(tmp_path / "a", tmp_path / "out", "kohya", model="tiny")
    assert done.profile == "kohya" and done.error < 1e-6 and len(done.modules) == 24
    assert json.loads((tmp_path / "out" / "lora_manifest.json").read_text())["profile"] == "kohya"
    convert(tmp_path / "out" / "a.safetensors", tmp_path / "back", model="tiny")
    torch.testing.assert_close(loaded(base, tmp_path / "back"), wanted, rtol=1e-5, atol=1e-5)
    for profile, options, words in (
        ("kohya", {"rank": 2}, "are not for the profile kohya"),
        ("diffusers", {}, "no part of a diffusers pipeline"),
    ):
        with pytest.raises(UseError, match=words):
            export(tmp_path / "a", tmp_path / "no", profile, model="tiny", **options)
        assert not (tmp_path / "no").exists()


def test_a_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Another tool's configuration becomes a file that `plan` reads, with what was left in front of it."""
    theirs, ours = tmp_path / "theirs.yaml", tmp_path / "ours" / "run.yaml"
    theirs.write_text(
        "model_name_or_path: tiny\nstage: sft\nlora_rank: 4\nlora_target: q_proj\ndataset: x\ntemplate: qwen3\n"
    )
    arguments = ["deltaw", "convert", str(theirs), "--output", str(ours), "--json"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 0
    assert "template" in [one["key"] for one in json.loads(capsys.readouterr().out)["left"]]
    found = parse.load(str(ours))
    assert found["model"] == "tiny" and found["adapter"]["rank"] == 4 and found["adapter"]["targets"] == ["q_proj"]
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2 and "exists: give another output" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", [*arguments[:3], "--output", str(tmp_path / "x"), "--to", "kohya", "--alpha", "3"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2 and "--to, --alpha is for adapters: leave it out" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.complex64, torch.bool])
def test_numbers_of_other_kinds(dtype: torch.dtype, tmp_path: Path) -> None:
    """Eight-bit floats are read exactly; whole and complex numbers are no weights, and nothing of them is dropped."""
    name = "lycoris_model_layers_0_self_attn_q_proj"
    pair = {"lora_down.weight": torch.randn(2, 256).to(dtype), "lora_up.weight": torch.randn(256, 2).to(dtype)}
    save_file({f"{name}.{end}": tensor for end, tensor in pair.items()}, tmp_path / "a.safetensors")
    if not dtype.is_floating_point:
        with pytest.raises(FileError, match="weights of adapters are floating-point numbers"):
            convert(tmp_path / "a.safetensors", tmp_path / "out", model="tiny")
        return
    convert(tmp_path / "a.safetensors", tmp_path / "out", model="tiny")
    (found,) = directory.read(tmp_path / "out")[0].tensors.values()
    assert torch.equal(found["lora_A"].float(), pair["lora_down.weight"].float())
    assert torch.equal(found["lora_B"].float(), pair["lora_up.weight"].float())
