"""What people see: grids in characters, tables, histories in words, pages of one file that stay the same byte for byte."""

import re
import subprocess
import sys
import xml.etree.ElementTree as ET

import pytest
import torch

from analysis.made import lora, orthonormal
from deltaw.analysis import compare, describe, history, table
from deltaw.analysis.figures import curves, heat_map, require
from deltaw.analysis.layers import Grid, folded, grid, layer
from deltaw.analysis.page import compared, inspected
from deltaw.core.errors import UseError
from deltaw.core.state import AdapterState


def layered(seed: int = 0, layers: int = 3) -> AdapterState:
    """Two modules in each layer; q grows with the layer."""
    return sum(
        lora(orthonormal(12, 2, seed + n), (float(n + 1), 0.5) if name == "q" else (1.0, 1.0), orthonormal(10, 2, 99 + n),
             f"model.layers.{n}.{name}")
        for n in range(layers)
        for name in ("q", "v")
    )  # fmt: skip


def test_sites_are_laid_out_by_layer_and_module() -> None:
    assert folded("model.layers.3.mlp.up") == "model.layers.*.mlp.up" and layer("model.layers.3.mlp.up") == 3
    assert folded("layers.3.experts:down_proj") == "layers.*.experts:down_proj" and layer("lm_head") is None
    assert folded("model.layer2.q") == "model.layer2.q"  # a number within a name is no layer
    found = grid(describe(layered()), "norm")
    assert found.modules == ["q", "v"] and found.layers == [0, 1, 2]
    assert found.values[0] == pytest.approx([(n**2 + 0.25) ** 0.5 for n in (1, 2, 3)], rel=1e-5)
    assert str(found) == "q  ▁▄█\nv  ▂▂▂"
    assert str(Grid(["a"], [0, 1], [[None, 2.0]])) == "a  ·▁"


def test_equal_modules_are_one_line_of_the_table() -> None:
    head, q, v = table(describe(layered())).splitlines()
    assert head.split()[:6] == ["module", "method", "rank", "alpha", "scale", "count"]
    assert "norm of change" in head and "effective rank" in head and "amplification" not in head
    assert q.startswith("model.layers.*.q") and "1.12 … 3.04" in q and "1.41" in v


def test_a_history_in_words() -> None:
    meta = {
        "task_type": "CAUSAL_LM", "metrics": {"losses": {"held_out": 1.23456}}, "parents": ["sha256:" + "a" * 64, "b"],
        "weights": [0.7, -0.3], "cut": {"rank": 4, "relative_error": 0.125}, "chat_template": None,
        "recipe": {"adapter": {"method": "lora", "rank": 8}, "train": {"clip": 1.0}}, "odd": {"deep": [1, 2.5]},
    }  # fmt: skip
    said = dict(history(meta))
    assert said["task"] == "language model" and said["measured"] == "losses.held_out 1.235"
    assert said["mixed from"] == "0.7 × sha256:aaaaaaaaaaaa… + -0.3 × b"
    assert said["cut"] == "to rank 4, at most 12.50% of a module's change was lost"
    assert said["recipe"] == "adapter.method lora, adapter.rank 8, and 1 more" and said["odd.deep"] == "1, 2.5"
    assert dict(history(meta, whole=True))["recipe"].endswith("train.clip 1")
    assert dict(history({"parents": ["c"]})) == {"continues": "c"} and history({}) == []
    assert dict(history({"parents": ["c"], "converted": {"from": "kohya"}}))["made from"] == "c"


def svgs(page: str) -> list[ET.Element]:
    return [ET.fromstring(found) for found in re.findall(r"<svg.*?</svg>", page, re.S)]


def test_a_page_is_one_file_and_the_same_every_time() -> None:
    state = layered()
    cuts = {
        "said": "yes: <2>", "loss": 1.0, "rows": [("rank", "loss"), ("2", "1.0")],
        "cuts": [{"rank": 2, "loss": 1.0}, {"rank": 1, "loss": 1.5}, {"rank": 0, "loss": 3.0}],
    }  # fmt: skip
    page = inspected("a <b>", {"base": "x & y"}, describe(state), cuts)
    assert page == inspected("a <b>", {"base": "x & y"}, describe(state), cuts)
    assert "a &lt;b&gt;" in page and "x &amp; y" in page and "yes: &lt;2&gt;" in page
    other = compared("both", {}, compare(state, layered(7)))
    for text, figures in ((page, 5), (other, 5)):
        assert len(svgs(text)) == figures and "<script" not in text
        links = set(re.findall(r"(?:https?:)?//[^\s\"'<>)]+", text))
        assert links <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}  # names, not addresses to load
        ids = re.findall(r' id="([^"]+)"', text)
        assert all(re.search(rf'(?:#){re.escape(one)}["\)]', text) for one in ids)


def test_figures_show_their_numbers() -> None:
    drawn = heat_map(Grid(["q", "v"], [0, 1], [[1.0, None], [2.0, 3.0]]), 'norm "of" <q>')
    root = ET.fromstring(drawn)
    texts = {"".join(one.itertext()).strip() for one in root.iter("{http://www.w3.org/2000/svg}text")}
    assert root.attrib["aria-label"] == 'norm "of" <q>' and {"q", "v", "0", "1", "layer"} <= texts
    lines = curves({"a": [(1, 0.5), (2, 0.9)]}, "t", "k", "share", ("all", 0.95))
    assert {"a", "all"} <= {
        "".join(e.itertext()).strip() for e in ET.fromstring(lines).iter("{http://www.w3.org/2000/svg}text")
    }


def test_without_matplotlib_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UseError, match=r"pip install 'deltaw\[report\]'"):
        require()


def test_matplotlib_is_loaded_by_figures_alone() -> None:
    code = "import sys, deltaw.analysis.page, deltaw.analysis; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_change_that_is_zero_everywhere_still_makes_a_page() -> None:
    zero = lora(torch.zeros(12, 2, dtype=torch.float64), (1.0, 1.0), orthonormal(10, 2), "model.layers.0.q")
    page = inspected("zero", {}, describe(zero))
    assert "‖ΔW‖" in page and svgs(page)
    assert svgs(compared("zero", {}, compare(zero, zero))) == []
