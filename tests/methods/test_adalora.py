"""AdaLoRA: the budget's published figures, the mask, PEFT as oracle, the orthogonality term, the finished adapter."""

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deltaw.core.attach import adapters, attach, detach, extract, insert, kinds
from deltaw.core.errors import ConfigError, UseError
from deltaw.core.host import HostSpec
from deltaw.core.merge import merge
from deltaw.core.method import Site
from deltaw.core.state import delta
from deltaw.methods.adalora import AdaLoRA

PAPER = AdaLoRA(rank=12, target_rank=8, tinit=10, tfinal=30)


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 7))


def trained(model: nn.Module, method: AdaLoRA, steps: int, total: int, orth: bool = False) -> list[int]:
    """Train a little; the numbers of λ ≠ 0 after every step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(16, 20, generator=generator)
    wanted = torch.randn(16, 7, generator=generator)
    left = []
    ((ours, there),) = kinds(model)
    for step in range(1, steps + 1):
        loss = (model(inputs) - wanted).square().mean()
        penalty = ours.penalty(there)
        if orth and penalty is not None:
            loss = loss + penalty
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ours.after_step(there, step, total)
        left.append(sum(int((adapter.lora_E != 0).sum()) for adapter in there))
    return left


def test_the_budget_has_the_published_figures() -> None:
    at = {t: PAPER.budget(t, 100, 12 * 1000, 8 * 1000)[0] / 1000 for t in (1, 10, 25, 40, 55, 70, 71, 100)}
    assert at == {
        1: 12,
        10: 12,
        25: 9.687,
        40: 8.5,
        55: 8.062,
        70: 8,
        71: 8,
        100: 8,
    }  # whole triplets: cut, not rounded
    assert not PAPER.budget(10, 100, 12, 8)[1] and PAPER.budget(11, 100, 12, 8)[1] and PAPER.budget(100, 100, 12, 8)[1]
    every = AdaLoRA(rank=12, target_rank=8, tinit=10, tfinal=30, delta_t=20)
    assert [t for t in range(1, 75) if every.budget(t, 100, 12, 8)[1]] == [20, 40, 60, 70, 71, 72, 73, 74]


def test_the_misprinted_schedule_exceeds_the_start() -> None:
    """Eq. 14 has t − t_i − t_f in the numerator: 21.5 of 12 ranks at t = t_i, where the code form has 12."""
    misprint = 8 + (12 - 8) * (1 - (10 - 10 - 30) / (100 - 10 - 30)) ** 3
    assert misprint == 21.5 and PAPER.budget(10, 100, 12, 8)[0] == 12


def test_after_a_mask_the_budget_is_what_is_left() -> None:
    model = net()
    model[2].weight.data *= 0.01  # next to nothing depends on the first layer
    method = AdaLoRA(rank=6, target_rank=2, tinit=4, tfinal=6)
    attach(model, method, targets="all-linear")
    left = trained(model, method, 20, 20)
    assert left == [method.budget(t, 20, 12, 4)[0] for t in range(1, 21)]
    assert left[3] == 12 and left[13] == left[-1] == 4
    ranks = [int((adapter.lora_E != 0).sum()) for adapter in adapters(model).values()]
    assert ranks == [0, 4]  # one ranking over all modules


def test_nothing_to_prune_is_no_error() -> None:
    """k = b₀ − b(t) = 0, where a threshold by kthvalue has no answer."""
    model = net()
    attach(model, AdaLoRA(rank=3, target_rank=3, tinit=0, tfinal=0), targets="all-linear")
    assert trained(model, AdaLoRA(), 3, 3) == [6, 6, 6]


def test_without_importance_exactly_the_budget_is_kept() -> None:
    """All scores alike: a threshold would drop everything."""
    model = net()
    attach(model, AdaLoRA(rank=4, target_rank=1, tinit=0, tfinal=0), targets="all-linear")
    ((method, there),) = kinds(model)
    for adapter in there:
        nn.init.ones_(adapter.lora_E)
    method.after_step(there, 5, 5)
    assert sum(int((adapter.lora_E != 0).sum()) for adapter in there) == 2


def test_a_masked_value_may_come_back() -> None:
    model = net()
    attach(model, AdaLoRA(rank=6, target_rank=2, tinit=1, tfinal=2, beta1=0.2, beta2=0.2), targets="all-linear")
    masks, (ours, there) = [], kinds(model)[0]
    inputs = torch.randn(12, 20)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=3.0)
    for step in range(1, 31):
        optimizer.zero_grad()
        model(inputs + torch.randn(12, 20)).square().mean().backward()
        optimizer.step()
        ours.after_step(there, step, 40)
        masks.append(torch.cat([adapter.lora_E.detach().flatten() != 0 for adapter in there]))
    assert any(bool((after & ~before).any()) for before, after in itertools.pairwise(masks))
    assert all(adapter.lora_E.requires_grad for adapter in there)


def test_peft_prunes_the_same_and_computes_the_same() -> None:
    """PEFT's RankAllocator beside ours: same tensors, data, optimizer; same masks at every step, same outputs."""
    peft = pytest.importorskip("peft")
    model, inputs = net(), torch.randn(5, 20)
    config = peft.AdaLoraConfig(
        init_r=6, target_r=2, lora_alpha=9, tinit=3, tfinal=6, deltaT=2, beta1=0.85, beta2=0.7, total_step=24,
        orth_reg_weight=0.3, target_modules=["0", "2"],
    )  # fmt: skip
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    plan = attach(
        model, AdaLoRA(rank=6, target_rank=2, alpha=9, tinit=3, tfinal=6, delta_t=2, beta2=0.7, orth=0.3), targets=["0", "2"]
    )  # fmt: skip
    layers = {site: theirs.base_model.model.get_submodule(site.path) for site in (t.site for t in plan.targets)}
    for site, adapter in adapters(model).items():
        for name in ("lora_A", "lora_B", "lora_E"):
            assert getattr(adapter, name).shape == getattr(layers[site], name)["default"].shape
            getattr(layers[site], name)["default"].data.copy_(getattr(adapter, name))
    ((ours, there),) = kinds(model)
    wanted, x = torch.randn(16, 7), torch.randn(16, 20)
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=0.02) for m in (model, theirs)]
    pruned = 0
    for step in range(1, 25):
        for optimizer in optimizers:
            optimizer.zero_grad()
        ((model(x) - wanted).square().mean() + ours.penalty(there)).backward()
        ((theirs(x) - wanted).square().mean() + peft_penalty(theirs, 0.3)).backward()
        for optimizer in optimizers:
            optimizer.step()
        ours.after_step(there, step, 24)
        theirs.base_model.update_and_allocate(step)
        for site, adapter in adapters(model).items():
            mask = layers[site].lora_E["default"] != 0
            assert torch.equal(adapter.lora_E != 0, mask), step
            pruned += int((~mask).sum())
        torch.testing.assert_close(model(inputs), theirs(inputs), rtol=1e-5, atol=1e-5)
    assert pruned > 50
    state = extract(model)
    for site, layer in layers.items():
        torch.testing.assert_close(
            delta(state, site, torch.zeros(state.specs[site].shape)),
            layer.get_delta_weight("default"),
            rtol=1e-4,
            atol=1e-6,
        )


