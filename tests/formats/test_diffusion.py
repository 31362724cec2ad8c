"""diffusers as the oracle, both ways: what we write it loads, what it wrote we read, in its own layout and in kohya's."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusion import build, folder, load_with_diffusers, outputs, randomise

import deltaw
from deltaw import DoRA, LoRA
from deltaw.formats import directory
from deltaw.ship.convert import convert

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

LAYERS = {
    "unet": ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2",
             "time_emb_proj", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv"],
    "text_encoder": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
}  # fmt: skip
LAYERS["text_encoder_2"] = LAYERS["text_encoder"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: folder(family, tmp_path_factory.mktemp(family)) for family in ("sd", "sdxl")}


def trained(family: str, method: Any, path: Path) -> dict[str, torch.Tensor]:
    """An adapter on every part, saved as folders of ours; what each part makes of its input with it."""
    result = {}
    for role, part in build(family).items():
        deltaw.attach(part, method, targets=LAYERS[role])
        randomise(part)
        deltaw.save(part, path / role)
        result[role] = outputs(part)
    return result


METHODS = {
    "lora": LoRA(rank=4, alpha=6, rank_pattern={"(to_q|conv1|fc1)": 2}, alpha_pattern={"(to_v|conv2|q_proj)": 5}),
    "rslora": LoRA(rank=4, alpha=6, rslora=True),
    "dora": DoRA(rank=4, alpha=6),
}
LOADED = [("sd", to, name) for to in ("kohya", "diffusers") for name in ("lora", "rslora")]
LOADED += [("sdxl", "kohya", "lora"), ("sdxl", "diffusers", "lora"), ("sd", "diffusers", "dora")]


@pytest.mark.parametrize(("family", "to", "name"), LOADED)
def test_what_we_write_diffusers_loads(family: str, to: str, name: str, bases: dict[str, Path], tmp_path: Path) -> None:
    expected = trained(family, METHODS[name], tmp_path / "ours")
    done = convert(tmp_path / "ours", tmp_path / "theirs", to=to, model=str(bases[family]))
    assert set(done.parts) == set(expected) and done.error <= 1e-6
    plain, parts = build(family), build(family)
    load_with_diffusers(family, tmp_path / "theirs", parts)
    for role, wanted in expected.items():
        assert float((outputs(plain[role]) - wanted).abs().max()) > 1e-2
        assert float((outputs(parts[role]) - wanted).abs().max()) <= 2e-5, role
    back = convert(tmp_path / "theirs", tmp_path / "again", model=str(bases[family]))
    assert back.tool == to and back.error <= 1e-6
    for role, part in build(family).items():
        deltaw.load(part, tmp_path / "again" / role)
        assert float((outputs(part) - expected[role]).abs().max()) <= 2e-5
        meta = directory.read(tmp_path / "again" / role)[0].meta
        assert meta["converted"]["from"] == to and len(meta["parents"]) == 1
