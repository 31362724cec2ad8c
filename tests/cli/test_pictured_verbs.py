"""Verbs on a base that reads images: where the files of rows lie, and where the images of a prompt stand."""

import json
import shutil
from pathlib import Path

import pictured
import pytest

from deltaw.cli.generate import pictured as asking


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictured.base(tmp_path_factory.mktemp("base"))


def test_eval_is_told_where_the_images_lie(run, base: Path, tmp_path: Path) -> None:
    rows = pictured.rows(tmp_path / "images", pictured=2)
    moved = Path(shutil.move(rows, tmp_path / "rows.jsonl"))
    given = ("eval", "--model", base, "--data", moved, "--generations", 0, "--json")
    code, _, err = run(*given)
    assert code == 2 and "no image" in err and "the source's `images`" in err and "--images" in err
    code, out, err = run(*given, "--images", rows.parent)
    assert code == 0 and json.loads(out)["rows"] == 2, err


@pytest.mark.parametrize(
    ("text", "places"),
    [
        ("What?", ["a", "b", "What?"]),
        ("<image>\nWhat?<image>", ["a", "\nWhat?", "b"]),
        ("First <image>, then <image>: which?", ["First ", "a", ", then ", "b", ": which?"]),
    ],
)
def test_images_stand_at_the_marks_of_a_prompt(text: str, places: list[str]) -> None:
    [turn] = asking(text, ["a", "b"])
    assert [part.get("path", part.get("text")) for part in turn["content"]] == places
    assert [part["type"] for part in turn["content"]] == ["image" if one in "ab" else "text" for one in places]


def test_generate_takes_marks_and_refuses_what_does_not_fit(run, base: Path, tmp_path: Path) -> None:
    image = pictured.rows(tmp_path).parent / "red.png"
    asked = ("--model", base, "--max-new-tokens", 2, "--json")
    answers = []
    for text in ("\nWhat is it?", "<image>\nWhat is it?"):
        code, out, err = run("generate", text, "--image", image, *asked)
        assert code == 0, err
        answers.append(json.loads(out)["answers"])
    assert answers[0] == answers[1]
    code, _, err = run("generate", "<image><image>What?", "--image", image, *asked)
    assert code == 2 and "'<image><image>What?' has <image> 2 times, and --image is given 1 time" in err
    code, _, err = run("generate", "<image>What?", *asked)
    assert code == 2 and "'<image>What?' has <image> 1 time, and --image is given 0 times" in err
    code, _, err = run("generate", "What?", "--image", tmp_path / "nope.png", *asked)
    assert code == 2 and "nope.png': there is no such file" in err and "rows" not in err.replace(str(tmp_path), "")