def peft_penalty(model: Any, weight: float) -> Tensor:
    """PEFT adds it to an output's `loss`: give it one."""

    class Output:
        loss = torch.zeros(())

    kept, model.base_model.model.forward = model.base_model.model.forward, lambda: Output
    try:
        return model.base_model.forward().loss
    finally:
        model.base_model.model.forward = kept


def test_the_orthogonality_term() -> None:
    """Not squared, averaged: one matrix by hand; and training brings P and Q nearer to orthonormal."""
    model = nn.Sequential(nn.Linear(4, 3))
    attach(model, AdaLoRA(rank=2, target_rank=1, orth=0.3), targets="0")
    ((method, there),) = kinds(model)
    with torch.no_grad():
        there[0].lora_A.copy_(torch.tensor([[1.0, 0, 0, 0], [0, 2.0, 0, 0]]))  # QQᵀ − I = diag(0, 3)
        there[0].lora_B.copy_(torch.tensor([[0.0, 0], [0, 0], [0, 0]]))  # PᵀP − I = −I, norm √2
    assert float(method.penalty(there).detach()) == pytest.approx(0.3 * (3 + 2**0.5) / 2)
    assert AdaLoRA(orth=0).penalty(there) is None
    model = net()
    attach(model, AdaLoRA(rank=4, orth=0.5), targets="all-linear")
    ((method, there),) = kinds(model)
    before = float(method.penalty(there).detach())
    trained(model, method, 40, 40, orth=True)
    assert float(method.penalty(there).detach()) < 0.8 * before


