"""diffusers as the oracle, both ways: what we write it loads, what it wrote we read, in its own layout and in kohya's."""

import json
from pathlib import Path
from typing import Any

import diffusers
import peft
import pytest
import torch
from diffusers.loaders.lora_conversion_utils import (
    _convert_non_diffusers_lora_to_diffusers,
    _maybe_map_sgm_blocks_to_diffusers,
)
from diffusers.training_utils import _collate_lora_metadata
from diffusers.utils.state_dict_utils import (
    convert_state_dict_to_diffusers,
    convert_state_dict_to_kohya,
    convert_unet_state_dict_to_peft,
)
from diffusion import build, folder, load_with_diffusers, outputs, randomise
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

import deltaw
from deltaw import DoRA, LoRA
from deltaw.core.errors import FileError, UseError
from deltaw.core.method import Site
from deltaw.formats import directory
from deltaw.formats.detect import detect
from deltaw.formats.diffusers import from_diffusers, place
from deltaw.formats.kohya import from_kohya, to_kohya
from deltaw.formats.kohya_names import names, table
from deltaw.formats.weights import read_file
from deltaw.models.adapters import layout
from deltaw.models.outlines import outlines
from deltaw.ship.convert import convert
from deltaw.ship.export import export

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
LOADED = [
    ("sd", "kohya", "lora"),
    ("sdxl", "kohya", "rslora"),
    ("sd", "diffusers", "lora"),
    ("sdxl", "diffusers", "rslora"),
    ("sd", "diffusers", "dora"),
]


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


@pytest.mark.parametrize("profile", ["diffusers", "kohya"])
def test_an_export_of_one_part(profile: str, bases: dict[str, Path], tmp_path: Path) -> None:
    expected = trained("sd", METHODS["lora"], tmp_path / "ours")
    done = export(tmp_path / "ours" / "unet", tmp_path / "theirs", profile, model=str(bases["sd"]))
    assert done.profile == profile and done.error <= 1e-6
    parts = build("sd")
    load_with_diffusers("sd", tmp_path / "theirs", parts)
    assert float((outputs(parts["unet"]) - expected["unet"]).abs().max()) <= 2e-5


@pytest.mark.parametrize(("to", "layers"), [("kohya", ["q_proj", "v_proj"]), ("diffusers", ["fc1"])])
def test_what_diffusers_refuses_is_said(to: str, layers: list[str], bases: dict[str, Path], tmp_path: Path) -> None:
    """It tells the layout of a text encoder by layers that are not in every file."""
    part = build("sd")["text_encoder"]
    deltaw.attach(part, LoRA(rank=2), targets=layers)
    randomise(part)
    deltaw.save(part, tmp_path / "a")
    done = convert(tmp_path / "a", tmp_path / "out", to=to, model=str(bases["sd"]))
    assert done.parts == {"text_encoder": 4 if to == "kohya" else 2} and done.error == 0.0
    assert any("diffusers 0.42" in note and "text_encoder" in note for note in done.notes)
    with pytest.raises(ValueError, match="Could not automatically infer state dict type"):
        load_with_diffusers("sd", tmp_path / "out", build("sd"))


# What others wrote


def with_peft(part: Any, config: dict[str, Any]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """An adapter that PEFT made on a part: its state dict, and the part's output with it."""
    part.add_adapter(peft.LoraConfig(**config))
    randomise(part)
    return get_peft_model_state_dict(part), outputs(part)


CONFIG = {"r": 4, "lora_alpha": 16, "rank_pattern": {"to_q": 2}, "alpha_pattern": {"to_q": 5}}


@pytest.fixture(scope="module")
def theirs() -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any], dict[str, torch.Tensor]]:
    """(layers, metadata, outputs) by part, made by PEFT on a tiny Stable Diffusion."""
    layers, outs, parts = {}, {}, build("sd")
    for role, part in parts.items():
        layers[role], outs[role] = with_peft(part, {**CONFIG, "target_modules": LAYERS[role][:6]})
    return layers, _collate_lora_metadata(parts), outs


def ours(path: Path, base: Path, out: Path) -> tuple[dict[str, torch.Tensor], Any]:
    """What each part makes of its input with the file read by us; and the report."""
    done = convert(path, out, model=str(base))
    result = {}
    for role, part in build("sd").items():
        deltaw.load(part, out / role)
        result[role] = outputs(part)
    return result, done


