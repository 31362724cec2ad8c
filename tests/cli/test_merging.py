"""deltaw merge on the command line: several adapters, prompts, no comparison, an interrupt."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import deltaw
from deltaw.ship import disk

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two adapters of the bundled base that do something; one lies in a folder that looks like a strength."""
    folder, found = tmp_path_factory.mktemp("pair"), []
    for name, targets in (("lr=2e-4", "attention"), ("b", "mlp")):
        model = deltaw.load_base("tiny", dtype="fp32", device=torch.device("cpu")).model
        deltaw.attach(model, deltaw.LoRA(rank=4), targets=targets)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_(std=0.05)
        deltaw.save(model, folder / name)
        found.append(folder / name)
    return found


def test_several_with_strengths_on_prompts(run: Run, pair: list[Path], tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("The river flows\n\nsay castle\n")
    words = [f"{pair[0]}=0.7", f"{pair[1]}=-0.3", "--prompts", tmp_path / "prompts.txt"]
    code, out, err = run("merge", *words, "--output", tmp_path / "m", "--dtype", "fp32", "--json")
    found = json.loads(out)
    assert code == 0 and not err and found["way"] == "shards"
    assert found["weights"] == 42 and found["max_logit_difference"] < 1e-3 < found["effect"]
    record = json.loads((tmp_path / "m/merge.json").read_text())
    assert [one["strength"] for one in record["adapters"]] == [0.7, -0.3] and 4 < record["positions"] < 20
    for text in (b"\n", b"\x80\x81 no text"):
        (tmp_path / "empty.txt").write_bytes(text)
        code, _, err = run("merge", pair[1], "--output", tmp_path / "n", "--prompts", tmp_path / "empty.txt")
        assert code == 2 and "holds no prompt" in err and not (tmp_path / "n").exists()


def test_left_out_checks_are_said(run: Run, pair: list[Path], tmp_path: Path) -> None:
    code, out, err = run("merge", pair[0], "--output", tmp_path / "m", "--no-check")
    assert code == 0 and "its logits NOT compared" in out and "logits were not compared" in err
    assert json.loads((tmp_path / "m/merge.json").read_text())["max_logit_difference"] is None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_is_one_sentence(
    run: Run, pair: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    before = {one: signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)}
    # one that nobody heard would end the tests
    monkeypatch.setattr(
        disk, "_copy", lambda *given: signal.getsignal(number) is before[number] or os.kill(os.getpid(), number)
    )
    try:
        code, out, err = run("merge", pair[1], "--output", tmp_path / "x/m", "--no-check")
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
    assert code == 1 and not out and err == f"error: interrupted: {tmp_path / 'x/m'} was not written\n"
    assert list((tmp_path / "x").iterdir()) == []
