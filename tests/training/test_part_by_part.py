"""Parts of an image-text model, each trained in its own way: what is attached, trained, refused, and read back."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pictured
import pytest
import torch
import vlm
from safetensors.torch import load_file
from torch import nn

import deltaw
from deltaw.cli.main import main
from deltaw.config import parse
from deltaw.core.attach import adapters, attach, plan_of
from deltaw.core.errors import TargetError, TrainError, UseError
from deltaw.methods.full import Full
from deltaw.methods.lora import LoRA
from deltaw.models.base import load_base
from deltaw.runs.directory import RunDirectory
from deltaw.training import parts as training
from deltaw.training import run as running
from deltaw.training.outlook import outlook

ALL = {
    "vision": {"rank": 3, "targets": ["q_proj"], "layers": "0-1", "learning_rate": 1e-3},
    "projector": "full",
    "language": "lora",
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictured.base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictured.rows(tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="module")
def finished(base: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> running.Run:
    return deltaw.train(pictured.config(base, rows, tmp_path_factory.mktemp("runs") / "a", ALL), quiet=True)


def chosen(parts: dict[str, Any], **more: Any) -> Any:
    record = {"model": "x", "data": {"train": "y"}, "adapter": {"rank": 2, "parts": parts, **more}}
    return parse.parse(record).adapter


def tensors(run: running.Run) -> dict[str, torch.Tensor]:
    return load_file(run.adapter / "adapter_model.safetensors")


def test_each_part_is_trained_as_it_says(finished: running.Run, base: Path) -> None:
    plan = RunDirectory(finished.path).plan()
    table = {row["part"]: row for row in plan["parts"]}
    assert [table[name]["method"] for name in ("vision", "projector", "language", "head")] == [
        "lora",
        "full",
        "lora",
        "frozen",
    ]
    assert (table["vision"]["learning_rate"], table["language"]["learning_rate"]) == (1e-3, 1e-2)
    assert (table["vision"]["tensors"], table["projector"]["tensors"], table["head"]["tensors"]) == (4, 4, 0)
    assert sum(row["parameters"] for row in plan["parts"]) == plan["trainable"] == finished.plan.trainable
    state, _ = deltaw.formats.directory.read(finished.adapter)
    methods = {
        part: {type(m) for s, m in state.methods.items() if part in s.path}
        for part in ("vision", "projector", "language")
    }
    assert methods == {"vision": {LoRA}, "projector": {Full}, "language": {LoRA}}
    ranks = {m.rank for site, m in state.methods.items() if "vision" in site.path}  # type: ignore[attr-defined]
    assert ranks == {3}
    loaded = load_base(str(base))
    assert deltaw.load(loaded.model, finished.adapter).base == "match"


def test_the_file_says_which_part_is_where(finished: running.Run) -> None:
    parts = json.loads((finished.adapter / "deltaw.json").read_text(encoding="utf-8"))["meta"]["parts"]
    assert parts["vision"] == ["model.vision_tower"] and parts["head"] == ["lm_head"]


def test_rows_of_new_tokens_beside_parts(base: Path, tmp_path: Path) -> None:
    """They are trained in the run that adds them, whatever their part; later with their part."""
    rows = pictured.rows(tmp_path, pictured=4)
    rows.write_text(rows.read_text().replace('"red."', '"<|c|>"'), encoding="utf-8")
    record = pictured.config(base, rows, tmp_path / "a", {"projector": "full"})
    record["data"]["tokens"] = ["<|c|>"]
    first = deltaw.train(record, quiet=True)
    table = {row["part"]: row["method"] for row in RunDirectory(first.path).plan()["parts"]}
    assert table["language"] == table["head"] == "token_rows" and table["projector"] == "full"
    record = pictured.config(base, rows, tmp_path / "b", {"language": "lora"})
    record["adapter"]["from"] = str(first.adapter)
    second = deltaw.train(record, quiet=True)
    table = {row["part"]: row["method"] for row in RunDirectory(second.path).plan()["parts"]}
    assert (
        table["language"] in ("token_rows + lora", "lora + token_rows")
        and table["head"] == "frozen, keeps its token_rows"
    )


def test_it_goes_on_with_other_parts(finished: running.Run, base: Path, rows: Path, tmp_path: Path) -> None:
    """A part that is now frozen stays in the file as it was, to the bit; a new one is attached beside; the others train on."""
    record = pictured.config(base, rows, tmp_path / "b", {"language": "lora", "head": "full"})
    record["adapter"]["from"] = str(finished.adapter)
    second = deltaw.train(record, quiet=True)
    before, after = (deltaw.formats.directory.read(run.adapter)[0].tensors for run in (finished, second))
    for site, old in before.items():
        same = all(torch.equal(tensor, after[site][name]) for name, tensor in old.items())
        assert same == ("language" not in site.path), site
    assert after.keys() - before.keys() == {site for site in after if site.path == "lm_head"}
    table = {row["part"]: row for row in RunDirectory(second.path).plan()["parts"]}
    assert table["vision"]["method"] == "frozen, keeps its lora" and table["projector"]["parameters"] == 0
    assert {t.site.path for t in second.plan.targets} == {s.path for s in after if "language" in s.path} | {"lm_head"}
    assert RunDirectory(second.path).plan()["parents"] == [
        json.loads((finished.adapter / "deltaw.json").read_text())["digest"]
    ]


def test_resume_keeps_what_is_frozen_frozen(finished: running.Run, base: Path, rows: Path, tmp_path: Path) -> None:
    record = pictured.config(base, rows, tmp_path / "c", {"language": "lora"}, max_steps=3, save_every=1)
    record["adapter"]["from"] = str(finished.adapter)
    whole = deltaw.train(record, quiet=True)
    cut = deltaw.train({**record, "output": str(tmp_path / "d")}, quiet=True)
    import shutil

    shutil.rmtree(cut.adapter)
    shutil.rmtree(cut.path / "checkpoints/step-3")
    resumed = deltaw.training.run.resume(cut.path, quiet=True)
    ours, theirs = tensors(resumed), tensors(whole)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_rates_go_to_the_parts(base: Path) -> None:
    model, config = load_base(str(base)).model, chosen(ALL)
    found = training.by_part(model, config)
    for part, plan in found.fresh.items():
        attach(model, config.parts[part].method, targets={part: [str(t.site.path) for t in plan.targets]})
    from deltaw.config.schema import TrainConfig
    from deltaw.training.optimizer import groups

    t = TrainConfig(learning_rate=1e-2, rates={r".*linear_1": 0.5})
    by_rate = {
        group["lr"]: len(group["params"])
        for group in groups(model, "default", t, training.rates(config, found.parts, 1e-2))
    }
    assert by_rate == {1e-3: 4, 1e-2: 2 + 28, 5e-3: 2}


def test_what_is_trained_is_asserted(base: Path) -> None:
    model = load_base(str(base)).model
    sites = [t.site for t in attach(model, LoRA(rank=2), targets={"language": "attention"}).targets]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    training.exactly(model, "default", sites, optimizer)
    with pytest.raises(TrainError, match="is not to be trained and requires a gradient"):
        training.exactly(model, "default", sites[1:], optimizer)
    next(iter(adapters(model).values())).requires_grad_(False)
    with pytest.raises(TrainError, match="is to be trained and requires no gradient"):
        training.exactly(model, "default", sites, optimizer)
    training.only(model, "default", sites)
    with pytest.raises(TrainError, match="the optimizer lacks it"):
        training.exactly(model, "default", sites, torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0))
    with pytest.raises(TrainError, match="is to be trained and has no adapter"):
        training.exactly(model, "default", [*sites, sites[0]._replace(path="x")], optimizer)


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        (
            {"visoin": "full"},
            ["visoin: no part 'visoin'", "did you mean 'vision'", "vision, projector, language, head"],
        ),
        ({"audio": "frozen", "head": "full"}, ["audio: no part 'audio'"]),
        ({"language": {"targets": ["linear_1"]}}, ["language: part 'language': no module matched 'linear_1'"]),
        ({"language": {"layers": "7"}}, ["language: layers [7] hold no target"]),
        ({"vision": {"targets": ["out_prj"]}, "language": {"layers": "9"}}, ["2 faults", "'out_prj'", "layers [9]"]),
    ],
)
def test_parts_that_cannot_be_are_sentences(parts: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(TargetError) as caught:
        training.by_part(vlm.model("llava"), chosen(parts))
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_text_model_has_no_parts() -> None:
    with pytest.raises(TargetError, match=r"the model has no parts.*give adapter.targets"):
        training.by_part(load_base("tiny").model, chosen({"language": "lora"}))


def test_another_method_than_is_carried_names_both_and_the_fix() -> None:
    model = vlm.model("llava")
    attach(model, LoRA(rank=2), targets={"language": "attention"})
    carried = plan_of(model, "default").targets
    with pytest.raises(TargetError) as caught:
        training.by_part(model, chosen({"language": {"method": "oft"}}, **{"from": "runs/a/adapter"}), carried)
    said = str(caught.value)
    assert "language carries lora from runs/a/adapter, and oft is asked" in said and "write language: lora" in said
    further = training.by_part(model, chosen({"language": {"rank": 4}}, **{"from": "runs/a/adapter"}), carried)
    assert not further.fresh and further.further == carried
    (remark,) = further.remarks
    assert "language is trained further as it is: rank 2, not 4" in remark and "8 adapters, and not 6 more" in remark
    same = training.by_part(model, chosen({"language": {"targets": "attention"}}), carried)
    assert same.remarks == ()


def test_a_part_that_is_not_found_is_named() -> None:
    """adapter.modules; what belongs to no part is a line of the table."""
    model = vlm.model("llava")
    config = chosen({"norm": "full"}, modules={"norm": ["language_model.norm"]})
    found = training.by_part(model, config)
    assert [t.site.path for t in found.plan(model).targets] == ["model.language_model.norm"]
    lines = training.said(training.table(model, config, found, 1e-4)).splitlines()
    assert [line.split()[:2] for line in lines if line.startswith("norm")] == [["norm", "full"]]


def test_a_part_that_goes_on_is_planned_from_its_files(finished: running.Run, base: Path) -> None:
    from deltaw.training.outlook import outlook

    adapter = {"from": str(finished.adapter), "rank": 2, "parts": {"language": "lora", "head": "full"}}
    look = outlook(parse.parse({"model": str(base), "data": {"train": "x"}, "adapter": adapter}))
    assert look is not None and look.by_part is not None and look.carried is not None
    assert {look.by_part.parts.of(t.site.path) for t in look.kept} == {"vision", "projector"}
    assert len(look.plan) == 15 and len(look.kept) + 14 == len(look.carried)


def test_advice_is_of_one_method(base: Path) -> None:
    from deltaw.training.probe import probe
    from deltaw.training.situation import situation

    config = parse.parse({"model": str(base), "data": {"train": "x"}, "adapter": {"parts": {"language": "lora"}}})
    for ask in (situation, probe):
        with pytest.raises(UseError, match=r"leave adapter.parts out"):
            ask(config)


@pytest.mark.parametrize("family", vlm.FAMILIES)
def test_every_family_goes_part_by_part(family: str) -> None:
    """Forward and backward: each part that is trained has a gradient, no other has; freezing comes last."""
    model, config = vlm.model(family), chosen({"vision": "lora", "projector": "full", "language": {"layers": "0"}})
    found = training.by_part(model, config)
    for part, plan in found.fresh.items():
        wanted = config.parts[part]
        attach(model, wanted.method, targets={part: wanted.targets}, layers=wanted.layers)
        assert plan.targets
    sites = [target.site for target in found.plan(model).targets]
    training.only(model, "default", sites)
    model.train()
    model(**vlm.inputs(family)).loss.backward()
    from deltaw.training.callbacks import check_gradients

    assert check_gradients(model, "default") == []
    assert {found.parts.of(site.path) for site in sites} == {"vision", "projector", "language"}


@pytest.fixture
def under_no_grad(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Bases whose tower runs under no_grad, as in the first LLaVA."""

    def load(*args: Any, **options: Any) -> Any:
        loaded = load_base(*args, **options)
        loaded.model.model.vision_tower.register_forward_hook(detached)
        return loaded

    def detached(module: nn.Module, given: Any, output: Any) -> Any:
        output["hidden_states"] = tuple(one if one is None else one.detach() for one in output.hidden_states)
        return output

    monkeypatch.setattr(running, "load_base", load)
    yield