def test_what_diffusers_writes_we_read(theirs: Any, bases: dict[str, Path], tmp_path: Path) -> None:
    layers, metadata, expected = theirs
    pipeline = diffusers.StableDiffusionPipeline
    pipeline.save_lora_weights(tmp_path / "a", layers["unet"], layers["text_encoder"], **metadata)
    found, done = ours(tmp_path / "a", bases["sd"], tmp_path / "a-ours")
    assert done.tool == "diffusers" and not [note for note in done.notes if "no alpha" in note]
    for role, wanted in expected.items():
        assert float((found[role] - wanted).abs().max()) <= 2e-5


def test_an_alpha_that_is_not_there_is_said(theirs: Any, bases: dict[str, Path], tmp_path: Path) -> None:
    """Known defect: diffusers' own save without metadata comes back at scale 1 in place of 4, without a word."""
    layers, _, expected = theirs
    diffusers.StableDiffusionPipeline.save_lora_weights(tmp_path / "a", layers["unet"], layers["text_encoder"])
    found, done = ours(tmp_path / "a", bases["sd"], tmp_path / "a-ours")
    parts = build("sd")
    load_with_diffusers("sd", tmp_path / "a", parts)
    for role, wanted in expected.items():
        assert float((outputs(parts[role]) - wanted).abs().max()) > 1e-2  # what was trained is not what comes back
        assert float((outputs(parts[role]) - found[role]).abs().max()) <= 2e-5  # the same convention here
        assert any(note.startswith(f"{role}: the file says no alpha") for note in done.notes)


def test_the_layouts_before_peft_are_read(theirs: Any, bases: dict[str, Path], tmp_path: Path) -> None:
    """lora.down (UNet), lora_linear_layer (text encoder), and the attention processors of 2023, all with alpha = rank."""
    layers, _, _ = theirs
    attention = {k: t for k, t in layers["unet"].items() if ".attn" in k}
    old = {"unet." + _processor(key): tensor for key, tensor in attention.items()}
    bare = {key.removeprefix("unet."): tensor for key, tensor in old.items()}
    dotted = {"unet." + k: t for k, t in convert_state_dict_to_diffusers(attention).items()}
    text = {"text_encoder." + k: t for k, t in convert_state_dict_to_diffusers(layers["text_encoder"]).items()}
    assert any(".processor.to_out_lora.up." in key for key in old) and any(".to_q.lora.down." in key for key in dotted)
    assert any(".lora_linear_layer." in key for key in text)
    heads = {k: t for k, t in layers["text_encoder"].items() if ".self_attn." in k}
    older = {
        f"text_encoder.text_model.{_processed(key)}": tensor for key, tensor in heads.items()
    }  # transformers 4's level
    states, parts = [], outlines(str(bases["sd"])).parts
    read, _ = from_diffusers(older, parts)
    assert {s.path for s in read["text_encoder"].methods} == {key.rpartition(".lora_")[0] for key in heads}
    for tensors in (old, bare, dotted, {"unet." + key: tensor for key, tensor in attention.items()}):
        found, _ = from_diffusers({**tensors, **text}, parts)
        assert len(found["unet"].methods) == len(attention) / 2 and len(found["text_encoder"].methods) == len(text) / 2
        states.append(found["unet"])
    for other in states[1:]:
        assert other.methods == states[0].methods
        assert all(torch.equal(t, other.tensors[s][n]) for s, g in states[0].tensors.items() for n, t in g.items())


def _processor(key: str) -> str:
    path, _, end = key.rpartition(".lora_")
    above, _, name = path.removesuffix(".0").rpartition(".")
    return f"{above}.processor.{name}_lora.{'down' if end.startswith('A') else 'up'}.weight"


def _processed(key: str) -> str:
    path, _, end = key.rpartition(".lora_")
    above, _, name = path.rpartition(".")
    return f"{above}.to_{name.removesuffix('_proj')}_lora.{'down' if end.startswith('A') else 'up'}.weight"


