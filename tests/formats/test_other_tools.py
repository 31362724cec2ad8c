"""loralib, PEFT's old schema, mlx-lm, torchtune: each layer's own forward, derived here again, against the change we read."""

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltaw import DoRA, LoRA
from deltaw.core.errors import ConfigError, FileError, UseError
from deltaw.core.method import Site
from deltaw.core.state import AdapterState, delta
from deltaw.formats.detect import TOOLS, detect
from deltaw.formats.diffusers import from_diffusers
from deltaw.formats.foreign import Parts
from deltaw.formats.loralib import from_loralib
from deltaw.formats.mlx import from_mlx
from deltaw.formats.peft import from_peft
from deltaw.formats.peft_config import parse_config
from deltaw.formats.torchtune import from_torchtune
from deltaw.models.adapters import layout


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.c_attn = nn.Linear(10, 8), nn.Linear(10, 24)
        self.conv, self.table = nn.Conv2d(4, 6, 3), nn.Embedding(20, 8)


PARTS: Parts = {"model": layout(Net())}


def change(state: AdapterState, path: str) -> Tensor:
    return delta(state, path, torch.zeros(state.specs[Site(path)].whole, dtype=torch.float64))


def same(found: Tensor, wanted: Tensor) -> bool:
    return bool((found - wanted).norm() <= 1e-5 * wanted.norm())


