"""LyCORIS' and kohya's tensors: every form to its change, derived here again, and back; names, alphas, what is refused."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import deltaw
from deltaw import DoRA, LoHa, LoKr, LoRA
from deltaw.core.errors import FileError, UseError
from deltaw.core.method import Site
from deltaw.core.state import AdapterState, delta
from deltaw.formats.diffusers import from_diffusers
from deltaw.formats.foreign import Parts
from deltaw.formats.kohya import from_kohya, to_kohya
from deltaw.formats.kohya_names import names, sgm, table
from deltaw.models.adapters import layout


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k = nn.Linear(24, 24), nn.Linear(24, 12, bias=False)
        self.block = nn.ModuleDict({"conv": nn.Conv2d(6, 8, 3, padding=1), "proj_in": nn.Conv2d(8, 10, 1)})
        self.table = nn.Embedding(20, 24)


def parts() -> Parts:
    return {"model": layout(Net())}


def random(*shape: int) -> Tensor:
    return torch.randn(shape)


def read(path: str, group: dict[str, Tensor]) -> tuple[AdapterState, Tensor]:
    """The state that a file with this one module gives, and its ΔW."""
    name = f"lycoris_{path}".replace(".", "_")
    states, _ = from_kohya({f"{name}.{end}": tensor for end, tensor in group.items()}, parts())
    state, site = states["model"], Site(path)
    assert set(state.methods) == {site}
    weight = torch.zeros(state.specs[site].whole, dtype=torch.float64)
    return state, delta(state, site, weight)


def same(found: Tensor, wanted: Tensor) -> bool:
    return bool((found - wanted).norm() <= 1e-5 * wanted.norm())


ALPHA = {"alpha": torch.tensor(6.0)}


def test_lora_on_layers_and_convolutions() -> None:
    a, b = random(4, 24), random(24, 4)
    state, change = read("to_q", {"lora_down.weight": a, "lora_up.weight": b, **ALPHA})
    assert state.methods[Site("to_q")] == LoRA(rank=4, alpha=6.0) and same(change, 1.5 * b @ a)
    a, b, x = random(4, 6, 3, 3), random(8, 4, 1, 1), random(2, 6, 5, 5)
    _, change = read("block.conv", {"lora_down.weight": a, "lora_up.weight": b, **ALPHA})
    assert same(F.conv2d(x.double(), change, padding=1), 1.5 * F.conv2d(F.conv2d(x, a, padding=1), b))
    a, b = random(4, 8), random(10, 4)  # some tools write 1×1 convolutions as matrices
    _, change = read("block.proj_in", {"lora_down.weight": a, "lora_up.weight": b, **ALPHA})
    assert same(change.flatten(1), 1.5 * b @ a)
    a, b = random(4, 24, 1, 1), random(12, 4, 1, 1)  # and layers as 1×1 convolutions
    assert same(
        read("to_k", {"lora_down.weight": a, "lora_up.weight": b, **ALPHA})[1], 1.5 * (b.flatten(1) @ a.flatten(1))
    )


def test_a_core_tensor_between_the_factors_is_taken_in_exactly() -> None:
    down, mid, up, x = random(4, 6, 1, 1), random(4, 4, 3, 3), random(8, 4, 1, 1), random(2, 6, 5, 5)
    state, change = read(
        "block.conv", {"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": up, **ALPHA}
    )
    assert isinstance(state.methods[Site("block.conv")], LoRA)
    wanted = 1.5 * F.conv2d(F.conv2d(F.conv2d(x, down), mid, padding=1), up)
    assert same(F.conv2d(x.double(), change, padding=1), wanted)


def test_loha_and_its_core_tensors() -> None:
    one, two = (random(24, 4), random(4, 24)), (random(24, 4), random(4, 24))
    pair = dict(zip(("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), (*one, *two), strict=True))
    state, change = read("to_q", {**pair, **ALPHA})
    assert state.methods[Site("to_q")] == LoHa(rank=4, alpha=6.0)
    assert same(change, 1.5 * (one[0] @ one[1]) * (two[0] @ two[1]))
    cores, ups, downs = [[random(*s) for _ in "12"] for s in ((3, 3, 3, 3), (3, 8), (3, 6))]
    group = {f"hada_t{i + 1}": cores[i] for i in range(2)} | {f"hada_w{i + 1}_a": ups[i] for i in range(2)}
    _, change = read("block.conv", {**group, **{f"hada_w{i + 1}_b": downs[i] for i in range(2)}, **ALPHA})
    whole = [sum(c[i, j] * u[i].view(-1, 1, 1, 1) * d[j].view(1, -1, 1, 1) for i in range(3) for j in range(3))
             for c, u, d in zip(cores, ups, downs, strict=True)]  # fmt: skip
    assert same(change, 2.0 * whole[0] * whole[1])


@pytest.mark.parametrize(("full_one", "full_two"), list(itertools.product([True, False], repeat=2)))
def test_lokr(full_one: bool, full_two: bool) -> None:
    """On 24 × 24 = (4·6) × (4·6). Two full factors have the scale 1, whatever alpha says."""
    group: dict[str, Tensor] = {}
    group |= {"lokr_w1": random(4, 4)} if full_one else {"lokr_w1_a": random(4, 1), "lokr_w1_b": random(1, 4)}
    group |= {"lokr_w2": random(6, 6)} if full_two else {"lokr_w2_a": random(6, 1), "lokr_w2_b": random(1, 6)}
    c = group["lokr_w1"] if full_one else group["lokr_w1_a"] @ group["lokr_w1_b"]
    d = group["lokr_w2"] if full_two else group["lokr_w2_a"] @ group["lokr_w2_b"]
    scale = 1.0 if full_one and full_two else 6.0
    assert same(read("to_q", {**group, **ALPHA})[1], scale * torch.kron(c, d))


def test_lokr_on_convolutions_and_cut_otherwise() -> None:
    c, core, up, down = random(2, 2), random(2, 2, 3, 3), random(2, 4), random(2, 3)
    d = sum(core[i, j] * up[i].view(-1, 1, 1, 1) * down[j].view(1, -1, 1, 1) for i in range(2) for j in range(2))
    tucker = {"lokr_w1": c, "lokr_t2": core, "lokr_w2_a": up, "lokr_w2_b": down, **ALPHA}
    assert same(read("block.conv", tucker)[1], 3.0 * torch.kron(c[:, :, None, None], d))
    c, d = random(2, 2), random(4, 3, 3, 3)
    state, change = read("block.conv", {"lokr_w1": c, "lokr_w2": d, "alpha": torch.tensor(9.0)})
    assert isinstance(state.methods[Site("block.conv")], LoKr) and same(change, torch.kron(c[:, :, None, None], d))
    c, up, down = random(6, 4), random(4, 1), random(1, 6)  # LyCORIS' unbalanced factorisation: 24 = 6·4 out, 4·6 in
    state, change = read("to_q", {"lokr_w1": c, "lokr_w2_a": up, "lokr_w2_b": down, **ALPHA})
    assert isinstance(state.methods[Site("to_q")], LoRA) and same(change, 6.0 * torch.kron(c, up @ down))


def test_tensors_that_do_not_go_together_are_named() -> None:
    wrong = {
        "ranks differ": {"lora_down.weight": random(4, 24), "lora_up.weight": random(24, 3)},
        "not the tensors of one method": {"lora_down.weight": random(4, 24), "hada_w1_a": random(24, 4)},
        "not the two factors": {"lokr_w1": random(4, 4), "lokr_w2_a": random(6, 1)},
        "have ranks 1 and 2": {"lokr_w1_a": random(4, 1), "lokr_w1_b": random(1, 4), "lokr_w2_a": random(6, 2), "lokr_w2_b": random(2, 6)},
        "do not go together": {"lokr_w1": random(4, 4), "lokr_w2_a": random(6, 2), "lokr_w2_b": random(3, 6)},
        "low rank": {"lokr_w1": random(3, 8), "lokr_w2": random(8, 3)},
        "expected": {"lora_down.weight": random(4, 20), "lora_up.weight": random(24, 4)},
    }  # fmt: skip
    for said, group in wrong.items():
        with pytest.raises(FileError, match=said):
            read("to_q", group)


def test_dora_has_a_scale_for_each_output() -> None:
    pair = {"lora_down.weight": random(4, 24), "lora_up.weight": random(24, 4), **ALPHA}
    scale = torch.rand(24, 1) + 0.5
    state, _ = read("to_q", {**pair, "dora_scale": scale})
    weight = torch.randn(24, 24, dtype=torch.float64)
    full = weight + 1.5 * (pair["lora_up.weight"] @ pair["lora_down.weight"]).double()
    wanted = scale.double() * full / full.norm(dim=1, keepdim=True) - weight
    assert isinstance(state.methods[Site("to_q")], DoRA) and same(delta(state, "to_q", weight), wanted)
    with pytest.raises(FileError, match="a scale for each input"):
        read("to_q", {**pair, "dora_scale": torch.rand(1, 24)})
    with pytest.raises(FileError, match="deltaw has DoRA on LoRA alone"):
        read("to_q", {"hada_w1_a": random(24, 2), "dora_scale": scale})


def test_alphas_are_kept_module_by_module() -> None:
    """Known defect: mixed alphas are read by diffusers and then lost."""
    tensors = {}
    for path, rank, alpha in (("to_q", 4, 6.0), ("to_k", 2, 0.5), ("block_conv", 3, -3.0), ("block_proj_in", 2, 0.0)):
        shape = {"to_q": (24, 24), "to_k": (12, 24), "block_conv": (8, 6, 3, 3), "block_proj_in": (10, 8, 1, 1)}[path]
        a, b = random(rank, *shape[1:]), random(shape[0], rank, *[1] * (len(shape) - 2))
        group = {"lora_down.weight": a, "lora_up.weight": b, "alpha": torch.tensor(alpha)}
        tensors |= {f"lycoris_{path}.{end}": tensor for end, tensor in group.items()}
    states, _ = from_kohya(tensors, parts())
    state = states["model"]
    given = {site.path: (method.rank, method.alpha) for site, method in state.methods.items()}  # type: ignore[attr-defined]
    assert given == {"to_q": (4, 6.0), "to_k": (2, 0.5), "block.conv": (3, 3.0), "block.proj_in": (2, 2.0)}
    assert torch.equal(state.tensors[Site("block.conv")]["lora_B"], -tensors["lycoris_block_conv.lora_up.weight"])
    written, _, notes = to_kohya(states, parts())
    assert len({float(t) for key, t in written.items() if key.endswith(".alpha")}) == 1 and "lora_up" in notes[0]
    again = from_kohya(written, parts())[0]["model"]
    for site in state.methods:
        zero = torch.zeros(state.specs[site].whole, dtype=torch.float64)
        assert same(delta(again, site, zero), delta(state, site, zero))


METHODS: dict[str, Any] = {
    "lora": LoRA(rank=4, alpha=6),
    "rslora": LoRA(rank=4, alpha=6, rslora=True),
    "pissa": LoRA(rank=4, alpha=4, init="pissa"),
    "dora": DoRA(rank=4, alpha=6),
    "loha": LoHa(rank=2, alpha=3),
    "lokr": LoKr(rank=1, alpha=3),
    "lokr-full": LoKr(rank=8, alpha=3),
    "lokr-both": LoKr(rank=1, alpha=3, decompose_both=True, decompose_factor=4),
}


@pytest.mark.parametrize("name", METHODS)
def test_what_we_write_reads_as_the_same_change(name: str) -> None:
    net = Net()
    deltaw.attach(net, METHODS[name], targets=["to_q", "to_k", "conv", "proj_in"])
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    state = deltaw.extract(net)
    tensors, header, _ = to_kohya({"model": state}, parts())
    assert header["ss_network_module"] == (
        "lycoris.kohya" if name.startswith("lo") and "lora" not in name else "networks.lora"
    )
    again, notes = from_kohya(tensors, parts())
    assert not notes and again["model"].methods.keys() == state.methods.keys()
    for site in state.methods:
        weight = torch.randn(state.specs[site].whole, dtype=torch.float64)
        assert same(delta(again["model"], site, weight), delta(state, site, weight)), site


def test_what_kohya_cannot_hold_is_refused() -> None:
    net = Net()
    deltaw.attach(net, LoRA(rank=2, bias="lora_only"), targets=["to_q", "table"])
    with pytest.raises(UseError, match="no form in kohya's files") as caught:
        to_kohya({"model": deltaw.extract(net)}, parts())
    assert "embeddings" in str(caught.value) and "to_q:bias" in str(caught.value)
    net = Net()
    deltaw.attach(net, deltaw.MoRA(rank=2), targets=["to_q"])
    with pytest.raises(UseError, match="no form for mora: make it a LoRA first"):
        to_kohya({"model": deltaw.extract(net)}, parts())
    with pytest.raises(UseError, match="original checkpoint"):
        names({"transformer": layout(Net())})


def test_an_alpha_of_several_numbers_is_said() -> None:
    net = nn.ModuleDict({"to_q": nn.Linear(4, 4)})
    alpha = torch.tensor([1.0, 2.0])
    tensors = {"lora_down.weight": random(2, 4), "lora_up.weight": random(4, 2), "alpha": alpha}
    said = "must be one number, its tensor holds 2: fetch the file again"
    with pytest.raises(FileError, match=f"to_q: alpha {said}"):
        from_kohya({f"lycoris_to_q.{end}": tensor for end, tensor in tensors.items()}, {"model": layout(net)})
    dotted = {"lora_A.weight": tensors["lora_down.weight"], "lora_B.weight": tensors["lora_up.weight"], "alpha": alpha}
    with pytest.raises(FileError, match=f"key 'to_q.alpha' {said}"):
        from_diffusers({f"unet.to_q.{end}": tensor for end, tensor in dotted.items()}, {"unet": layout(net)}, {})


def test_a_name_that_may_mean_two_modules_is_an_error() -> None:
    net = nn.ModuleDict({"a_b": nn.Linear(4, 4), "a": nn.ModuleDict({"b": nn.Linear(4, 4)})})
    both: Parts = {"model": layout(net)}
    assert sorted(path for _, path in table(both)["lycoris_a_b"]) == ["a.b", "a_b"]
    tensors = {"lycoris_a_b.lora_down.weight": random(2, 4), "lycoris_a_b.lora_up.weight": random(4, 2)}
    with pytest.raises(FileError, match=r"'lycoris_a_b' may mean a_b or a.b of the base"):
        from_kohya(tensors, both)
    deltaw.attach(net, LoRA(rank=2), targets=["a_b"])
    with pytest.raises(UseError, match="two modules of the base have the name 'lycoris_a_b'"):
        to_kohya({"model": deltaw.extract(net)}, both)


def test_places_in_the_original_unet() -> None:
    """SDXL: 320, 640, 1280 channels, two resnets a block, attention in the two inner ones."""
    there = {"conv_in": "input_blocks.0.0", "conv_out": "out.2", "add_embedding.linear_2": "label_emb.0.2"}
    down = [f"down_blocks.{i}" for i in range(3)] + [f"up_blocks.{i}" for i in range(3)]
    entries = {
        *there,
        *down,
        "mid_block",
        "mid_block.resnets.1",
        "mid_block.resnets.1.conv2",
        "mid_block.attentions.0.proj_in",
    }
    for i in range(3):
        entries |= {f"down_blocks.{i}.resnets.{j}" for j in range(2)} | {f"up_blocks.{i}.resnets.{j}" for j in range(3)}
        entries |= {f"down_blocks.{i}.downsamplers.0.conv", f"up_blocks.{i}.upsamplers.0.conv"} if i < 2 else set()
        entries |= {f"down_blocks.{i}.attentions.{j}" for j in range(2)} if i > 0 else set()
        entries |= {f"up_blocks.{i}.attentions.{j}" for j in range(3)} if i < 2 else set()
    entries |= {
        "down_blocks.1.attentions.0.proj_in",
        "up_blocks.1.attentions.2.proj_out",
        "down_blocks.2.resnets.0.conv_shortcut",
    }
    found = sgm(entries)
    assert {path: found[path] for path in there} == there
    assert found["down_blocks.1.attentions.0.proj_in"] == "input_blocks.4.1.proj_in"
    assert found["down_blocks.2.resnets.0.conv_shortcut"] == "input_blocks.7.0.skip_connection"
    assert found["down_blocks.0.downsamplers.0.conv"] == "input_blocks.3.0.op"
    assert found["mid_block.resnets.1.conv2"] == "middle_block.2.out_layers.3"
    assert found["mid_block.attentions.0.proj_in"] == "middle_block.1.proj_in"
    assert found["up_blocks.1.attentions.2.proj_out"] == "output_blocks.5.1.proj_out"
    assert found["up_blocks.0.upsamplers.0.conv"] == "output_blocks.2.2.conv"
