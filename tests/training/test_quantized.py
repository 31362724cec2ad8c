"""QLoRA on the CPU: `quantize` loads, trains, resumes to the bit, evaluates, loads again and merges two ways."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

import deltaw
from deltaw.cli.main import main
from deltaw.config import parse
from deltaw.core.base import parameters, quantization
from deltaw.core.errors import BaseMismatchError, ConfigError, MergeError, TargetError, TrainError, UseError
from deltaw.core.host import host_of
from deltaw.models.base import load_base
from deltaw.ship.check import logits, probe
from deltaw.ship.merge import merge_to_folder
from deltaw.training import run as training
from deltaw.training.facts import unchanged
from deltaw.training.outlook import outlook


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    words = ["river", "castle", "garden", "church", "mill"]
    text = [{"prompt": f"say {a} then {b}", "completion": f"{b}, {a} and {b}."} for a in words for b in words]
    file.write_text("".join(json.dumps(row) + "\n" for row in text))
    return file


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """The command line: exit code, stdout, stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["deltaw", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    return call


def config(rows: Path, output: Path, quantize: str = "nf4", **adapter: object) -> dict:
    return {
        "model": "tiny",
        "quantize": quantize,
        "data": {"train": str(rows), "eval": 0.2},
        "adapter": {"rank": 4, "alpha": 8, "dropout": 0.1, **adapter},
        "train": {"max_steps": 4, "batch_size": 4, "learning_rate": 5e-3, "save_every": 2, "eval_every": 2},
        "output": str(output),
    }


@pytest.fixture(scope="module")
def shelf() -> training.Shelf:
    return training.Shelf()


@pytest.fixture(scope="module")
def finished(rows: Path, tmp_path_factory: pytest.TempPathFactory, shelf: training.Shelf) -> training.Run:
    return deltaw.train(config(rows, tmp_path_factory.mktemp("runs") / "whole"), quiet=True, shelf=shelf)


@pytest.fixture(scope="module")
def base(finished: training.Run, shelf: training.Shelf) -> object:
    """The base of the finished run, as the run left it."""
    return shelf.get("base", ("tiny", "auto", "nf4"), lambda: pytest.fail("the run used another base"))


def test_a_run_learns_with_fp32_masters_on_four_bits(finished: training.Run) -> None:
    assert finished.losses["held_out"] < finished.losses["base"]
    tensors = load_file(finished.adapter / "adapter_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    manifest = json.loads((finished.adapter / "deltaw.json").read_text())
    assert manifest["base"]["quantized"] == manifest["meta"]["recipe"]["quantize"] == "nf4"
    plan = json.loads((finished.path / "plan.json").read_text())
    assert plan["config"]["quantize"] == "nf4"
    assert plan["base_parameters"] == parameters(load_base("tiny").model)


def test_the_base_stays_as_it_was(base: object) -> None:
    """Its values are those of a fresh one, and the mark that the trainer wants to see is gone."""
    fresh = load_base("tiny", quantize="nf4").model
    assert quantization(fresh) == "nf4" and type(fresh.lm_head) is nn.Linear
    for path, module in fresh.named_modules():
        host = host_of(module)
        if host is not None:
            assert torch.equal(host.weight, host_of(base.model.get_submodule(path)).weight)
    assert "_hf_peft_config_loaded" not in base.model.__dict__
    assert not any(p.requires_grad for p in base.model.parameters())
    ids = probe(fresh)
    assert torch.equal(logits(fresh, ids), logits(base.model, ids))


def test_resumed_is_bit_identical(finished: training.Run, tmp_path: Path, shelf: training.Shelf) -> None:
    part = tmp_path / "part"
    shutil.copytree(finished.path, part)
    for gone in (part / "adapter", part / "checkpoints" / "step-4"):
        shutil.rmtree(gone)
    resumed = deltaw.resume(part, quiet=True, shelf=shelf)
    whole, again = (load_file(run.adapter / "adapter_model.safetensors") for run in (finished, resumed))
    assert whole.keys() == again.keys() and all(torch.equal(whole[key], again[key]) for key in whole)
    plan = json.loads((part / "plan.json").read_text())
    shutil.rmtree(part / "adapter")
    plan["config"]["quantize"] = "none"
    (part / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(TrainError, match="quantize was 'none', is 'nf4'"):
        deltaw.resume(part, quiet=True, shelf=shelf)


def test_quantised_weights_are_not_trained_in_full(rows: Path, tmp_path: Path) -> None:
    """Refused before the base is read: the layers would be left out of the run, and the plan would count them."""
    given = config(rows, tmp_path / "run")
    given["adapter"] = {"method": "full", "targets": "all-linear"}
    with pytest.raises(
        TargetError, match=r"full would train 42 layers whose weights are quantised \(nf4; the first is model"
    ):
        deltaw.train(given, quiet=True)
    assert not (tmp_path / "run").exists()
    given["adapter"]["targets"] = ["embed_tokens", "norm"]
    assert len(outlook(parse.parse(given)).plan.targets) > 1


def test_a_run_older_than_the_option_goes_on(rows: Path, tmp_path: Path) -> None:
    given = parse.parse(config(rows, tmp_path, "none")).to_dict()
    digest = {"rows": "a", "held_out": "b"}
    before = {"config": {k: v for k, v in given.items() if k != "quantize"}, "digest": digest}
    unchanged(before, {"config": given, "digest": digest})


def test_loads_on_the_quantised_base_and_on_the_original(finished: training.Run, base: object) -> None:
    ids, plain = probe(base.model), load_base("tiny", dtype="fp32")
    outputs = []
    for model, note in ((base.model, False), (plain.model, True)):
        report = deltaw.load(model, finished.adapter, name="again")
        outputs.append(logits(model, ids))
        assert report.base == "match"
        assert any("trained on the base in nf4, this one is unquantised" in n for n in report.notes) == note
    assert 0.01 < float((outputs[0] - outputs[1]).abs().max()) < 0.5 * float(outputs[0].abs().max())
    deltaw.save(plain.model, finished.path / "other", name="again")
    deltaw.detach(base.model, "again")
    back = deltaw.load(base.model, finished.path / "other", name="again")
    assert back.base == "match" and "trained on the base unquantised, this one is in nf4" in back.notes[-1]
    assert torch.equal(logits(base.model, ids), outputs[0])
    deltaw.detach(base.model, "again")


@pytest.mark.parametrize("quantize", ["nf4-double", "int8"])
def test_other_kinds_train_and_share_no_base(quantize: str, rows: Path, tmp_path: Path, shelf: training.Shelf) -> None:
    kept = shelf._kept.get("base")
    own = training.Shelf()
    own._kept["base"] = kept
    run = deltaw.train(config(rows, tmp_path / "run", quantize), quiet=True, shelf=own)
    assert run.losses["held_out"] < run.losses["base"]
    (_, _, kind), loaded = own._kept["base"]
    assert kind == quantization(loaded.model) == quantize and loaded is not kept[1]


def test_merges_two_ways_and_says_which_is_closer(finished: training.Run, base: object, tmp_path: Path) -> None:
    ids = probe(base.model)
    deltaw.load(base.model, finished.adapter, name="again")
    wanted = logits(base.model, ids)
    deltaw.detach(base.model, "again")
    for into in ("original", "dequantized"):
        done = merge_to_folder("tiny", finished.adapter, tmp_path / into, dtype="fp32", into=into)
        assert done.into == into and done.max_logit_difference < 1e-4 < done.effect
        found = done.round_trip
        assert found.quantize == "nf4" and found.closer == "dequantized"
        assert found.dequantized.largest < 1e-3 < 0.01 < found.original.mean <= found.original.largest
        written = AutoModelForCausalLM.from_pretrained(tmp_path / into, dtype=torch.float32)
        assert quantization(written) is None
        apart = (logits(written, ids) - wanted).abs()
        said = getattr(found, into)
        assert float(apart.max()) == pytest.approx(said.largest, abs=1e-4)
        assert float(apart.mean()) == pytest.approx(said.mean, abs=1e-4)


def test_loftq_starts_nearer_and_stays_on_its_base(
    rows: Path, base: object, tmp_path: Path, shelf: training.Shelf, run: Callable[..., tuple[int, str, str]]
) -> None:
    """Its first step is nearer to the unquantised base; the adapter is refused elsewhere, and merges one way only."""
    full = load_base("tiny", dtype="fp32").model
    ids = probe(full)
    weights = lambda site: host_of(full.get_submodule(site.path)).weight  # noqa: E731
    deltaw.attach(base.model, deltaw.LoRA(rank=16, init="loftq"), targets="all-linear", weights=weights)
    wanted, started = logits(full, ids), logits(base.model, ids)
    deltaw.detach(base.model)
    apart, plain = ((x - wanted).square().mean() for x in (started, logits(base.model, ids)))
    assert apart < 0.95 * plain
    done = deltaw.train(config(rows, tmp_path / "run", init="loftq", niter=4), quiet=True, shelf=shelf)
    assert done.losses["held_out"] < done.losses["base"]
    assert "belongs to the quantised base (nf4) and to no other" in (done.adapter / "README.md").read_text()
    assert deltaw.load(base.model, done.adapter, name="again").base == "match"
    tuned = logits(base.model, ids)
    deltaw.detach(base.model, "again")
    with pytest.raises(BaseMismatchError, match=r"init: loftq\): its base is in nf4, this one is unquantised"):
        deltaw.load(full, done.adapter)
    code, _, err = run("merge", done.adapter, "--output", tmp_path / "m", "--dtype", "fp32")
    assert code == UseError.code and "--into dequantized" in err and not (tmp_path / "m").exists()
    merged = merge_to_folder("tiny", done.adapter, tmp_path / "m", dtype="fp32", into="dequantized")
    assert merged.round_trip.closer == "dequantized"
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    assert float((logits(written, ids) - tuned).abs().max()) < 1e-3
    with pytest.raises(UseError, match="this layer is not quantised"):
        deltaw.train(config(rows, tmp_path / "no", "none", init="loftq"), quiet=True)
    assert not (tmp_path / "no").exists()


def test_the_verbs(
    finished: training.Run, rows: Path, tmp_path: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    """eval follows the adapter's files, --quantize overrules them; merge prints both figures."""
    losses = []
    for more in ([], ["--quantize", "none"]):
        code, out, err = run("eval", "--adapter", finished.adapter, "--data", rows, "--generations", 0, "--json", *more)
        assert code == 0, err
        losses.append(json.loads(out)["base"]["loss"])
    assert losses[0] != losses[1]
    merging = ["merge", finished.adapter, "--output", tmp_path / "merged", "--dtype", "fp32"]
    code, out, err = run(*merging, "--into", "dequantized")
    assert code == 0, err
    assert "beside the adapter on the base in nf4" in out and "closer: --into dequantized" in out
    code, _, err = run("generate", "say river", "--model", "tiny", "--quantize", "nf5")
    assert code == UseError.code and "quantize 'nf5' is none of none, nf4" in err


def test_merging_that_cannot_be(finished: training.Run, tmp_path: Path) -> None:
    plain = load_base("tiny", dtype="fp32").model
    deltaw.attach(plain, deltaw.LoRA(rank=2), targets="q_proj")
    deltaw.save(plain, tmp_path / "a")
    with pytest.raises(UseError, match="do not say that its base was quantised"):
        merge_to_folder("tiny", tmp_path / "a", tmp_path / "out", into="dequantized")
    with pytest.raises(UseError, match="neither original nor dequantized"):
        merge_to_folder("tiny", finished.adapter, tmp_path / "out", into="nf4")
    with pytest.raises(MergeError, match="would change no weight"):
        merge_to_folder("tiny", tmp_path / "a", tmp_path / "out", quantize="nf4")
    assert not (tmp_path / "out").exists()


def test_a_base_whose_files_are_quantised(
    finished: training.Run, base: object, tmp_path: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    base.model.save_pretrained(tmp_path / "coarse")
    base.tokenizer.save_pretrained(tmp_path / "coarse")
    again = load_base(str(tmp_path / "coarse"), dtype="fp32")
    assert quantization(again.model) == "nf4"
    ids = probe(again.model)
    torch.testing.assert_close(logits(again.model, ids), logits(base.model, ids))
    assert deltaw.load(again.model, finished.adapter).base == "match"
    with pytest.raises(
        UseError, match=r"is quantised already \(bitsandbytes, by its config.json\): leave quantize out"
    ):
        load_base(str(tmp_path / "coarse"), quantize="nf4")
    with pytest.raises(UseError, match=r"quantised themselves \(bitsandbytes\): give the unquantised base"):
        merge_to_folder(str(tmp_path / "coarse"), finished.adapter, tmp_path / "out")
    code, out, err = run(
        "generate", "say river", "--model", tmp_path / "coarse", "--adapter", finished.adapter, "--max-new-tokens", 2
    )
    assert code == 0 and out, err  # the adapter's files ask for nf4, which this base is


def test_bad_input(rows: Path, tmp_path: Path, base: object, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="quantize='nf5'"):
        parse.parse(config(rows, tmp_path, "nf5"))
    for extra in ({"modules_to_save": ["q_proj"]}, {"method": "full"}):
        given = config(rows, tmp_path / "run")
        given["adapter"] = {"targets": "q_proj" if "method" in extra else "v_proj", **extra}
        with pytest.raises(TargetError, match=r"its weight is quantised \(torch.uint8\)"):
            attached = parse.parse(given).adapter
            deltaw.attach(base.model, attached.method, targets=attached.targets)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UseError, match=r"^quantize: nf4 needs bitsandbytes: pip install 'deltaw\[quant\]'$"):
        deltaw.train(config(rows, tmp_path / "run"), quiet=True)
    assert not (tmp_path / "run").exists()