def merged_linear(x: Tensor, a: Tensor, b: Tensor, enabled: list[bool], groups: int, scale: float, out: int) -> Tensor:
    """The forward of a fused layer of which some parts have a LoRA: a grouped convolution over rows, zeros between."""
    after = F.conv1d((x @ a.T).T[None], b.reshape(*b.shape[:2], 1), groups=groups)[0].T  # [T, n·out/m]
    result, mask = x.new_zeros(len(x), out), torch.tensor(enabled).repeat_interleave(out // len(enabled))
    result[:, mask] = scale * after
    return result


ENABLED = [[True, False, True], [True, True, True], [False, True, False], [True, True, False]]


@pytest.mark.parametrize("enabled", ENABLED, ids=str)
def test_loralib_fused_layers(enabled: list[bool]) -> None:
    n, r, x = sum(enabled), 2, torch.randn(5, 10)
    a, b = torch.randn(r * n, 10), torch.randn(8 * n, r)
    states, _ = from_loralib(
        {"c_attn.lora_A": a, "c_attn.lora_B": b}, PARTS, alpha=6.0, enable_lora=None if n == 3 else enabled
    )
    method = states["model"].methods[Site("c_attn")]
    assert isinstance(method, LoRA) and method.scale == 3.0
    wanted = merged_linear(x, a, b, enabled, n, 6 / r, 24)
    assert same(x.double() @ change(states["model"], "c_attn").T, wanted)


def test_loralib_layers_tables_convolutions_and_biases() -> None:
    a, b, x = torch.randn(3, 10), torch.randn(8, 3), torch.randn(5, 10)
    table_a, table_b, ids = torch.randn(3, 20), torch.randn(8, 3), torch.tensor([3, 7])
    conv_a, conv_b, image = torch.randn(2 * 3, 4 * 3), torch.randn(6 * 3, 2 * 3), torch.randn(2, 4, 5, 5)
    tensors = {
        "q_proj.lora_A": a, "q_proj.lora_B": b, "q_proj.bias": torch.randn(8), "table.lora_A": table_a,
        "table.lora_B": table_b, "conv.lora_A": conv_a, "conv.lora_B": conv_b,
    }  # fmt: skip
    assert detect(tensors) == "loralib"
    states, notes = from_loralib({f"module.{key}": tensor for key, tensor in tensors.items()}, PARTS, alpha=6.0)
    state = states["model"]
    assert not notes and len(state.methods) == 4
    assert same(x.double() @ change(state, "q_proj").T, (x @ a.T @ b.T) * 2)
    assert same(change(state, "table").T[ids], F.embedding(ids, table_a.T) @ table_b.T * 2)
    weight = (conv_b @ conv_a).view(6, 4, 3, 3) * (6 / 2)
    assert same(F.conv2d(image.double(), change(state, "conv")), F.conv2d(image, weight))
    assert torch.equal(state.tensors[Site("q_proj", "bias")]["copy"], tensors["q_proj.bias"])


def test_loralib_says_what_is_missing() -> None:
    """Known defect of hand-written converters: an alpha that nobody gave is taken for something."""
    pair = {"q_proj.lora_A": torch.randn(3, 10), "q_proj.lora_B": torch.randn(8, 3)}
    with pytest.raises(UseError, match=r"hold no alpha.*--alpha"):
        from_loralib(pair, PARTS)
    fused = {"c_attn.lora_A": torch.randn(4, 10), "c_attn.lora_B": torch.randn(16, 2)}
    with pytest.raises(FileError, match=r"2 of 3 blocks.*--enable-lora true,true,false"):
        from_loralib(fused, PARTS, alpha=4)
    with pytest.raises(FileError, match="enable_lora has 1 of 3 blocks, the tensors are 2 of 3"):
        from_loralib(fused, PARTS, alpha=4, enable_lora=[True, False, False])
    wrong = {"q_prj.lora_A": torch.randn(3, 10), "conv.lora_A": torch.randn(5, 12), "conv.lora_B": torch.randn(18, 5)}
    with pytest.raises(FileError) as caught:
        from_loralib({**wrong, "q_proj.lora_A": torch.randn(3, 10), "conv.biass": torch.ones(1)}, PARTS, alpha=4)
    said = str(caught.value)
    assert (
        "did you mean 'q_proj'" in said and "missing lora_B" in said and "convolution 3×3" in said and "biass" in said
    )


OLD = {
    "base_model_name_or_path": "gpt2", "bias": "none", "enable_lora": None, "fan_in_fan_out": True, "inference_mode": True,
    "lora_alpha": 6, "lora_dropout": 0.1, "merge_weights": False, "modules_to_save": None, "peft_type": "LORA", "r": 2,
    "target_modules": ["c_attn"], "task_type": "CAUSAL_LM",
}  # fmt: skip
"""What PEFT 0.1 and 0.2 wrote."""


@pytest.mark.parametrize("enabled", [*ENABLED[:2], ENABLED[3]], ids=str)
def test_an_old_peft_adapter_on_parts_of_a_fused_layer(enabled: list[bool]) -> None:
    """PEFT 0.1: its convolution has two groups, however many parts are enabled."""
    n, r, x = sum(enabled), 2, torch.randn(5, 10)
    a, b = torch.randn(r * n, 10), torch.randn(8 * n, r * n // 2, 1)
    tensors = {"base_model.model.c_attn.lora_A.weight": a, "base_model.model.c_attn.lora_B.weight": b}
    state, notes = from_peft({**OLD, "enable_lora": enabled}, tensors)
    method = state.methods[Site("c_attn")]
    assert (
        not notes and isinstance(method, LoRA) and method.scale == 3.0 and state.specs[Site("c_attn")].shape == (24, 10)
    )
    assert same(x.double() @ change(state, "c_attn").T, merged_linear(x, a, b, enabled, 2, 6 / r, 24))
    with pytest.raises(ConfigError, match="parts of a fused weight"):
        parse_config({**OLD, "enable_lora": enabled})
    with pytest.raises(FileError, match="not the factors of"):
        from_peft({**OLD, "enable_lora": enabled}, {**tensors, "base_model.model.c_attn.lora_B.weight": b[:, :, 0]})


@pytest.mark.parametrize("enabled", [[], [False, False], [1, 0], "true"])
def test_an_enable_lora_that_says_nothing(enabled: Any) -> None:
    with pytest.raises(ConfigError, match="a list of true and false, with a true one"):
        from_peft({**OLD, "enable_lora": enabled}, {"base_model.model.c_attn.lora_A.weight": torch.ones(2, 2)})


MLX = {"fine_tune_type": "lora", "num_layers": 16, "lora_parameters": {"rank": 3, "scale": 20.0, "dropout": 0.0}}


def test_mlx_is_transposed_and_has_a_scale_of_its_own() -> None:
    a, b, x = torch.randn(10, 3), torch.randn(3, 8), torch.randn(5, 10)
    table_a, table_b, ids = torch.randn(20, 3), torch.randn(3, 8), torch.tensor([3, 7])
    tensors = {"q_proj.lora_a": a, "q_proj.lora_b": b, "table.lora_a": table_a, "table.lora_b": table_b}
    assert detect(tensors) == "mlx"
    state = from_mlx(tensors, PARTS, MLX)[0]["model"]
    assert same(x.double() @ change(state, "q_proj").T, 20 * (x @ a @ b))
    assert same(change(state, "table").T[ids], 20 * table_a[ids] @ table_b)
    m, weight = torch.rand(8) + 0.5, torch.randn(8, 10, dtype=torch.float64)
    dora = from_mlx({"q_proj.lora_a": a, "q_proj.lora_b": b, "q_proj.m": m}, PARTS, {**MLX, "fine_tune_type": "dora"})[
        0
    ]
    full = weight + 20 * (b.T @ a.T).double()
    wanted = (m / full.norm(dim=1))[:, None] * full - weight
    assert isinstance(dora["model"].methods[Site("q_proj")], DoRA) and same(
        delta(dora["model"], "q_proj", weight), wanted
    )
    own = from_mlx(tensors, PARTS, {}, alpha=6.0)[0]["model"]
    assert same(change(own, "q_proj"), 2 * (a @ b).T)


def test_mlx_says_what_is_missing_or_may_mean_two_things() -> None:
    pair = {"q_proj.lora_a": torch.randn(10, 3), "q_proj.lora_b": torch.randn(3, 8)}
    both = {**MLX, "lora_parameters": {"rank": 3, "scale": 10.0, "alpha": 16.0}}
    for config, said in (
        (both, "scale 10 and alpha 16"),
        ({}, "no lora_parameters.scale"),
        ({"fine_tune_type": "full"}, "'full'"),
    ):
        with pytest.raises((UseError, FileError), match=said):
            from_mlx(pair, PARTS, config)
    with pytest.raises(FileError, match="scales every row of a table by itself"):
        from_mlx(
            {"table.lora_a": torch.ones(20, 2), "table.lora_b": torch.ones(2, 8), "table.m": torch.ones(20)}, PARTS, MLX
        )
    with pytest.raises(FileError, match=r"quantised, or of another kind of layer"):
        from_mlx({"q_proj.lora_a": torch.ones(2, 3, 10), "q_proj.lora_b": torch.ones(2, 8, 3)}, PARTS, MLX)


class Attention(nn.Module):
    """The names of transformers' Llama, four heads of q and two of k."""

    def __init__(self) -> None:
        super().__init__()
        inner = {"q_proj": nn.Linear(12, 4 * 6), "k_proj": nn.Linear(12, 2 * 6), "v_proj": nn.Linear(12, 12)}
        mlp = nn.ModuleDict({"gate_proj": nn.Linear(12, 16)})
        layer = nn.ModuleDict({"self_attn": nn.ModuleDict(inner), "mlp": mlp})
        self.model = nn.ModuleDict({"layers": nn.ModuleList([layer])})


LLAMA = {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2}


def scores(q: Tensor, k: Tensor, paired: bool) -> Tensor:
    """q·k of rotated heads, [heads, T, T]: every head's dimensions rotated as pairs (0, 1), (2, 3), … or as (0, d/2), ….

    q, k: [T, heads · 6]; k is repeated for its group of heads.
    """

    def turned(x: Tensor, heads: int) -> Tensor:
        x = x.view(len(x), heads, -1).transpose(0, 1)  # [heads, T, d]
        angle = torch.arange(len(x[0]))[:, None] * (0.3 ** torch.arange(x.shape[2] // 2))  # [T, d/2]
        one, two = (x[..., 0::2], x[..., 1::2]) if paired else x.chunk(2, dim=-1)
        first, second = one * angle.cos() - two * angle.sin(), two * angle.cos() + one * angle.sin()
        return torch.cat([first, second], dim=-1)

    return turned(q, 4) @ turned(k, 2).repeat_interleave(2, 0).mT


def test_torchtune_rows_are_put_back_in_order() -> None:
    """Attention scores with torchtune's rotary of pairs equal those with transformers' halves, only when rows move."""
    names = {"q": (24, 12), "k": (12, 12), "v": (12, 12)}
    pairs = {name: (torch.randn(3, inside), torch.randn(out, 3)) for name, (out, inside) in names.items()}
    tensors = {f"layers.0.attn.{n}_proj.lora_a.weight": a for n, (a, _) in pairs.items()}
    tensors |= {f"layers.0.attn.{n}_proj.lora_b.weight": b for n, (_, b) in pairs.items()}
    tensors |= {
        "layers.0.mlp.w1.lora_a.weight": torch.randn(3, 12),
        "layers.0.mlp.w1.lora_b.weight": torch.randn(16, 3),
    }
    assert detect(tensors) == "torchtune"
    parts: Parts = {"model": layout(Attention())}
    state = from_torchtune(tensors, parts, LLAMA, {"lora_alpha": 6, "r": 3})[0]["model"]
    x = torch.randn(7, 12).double()
    mine = {n: x @ change(state, f"model.layers.0.self_attn.{n}_proj").T for n in "qkv"}
    own = {n: x @ (2 * b @ a).double().T for n, (a, b) in pairs.items()}
    assert same(scores(mine["q"], mine["k"], paired=False), scores(own["q"], own["k"], paired=True))
    assert not same(scores(own["q"], own["k"], paired=False), scores(own["q"], own["k"], paired=True))
    assert same(mine["v"], own["v"]) and Site("model.layers.0.mlp.gate_proj") in state.methods
    qwen = from_torchtune(tensors, parts, {**LLAMA, "model_type": "qwen2"}, alpha=6.0)[0]["model"]
    assert same(x @ change(qwen, "model.layers.0.self_attn.q_proj").T, own["q"])
    with pytest.raises(UseError, match="not known here for 'phi3'"):
        from_torchtune(tensors, parts, {"model_type": "phi3"}, alpha=6.0)
    with pytest.raises(UseError, match="holds no alpha"):
        from_torchtune(tensors, parts, LLAMA)


def test_torchtunes_magnitudes_move_with_their_rows() -> None:
    a, b, m = torch.randn(3, 12), torch.randn(24, 3), torch.rand(24) + 0.5
    tensors = {"layers.0.attn.q_proj.lora_a.weight": a, "layers.0.attn.q_proj.lora_b.weight": b}
    state = from_torchtune(
        {**tensors, "layers.0.attn.q_proj.magnitude": m}, {"model": layout(Attention())}, LLAMA, alpha=3.0
    )[0]["model"]
    group = state.tensors[Site("model.layers.0.self_attn.q_proj")]
    moved = {tuple(row.tolist()): float(value) for row, value in zip(group["lora_B"], group["magnitude"], strict=True)}
    assert moved == {tuple(row.tolist()): float(value) for row, value in zip(b, m, strict=True)}


def test_whose_file_it_is() -> None:
    keys = {
        "peft": ["base_model.model.layers.0.q_proj.lora_A.weight"],
        "kohya": ["lora_unet_mid_block_resnets_0_conv1.lora_mid.weight", "lora_te1_x.alpha"],
        "kohya ": ["lora_unet_a.lokr_w1", "lora_unet_a.lokr_w2", "lora_unet_a.alpha"],  # diffusers' LoKr, by its ends
        "diffusers": [
            "unet.a.to_k.lora_A.weight",
            "text_encoder.b.q_proj.lora_linear_layer.up.weight",
            "unet.a.to_k.alpha",
        ],
        "loralib": ["a.lora_A", "a.lora_B", "b.bias"],
        "mlx": ["model.layers.3.self_attn.q_proj.lora_a", "model.layers.3.self_attn.q_proj.m"],
        "torchtune": ["layers.0.attn.output_proj.lora_b.weight", "output.lora_a.weight"],
    }
    assert {"deltaw", *map(str.strip, keys)} == set(TOOLS)
    for tool, some in keys.items():
        assert detect(some) == tool.strip()
    with pytest.raises(FileError, match=re.escape("loralib: 1 of 2 are not ('lora.weight')")):
        detect(["a.lora_A", "lora.weight"])
    with pytest.raises(FileError, match="holds no tensor"):
        detect([])


@pytest.mark.parametrize("a, b", [((0, 10), (8, 0)), ((2, 10), (8, 0)), ((4, 10), (0, 2)), ((0, 0), (0, 0))], ids=str)
def test_empty_factors_are_named(a: tuple[int, int], b: tuple[int, int]) -> None:
    """A tensor of no size is a fault of its layer, not a division by zero."""
    with pytest.raises(FileError, match="q_proj: lora_A is"):
        from_loralib({"q_proj.lora_A": torch.ones(a), "q_proj.lora_B": torch.ones(b)}, PARTS, alpha=4)
    with pytest.raises(FileError, match="q_proj: lora_a is"):
        from_mlx({"q_proj.lora_a": torch.ones(a).T, "q_proj.lora_b": torch.ones(b).T}, PARTS, {}, alpha=4)
    name = "layers.0.attn.q_proj"
    with pytest.raises(FileError, match="q_proj: lora_a is"):
        pair = {f"{name}.lora_a.weight": torch.ones(a), f"{name}.lora_b.weight": torch.ones(b)}
        from_torchtune(pair, {"model": layout(Attention())}, LLAMA, alpha=4)


def test_a_magnitude_of_another_size_is_named() -> None:
    tensors = {"lora_a.weight": torch.ones(3, 12), "lora_b.weight": torch.ones(24, 3), "magnitude": torch.ones(7)}
    named = {f"layers.0.attn.q_proj.{end}": tensor for end, tensor in tensors.items()}
    with pytest.raises(
        FileError, match=r"magnitude \(7,\), expected two matrices, and of the magnitude a number for each"
    ):
        from_torchtune(named, {"model": layout(Attention())}, LLAMA, alpha=4)


@pytest.mark.parametrize(
    "alpha, said", [("conv.alpha", "conv.alpha': the file holds no adapter"), ("q_proj.alpha", "")]
)
def test_alphas_of_diffusers_that_are_nobodys_or_nothing(alpha: str, said: str) -> None:
    """An α beside no adapter is a key that cannot be placed; one of zero is a scale of zero, and not α = r."""
    pair = {"q_proj.lora_A.weight": torch.ones(3, 10), "q_proj.lora_B.weight": torch.ones(8, 3)}
    with pytest.raises(FileError, match=said or "positive number"):
        from_diffusers({**pair, alpha: torch.tensor(0.0)}, PARTS)