def test_a_finished_adapter_is_its_three_tensors() -> None:
    model, x = net(), torch.randn(5, 20)
    attach(model, AdaLoRA(rank=6, target_rank=2, alpha=9, tinit=0, tfinal=0), targets="all-linear")
    trained(model, AdaLoRA(), 10, 10)
    assert set(adapters(model)[Site("0")].memory()) == {
        f"{kind}_lora_{which}" for kind in ("mean", "spread") for which in "ABE"
    }
    state, live = extract(model), model(x)
    assert set(state.tensors[Site("0")]) == {"lora_A", "lora_B", "lora_E"}
    assert sum(int((group["lora_E"] != 0).sum()) for group in state.tensors.values()) == 4
    for site, spec in state.specs.items():
        a, b, scale = state.factors(site)
        torch.testing.assert_close(scale * b @ a, delta(state, site, torch.zeros(spec.shape)), rtol=1e-5, atol=1e-7)
        assert scale == 1.5 and a.shape[0] == 6
    detach(model)
    insert(model, state)
    assert torch.equal(model(x), live)
    assert not any(bool(buffer.any()) for adapter in adapters(model).values() for buffer in adapter.memory().values())
    merge(model)
    torch.testing.assert_close(model(x), live, rtol=1e-5, atol=1e-5)


def test_the_scale_is_that_of_the_initial_rank() -> None:
    """PEFT divides by r + 1e-5, never by the ranks that are left."""
    layer = nn.Linear(8, 6)
    attach(layer, AdaLoRA(rank=4, alpha=10), targets="")
    state = extract(layer)
    group = {**state.tensors[Site("")], "lora_E": torch.tensor([[1.0], [0], [0], [0]])}
    assert state.methods[Site("")].factors(group).scale == 2.5


def test_defaults_fit_and_depend_on_each_other() -> None:
    wide, narrow = HostSpec((64, 32)), HostSpec((5, 32))
    resolved = [(m.rank, m.target_rank, m.alpha) for m in (AdaLoRA().at("", wide), AdaLoRA().at("", narrow))]
    assert resolved == [(12, 8, 24.0), (5, 3, 10.0)]
    assert AdaLoRA(target_rank=5).at("", wide).rank == 8
    assert AdaLoRA(rank=9).at("", wide).target_rank == 6
    assert AdaLoRA(target_rank=5).at("", narrow).rank == 5


def test_impossible_fields_are_named_together() -> None:
    with pytest.raises(ConfigError) as error:
        AdaLoRA(rank=2, target_rank=3, tinit=0.5, tfinal=0.5, beta1=1.0, orth=-1, delta_t=1, alpha=0, dropout=1.0)
    said = str(error.value)
    for words in ("target_rank=3 is above", "together below 1", "beta1=1.0", "orth=-1", "alpha=0", "dropout=1.0"):
        assert words in said
    with pytest.raises(ConfigError, match=r"delta_t=0 is not a whole number"):
        AdaLoRA(delta_t=0)
    with pytest.raises(ConfigError, match=r"tinit=2\.5"):
        AdaLoRA(tinit=2.5)
    with pytest.raises(UseError, match=r"tinit=10 and tfinal=30 leave no steps of 40"):
        PAPER.phases(40)
    with pytest.raises(ConfigError) as error:
        AdaLoRA(alpha="x", dropout="x", orth=float("nan"), tinit="x", tfinal=float("inf"), beta1=None)  # type: ignore[arg-type]
    for words in ("alpha='x' is not", "dropout='x' is not", "orth=nan is", "tinit='x'", "tfinal=inf", "beta1=None"):
        assert words in str(error.value)
    with pytest.raises(ConfigError, match="alpha=inf is not a positive number"):
        AdaLoRA(alpha=float("inf"))


def test_what_counts_for_all_adapters_of_a_name_cannot_differ() -> None:
    """The hooks of the first would have spoken for the second as well; ranks are each adapter's own."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    attach(model, AdaLoRA(rank=4, target_rank=2, orth=0.5), targets="0")
    with pytest.raises(
        UseError, match=r"cannot add to 'default', whose adapters share these options of adalora"
    ) as error:
        attach(model, AdaLoRA(rank=4, target_rank=1, orth=0.0, delta_t=7), targets="1")
    assert error.value.faults == ("delta_t is 1 there and 7 here", "orth is 0.5 there and 0.0 here")
    assert type(model[1]) is nn.Linear
    attach(model, AdaLoRA(rank=2, target_rank=1, dropout=0.1), targets="1")
    attach(model, AdaLoRA(orth=0.1), targets="2", name="other")
    assert [(method.orth, len(there)) for method, there in kinds(model)] == [(0.5, 2)]  # type: ignore[attr-defined]