def test_a_tower_under_no_grad_is_an_error(under_no_grad: None, base: Path, rows: Path, tmp_path: Path) -> None:
    record = pictured.config(base, rows, tmp_path / "run", {"vision": "lora", "projector": "full"})
    with pytest.raises(TrainError, match=r"no gradient reaches vision: is it run under no_grad.*vision: frozen"):
        deltaw.train(record, quiet=True)
    assert not (tmp_path / "run").exists()


def test_rows_without_images_do_not_train_a_tower(base: Path, tmp_path: Path) -> None:
    text = pictured.rows(tmp_path, pictured=0, plain=6)
    with pytest.raises(TrainError) as caught:
        deltaw.train(pictured.config(base, text, tmp_path / "run", {"vision": "lora", "projector": "full"}), quiet=True)
    assert "no gradient reaches vision: no row has an image" in str(caught.value)
    assert "no gradient reaches projector: no row has an image" in str(caught.value)


def test_a_batch_of_text_alone_waits_for_images(base: Path, tmp_path: Path) -> None:
    """Whatever the order of rows: some of the first batches have none."""
    mixed = pictured.rows(tmp_path, pictured=3, plain=9)
    for seed in range(3):
        record = pictured.config(base, mixed, tmp_path / f"run{seed}", ALL, max_steps=6, batch_size=1, seed=seed)
        assert deltaw.train(record, quiet=True).steps == 6


