"""Targets by part: what they hit in nine families, what is refused, and that all they hit gets a gradient."""

import re
from collections import Counter
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from core import tiny, vlm
from deltaw.core.attach import attach
from deltaw.core.errors import TargetError
from deltaw.core.parts import find
from deltaw.core.targets import plan
from deltaw.methods.full import Full
from deltaw.methods.lora import LoRA

LORA = LoRA(rank=2, alpha=4)
PATHS = {"language": r"model\.(language|text)_model\.", "vision": r"model\.(vision_tower|vision_model|visual)\."}

HITS = {  # targets → modules; what the projector can be given LoRA on are its linear layers
    "llava": {"language": 14, "vision": 8, "vision all": 12, "projector": 2},  # one of three layers is never read
    "qwen2_vl": {"language": 14, "vision": 4, "vision all": 8, "projector": 2},
    "qwen2_5_vl": {"language": 14, "vision": 4, "vision all": 10, "projector": 2},
    "qwen3_vl": {"language": 14, "vision": 4, "vision all": 8, "projector": 4},
    "gemma3": {"language": 14, "vision": 8, "vision all": 12, "projector": 0},
    "paligemma": {"language": 14, "vision": 8, "vision all": 12, "projector": 1},
    "idefics3": {"language": 14, "vision": 8, "vision all": 12, "projector": 1},
    "smolvlm": {"language": 14, "vision": 8, "vision all": 12, "projector": 1},
    "internvl": {"language": 14, "vision": 8, "vision all": 12, "projector": 2},
}
Q_AND_V = {  # in the language model and in the tower; Qwen's towers have one fused qkv
    **dict.fromkeys(vlm.FAMILIES, (4, 4)), **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl"), (4, 0)),
    "llava": (4, 6), "idefics3": (4, 4), "smolvlm": (4, 4),
}  # fmt: skip


@pytest.mark.parametrize("family", vlm.FAMILIES)
def test_what_a_part_holds(family: str) -> None:
    model = vlm.hollow(family)
    parts = find(model)
    assert parts is not None
    for key, wanted in HITS[family].items():
        part = key.partition(" ")[0]
        preset = "attention" if key == "vision" else "all-linear"
        if wanted == 0:
            sentence = r"part 'projector': no module matched 'all-linear'.*trained in full \(full, with 'all'\)"
            with pytest.raises(TargetError, match=sentence):
                plan(model, LORA, {part: preset})
            continue
        chosen = plan(model, LORA, {part: preset})
        assert len(chosen) == wanted, (key, chosen.paths)
        assert {parts.of(path) for path in chosen.paths} == {part}
        assert all(re.match(PATHS.get(part, ""), path) for path in chosen.paths)
        assert not any("merger" in path for path in chosen.paths) or part == "projector"


@pytest.mark.parametrize("family", vlm.FAMILIES)
def test_a_name_that_is_in_several_parts_is_refused(family: str) -> None:
    model = vlm.hollow(family)
    language, vision = Q_AND_V[family]
    if not vision:
        assert len(plan(model, LORA, ["q_proj", "v_proj"])) == language
        return
    with pytest.raises(TargetError) as error:
        plan(model, LORA, ["q_proj", "v_proj"])
    counts = f"vision ({vision // 2}), language ({language // 2})"
    assert error.value.faults == tuple(
        f"{name!r} hits several parts of the model, {counts}: say which, for example {{'language': {name!r}}}"
        for name in ("q_proj", "v_proj")
    )
    assert len(plan(model, LORA, {"language": ["q_proj", "v_proj"]})) == language


@pytest.mark.parametrize("family", vlm.FAMILIES)
def test_presets_cross_parts_and_paths_do_not(family: str) -> None:
    model = vlm.hollow(family)
    with pytest.raises(
        TargetError, match=r"'all-linear' hits several parts of the model, .*{'language': 'all-linear'}"
    ):
        plan(model, LORA, "all-linear")
    path = plan(model, LORA, {"vision": "attention"}).paths[0]
    assert plan(model, LORA, path).paths == [path]
    language = next(iter(find(model).roots["language"])).replace(".", r"\.")
    assert len(plan(model, LORA, rf"{language}\..*\.(q|v)_proj")) == 4
    assert plan(model, LORA, {"head": "all-linear"}).paths == ["lm_head"]


