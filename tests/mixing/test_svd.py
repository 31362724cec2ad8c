"""A mix in a given rank: what is discarded is what is reported, and PEFT's own SVD mix gives the same change."""

import peft
import pytest
import torch
from torch import Tensor, nn

import deltaw
from deltaw.core.errors import UseError
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
