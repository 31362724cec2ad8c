"""deltaw doctor: each fault of a made-up machine is found with its fix, a broken step fails the self-test, a core install answers."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from deltaw.cli import main as cli
from deltaw.lab import doctor, selftest
from deltaw.models import machine as machines
from deltaw.models.installed import COMPARED, Package, read, within
from deltaw.models.machine import Cpu, Device, Machine, hub_cache, look

ROOT = Path(__file__).resolve().parents[2]
CARD = Device("cuda", "Card", 24 * 10**9, 20 * 10**9, "8.9", True)
SOUND = Machine(
    python="3.12.1", python_wanted=">=3.11,<3.14", version="0.1.0", copies=("/site/deltaw",), natives=("cpu", "cuda128"), triton=True,
    packages=(
        Package("torch", ">=2.6", (), "2.13.0+cu128"), Package("transformers", ">=5.23", ("train",), "5.23.0"),
        Package("bitsandbytes", ">=0.46", ("quant",), "0.50.2"), Package("triton", ">=3", ("test",), "3.9.0"),
        Package("peft", ">=0.21", ("test",), None), Package("sacrebleu", ">=2.4", ("eval",), None),
    ),
    cpu=Cpu("Chip", 8, 8, 32 * 10**9, 16 * 10**9, ("avx512_bf16",)), devices=(CARD,), build="cuda 12.8", nvidia=True,
    cache="/home/me/hub", cache_writable=True, disk=10**11, cache_disk=10**11,
)  # fmt: skip


def with_version(name: str, version: str | None) -> dict[str, Any]:
    given = [dataclasses.replace(one, version=version) if one.name == name else one for one in SOUND.packages]
    return {"packages": tuple(given)}


def on(**facts: Any) -> dict[str, doctor.Check]:
    """What is not ok on the sound machine with some facts changed."""
    return {one.name: one for one in doctor.examine(dataclasses.replace(SOUND, **facts)) if one.verdict != "ok"}


def test_a_sound_machine() -> None:
    checks = doctor.examine(SOUND)
    assert doctor.worst(checks) == "ok" and not any(one.fix for one in checks)
    text = doctor.table(checks)
    for words in (
        "24.0 GB, 20.0 GB free, capability 8.9, bf16",
        "8 cores, torch uses 8 threads",
        "avx512_bf16",
        "cuda128",
    ):
        assert words in text
    assert "not installed (>=0.21, extra test): deltaw does without it" in text  # PEFT
    assert "pip install 'deltaw[eval]' brings it" in text


@pytest.mark.parametrize(
    ("facts", "name", "verdict", "said", "fix"),
    [
        ({"python": "3.10.2"}, "python", "fault", "3.10.2", ">=3.11,<3.14"),
        ({"packages": ()}, "deltaw", "warning", "not installed", "pip install -e"),
        (with_version("torch", "2.5.1"), "torch", "fault", "2.5.1 is outside", "pip install 'torch>=2.6'"),
        (with_version("transformers", "5.2.0"), "transformers", "fault", "5.2.0 is outside", "deltaw[train]"),
        (with_version("transformers", None), "transformers", "warning", "not installed", "deltaw[train]"),
        (with_version("bitsandbytes", "0.45"), "bitsandbytes", "warning", "0.45 is outside", "deltaw[quant]"),
        ({"natives": ()}, "bitsandbytes", "fault", "without its compiled library", "deltaw[quant]"),
        ({"natives": ("cpu", "cuda126")}, "bitsandbytes", "warning", "no library for cuda128", "deltaw[quant]"),
        ({"devices": ()}, "torch", "fault", "built for cuda 12.8 and sees no device", "update the driver"),
        ({"devices": (), "nvidia": False}, "torch", "warning", "sees no device", "nothing to do without a card"),
        ({"devices": (), "environment": {"CUDA_VISIBLE_DEVICES": ""}}, "torch", "warning", "DEVICES=''", "unset"),
        ({"devices": (), "build": None}, "torch", "warning", "the card is not used", "pip install torch"),
        ({"triton": False}, "triton", "warning", "not installed", "pip install triton"),
        ({"devices": (Device("cuda", "Card", fault="busy"),)}, "cuda", "fault", "cannot be used: busy", "driver"),
        ({"environment": {"OMP_NUM_THREADS": "16"}}, "threads", "warning", "16 threads on 8", "OMP_NUM_THREADS=8"),
        ({"copies": ("/a/deltaw", "/b/deltaw")}, "copies", "warning", "/b/deltaw is there too", "uninstall"),
        ({"cache_writable": False}, "cache", "warning", "cannot be written", "HF_HOME"),
        ({"disk": 10**8}, "disk here", "warning", "0.1 GB free", "output="),
        ({"cache_disk": 10**9}, "disk of the cache", "warning", "1.0 GB free", "HF_HOME"),
        ({"cpu": dataclasses.replace(SOUND.cpu, free=10**8)}, "memory", "warning", "0.1 GB free", "end other programs"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_found_and_nothing_else(facts: Any, name: str, verdict: str, said: str, fix: str) -> None:
    found = on(**facts)
    assert list(found) == [name]
    assert found[name].verdict == verdict and said in found[name].said and fix in found[name].fix


def test_what_is_not_wrong() -> None:
    """No card, no triton, offline with a cache that is read only: all as they may be."""
    bare = {"devices": (), "build": None, "nvidia": False, "triton": False}
    assert on(**bare) == {}
    offline = {"environment": {"HF_HUB_OFFLINE": "1"}, "cache_writable": False}
    assert on(**offline) == {}
    (network,) = (one for one in doctor.examine(dataclasses.replace(SOUND, **offline)) if one.name == "network")
    assert "offline (HF_HUB_OFFLINE)" in network.said
    assert on(environment={"TRANSFORMERS_OFFLINE": "0"}) == {}


def test_requirements_are_read_as_pip_reads_them() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    given = list(project["dependencies"])
    for extra, wanted in project["optional-dependencies"].items():
        given += [
            f"{text}; extra == '{extra}'" if ";" not in text else f"{text} and extra == '{extra}'" for text in wanted
        ]
    found = {name: (wanted, extras) for name, wanted, extras in read(given)}
    assert found["transformers"] == (">=5.23", ("train",)) and found["torch"] == (">=2.6", ())
    assert found["triton"] == (">=3", ("test",)) and "deltaw" not in found
    for wanted, _ in found.values():  # another form of range must be taught to `within`
        assert all(COMPARED.fullmatch(part.strip()) for part in wanted.split(",") if part)


@pytest.mark.parametrize(
    ("version", "wanted", "fits"),
    [
        ("2.13.0+cpu", ">=2.6", True), ("2.6", ">=2.6", True), ("2.5.9", ">=2.6", False), ("5.23.0.dev0", ">=5.23", True),
        ("3.14.0", "<3.14,>=3.11", False), ("3.13.9", "<3.14,>=3.11", True), ("1.0", "", True), ("4.0.1", "==4", False),
    ],
)  # fmt: skip
def test_versions_are_compared_by_number(version: str, wanted: str, fits: bool) -> None:
    assert within(version, wanted) is fits


def test_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in machines.NAMED:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "not" / "there"))
    found = look("0.1.0")
    assert found.cpu.cores >= 1 and found.cpu.threads >= 1 and found.disk > 0 and found.cache_disk > 0
    assert found.cpu.free is None or 0 < found.cpu.free <= found.cpu.memory
    assert found.cache == str(tmp_path / "not" / "there" / "hub") and found.cache_writable
    assert Path(found.copies[0]) == Path(doctor.__file__).resolve().parents[1]


@pytest.mark.parametrize(
    "given", [{}, {"HF_HOME": "/a"}, {"XDG_CACHE_HOME": "/b"}, {"HF_HUB_CACHE": "~/c"}, {"HUGGINGFACE_HUB_CACHE": "/d"}]
)
def test_the_cache_is_where_the_hub_has_it(given: dict[str, str]) -> None:
    ours = {
        name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING", "XDG_"))
    } | given
    asked = "from huggingface_hub.constants import HF_HUB_CACHE; print(HF_HUB_CACHE)"
    done = subprocess.run([sys.executable, "-c", asked], env=ours, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(hub_cache(ours))


def test_the_self_test_passes_and_stops_where_something_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = selftest.selftest()
    assert [one.name for one in whole] == [
        "load",
        "attach",
        "gradients",
        "training",
        "save and load",
        "merge",
        "detach",
    ]
    assert all(one.right for one in whole)

    monkeypatch.setattr(selftest, "RATE", 0.0)
    still = selftest.selftest()
    assert still[-1].name == "training" and not still[-1].right and "the loss went from" in still[-1].said
    monkeypatch.undo()

    def forgetful(model: Any) -> None:
        model.get_input_embeddings().weight.data[0, 0] += 1

    monkeypatch.setattr(selftest, "unmerge", forgetful)
    broken = selftest.selftest()
    assert broken[-1].name == "merge" and "did not bring back" in broken[-1].said and len(broken) == 6

    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("no kernel\nfor this card")

    monkeypatch.setattr(selftest, "load_base", fails)
    checks = doctor.tested()
    assert [(one.verdict, one.said) for one in checks] == [("fault", "RuntimeError: no kernel for this card")]
    assert "reinstall" in checks[0].fix


def test_the_verb(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def call(machine: Machine, *arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(machines, "look", lambda version: machine)
        monkeypatch.setattr(sys, "argv", ["deltaw", "doctor", "--no-test", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return int(caught.value.code or 0), capsys.readouterr().out

    code, out = call(SOUND)
    assert code == 0 and "0 faults, 0 warnings" in out and "self-test" not in out
    code, out = call(dataclasses.replace(SOUND, natives=()), "--json")
    found = json.loads(out)
    assert code == 1 and found["verdict"] == "fault" and found["machine"]["devices"][0]["name"] == "Card"
    assert [one["name"] for one in found["checks"] if one["verdict"] == "fault"] == ["bitsandbytes"]
    code, out = call(dataclasses.replace(SOUND, disk=10**8))
    assert code == 0 and "fix: free some" in out and "1 warning," in out


def test_a_core_install_is_told_what_it_lacks(tmp_path: Path) -> None:
    """Site-packages as they are, but for what only the extra `train` installs."""
    torch = importlib.util.find_spec("torch")
    assert torch is not None and torch.origin is not None
    for entry in Path(torch.origin).parents[1].iterdir():
        if (
            not entry.name.startswith(("transformers", "accelerate", "datasets", "__editable__"))
            and entry.suffix != ".pth"
        ):
            (tmp_path / entry.name).symlink_to(entry)
    paths = os.pathsep.join([str(Path(doctor.__file__).resolve().parents[2]), str(tmp_path)])
    done = subprocess.run(
        [sys.executable, "-S", "-m", "deltaw", "doctor", "--json"], capture_output=True, text=True, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": paths},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    checks = {(one["group"], one["name"]): one for one in json.loads(done.stdout)["checks"]}
    for name in ("transformers", "accelerate", "datasets"):
        assert checks["versions", name]["verdict"] == "warning" and "deltaw[train]" in checks["versions", name]["fix"]
    assert "not run: this needs transformers" in checks["self-test", "base"]["said"]
    assert checks["versions", "torch"]["verdict"] == "ok"