def test_a_part_in_full() -> None:
    gemma = plan(vlm.hollow("gemma3"), Full(), {"projector": "all"})
    assert {str(target.site).removeprefix("model.multi_modal_projector") for target in gemma.targets} == {
        ":mm_input_projection_weight", ".mm_soft_emb_norm",
    }  # fmt: skip
    qwen = plan(vlm.hollow("qwen3_vl"), Full(), {"projector": "all"})
    owned = sum(p.numel() for name, p in vlm.hollow("qwen3_vl").named_parameters() if "merger" in name)
    assert qwen.trainable == owned and "model.visual.deepstack_merger_list.0.linear_fc1" in qwen.paths
    assert plan(vlm.hollow("qwen3_vl"), Full(), "deepstack_merger_list").paths == [
        path for path in qwen.paths if "deepstack" in path
    ]
    vision = plan(vlm.hollow("qwen2_vl"), Full(), {"vision": "all"})
    assert not [path for path in vision.paths if "merger" in path]


@pytest.mark.parametrize("family", vlm.FAMILIES)
def test_all_is_every_parameter_once(family: str) -> None:
    model = vlm.hollow(family)
    parts, never = find(model), r"layers\.2\.|post_layernorm" if family == "llava" else "(?!)"
    out = rf"{never}|vision_tower\.embeddings\.position_embedding"  # read past the module where an image is resized
    for targets in ("all", {part: "all" for part in parts.roots if part != "head"}):
        chosen = plan(model, Full(), targets)
        names = {f"{t.site.path}.{t.site.slot}".lstrip(".") for t in chosen.targets}
        left = {name for name, _ in model.named_parameters()} - names - {"lm_head.weight"}
        assert all(re.search(out, name) for name in left)
        assert bool(left) == bool(chosen.notes) and (family == "llava") == any("layers" in name for name in left)
    assert len(plan(tiny.model("llama"), Full(), "all")) == len(list(tiny.model("llama").parameters()))


def test_layers_that_are_never_read() -> None:
    model = vlm.hollow("llava")
    chosen = plan(model, LORA, {"vision": "all-linear"})
    why = (
        "the model reads its vision tower after 2 of 3 layers (vision_feature_layer -2), no gradient ever comes here: "
        "give layers 0-1, or a preset"
    )
    assert chosen.notes == (f"left out model.vision_tower.encoder.layers.2.self_attn.k_proj and 5 more: {why}",)
    with pytest.raises(TargetError) as error:
        plan(model, LORA, {"vision": ["q_proj", "v_proj"]})
    assert error.value.faults == (f"model.vision_tower.encoder.layers.2.self_attn.q_proj and 1 more: {why}",)
    assert len(plan(model, LORA, {"vision": ["q_proj", "v_proj"]}, layers="0-1")) == 4
    with pytest.raises(TargetError, match=re.escape(f"model.vision_tower.post_layernorm: {why}")):
        plan(model, Full(), "model.vision_tower.post_layernorm")


@pytest.mark.parametrize(
    ("layer", "read"), [(-1, {0, 1, 2}), (-2, {0, 1}), (1, {0}), (3, {0, 1, 2}), ([-3, 1], {0}), ([-2, 3], {0, 1, 2})]
)
def test_which_layers_are_read(layer: Any, read: set[int]) -> None:
    """As the gradient has it."""
    model = vlm.model("llava").requires_grad_(True)
    model.config.vision_feature_layer = layer
    if isinstance(layer, list):
        model.model.multi_modal_projector.linear_1 = nn.Linear(32 * len(layer), 32)
    chosen = plan(model, LORA, {"vision": "q_proj"}, layers=read)
    assert {int(path.split(".")[4]) for path in chosen.paths} == read
    model(**vlm.inputs("llava")).loss.backward()
    layers = model.model.vision_tower.encoder.layers
    alive = {i for i in range(3) if layers[i].mlp.fc1.weight.grad is not None and layers[i].mlp.fc1.weight.grad.any()}
    assert alive == read
    for dead in {0, 1, 2} - read:
        with pytest.raises(TargetError, match="no gradient ever comes here"):
            plan(model, LORA, f"model.vision_tower.encoder.layers.{dead}.mlp.fc1")


