"""The command line: exit codes, one sentence per fault, nothing half-written, one JSON object on stdout."""

import json
import re
import sys
from pathlib import Path

import pytest
from PIL import Image

Run = tuple[int, str, str]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    words = ["river", "castle", "garden", "church"]
    file.write_text(
        "".join(json.dumps({"prompt": f"say {a} {b}", "completion": f"{b} {a}"}) + "\n" for a in words for b in words)
    )
    return file


@pytest.fixture(scope="module")
def trained(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from deltaw import train

    output = tmp_path_factory.mktemp("runs") / "run"
    config = {
        "model": "tiny",
        "data": {"train": str(rows), "eval": None},
        "adapter": {"rank": 2},
        "output": str(output),
    }
    train({**config, "train": {"max_steps": 4, "batch_size": 4, "learning_rate": 5e-3}}, quiet=True)
    return output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["Usage"]),
        (["lroa"], ["No such command 'lroa'"]),
        (["train"], ["nothing to train"]),
        (["train", "no.yaml"], ["no configuration file 'no.yaml'"]),
        (["train", "model=tiny"], ["data.train is missing"]),
        (["train", "model=tiny", "data.train=x.jsonl", "adapter.rank=0"], ["rank=0", "at least 1"]),
        (["train", "model=tiny", "data.train=x.jsonl", "adapter.dropout=-1"], ["dropout=-1", "[0, 1)"]),
        (["train", "model=tiny", "data.train=nowhere.jsonl"], ["nowhere.jsonl"]),
        (["train", "--resume", "no-run"], ["holds no run"]),
        (["train", "model=tiny", "data.train=x.jsonl", "train.learning_rate=.inf"], ["learning_rate=inf", "finite"]),
        (["train", "model=tiny", "data.train=x.jsonl", "train.seed=-1"], ["train.seed=-1"]),
        (["train", "model=tiny", "data.train=x.jsonl", "train=5"], ["train=5 must be a section with objective"]),
        (
            ["train", "model=tiny", "data.train=x.jsonl", "adapter.targets=[[]"],
            ["the value of adapter.targets", "YAML"],
        ),
        (
            ["train", "model=tiny", "data.train=x.jsonl", "adapter.layers=1.5"],
            ["adapter.layers=1.5", "integer", ", or"],
        ),
        (["generate", "hello", "--model", "tiny", "--temperature", "-1"], ["temperature=-1.0 must not be negative"]),
        (["generate", "hello", "--adapter", "a=nan"], ["'nan' is not a number"]),
        (["eval", "--data", "x.jsonl", "--generations", "-1"], ["--generations", "greater than or equal to 0"]),
        (["generate", "hello"], ["--model", "--adapter"]),
        (["generate", "hello", "--model", "tiny", "--dtype", "fp8"], ["fp8", "bf16"]),
    ],
)
def test_wrong_use_is_2_with_a_sentence(
    run, arguments: list[str], words: list[str], tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*arguments)
    assert code == 2 and "Traceback" not in err
    assert all(word in out + err for word in words), out + err
    assert list(tmp_path.iterdir()) == []  # nothing half-written


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "x", "--model", "./no-model"], ["no base './no-model'"]),
        (["inspect", "no-adapter"], ["no-adapter"]),
        (["merge", "no-adapter", "--output", "out"], ["no-adapter"]),
    ],
)
def test_failure_is_1_with_a_sentence(run, arguments: list[str], words: list[str], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*arguments)
    assert code == 1 and out == "" and err.startswith("error: ") and "Traceback" not in err
    assert all(word in err for word in words), err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("base", ["nowhere", "no/where", "./no/where", "empty"])
