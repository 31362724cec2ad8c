"""The exact mix: to 1e-6 the sum of the ΔW in fp64, whatever the ranks, alphas, scalings, signs and methods."""

from collections.abc import Sequence

import peft
import pytest
import torch
from torch import Tensor, nn

import deltaw
from deltaw.core.errors import UseError
from deltaw.core.method import Method, Site, get
from deltaw.core.state import AdapterState, delta
from deltaw.methods.adalora import AdaLoRA
from deltaw.methods.dora import DoRA
from deltaw.methods.full import Full
from deltaw.methods.loha import LoHa
from deltaw.methods.lokr import LoKr
from deltaw.methods.lora import LoRA
from deltaw.methods.mora import MoRA
from deltaw.mixing import exact, svd

WEIGHTS = (0.7, -0.3, 1.6, -2.0)
LORAS = (
    LoRA(rank=4, alpha=7.0), LoRA(rank=3, alpha=5.0, rslora=True), LoRA(rank=8, alpha=1.0, rank_pattern={"1": 2}, alpha_pattern={"0": 9.0}),
    LoRA(rank=5, init="pissa"),
)  # fmt: skip


def states(model: nn.Module, methods: Sequence[Method], targets: str = "all-linear") -> list[AdapterState]:
    found = []
    for method in methods:
        deltaw.attach(model, method, targets=targets, name="one")
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(0.3 * torch.randn_like(parameter))
        found.append(deltaw.extract(model, "one"))
        deltaw.detach(model, "one")
    return found


def summed(parts: Sequence[AdapterState], weights: Sequence[float], site: Site, weight: Tensor) -> Tensor:
    """Σ wᵢ · ΔWᵢ in fp64."""
    found = torch.zeros_like(weight)
    for state, w in zip(parts, weights, strict=True):
        if site in state.methods:
            found += w * delta(state, site, weight)
    return found


def apart(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


def test_ranks_alphas_scalings_and_signs() -> None:
    model = nn.Sequential(nn.Linear(40, 56), nn.Linear(56, 48))
    parts = states(model, LORAS)
    mixed = exact(parts, WEIGHTS)
    assert [method.rank for method in mixed.methods.values()] == [4 + 3 + 8 + 10, 4 + 3 + 2 + 10]  # type: ignore[attr-defined]
    for site, spec in mixed.specs.items():
        zero = torch.zeros(spec.shape, dtype=torch.float64)
        assert apart(delta(mixed, site, zero), summed(parts, WEIGHTS, site, zero)) < 1e-6


def test_methods_with_factors_mix_with_each_other() -> None:
    """AdaLoRA, VeRA, LoHa and a PiSSA at one site are a plain LoRA together; each alone at any weight as well."""
    model = nn.Sequential(nn.Linear(40, 56))
    parts = states(model, [AdaLoRA(rank=4), get("vera")(rank=3), get("loha")(rank=2), LoRA(rank=2, init="pissa")])
    zero, site = torch.zeros(56, 40, dtype=torch.float64), Site("0")
    mixed = exact(parts, WEIGHTS)
    assert type(mixed.methods[site]) is LoRA and mixed.methods[site].rank == 4 + 3 + 4 + 4
    assert apart(delta(mixed, site, zero), summed(parts, WEIGHTS, site, zero)) < 1e-6
    for part in parts:
        assert apart(delta(exact([part], [-0.5]), site, zero), -0.5 * delta(part, site, zero)) < 1e-6


def test_taking_away_is_the_weights_one_and_minus_one() -> None:
    """What was mixed in comes out again: a + b − b is a, and its rank shows it."""
    model = nn.Sequential(nn.Linear(64, 48))
    a, b = states(model, LORAS[:2])
    both = exact([a, b], [1.0, 0.4])
    zero, site = torch.zeros(48, 64, dtype=torch.float64), Site("0")
    left = exact([both, b], [1.0, -0.4])
    assert apart(delta(left, site, zero), delta(a, site, zero)) < 1e-6
    least, report = svd([both, b], [1.0, -0.4], energy=1.0)
    assert least.methods[site].rank == 4 and report.error < 1e-6  # type: ignore[attr-defined]
    assert apart(delta(least, site, zero), delta(a, site, zero)) < 1e-6


def test_adding_a_and_b_apart_is_another_adapter() -> None:
    """(Σ wA)(Σ wB), as servers mix "linearly": 0.55 off at weights 0.7 and 0.3. PEFT's (√w) is as far; ours is the sum."""
    model = nn.Sequential(nn.Linear(512, 512, bias=False))
    parts = states(model, [LoRA(rank=16, alpha=32), LoRA(rank=16, alpha=32)])
    site, zero = Site("0"), torch.zeros(512, 512, dtype=torch.float64)
    for part in parts:
        for tensor in part.tensors[site].values():
            nn.init.normal_(tensor)
    (a1, b1), (a2, b2) = ((part.tensors[site]["lora_A"], part.tensors[site]["lora_B"]) for part in parts)
    wanted = summed(parts, (0.7, 0.3), site, zero)
    apart_each = 2.0 * (0.7 * b1 + 0.3 * b2) @ (0.7 * a1 + 0.3 * a2)
    assert apart(apart_each.double(), wanted) == pytest.approx(0.55, abs=0.02)
    theirs = peft.get_peft_model(
        nn.Sequential(nn.Linear(512, 512)), peft.LoraConfig(r=16, lora_alpha=32, target_modules=["0"]), adapter_name="x"  # type: ignore[arg-type]
    )  # fmt: skip
    theirs.add_adapter("y", peft.LoraConfig(r=16, lora_alpha=32, target_modules=["0"]))
    layer = theirs.base_model.model[0]  # type: ignore[index, union-attr]
    for name, a, b in (("x", a1, b1), ("y", a2, b2)):
        layer.lora_A[name].weight.data, layer.lora_B[name].weight.data = a, b
    theirs.add_weighted_adapter(["x", "y"], [0.7, 0.3], "mix", combination_type="linear")
    assert apart(layer.get_delta_weight("mix").double(), wanted) > 0.5
    assert apart(delta(exact(parts, [0.7, 0.3]), site, zero), wanted) < 1e-6


def test_trained_copies_of_any_weights_with_the_base() -> None:
    """W + Σ wᵢ(cᵢ − W); without the base only where the weights sum to 1."""
    model, x = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), torch.randn(4, 6)
    parts = states(model, [LoRA(rank=2, modules_to_save=("2",)), LoRA(rank=3, modules_to_save=("2",))], "0")
    for name, part in zip("ab", parts, strict=True):
        deltaw.insert(model, part, name=name)
    with deltaw.use(model, {"a": 1.0, "b": -0.5}):
        live = model(x)
    with pytest.raises(UseError, match=r"weights of trained copies sum to 0\.5.*--model"):
        exact(parts, [1.0, -0.5])
    mixed = exact(parts, [1.0, -0.5], base=model)
    for name in "ab":
        deltaw.detach(model, name)
    deltaw.insert(model, mixed)
    torch.testing.assert_close(model(x), live, rtol=1e-5, atol=1e-5)
    with pytest.raises(
        UseError,
        match=r"2:bias: weights of trained copies sum to 0\.5, not to 1: the base's parameter is \(4,\), the adapter's copy \(3,\)",
    ):
        exact(parts, [1.0, -0.5], base=nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)))