def test_parts_that_cannot_be_meant() -> None:
    model = vlm.hollow("llava")
    with pytest.raises(TargetError) as error:
        plan(model, LORA, {"visoin": "attention", "audio": "all-linear", "language": [], "projector": 7})
    assert error.value.faults == (
        "no part 'visoin'; did you mean 'vision'? (this model has vision, projector, language, head)",
        "no part 'audio' (this model has vision, projector, language, head)",
        "part 'language': [] is no target",
        "part 'projector': 7 is no target: give a name, a preset (all-linear, attention, mlp, all), a pattern, or a list of them",
    )
    with pytest.raises(
        TargetError, match=r"names parts, and this model has none \(no encoder beside a language model\)"
    ):
        plan(tiny.model("llama"), LORA, {"language": "all-linear"})
    with pytest.raises(TargetError, match="part 'vision': no module matched 'linear_1'; lora fits: q_proj"):
        plan(vlm.hollow("internvl"), LORA, {"vision": "linear_1"})
    with pytest.raises(TargetError, match="part 'turn': it owns no parameter"):
        plan(vlm.hollow("qwen2_vl"), Full(), {"turn": "all"}, given={"turn": ["model.visual.rotary_pos_emb"]})
    with pytest.raises(TargetError, match=r"'all' is every parameter, .* for lora say 'all-linear'"):
        plan(model, LORA, {"vision": "all"})


def test_parts_that_the_user_gives() -> None:
    model = tiny.model("llama")
    lower = {"lower": ["model.layers.0"]}
    chosen = attach(model, LORA, targets={"lower": "attention"}, given=lower)
    assert chosen.paths == [f"model.layers.0.self_attn.{n}_proj" for n in "qkvo"]
    with pytest.raises(TargetError, match=r"'q_proj' hits several parts of the model, lower \(1\), none of them \(1\)"):
        plan(model, LORA, "q_proj", given=lower)


def test_biases_of_a_part_are_those_of_the_part() -> None:
    model = vlm.hollow("llava")
    chosen = plan(model, LoRA(rank=2, bias="all"), {"projector": "all-linear"})
    assert {target.site.path for target in chosen.targets} == {
        f"model.multi_modal_projector.linear_{n}" for n in (1, 2)
    }


@pytest.mark.parametrize("family", vlm.FAMILIES)
def test_every_adapter_of_three_parts_learns_and_nothing_else_moves(family: str) -> None:
    """Forward, backward and a step: each B has a gradient, the frozen tensors keep their bits."""
    model = vlm.model(family)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    attach(model, LORA, targets={"vision": "all-linear", "language": "all-linear"})
    bare = family == "gemma3"
    planned = attach(model, Full() if bare else LORA, targets={"projector": "all" if bare else "all-linear"})
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    sites = Counter(name.partition(".adapters.")[0] for name in trained)
    expected = {*planned.paths, *plan(model, LORA, {"vision": "all-linear", "language": "all-linear"}).paths}
    assert set(sites) == expected and all(".adapters.default." in name for name in trained)
    model(**vlm.inputs(family)).loss.backward()
    dead = [name for name, p in trained.items() if p.grad is None or not (p.grad.any() or name.endswith("lora_A"))]
    assert not dead, dead
    torch.optim.AdamW(trained.values(), lr=0.1).step()
    kept = {name: p for name, p in model.named_parameters() if ".adapters." not in name}
    assert kept.keys() == before.keys() and all(torch.equal(kept[name], before[name]) for name in before)
    assert all(p.grad is None for p in kept.values())


def test_a_siglip_tower_too_ends_where_it_is_read() -> None:
    """Its pooling head and last norm come after the layers."""
    vision = transformers.SiglipVisionConfig(**{**vlm.VISION, "num_hidden_layers": 3})
    text = transformers.LlamaConfig(**vlm.TEXT)
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=vlm.IMAGE, vision_feature_select_strategy="full",
        vision_feature_layer=-2,
    )  # fmt: skip
    model = transformers.LlavaForConditionalGeneration(config)
    attach(model, Full(), targets={"vision": "all"})
    model(**vlm.inputs("llava")).loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(
        p.grad is not None and p.grad.any() for name, p in trained.items() if "k_proj:bias" not in name
    )
