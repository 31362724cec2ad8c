"""deltaw mix: every way, what is kept of it, the base read for what needs it, and options that do not go together."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import deltaw
from deltaw.core.state import AdapterState, delta
from deltaw.formats.directory import open_directory
from deltaw.methods.dora import DoRA
from deltaw.methods.lora import LoRA

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters a, b (LoRA of unlike ranks) and d (DoRA) on the bundled base, and the same base with other values."""
    folder, base = tmp_path_factory.mktemp("adapters"), deltaw.load_base("tiny", dtype="fp32")
    torch.manual_seed(0)
    for name, method in {"a": LoRA(rank=4, alpha=6.0), "b": LoRA(rank=2, rslora=True), "d": DoRA(rank=2)}.items():
        deltaw.attach(base.model, method, targets=["q_proj", "down_proj"], name=name)
        for parameter in base.model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(0.05 * torch.randn_like(parameter))
        deltaw.save(base.model, folder / name, name=name, meta={"task_type": "CAUSAL_LM"})
        deltaw.detach(base.model, name)
    for parameter in base.model.parameters():
        parameter.data.add_(0.01)
    base.model.save_pretrained(folder / "other")
    base.tokenizer.save_pretrained(folder / "other")
    return folder


def changes(state: AdapterState, weight: float = 1.0) -> dict[str, torch.Tensor]:
    return {str(s): weight * delta(state, s, torch.zeros(spec.shape)) for s, spec in state.specs.items()}


def test_exact_with_negative_weights_and_subtract(run: Run, made: Path, tmp_path: Path) -> None:
    code, out, err = run("mix", f"{made / 'a'}=0.7", f"{made / 'b'}=-0.3", "--output", tmp_path / "one", "--json")
    found = json.loads(out)
    assert code == 0, err
    assert found["how"] == "exact" and found["ranks"] == [6] and found["read_back"] < 1e-6
    code, out, _ = run("mix", f"{made / 'a'}=0.7", "--subtract", f"{made / 'b'}=0.3", "--output", tmp_path / "two")
    assert code == 0 and "0.7 × " in out and "-0.3 × " in out and "rank 6; read back and compared" in out
    one, two = (open_directory(tmp_path / name).state for name in ("one", "two"))
    a, b = (changes(open_directory(made / name).state, w) for name, w in (("a", 0.7), ("b", -0.3)))
    for site, change in changes(one).items():
        torch.testing.assert_close(change, a[site] + b[site], rtol=1e-5, atol=1e-6)
        assert torch.equal(change, changes(two)[site])
    assert one.meta["weights"] == two.meta["weights"] == [0.7, -0.3] and one.meta["mix"] == {"how": "exact"}
    assert one.meta["task_type"] == "CAUSAL_LM" and "cut" not in one.meta
    code, _, err = run("mix", made / "a", "--subtract", made / "a", "--output", tmp_path / "none")
    assert code == 2 and "would change nothing at all" in err and not (tmp_path / "none").exists()


def test_ranks_by_energy_are_reported_kept_and_read_again(run: Run, made: Path, tmp_path: Path) -> None:
    given = [f"{made / 'a'}=1", f"{made / 'b'}=0.2"]
    code, out, err = run("mix", *given, "--rank", "auto", "--energy", 0.8, "--output", tmp_path / "auto", "--json")
    assert code == 0, err
    found, state = json.loads(out), open_directory(tmp_path / "auto").state
    assert found["how"] == "svd" and found["energy"] == 0.8 and len(found["ranks"]) > 1
    assert 0 < found["error"] == max(one["error"] for one in found["modules"].values()) <= 0.2**0.5
    assert {str(s): m.rank for s, m in state.methods.items()} == {s: one["rank"] for s, one in found["modules"].items()}  # type: ignore[attr-defined]
    assert state.meta["cut"]["relative_error"] == found["error"]
    assert state.meta["cut"]["modules"] == pytest.approx(
        {s: one["error"] for s, one in found["modules"].items() if one["error"]}
    )
    code, out, _ = run("mix", *given, "--how", "svd", "--rank", 1, "--output", tmp_path / "one")
    lines = out.splitlines()
    assert code == 0 and "of a module's change is lost" in lines[1] and len(lines) == 2 + 1 + 5
    code, out, _ = run("mix", *given, "--rank", 99, "--output", tmp_path / "more", "--json")
    assert code == 0 and json.loads(out)["error"] == 0.0 and json.loads(out)["ranks"] == [6]


@pytest.mark.parametrize("how", ["ties", "dare", "dare-ties"])
def test_on_the_change_itself(run: Run, made: Path, tmp_path: Path, how: str) -> None:
    given = [made / "a", made / "b", "--how", how, "--density", 0.5, "--output"]
    code, out, err = run("mix", *given, tmp_path / "full", "--rank", "full", "--json")
    assert code == 0, err
    assert json.loads(out)["error"] == 0.0 and json.loads(out)["density"] == 0.5
    code, out, _ = run("mix", *given, tmp_path / "cut", "--rank", 8, "--json")
    found, full, cut = json.loads(out), *(open_directory(tmp_path / name).state for name in ("full", "cut"))
    assert found["ranks"] == [8] and cut.meta["mix"] == {key: found[key] for key in cut.meta["mix"]}
    for site, wanted in changes(full).items():
        apart = float((changes(cut)[site] - wanted).norm() / wanted.norm())
        assert found["modules"][site]["error"] == pytest.approx(apart, rel=1e-3)


