"""deltaw assemble on the command line."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from towers import clip, convnext

from deltaw.cli import main as cli

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["deltaw", "assemble", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    return call


def test_in_words_and_as_json(run: Run, tmp_path: Path) -> None:
    words = ["--vision", clip(tmp_path / "clip"), "--language", "tiny"]
    code, out, err = run(*words, "--output", tmp_path / "a")
    assert code == 0 and "an image takes 16 tokens" in out and "language 5.8 M" in out
    assert "<image> is token 4096: the embeddings grew" in err and (tmp_path / "a" / "model.safetensors").is_file()
    mining = ["--projector", "mining", "--detail", convnext(tmp_path / "c"), "--detail-size", 64, "--no-weights"]
    code, out, err = run(*words, *mining, "--output", tmp_path / "b")
    assert code == 0 and "seen at 64 x 64 by the second tower; no weights were written" in out
    code, out, err = run(*words, *mining, "--output", tmp_path / "c2", "--json")
    record = json.loads(out)
    assert record["image_tokens"] == 16 and record["detail_size"] == 64 and record["weights"] is False


def test_faults_are_wrong_use(run: Run, tmp_path: Path) -> None:
    code, _, err = run(
        "--vision", clip(tmp_path / "clip"), "--language", "tiny", "--output", tmp_path / "a", "--projector", "mpl"
    )
    assert code == 2 and "did you mean 'mlp'" in err and not (tmp_path / "a").exists()
    code, _, err = run("--vision", tmp_path / "clip", "--language", "tiny", "--output", tmp_path / "clip")
    assert code == 2 and "exists and is not an empty folder" in err
