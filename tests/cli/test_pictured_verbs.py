"""Verbs on a base that reads images: where the files of rows lie, and where the images of a prompt stand."""

import json
import shutil
from pathlib import Path

import pictured
import pytest


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
