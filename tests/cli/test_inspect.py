"""deltaw inspect and deltaw compare, as they are typed: on the bundled base, and on adapters of other people."""

import json
from pathlib import Path

import pytest
import torch

import deltaw
from deltaw.methods.dora import DoRA
from deltaw.methods.lora import LoRA


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders one, two (LoRAs on the same modules), dora, and narrow (fewer modules), all of `tiny`."""
    folder, base = tmp_path_factory.mktemp("adapters"), deltaw.load_base("tiny", dtype="fp32")
    kinds = {
        "one": (LoRA(rank=4), "all-linear"), "two": (LoRA(rank=2), "all-linear"), "dora": (DoRA(rank=2), "q_proj"),
        "narrow": (LoRA(rank=2), "v_proj"),
    }  # fmt: skip
    for seed, (name, (method, targets)) in enumerate(kinds.items()):
        torch.manual_seed(seed)
        deltaw.attach(base.model, method, targets=targets, name=name)
        with torch.no_grad():
            for parameter in base.model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.02 * torch.randn_like(parameter))
        meta = {"metrics": {"losses": {"held_out": 1.5}}, "task_type": "CAUSAL_LM"}
        deltaw.save(base.model, folder / name, name=name, meta=meta)
        deltaw.detach(base.model, name)
    rows = [{"prompt": f"say {a}", "completion": a} for a in ("river", "castle", "church")]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_inspect_without_the_base(run, adapters: Path) -> None:
    code, out, err = run("inspect", adapters / "one")
    assert code == 0 and not err
    assert "effective rank" in out and "amplification" not in out and "measured: losses.held_out 1.5" in out
    assert "task: language model" in out and "by layer 0 … 5" in out and "▁" in out and "{" not in out
    found = json.loads(run("inspect", adapters / "one", "--json")[1])
    assert len(found["sites"]) == 42 and found["truncation"] is None
    site = found["sites"][0]
    assert len(site["spectrum"]) == 4 and 1 <= site["stable_rank"] <= site["effective_rank"] <= 4
    assert site["energy"][-1] == pytest.approx(1) and site["of_base"] is None


def test_inspect_with_the_base_a_page_and_cuts(run, adapters: Path, tmp_path: Path) -> None:
    given = ["inspect", adapters / "one", "--model", "tiny", "--intruders", 2, "--truncate", adapters / "rows.jsonl"]
    code, out, err = run(*given, "--html", tmp_path / "page.html", "--json")
    assert code == 0 and "intruder dimensions: about" in err and "held-out loss: rank 2" in err
    found = json.loads(out)
    assert all(0 < site["of_base"] < 1 and site["amplification"]["factor"] > 0 for site in found["sites"])
    assert sum(site["intruders"] is not None for site in found["sites"]) == 2
    assert [cut["rank"] for cut in found["truncation"]["cuts"]] == [4, 2, 1, 0] and found["truncation"]["rows"] == 3
    page = (tmp_path / "page.html").read_text()
    assert page.count("<svg") >= 6 and "Would a smaller rank do?" in page and "‖ΔW‖ / ‖W‖" in page


def test_a_change_that_depends_on_the_base(run, adapters: Path) -> None:
    code, out, _ = run("inspect", adapters / "dora")
    assert code == 0 and "depends on the base" in out
    code, out, _ = run("inspect", adapters / "dora", "--model", "tiny", "--json")
    sites = json.loads(out)["sites"]
    assert code == 0 and all(site["norm"] > 0 and site["effective_rank"] > 0 and site["of_base"] > 0 for site in sites)


def test_what_takes_long_is_asked_for(run, adapters: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import deltaw.cli.inspect as verb

    monkeypatch.setattr(verb, "PATIENCE", 0.0)
    given = ["inspect", adapters / "dora", "--base", "tiny", "--json"]
    _, out, err = run(*given)
    assert "6 changes of no or high rank: about" in err and "ask for them with --dense" in err
    assert all(site["spectrum"] is None and site["norm"] > 0 for site in json.loads(out)["sites"])
    _, out, err = run(*given, "--dense")
    assert "--dense" not in err and all(site["spectrum"] for site in json.loads(out)["sites"])


def test_compare(run, adapters: Path, tmp_path: Path) -> None:
    code, out, _ = run("compare", adapters / "one", adapters / "two", "--html", tmp_path / "page.html", "--top", 2)
    assert code == 0 and "left φ, first 2" in out and "(chance 0.00781)" in out and "× chance" in out
    assert (tmp_path / "page.html").read_text().count("<svg") == 5
    found = json.loads(run("compare", adapters / "one", adapters / "one", "--json")[1])
    assert found["cosine"] == pytest.approx(1) and found["norm_ratio"] == pytest.approx(1) and len(found["sites"]) == 42
    found = json.loads(run("compare", adapters / "one", adapters / "narrow", "--json")[1])
    assert len(found["sites"]) == 6 and len(found["only_a"]) == 36 and found["only_b"] == []
    code, out, _ = run("compare", adapters / "one", adapters / "dora")
    assert code == 0 and "not compared, dora: depends on the base: 6 modules" in out
    found = json.loads(run("compare", adapters / "one", adapters / "dora", "--base", "tiny", "--json")[1])
    assert len(found["sites"]) == 6 and not found["left_out"]


def test_an_adapter_that_changes_nothing_is_named(run, adapters: Path, tmp_path: Path) -> None:
    model = deltaw.load_base("tiny", dtype="fp32").model
    deltaw.attach(model, LoRA(rank=2), targets="all-linear")
    deltaw.save(model, tmp_path / "zero")
    code, out, _ = run("compare", adapters / "one", tmp_path / "zero")
    assert code == 0 and "the change of B is zero at all of these modules" in out and "all together" not in out
    found = json.loads(run("compare", tmp_path / "zero", tmp_path / "zero", "--json")[1])
    assert found["zero"] == ["A", "B"] and found["cosine"] is None


def test_wrong_use_is_one_sentence(run, adapters: Path, tmp_path: Path) -> None:
    for given, words in (
        (["inspect", adapters / "one", "--intruders", 2], "give it with --model"),
        (["inspect", adapters / "one", "--truncate", adapters / "rows.jsonl"], "give it with --model"),
        (["inspect", adapters / "one", "--base", "tiny", "--truncate", tmp_path / "no.jsonl"], "no.jsonl"),
        (["inspect", adapters / "one", "--html", tmp_path / "no/page.html"], "in a folder that exists"),
        (["compare", adapters / "dora", adapters / "narrow"], "no module is adapted by both"),
    ):
        code, out, err = run(*given)
        assert code == 2 and words in err and "Traceback" not in err and out == "", err
    assert list(tmp_path.iterdir()) == []


def test_adapters_of_two_bases_are_not_compared(run, adapters: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(adapters / "two", tmp_path / "other")
    file = tmp_path / "other/deltaw.json"
    record = json.loads(file.read_text())
    for sample in record["base"]["samples"].values():
        sample["values"] = [value + 1 for value in sample["values"]]
    file.write_text(json.dumps(record))
    code, _, err = run("compare", adapters / "one", tmp_path / "other")
    assert code == 1 and "two bases" in err and "--allow-base-mismatch" in err
    assert run("compare", adapters / "one", tmp_path / "other", "--allow-base-mismatch")[0] == 0
    code, _, err = run("inspect", tmp_path / "other", "--base", "tiny")
    assert code == 1 and "is another base" in err


def test_two_strangers_on_gpt2_share_little(run, shared: Path) -> None:
    """Adapters of other people for two tasks: their outputs share more than chance, and they point nowhere together."""
    folder = shared / "adapters"
    one = folder / "anirudh-ak__peft-gpt2/model/lora_model"
    other = folder / "stathopoan__Apply-Lightweight-Fine-Tuning-to-a-Foundation-LLM-Model/lora_model"
    code, out, _ = run("inspect", one, "--json")
    assert code == 0
    for site in json.loads(out)["sites"]:
        assert site["spectrum"] is None or 1 <= site["stable_rank"] <= site["effective_rank"] <= site["rank"]
    code, out, _ = run("compare", one, other, "--json")
    found = json.loads(out)
    assert code == 0 and len(found["sites"]) == 12 and abs(found["cosine"]) < 0.1
    left = [site["left"]["top"] for site in found["sites"]]
    assert sum(one["phi"] for one in left) > 5 * sum(one["chance"] for one in left)
