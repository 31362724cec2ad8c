"""A mix in a given rank: what is discarded is what is reported, and PEFT's own SVD mix gives the same change."""

from dataclasses import replace

import peft
import pytest
import torch
from torch import Tensor, nn

import deltaw
from deltaw.core.errors import UseError
from deltaw.core.method import get
from deltaw.core.state import AdapterState, delta
from deltaw.methods.lora import LoRA
from deltaw.mixing import exact, svd

WEIGHTS = (0.7, -0.4, 1.3)


def states(model: nn.Module) -> list[AdapterState]:
    found = []
    for number, (rank, rslora) in enumerate(((4, False), (3, True), (5, False))):
        deltaw.attach(model, LoRA(rank=rank, alpha=7.0, rslora=rslora), targets="all-linear", name=f"a{number}")
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter)
        found.append(deltaw.extract(model, f"a{number}"))
    return found


@pytest.mark.parametrize("rank", [1, 6, 12, 40])
def test_it_is_the_best_of_its_rank(rank: int) -> None:
    torch.manual_seed(0)
    mine = states(nn.Sequential(nn.Linear(24, 17), nn.Linear(17, 20)))
    whole, (cut, report) = exact(mine, WEIGHTS), svd(mine, WEIGHTS, rank)
    for site, spec in whole.specs.items():
        wanted, got = (delta(state, site, torch.zeros(spec.shape)).double() for state in (whole, cut))
        summed: Tensor = sum(
            w * delta(s, site, torch.zeros(spec.shape)).double() for w, s in zip(WEIGHTS, mine, strict=True)
        )  # type: ignore[assignment]
        torch.testing.assert_close(wanted, summed, rtol=1e-4, atol=1e-5)
        values = torch.linalg.svdvals(summed)
        least = float(values[rank:].square().sum().sqrt() / values.square().sum().sqrt())
        assert float((got - summed).norm() / summed.norm()) == pytest.approx(least, abs=1e-5)
        assert report.sites[site].error == pytest.approx(least, abs=1e-5) and report.sites[site].rank <= rank


def test_peft_cuts_to_the_same_change() -> None:
    model = nn.Sequential(nn.Linear(24, 17))
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["0"])
    tuned = peft.get_peft_model(model, config, adapter_name="a")  # type: ignore[arg-type]
    tuned.add_adapter("b", config)
    layer = tuned.base_model.model[0]  # type: ignore[index, union-attr]
    for name in ("a", "b"):
        nn.init.normal_(layer.lora_B[name].weight)
    twin, mine = nn.Sequential(nn.Linear(24, 17)), []
    for name in ("a", "b"):
        deltaw.attach(twin, LoRA(rank=4, alpha=6), targets="0", name=name)
        own = twin[0].adapters[name]["weight"]
        own.lora_A.data, own.lora_B.data = layer.lora_A[name].weight.data, layer.lora_B[name].weight.data
        mine.append(deltaw.extract(twin, name))
    tuned.add_weighted_adapter(["a", "b"], [0.7, 0.3], "mix", combination_type="svd", svd_rank=3)
    theirs = layer.get_delta_weight("mix")
    (site,) = mine[0].methods
    ours = delta(svd(mine, (0.7, 0.3), 3)[0], site, torch.zeros(17, 24))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_faults_are_said() -> None:
    mine = states(nn.Sequential(nn.Linear(8, 8)))
    with pytest.raises(UseError, match="rank=0 is not a whole number"):
        svd(mine, WEIGHTS, 0)
    with pytest.raises(UseError, match="3 states and 2 weights"):
        svd(mine, WEIGHTS[:2], 4)


def test_a_part_of_no_weight_leaves_no_rank() -> None:
    mine = states(nn.Sequential(nn.Linear(24, 17)))
    cut, report = svd(mine, (1.0, 0.0, 0.0), 4)
    (site,) = cut.methods
    assert cut.methods[site].rank == 4 and report.error < 1e-6  # type: ignore[attr-defined]
    torch.testing.assert_close(
        delta(cut, site, torch.zeros(17, 24)), delta(mine[0], site, torch.zeros(17, 24)), rtol=1e-4, atol=1e-5
    )


def test_what_cancels_leaves_no_noise_behind() -> None:
    """a + 0.4 b − 0.4 b is a in its own rank, and nothing where only b was: not rounding in the ranks of both."""
    torch.manual_seed(0)
    a, b, _ = states(nn.Sequential(nn.Linear(24, 17), nn.Linear(17, 20)))
    first, second = a.methods
    a = replace(a, methods={first: a.methods[first]}, tensors={first: a.tensors[first]})
    back, report = svd([exact([a, b], [1.0, 0.4]), b], [1.0, -0.4], energy=1.0)
    assert list(back.methods) == [first] and report.sites[first].rank == 4 and second in b.methods
    nothing, _ = svd([b, b], [1.0, -1.0], energy=0.9)
    assert not nothing.methods
    close = exact([a, b], [1e-4, 1.0])  # the rest is four orders smaller than what is taken away
    left, report = svd([close, b], [1.0, -1.0], energy=1.0)
    assert report.sites[first].rank == 4 and report.error < 1e-2 and list(left.methods) == [first]