def test_what_has_no_factors_is_refused_with_the_way_out() -> None:
    model = nn.Sequential(nn.Linear(6, 5))
    dora, lora = states(model, [DoRA(rank=2), LoRA(rank=2)])
    with pytest.raises(
        UseError, match=r"DoRA \+ LoRA at one site cannot be mixed exactly.*mixing\.svd, deltaw mix --rank"
    ):
        exact([dora, lora], [0.5, 0.5])
    (whole,) = states(model, [Full()], "0")
    with pytest.raises(UseError, match="one adapter trains this module itself and another adapts it"):
        svd([whole, lora], [0.5, 0.5], 2, base=model)
    with pytest.raises(UseError, match="the mix is too large for fp32"):
        exact([lora], [1e39])


@pytest.mark.parametrize("method", [LoRA(rank=2), LoHa(rank=2), LoKr(rank=2), MoRA(rank=2)], ids=lambda m: m.name)
def test_a_weight_that_fp32_would_round_away_is_refused(method: Method) -> None:
    """Subnormal numbers have fewer digits: ΔW would be some ten per cent off, and be read back as it was written."""
    (state,) = states(nn.Sequential(nn.Linear(8, 8)), [method])
    for mix in (lambda w: exact([state], [w]), lambda w: svd([state], [w], 2)):
        for weight in (1e-44, -1e-60):
            with pytest.raises(UseError, match=r"its change times .* is too small for fp32: give a larger weight"):
                mix(weight)
    (site,), zero = state.methods, torch.zeros(8, 8, dtype=torch.float64)
    small = exact([state], [1e-35])
    assert apart(1e35 * delta(small, site, zero), delta(state, site, zero)) < 1e-6


def test_token_rows_of_one_part_stay_and_what_has_no_change_is_refused() -> None:
    from core import tiny

    from deltaw.methods.token_rows import TokenRows

    model = tiny.model("llama")
    lora, other = states(model, [LoRA(rank=2), LoRA(rank=3)], "q_proj")
    (rows,) = states(model, [TokenRows(tokens=(1, 2))], "embed_tokens")
    mixed = exact([lora, other, rows], [0.5, -0.5, 1.0])
    place = Site("model.embed_tokens")
    assert torch.equal(mixed.tensors[place]["rows"], rows.tensors[place]["rows"]) and len(mixed.methods) == 3
    with pytest.raises(UseError, match="TokenRows at one site cannot be mixed exactly"):
        exact([rows, rows], [0.5, 0.5])
    (block,) = states(model, [get("bottleneck")()], "mlp")
    with pytest.raises(UseError, match="Bottleneck at one site cannot be mixed exactly"):
        exact([block, lora], [1.0, 1.0])
    with pytest.raises(UseError, match="bottleneck has no ΔW, its change cannot be written"):
        svd([block, lora], [1.0, 1.0], 4)