def test_lokr_in_diffusers_layout(bases: dict[str, Path]) -> None:
    unet, fresh = build("sd")["unet"], build("sd")["unet"]
    config = peft.LoKrConfig(r=4, alpha=6, target_modules=["to_q", "to_v", "ff.net.2"], decompose_factor=4)
    model = peft.get_peft_model(unet, config)
    randomise(model)
    wanted = outputs(unet)
    tensors = {f"unet.{k.removeprefix('base_model.model.')}": t for k, t in get_peft_model_state_dict(model).items()}
    given = {k: list(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}
    header = {"lora_adapter_metadata": json.dumps({f"unet.{key}": value for key, value in given.items()})}
    states, _ = from_diffusers(tensors, outlines(str(bases["sd"])).parts, header)
    deltaw.insert(fresh, states["unet"])
    assert (
        float((outputs(fresh) - wanted).abs().max())
        <= 2e-5
        < float((outputs(build("sd")["unet"]) - wanted).abs().max())
    )


def test_a_model_by_itself_and_alphas_as_tensors(tmp_path: Path) -> None:
    """A folder of one diffusers model, here a small Flux; a file whose alphas are tensors beside the factors."""
    torch.manual_seed(5)
    flux = diffusers.FluxTransformer2DModel(
        num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=16,
        pooled_projection_dim=16, in_channels=4, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    flux.save_config(tmp_path / "flux")
    flux.add_adapter(peft.LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "to_k", "proj_out"]))
    randomise(flux)
    layers = get_peft_model_state_dict(flux)
    alphas = {f"{key.removesuffix('.lora_A.weight')}.alpha": torch.tensor(6.0) for key in layers if ".lora_A." in key}
    save_file(
        {f"transformer.{key}": t.contiguous() for key, t in (layers | alphas).items()}, tmp_path / "a.safetensors"
    )
    done = convert(tmp_path / "a.safetensors", tmp_path / "out", model=str(tmp_path / "flux"))
    assert done.parts == {"transformer": len(alphas)} and not done.notes
    state = directory.read(tmp_path / "out")[0]
    assert {method.scale for method in state.methods.values()} == {1.5}
    again = convert(tmp_path / "out", tmp_path / "d", to="diffusers", model=str(tmp_path / "flux"))
    fresh = diffusers.FluxTransformer2DModel.from_config(flux.config)
    fresh.load_lora_adapter(
        str(tmp_path / "d"), weight_name="pytorch_lora_weights.safetensors", use_safetensors=True, prefix="transformer"
    )
    loaded = get_peft_model_state_dict(fresh, adapter_name="default_0")
    assert again.error <= 1e-6 and all(torch.equal(tensor, loaded[key]) for key, tensor in layers.items())
    assert fresh.peft_config["default_0"].lora_alpha == 6
    with pytest.raises(UseError, match="name the layers of a transformer as its original checkpoint does"):
        convert(tmp_path / "out", tmp_path / "k", to="kohya", model=str(tmp_path / "flux"))


def test_what_diffusers_writes_for_kohya_we_read(theirs: Any, bases: dict[str, Path], tmp_path: Path) -> None:
    """It writes alpha = rank whatever was trained: with the true alpha in its place, the adapter is what it was."""
    layers, _, expected = theirs
    flat = {f"{role}.{key}": tensor for role, group in layers.items() for key, tensor in group.items()}
    written = convert_state_dict_to_kohya(flat)
    for key in [key for key in written if key.endswith(".alpha")]:
        written[key] = torch.tensor(5.0 if key.endswith("to_q.alpha") else 16.0)
    save_file({k: t.contiguous() for k, t in written.items()}, tmp_path / "a.safetensors")
    found, done = ours(tmp_path / "a.safetensors", bases["sd"], tmp_path / "a-ours")
    assert done.tool == "kohya" and not done.notes
    for role, wanted in expected.items():
        assert float((found[role] - wanted).abs().max()) <= 2e-5
    for key in [key for key in written if key.endswith(".alpha")]:
        del written[key]
    _, notes = from_kohya(written, outlines(str(bases["sd"])).parts)
    assert len(notes) == 1 and "read as alpha = rank" in notes[0]