def test_energy_chooses_the_smallest_ranks() -> None:
    torch.manual_seed(0)
    mine = states(nn.Sequential(nn.Linear(24, 17), nn.Linear(17, 20)))
    whole = exact(mine, WEIGHTS)
    for energy in (0.5, 0.9, 0.99, 1.0):
        cut, report = svd(mine, WEIGHTS, energy=energy)
        for site, spec in whole.specs.items():
            squares = torch.linalg.svdvals(delta(whole, site, torch.zeros(spec.shape)).double()).square()
            left = 1 - squares.cumsum(0) / squares.sum()  # of ranks 1, 2, …
            rank = cut.methods[site].rank  # type: ignore[attr-defined]
            assert rank == report.sites[site].rank == 1 + int((left > max(1 - energy, 1e-9)).sum())
            assert report.sites[site].error == pytest.approx(max(0.0, float(left[rank - 1])) ** 0.5, abs=1e-5)
    capped, report = svd(mine, WEIGHTS, 2, energy=0.99)
    assert {method.rank for method in capped.methods.values()} == {2} and report.error > 0.1  # type: ignore[attr-defined]
    full, report = svd(mine, WEIGHTS, "full")
    assert {method.rank for method in full.methods.values()} == {12} and report.error == 0.0  # type: ignore[attr-defined]


def test_a_dora_goes_through_its_change_on_the_base() -> None:
    """One adapter at weight 1 is itself at full rank; less rank costs what the report says, against Σ wᵢΔWᵢ of all parts."""
    model = nn.Sequential(nn.Linear(24, 17))
    weight = model[0].weight.detach().clone()
    lora = states(model)[0]
    deltaw.attach(model, get("dora")(rank=3), targets="0", name="dora")
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    dora = deltaw.extract(model, "dora")
    with pytest.raises(UseError, match=r"0: the change of dora depends on the base's weight: give the model.*--model"):
        svd([dora, lora], [1.0, -0.5], 4)
    alone, report = svd([dora], [1.0], 17, base=model)
    torch.testing.assert_close(delta(alone, "0", weight), delta(dora, "0", weight), rtol=1e-4, atol=1e-5)
    assert report.error < 1e-5
    wanted = (delta(dora, "0", weight) - 0.5 * delta(lora, "0", weight)).double()
    for base in (model, {"0": weight}, model.get_submodule):
        cut, report = svd([dora, lora], [1.0, -0.5], 4, base=base)
        values = torch.linalg.svdvals(wanted)
        lost = float(values[4:].square().sum().sqrt() / values.square().sum().sqrt())
        assert report.error == pytest.approx(lost, rel=1e-3) and 0.01 < lost < 1
        got = delta(cut, "0", torch.zeros(17, 24)).double()
        assert float((got - wanted).norm() / wanted.norm()) == pytest.approx(lost, rel=1e-3)


def test_scaled_biases_come_along_as_copies() -> None:
    model, x = nn.Sequential(nn.Linear(24, 17)), torch.randn(5, 24)
    parts = []
    for _ in range(2):
        deltaw.attach(model, get("ia3")(), targets="0", name="one")
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(0.3 * torch.randn_like(parameter))
        parts.append(deltaw.extract(model, "one"))
        deltaw.detach(model, "one")
    for name, part in zip("ab", parts, strict=True):
        deltaw.insert(model, part, name=name)
    with deltaw.use(model, {"a": 0.5, "b": -1.5}):
        live = model(x)
    for name in "ab":
        deltaw.detach(model, name)
    mixed, report = svd(parts, [0.5, -1.5], "full", base=model)
    assert {str(site): one.how for site, one in report.sites.items()} == {"0": "exact", "0:bias": "kept"}
    deltaw.insert(model, mixed)
    torch.testing.assert_close(model(x), live, rtol=1e-4, atol=1e-4)


def test_a_sketch_is_near_the_best_and_its_error_is_its_own() -> None:
    """Of large matrices: within a percent of the discarded energy also where the spectrum hardly falls (TIES)."""
    from deltaw.mixing import cut

    left, right = torch.randn(1200, 40), torch.randn(40, 1000)
    low = left @ right / 6
    for matrix in (low + 0.05 * torch.randn(1200, 1000), torch.where(low.abs() > 1.0, low, 0.0)):
        values = torch.linalg.svdvals(matrix).double()
        for rank in (8, 32):
            made = cut.of_matrix(matrix, rank)
            best = float(values[rank:].square().sum().sqrt() / values.square().sum().sqrt())
            true = float((matrix - made.b @ made.a).norm() / matrix.norm())
            assert best * (1 - 1e-4) <= made.error <= 1.01 * best and made.error == pytest.approx(true, rel=1e-4)
        energy = float(values[:20].square().sum() / values.square().sum())
        assert 20 <= cut.of_matrix(matrix, None, energy - 1e-6).rank <= 22
    assert cut.of_matrix(low, 64).error < 1e-5
    for matrix in (low, low.T):
        kept = cut.whole(matrix)
        assert torch.equal(kept.b @ kept.a, matrix) and kept.rank == 1000


def test_a_sum_of_no_change_is_no_error() -> None:
    (one, *_) = states(nn.Sequential(nn.Linear(8, 8)))
    gone, report = svd([one, one], [1.0, -1.0], 2)
    assert float(delta(gone, "0", torch.zeros(8, 8)).norm()) < 1e-5 and report.error <= 1.0
    with pytest.raises(UseError, match="give the rank to cut the sum at, or the share of energy"):
        svd([one], [1.0])
    with pytest.raises(UseError, match="rank full keeps everything"):
        svd([one], [1.0], "full", energy=0.9)
