"""deltaw adapters: every verb speaks to people and to machines, and says by its exit code how it went."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import deltaw
from deltaw.cli import main as cli


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    monkeypatch.setenv("DELTAW_LIBRARY", str(tmp_path / "shelf"))

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["deltaw", "adapters", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    return call


def adapter(folder: Path, seed: int) -> Path:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4))
    deltaw.attach(model, deltaw.LoRA(rank=2), targets=["0"])
    torch.manual_seed(seed)
    for parameter in filter(lambda p: p.requires_grad, model.parameters()):
        nn.init.normal_(parameter)
    clocks = {"steps": 3, "seconds": 9.5, "peak_memory": 1, "memory_increment": 1}  # as training writes them
    deltaw.save(model, folder, meta={"metrics": {**clocks, "losses": {"held_out": 1.25}}})
    return folder


def test_from_add_to_remove(run, tmp_path: Path) -> None:
    a, b = adapter(tmp_path / "a", 1), adapter(tmp_path / "b", 2)
    (a / "extra.txt").write_text("x")
    code, out, err = run("add", a, "--name", "sql", "--json")
    first = json.loads(out)
    assert code == 0 and first["new"] and first["generation"] == 1 and "not copied" in err and "extra.txt" in err
    code, out, _ = run("add", b, "--name", "sql", "--expect", 1)
    assert code == 0 and out.startswith("sql@2  sha256:")
    code, out, err = run("add", b, "--name", "sql", "--expect", 1)
    assert code == 1 and out == "" and "is at generation 2, expected it at generation 1" in err
    code, out, _ = run("alias", "prod", "sql@1", "--json")
    assert code == 0 and json.loads(out)["digest"] == first["digest"]

    code, out, _ = run("list")
    assert code == 0 and out.splitlines()[0].split()[:3] == ["name", "generation", "content"]
    assert [line.split()[:2] for line in out.splitlines()[1:]] == [
        ["prod", "1"],
        ["sql", "2"],
    ] and "held-out 1.25" in out
    code, out, _ = run("list", "--json")
    assert code == 0 and [one["name"] for one in json.loads(out)["adapters"]] == ["prod", "sql"]

    code, out, _ = run("show", "prod")
    assert code == 0 and "prod@1, sql@1" in out and "Sequential" in out and "alias of sql@1" in out
    code, out, _ = run("show", first["digest"][:16], "--json")
    found = json.loads(out)
    assert code == 0 and found["points"] == ["prod@1", "sql@1"] and found["lineage"]["there"] and found["history"] == []

    code, out, _ = run("rollback", "sql", "--json")
    assert code == 0 and (json.loads(out)["generation"], json.loads(out)["digest"]) == (3, first["digest"])
    code, _, err = run("rollback", "sql")
    assert code == 2 and "nothing before generation 1" in err
    code, _, err = run("rollback", "sql", "--to", 0)
    assert code == 2 and "sql has no generation 0; it has 1, 2, 3" in err
    code, out, _ = run("verify", "--json")
    assert code == 0 and json.loads(out)["faults"] == [] and json.loads(out)["adapters"] == 2

    code, out, _ = run("remove", "prod")
    assert code == 0 and "its content stays" in out
    code, out, _ = run("remove", "sql", "--json")
    assert code == 0 and len(json.loads(out)["deleted"]) == 2
    code, out, _ = run("list")
    assert code == 0 and out.startswith("no adapter in")
    run("add", a, "--name", "sql")
    assert run("verify")[1].startswith("1 adapter under 1 name, ")


def test_damage_is_exit_code_1(run, tmp_path: Path) -> None:
    code, out, _ = run("add", adapter(tmp_path / "a", 1), "--name", "sql", "--json")
    record = Path(json.loads(out)["folder"]).parent / "record.json"
    record.chmod(0o644)
    record.write_text("{")
    code, out, _ = run("list", "--json")
    assert code == 1 and json.loads(out)["damaged"][0]["name"] == "sql"
    code, out, _ = run("verify")
    assert code == 1 and "fault: sha256:" in out and "1 fault" in out
    code, out, _ = run("verify", "--json")
    assert code == 1 and len(json.loads(out)["faults"]) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["list"], ["no library at", "--library"]),
        (["verify"], ["no library at"]),
        (["show", "sql"], ["no library at"]),
        (["rollback", "sql"], ["no library at"]),
        (["remove", "sql"], ["no library at"]),
        (["alias", "prod", "sql"], ["no library at"]),
        (["add", "nowhere"], ["--name"]),
        (["add", "nowhere", "--name", "SQL"], ["'SQL' is no name", "'sql'"]),
        (["add", "nowhere", "--name", "../x"], ["is no name"]),
    ],
)
def test_wrong_use_is_2(run, arguments: list[str], words: list[str], tmp_path: Path) -> None:
    code, out, err = run(*arguments)
    assert code == 2 and out == "" and "Traceback" not in err and all(word in err for word in words), err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_no_adapter_is_1(run, tmp_path: Path) -> None:
    code, _, err = run("add", tmp_path / "nowhere", "--name", "sql")
    assert code == 1 and "no adapter folder" in err and list(tmp_path.iterdir()) == []