def test_blocks(run: Run, made: Path, tmp_path: Path) -> None:
    given = [made / "a", made / "b", "--block", "attention=1,0", "--block", "mlp@0-2=0,-0.5", "--output"]
    code, out, err = run("mix", *given, tmp_path / "blocks", "--json")
    assert code == 0, err
    found, state = json.loads(out), open_directory(tmp_path / "blocks").state
    assert found["how"] == "blocks" and found["blocks"] == {"attention": [1.0, 0.0], "mlp@0-2": [0.0, -0.5]}
    a, b = (changes(open_directory(made / name).state) for name in "ab")
    for site, change in changes(state).items():
        low = "mlp" in site and int(site.split(".")[2]) < 3
        wanted = a[site] if "self_attn" in site else -0.5 * b[site] if low else a[site] + b[site]
        torch.testing.assert_close(change, wanted, rtol=1e-5, atol=1e-6)
    code, _, err = run("mix", made / "a", made / "b", "--block", "atention=1,0", "--output", tmp_path / "no")
    assert code == 2 and "did you mean 'attention'" in err and not (tmp_path / "no").exists()


def test_what_depends_on_the_base_reads_it(
    run: Run, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = [f"{made / 'd'}=1", f"{made / 'a'}=0.5", "--rank", 12]
    code, _, err = run("mix", *given, "--output", tmp_path / "no")
    assert code == 2 and "depends on the base's weight: give the model as weights (--model)" in err
    code, _, err = run("mix", *given, "--model", made / "other", "--output", tmp_path / "no")
    assert code == 1 and "trained on another base than" in err and not (tmp_path / "no").exists()
    model = deltaw.load_base("tiny", dtype="fp32").model

    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("the base was loaded as a whole")

    monkeypatch.setattr("deltaw.models.base.load_base", never)  # its weights are read one at a time
    code, out, err = run("mix", *given, "--model", "tiny", "--output", tmp_path / "mixed", "--json")
    assert code == 0, err
    found, mixed = json.loads(out), open_directory(tmp_path / "mixed").state
    d, a = (open_directory(made / name).state for name in "da")
    for site in mixed.methods:
        weight = model.get_submodule(site.path).weight.detach()
        wanted = delta(d, site, weight) + 0.5 * delta(a, site, weight)
        apart = float((delta(mixed, site, weight) - wanted).norm() / wanted.norm())
        assert found["modules"][str(site)]["error"] == pytest.approx(apart, rel=1e-2) and apart < 0.9
    code, _, err = run("mix", *given, "--model", made / "other", "--allow-base-mismatch", "--output", tmp_path / "yes")
    assert code == 0, err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--how", "tise"], "is none of exact, svd, ties, dare, dare-ties, blocks; did you mean 'ties'"),
        (["--how", "exact", "--rank", 4], "--how exact cuts nothing"),
        (["--how", "svd"], "--how svd needs a rank: --rank 16, --rank auto"),
        (["--how", "ties", "--rank", 4], "needs --density"),
        (["--how", "dare", "--density", 0.5], "needs a rank: --rank 16, --rank auto (with --energy) or --rank full"),
        (["--density", 0.5], "--density belongs to ties and dare, not to exact"),
        (["--how", "blocks"], "--how blocks needs the weights"),
        (["--rank", "many"], "--rank 'many' is neither a whole number, nor auto, nor full"),
        (["--rank", 0], "rank=0 is not a whole number"),
        (["--energy", 1.5], "energy=1.5 is not a share"),
        (["--rank", "full", "--energy", 0.5], "rank full keeps everything"),
        (["--block", "attention=x"], "'x' is not a list of numbers: write attention=1,0"),
        (["--seed", 3], "--seed belongs to dare"),
        (["--block", "attention=1", "--block", "attention=0"], "given twice"),
    ],
)  # fmt: skip
def test_options_that_do_not_go_together(
    run: Run, made: Path, tmp_path: Path, options: list[object], words: str
) -> None:
    code, _, err = run("mix", made / "a", *options, "--output", tmp_path / "no")
    assert code == 2 and words in err and not (tmp_path / "no").exists(), err


def test_nothing_stays_of_a_mix_that_reads_as_another_one(
    run: Run, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk, or a writer, that gives back something else: no folder, no draft, one sentence."""
    from deltaw.formats import directory

    right = directory.write

    def wrong(state: AdapterState, *args: object, **kwargs: object) -> None:
        site = next(iter(state.methods))
        group = {name: 1.01 * tensor for name, tensor in state.tensors[site].items()}
        right(
            AdapterState(state.methods, {**state.tensors, site: group}, state.specs, state.base, state.meta),
            *args,
            **kwargs,
        )  # type: ignore[arg-type]

    monkeypatch.setattr(directory, "write", wrong)
    code, _, err = run("mix", made / "a", "--output", tmp_path / "out" / "mixed")
    assert code == 1 and "reads as another one, nothing is kept of it" in err and not list((tmp_path / "out").iterdir())


def test_bases_that_only_have_names_are_compared_by_them(run: Run, made: Path, shared: Path, tmp_path: Path) -> None:
    """Nothing proves that they are two, but nobody should hear of it from a model that will not take the mix."""
    strange = shared / "adapters/niket-sharma__LLMs-from-groundup/lora_adapters"
    code, _, err = run("mix", strange, made / "a", "--output", tmp_path / "m")
    assert code == 0 and "the adapters name different bases (distilgpt2, tiny)" in err
    code, _, err = run("mix", made / "a", made / "b", "--output", tmp_path / "n")
    assert code == 0 and not err