def test_what_was_written_is_read_back(base: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from deltaw.models.adapters import load
    from deltaw.training import readback

    def lossy(model: nn.Module, *args: Any, **options: Any) -> Any:
        report = load(model, *args, **options)
        for adapter in adapters(model).values():
            for parameter in adapter.parameters():
                parameter.data.mul_(0.9)
        return report

    monkeypatch.setattr(readback, "load", lossy)
    with pytest.raises(TrainError, match=r"differs from the one that was trained: by .* when read back"):
        deltaw.train(pictured.config(base, rows, tmp_path / "run", {"projector": "full"}), quiet=True)
    assert not (tmp_path / "run/adapter").exists() and RunDirectory(tmp_path / "run").steps()


def test_plan_shows_the_parts(
    base: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps(pictured.config(base, rows, tmp_path / "run", ALL)), encoding="utf-8")
    monkeypatch.setattr("sys.argv", ["deltaw", "plan", str(file)])
    with pytest.raises(SystemExit) as done:
        main()
    lines = capsys.readouterr().out.splitlines()
    assert done.value.code == 0
    table = [line.split() for line in lines if line.split()[:1] in (["vision"], ["projector"], ["language"], ["head"])]
    assert [row[:4] for row in table[:4]] == [
        ["vision", "lora", "0.001", "4"], ["projector", "full", "0.01", "4"], ["language", "lora", "0.01", "28"],
        ["head", "frozen", "–", "0"],
    ]  # fmt: skip
    monkeypatch.setattr("sys.argv", ["deltaw", "plan", str(file), "--json"])
    with pytest.raises(SystemExit):
        main()
    found = json.loads(capsys.readouterr().out)
    assert [part["part"] for part in found["parts"]] == ["vision", "projector", "language", "head"]
    assert sum(part["parameters"] for part in found["parts"]) == found["parameters"]["trainable"]
    assert sum(part["base_parameters"] for part in found["parts"]) == found["parameters"]["total"]
    assert found["batch"]["features"][0][:2] == ["pixel_values", [4, 3, 16, 16]] and found["notes"] == []


@pytest.mark.parametrize(
    ("section", "example"),
    [
        ({}, "{language: lora}"),
        ({"targets": "q_proj"}, "{language: {targets: 'q_proj'}}"),
        ({"method": "full", "targets": "q_proj"}, "{language: {targets: 'q_proj'}}"),
    ],
)
def test_targets_in_several_parts_are_refused_with_what_a_configuration_takes(
    base: Path, section: dict[str, Any], example: str
) -> None:
    record = {"model": str(base), "data": {"train": "x"}, "adapter": section}
    with pytest.raises(TargetError, match="hits several parts of the model, vision") as caught:
        outlook(parse.parse(record))
    said = str(caught.value).partition("for example ")[2]
    assert said == f"adapter.parts={example}"
    kept = {key: value for key, value in section.items() if key != "targets"}
    assert outlook(parse.parse(parse.override({**record, "adapter": kept}, [said]))) is not None