def test_a_missing_base_is_said_in_words(base: str, run, trained: Path, tmp_path: Path, monkeypatch) -> None:
    """Every verb that takes a base, by a name of each kind; a folder that holds a configuration of no model."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/config.json").write_text('{"model_type": "no-such-model"}')
    monkeypatch.chdir(tmp_path)
    adapter = trained / "adapter"
    for verb in (
        ["merge", adapter, "--output", "out"],
        ["export", adapter, "--output", "out"],
        ["convert", adapter, "--to", "kohya", "--output", "out"],
        ["mix", adapter, "--output", "out"],
        ["inspect", adapter],
        ["generate", "x"],
    ):
        code, _, err = run(*verb, "--model", base)
        assert code == 1 and not re.search(r"\w*(Error|Exception)\b: ", err.removeprefix("error: ")), err
        assert f"no base {base!r}" in err or f"the base {base!r} cannot be loaded" in err, err
        assert "fetch it again" in err or "give its folder" in err or "not a hub id" in err, err


def test_rank_above_both_dimensions_and_unknown_targets_stop_before_training(run, rows: Path, tmp_path: Path) -> None:
    given = ["train", "model=tiny", f"data.train={rows}", "data.eval=null", f"output={tmp_path / 'run'}"]
    code, _, err = run(*given, "adapter.rank=4096")
    assert code == 2 and "rank 4096 is above both dimensions" in err
    code, _, err = run(*given, "adapter.targets=q_prj", f"output={tmp_path / 'other'}")
    assert code == 2 and "did you mean 'q_proj'? (6 modules)" in err


def test_eval_generate_inspect_mix_merge(run, rows: Path, trained: Path, tmp_path: Path) -> None:
    adapter = trained / "adapter"
    code, out, _ = run("eval", "--adapter", adapter, "--data", rows, "--generations", 2, "--json")
    found = json.loads(out)
    assert code == 0 and found["model"] == "tiny" and found["tuned"]["loss"] < found["base"]["loss"]

    renamed = tmp_path / "questions.jsonl"
    renamed.write_text(rows.read_text().replace('"prompt"', '"question"').replace('"completion"', '"answer"'))
    names = ["--columns", "prompt=question", "--columns", "completion=answer"]
    code, out, _ = run("eval", "--adapter", adapter, "--data", renamed, "--generations", 0, "--json", *names)
    assert code == 0 and json.loads(out)["tuned"]["loss"] == pytest.approx(found["tuned"]["loss"])
    code, _, err = run("eval", "--adapter", adapter, "--data", renamed, "--columns", "prompt")
    assert code == 2 and "write prompt=question" in err

    code, out, _ = run("generate", "say river castle", "--adapter", f"{adapter}=0.5", "--max-new-tokens", 4, "--json")
    assert code == 0 and len(json.loads(out)["answers"]) == 1

    code, out, _ = run("inspect", adapter, "--json")
    found = json.loads(out)
    assert code == 0 and found["base"]["name"] == "tiny" and len(found["sites"]) == 42
    assert all(site["rank"] == 2 and site["scale"] == 2.0 for site in found["sites"])
    code, out, _ = run("inspect", adapter)
    assert code == 0 and "42 adapters" in out

    code, out, _ = run("mix", f"{adapter}=0.7", f"{adapter}=0.3", "--output", tmp_path / "mixed", "--json")
    assert code == 0 and (tmp_path / "mixed" / "adapter_model.safetensors").is_file()
    cut = run("mix", f"{adapter}=0.7", f"{adapter}=0.3", "--output", tmp_path / "cut", "--rank", 2, "--json")
    assert cut[0] == 0 and json.loads(cut[1])["rank"] == 2 and 0 < json.loads(cut[1])["error"] < 1
    assert json.loads(cut[1])["parameters"] < json.loads(out)["parameters"]

    code, out, _ = run(
        "merge", tmp_path / "mixed", "--model", "tiny", "--output", tmp_path / "merged", "--dtype", "fp32", "--json"
    )
    found = json.loads(out)
    assert code == 0 and found["max_logit_difference"] < 1e-3 < found["effect"]
    code, _, err = run("merge", adapter, "--output", tmp_path / "merged")
    assert code == 2 and "not an empty folder" in err


def test_template_and_tokens_of_several_adapters(run, trained: Path, tmp_path: Path) -> None:
    """A mix has what its parts keep, and their digests; parts that want different things of one tokenizer are refused."""
    import shutil

    from deltaw.data.template import TEMPLATES
    from deltaw.formats.directory import open_directory

    for name in "ab":
        shutil.copytree(trained / "adapter", tmp_path / name)
        (tmp_path / name / "chat_template.jinja").write_text(TEMPLATES["plain"])
    (tmp_path / "b" / "tokens.json").write_text('{"<new>": 4096}')
    code, _, err = run("mix", f"{tmp_path / 'a'}=0.7", f"{tmp_path / 'b'}=0.3", "--output", tmp_path / "mixed")
    assert code == 0, err
    assert (tmp_path / "mixed" / "chat_template.jinja").read_text() == TEMPLATES["plain"]
    assert json.loads((tmp_path / "mixed" / "tokens.json").read_text()) == {"<new>": 4096}
    meta = open_directory(tmp_path / "mixed").state.meta
    assert meta["parents"] == [open_directory(tmp_path / "a").digest] * 2 and meta["weights"] == [0.7, 0.3]
    assert meta["task_type"] == "CAUSAL_LM"
    (tmp_path / "a" / "chat_template.jinja").unlink()
    (tmp_path / "a" / "tokens.json").write_text('{"<other>": 4096}')
    both = ["--adapter", tmp_path / "a", "--adapter", tmp_path / "b"]
    for verb in (["mix", tmp_path / "a", tmp_path / "b", "--output", tmp_path / "no"], ["generate", "x", *both]):
        code, _, err = run(*verb)
        assert code == 2 and "copy the chat_template.jinja to go by" in err and "'<new>' is 4096, which" in err


def test_what_loading_says_goes_to_stderr(run, rows: Path, trained: Path, tmp_path: Path) -> None:
    """A base that is not known to be the right one is heard of, in every verb and in a run, and never on stdout."""
    import shutil

    from deltaw.runs.directory import RunDirectory

    shutil.copytree(trained / "adapter", tmp_path / "a")
    (tmp_path / "a" / "deltaw.json").unlink()
    words = f"note: {tmp_path / 'a'}: the file does not say which base it was trained on"
    for verb in (
        ["generate", "x", "--adapter", tmp_path / "a", "--max-new-tokens", 1],
        ["merge", tmp_path / "a", "--model", "tiny", "--output", tmp_path / "merged"],
        ["train", "model=tiny", f"data.train={rows}", "data.eval=null", f"adapter.from={tmp_path / 'a'}",
         "train.max_steps=1", f"output={tmp_path / 'run'}"],
    ):  # fmt: skip
        code, out, err = run(*verb, "--json")
        assert code == 0 and words in err and "note" not in out and "remarks" not in json.loads(out), err
    (warning,) = RunDirectory(tmp_path / "run").events("warning")
    assert words.removeprefix("note: ") in warning["text"]
    assert "note:" not in run("generate", "x", "--adapter", trained / "adapter", "--max-new-tokens", 1)[2]


def test_adapters_of_differently_quantised_bases_ask_how_to_load_it(run, trained: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(trained / "adapter", tmp_path / "b")
    manifest = json.loads((tmp_path / "b" / "deltaw.json").read_text())
    manifest["base"]["quantized"] = "nf4"
    (tmp_path / "b" / "deltaw.json").write_text(json.dumps(manifest))
    both = ["generate", "x", "--adapter", trained / "adapter", "--adapter", tmp_path / "b", "--max-new-tokens", 1]
    code, _, err = run(*both)
    assert code == 2 and "differently quantised" in err and f"{tmp_path / 'b'}: nf4" in err and "--quantize" in err
    code, _, err = run(*both, "--quantize", "none")
    assert code == 0 and "trained on the base in nf4, this one is unquantised" in err


def test_merging_nothing_is_refused(run, tmp_path: Path) -> None:
    import deltaw

    base = deltaw.load_base("tiny")
    deltaw.attach(base.model, deltaw.LoRA(rank=2), targets="q_proj")
    deltaw.save(base.model, tmp_path / "untrained")
    code, _, err = run("merge", tmp_path / "untrained", "--model", "tiny", "--output", tmp_path / "merged")
    assert code == 1 and "would change no weight" in err and not (tmp_path / "merged").exists()


def test_an_adapter_is_not_a_base(run, trained: Path) -> None:
    code, _, err = run("generate", "x", "--model", trained / "adapter")
    assert code == 2 and "is an adapter, not a base" in err and "'tiny'" in err


def test_schema_is_json(run) -> None:
    code, out, _ = run("schema")
    assert code == 0 and json.loads(out)["required"] == ["model", "data"]


@pytest.mark.parametrize(
    "options", [["adapter.targets=[]"], ["adapter.layers=3-1"], ["adapter.exclude=.*"], ["data.max_length=600"]]
)
def test_a_run_that_cannot_be_leaves_no_folder(run, rows: Path, tmp_path: Path, options: list[str]) -> None:
    code, _, err = run("train", "model=tiny", f"data.train={rows}", f"output={tmp_path / 'run'}", *options)
    assert code == 2 and err.startswith("error: ") and not (tmp_path / "run").exists()


def test_version(run) -> None:
    import deltaw

    assert run("--version")[:2] == (0, f"{deltaw.__version__}\n")


def test_mixes_that_are_nothing_or_too_much(run, trained: Path, tmp_path: Path) -> None:
    for weight, words in (
        ("0", "would change nothing at all"),
        ("1e39", "too large for fp32"),
        ("1e-44", "too small for fp32"),
        ("nan", "is not a number"),
    ):
        code, _, err = run("mix", f"{trained / 'adapter'}={weight}", "--output", tmp_path / "mixed")
        assert code == 2 and words in err and not (tmp_path / "mixed").exists()
    (tmp_path / "file").write_text("x")
    for verb in (["mix", trained / "adapter"], ["merge", trained / "adapter"]):
        code, _, err = run(*verb, "--output", tmp_path / "file")
        assert code == 2 and "is not an empty folder: give another output" in err


def test_a_run_is_not_its_adapter_and_a_finished_one_is_finished(run, trained: Path) -> None:
    code, _, err = run("generate", "x", "--adapter", trained)
    assert code == 2 and f"give {trained / 'adapter'}" in err
    code, _, err = run("train", "--resume", trained)
    assert code == 2 and "is finished" in err


def test_chat_goes_on_after_a_mistake(run, monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{'word ' * 700}\n/what\nhello\n/clear\n/quit\nnever read\n"))
    code, out, err = run("chat", "--model", "tiny", "--max-new-tokens", 3, "--temperature", 0)
    assert code == 0 and len(out.strip().splitlines()) == 1
    assert "/clear starts the conversation anew" in err and "no command /what" in err


@pytest.mark.parametrize("wait", [0.1, 1.3])
def test_ctrl_c_is_one_sentence(rows: Path, tmp_path: Path, wait: float) -> None:
    """While imports or the base load, and in the evaluation before the first step: nothing is left behind."""
    import signal
    import subprocess
    import time

    given = [f"data.train={rows}", f"data.eval={rows}", f"output={tmp_path / 'run'}", "train.max_steps=100000"]
    began = time.monotonic()
    subprocess.run([sys.executable, "-m", "deltaw", "--version"], check=True, capture_output=True)
    start = time.monotonic() - began  # until our handler is there, on this machine at this moment
    process = subprocess.Popen(
        [sys.executable, "-m", "deltaw", "train", "model=tiny", *given], stderr=subprocess.PIPE, text=True
    )
    time.sleep(2 * start + wait)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1 and "error: interrupted" in err and "Traceback" not in err
    assert not (tmp_path / "run").exists() or (tmp_path / "run" / "checkpoints").exists()


def test_an_image_before_a_prompt(run, tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    code, out, err = run("generate", "What?", "--image", tmp_path / "a.png", "--model", "tiny")
    assert (code, out) == (2, "") and "prompt 1 holds an image, and this base reads none" in err
    code, _, err = run("generate", "What?", "--image", tmp_path / "b.png", "--model", "tiny")
    assert code == 2 and "b.png" in err and "no image" in err