def test_an_unknown_module_is_an_error(theirs: Any, bases: dict[str, Path]) -> None:
    """Known defect: diffusers leaves such keys out without a word."""
    layers, _, _ = theirs
    parts = outlines(str(bases["sd"])).parts
    tensors = convert_state_dict_to_kohya({f"unet.{key}": tensor for key, tensor in layers["unet"].items()})
    one = next(key for key in tensors if key.endswith("attn2_to_k.lora_down.weight"))
    wrong = {key.replace("attn2_to_k", "attn2_to_kk"): tensor for key, tensor in tensors.items()}
    with pytest.raises(
        FileError, match=r"is no module of the base; did you mean 'lora_unet_down_blocks_0.*attn2_to_k'"
    ):
        from_kohya(wrong, parts)
    with pytest.raises(FileError, match="is not one of kohya's"):
        from_kohya({**tensors, one.replace("lora_down", "lora_dwn"): tensors[one]}, parts)
    with pytest.raises(FileError, match="a full difference is not supported"):
        from_kohya({**tensors, one.replace("lora_down.weight", "diff"): tensors[one]}, parts)
    dotted = {f"unet.{key.replace('attn2.to_k', 'attn2.to_kk')}": tensor for key, tensor in layers["unet"].items()}
    with pytest.raises(FileError, match=r"'down_blocks.*attn2.to_kk' is no module of the base; did you mean"):
        from_diffusers(dotted, parts)
    with pytest.raises(FileError, match="expected"):
        from_kohya({**tensors, one: torch.zeros(4, 3)}, parts)


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_names_are_exact_both_ways(family: str, bases: dict[str, Path]) -> None:
    parts = outlines(str(bases[family])).parts
    written, known = names(parts), table(parts)
    assert len(set(written.values())) == len(written) == sum(len(layout.specs) for layout in parts.values())
    for where, name in written.items():
        assert known[name] == [where]
    assert {len(places) for places in known.values()} == {
        1
    }  # nor do the names of the original checkpoint clash with them


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_names_are_those_that_diffusers_takes_apart_by_rule(family: str, bases: dict[str, Path]) -> None:
    parts = outlines(str(bases[family])).parts
    written = {w: name for w, name in names(parts).items() if not parts[w[0]].specs[Site(w[1])].lookup}
    file = {f"{name}.lora_{way}.weight": torch.ones(1, 1) for name in written.values() for way in ("down", "up")}
    renamed = _maybe_map_sgm_blocks_to_diffusers(file, build(family)["unet"].config)
    flat, _ = _convert_non_diffusers_lora_to_diffusers(renamed)
    found = {placed[:2] for key in flat if (placed := place(key)) is not None}
    old = {
        (role, path) if role == "unet" or path.startswith("text_") else (role, f"text_model.{path}")
        for role, path in written
    }
    assert found == old


@pytest.mark.shared
def test_a_real_adapter_reads_completely(shared: Path, tmp_path: Path) -> None:
    """Rank 4 on all attention layers of Stable Diffusion 1.5, in the layout of 2023; only the architecture is built."""
    with torch.device("meta"):
        parts = {
            "unet": layout(diffusers.UNet2DConditionModel(cross_attention_dim=768))
        }  # 1.5 but for this: the defaults
    file = shared / "adapters/catundchat__stable-diffusion-v1.5-lora/pytorch_lora_weights.safetensors"
    tensors = load_file(file)
    assert detect(tensors) == "diffusers"
    states, notes = from_diffusers(tensors, parts)
    state = states["unet"]
    assert len(state.methods) == 128 and sum(t.numel() for t in tensors.values()) == state.parameters
    assert {method.scale for method in state.methods.values()} == {1.0} and "no alpha" in notes[0]
    loaded = convert_unet_state_dict_to_peft(dict(tensors))  # diffusers' own reading of it
    for site, group in state.tensors.items():
        assert torch.equal(group["lora_A"], loaded[f"{site.path}.lora_A.weight"])
        assert torch.equal(group["lora_B"], loaded[f"{site.path}.lora_B.weight"])
    again, _ = from_kohya(to_kohya(states, parts)[0], parts)
    assert again["unet"].methods == state.methods
    pickled = file.with_suffix(".bin")
    with pytest.raises(FileError, match="allow_pickle"):
        read_file(pickled, allow_pickle=False)
    other, _ = from_diffusers(read_file(pickled, allow_pickle=True)[0], parts)  # another training, the same layers
    assert other["unet"].methods == state.methods
