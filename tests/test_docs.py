"""Every Python block of the documentation runs, in order, in one namespace per file; links and commands exist."""

import re
import shlex
import sys
from pathlib import Path

import pytest

from deltaw.cli.main import main

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "README.zh-CN.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.S)
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": page.stem}
    for block in blocks:
        exec(compile(block, str(page), "exec"), namespace)  # a failing block fails the test with its own error


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_exist(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES[:2], ids=lambda page: page.name)
def test_the_yaml_of_the_readme_is_the_example(page: Path) -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", page.read_text(encoding="utf-8"), re.S)
    assert block == (ROOT / "examples/records.yaml").read_text(encoding="utf-8")


def test_the_commands_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, from a folder like the clone's, with two steps instead of sixty and fewer rows to score; all but a chat and a resume."""
    lines = re.findall(r"^deltaw .*$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M)
    assert len(lines) == 16
    for name in ("examples", "src"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    for line in lines:
        words = shlex.split(line, comments=True)
        if words[1] == "chat" or "--resume" in words:
            continue
        short = ["train.max_steps=2", "data.eval=null", "--quiet"] if words[1] == "train" else []
        short += ["--generations", "0"] if words[1] == "eval" else []
        short += ["--no-test"] if words[1] == "doctor" else []
        monkeypatch.setattr(sys, "argv", [*words, *short])
        with pytest.raises(SystemExit) as caught:
            main()
        assert caught.value.code in (0, None), line
    assert (tmp_path / "merged/model.safetensors").exists() and (tmp_path / "mixed/deltaw.json").exists()
    assert (tmp_path / "portable/lora_manifest.json").exists() and (tmp_path / "library/names/records.json").exists()
