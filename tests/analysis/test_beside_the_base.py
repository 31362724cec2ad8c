"""The change beside its weight: amplification of known directions, its random level, intruders, PEFT's count of them."""

import math
import re

import peft
import pytest
import torch
from torch import nn

from analysis.made import attached, lora, orthonormal, small
from deltaw.analysis import amplification, describe, directions, intruders
from deltaw.analysis.amplification import largest
from deltaw.core.errors import UseError
from deltaw.methods.lora import LoRA


def spectral(values: tuple[float, ...], out: int = 30, fan_in: int = 24) -> tuple[torch.Tensor, ...]:
    """W = U·diag(values)·Vᵀ with its U and V."""
    u, v = orthonormal(out, len(values), 5), orthonormal(fan_in, len(values), 6)
    return (u * torch.tensor(values, dtype=torch.float64)) @ v.T, u, v


def test_a_direction_of_the_base_is_amplified_by_the_ratio_of_sizes() -> None:
    weight, u, v = spectral((8.0, 4.0, 2.0, 0.5))
    for place, size in ((0, 8.0), (3, 0.5)):
        state = lora(u[:, [place]], (3.0,), v[:, [place]])
        found = amplification(directions(state, next(iter(state.methods))), weight)  # type: ignore[arg-type]
        assert found.seen == pytest.approx(size, rel=1e-5) and found.factor == pytest.approx(3.0 / size, rel=1e-5)
        assert found.largest == pytest.approx(8.0, rel=1e-5) and found.change == pytest.approx(3.0, rel=1e-5)


def test_the_most_that_r_directions_see_are_the_largest() -> None:
    weight, u, v = spectral((8.0, 4.0, 2.0, 0.5))
    state = lora(u[:, :2], (1.0, 1.0), v[:, :2])
    found = amplification(directions(state, next(iter(state.methods))), weight)  # type: ignore[arg-type]
    assert found.rank == 2 and found.seen == pytest.approx(math.hypot(8, 4), rel=1e-5) == found.largest


def test_unused_rank_is_no_direction() -> None:
    weight, u, v = spectral((8.0, 4.0))
    state = lora(torch.cat([u, u], 1), (1.0, 1.0, 1.0, 1.0), torch.cat([v, v], 1))
    found = amplification(directions(state, next(iter(state.methods))), weight)  # type: ignore[arg-type]
    assert found.rank == 2 and found.seen == pytest.approx(math.hypot(8, 4), rel=1e-5)


def test_the_random_level_is_that_of_random_directions() -> None:
    weight = torch.randn(60, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    squares, rank = [], 5
    for seed in range(200):
        state = lora(orthonormal(60, rank, seed), (1.0,) * rank, orthonormal(40, rank, 1000 + seed))
        found = amplification(directions(state, next(iter(state.methods))), weight)  # type: ignore[arg-type]
        squares.append(found.seen**2)
    assert math.sqrt(sum(squares) / len(squares)) == pytest.approx(found.random, rel=0.05)
    assert found.random == pytest.approx(float(weight.norm()) * rank / math.sqrt(60 * 40))
    # Table 7 of the LoRA paper: ‖W_q‖ = 61.95 at 12288 × 12288 gives 0.02 at r = 4 and 0.33 (measured) at r = 64
    assert (
        pytest.approx(0.0202, abs=1e-4) == 61.95 * 4 / 12288 and pytest.approx(0.3227, abs=1e-4) == 61.95 * 64 / 12288
    )


def test_the_sketch_of_a_large_weight_is_near_and_repeatable() -> None:
    u, v = orthonormal(640, 600, 1), orthonormal(600, 600, 2)
    values = 10 * torch.arange(1, 601, dtype=torch.float64) ** -0.5
    weight = ((u * values) @ v.T).float()
    state = torch.random.get_rng_state()
    found = largest(weight, 8)
    assert torch.equal(torch.random.get_rng_state(), state) and torch.equal(found, largest(weight, 8))
    torch.testing.assert_close(found.double(), values[:8], rtol=0.03, atol=0)
    assert float(found.norm()) <= float(values[:8].norm()) * 1.0001  # never more than there is


def test_what_the_base_had_is_no_intruder_and_what_is_new_and_large_is() -> None:
    weight, u, v = spectral((8.0, 4.0, 2.0))
    basis = torch.linalg.qr(torch.cat([u, torch.randn(30, 1, dtype=torch.float64)], 1))[0]
    new = basis[:, [3]]  # orthogonal to all of W's
    stronger = 5.0 * u[:, [1]] @ v[:, [1]].T
    assert intruders(weight, stronger, top=3).places == ()
    alien = 6.0 * new @ orthonormal(24, 1, 9).T
    found = intruders(weight, alien, top=3)
    assert len(found.places) == 1 and found.share == pytest.approx(1 / 3) and min(found.cosines) < 0.5
    assert intruders(weight, 0.01 * alien, top=3).places == ()  # too small to come among the largest


@pytest.mark.parametrize("size", [0.5, 4.0])
def test_peft_counts_the_same_intruders(size: float) -> None:
    from peft.tuners.lora.intruders import reduce_intruder_dimension

    model = nn.Sequential(nn.Linear(48, 40, bias=False))
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=4, target_modules=["0"]))  # type: ignore[arg-type]
    layer = tuned.base_model.model[0]  # type: ignore[index, union-attr]
    nn.init.normal_(layer.lora_B["default"].weight, std=size)
    weight, change = layer.base_layer.weight.data.clone(), layer.get_delta_weight("default")
    said: list[str] = []
    reduce_intruder_dimension(tuned, logging_sink=said.append)
    theirs = [int(found[1]) for line in said if (found := re.search(r"Intruders: (\d+)", line))]
    assert len(intruders(weight, change).places) == (theirs[0] if theirs else 0)


def test_describe_counts_those_that_change_most() -> None:
    model = small()
    state = attached(model, LoRA(rank=3, alpha=6))
    records = describe(state, lambda site: model[int(site.path)].weight.detach(), count_intruders=1)
    most = max(records, key=lambda record: record["of_base"])
    assert [record["intruders"] is not None for record in records] == [record is most for record in records]
    assert len(most["intruders"]["cosines"]) == 10
    for record in records:
        weight = model[int(record["site"])].weight.detach()
        assert record["of_base"] == pytest.approx(record["norm"] / float(weight.norm()), rel=1e-5)
        assert record["amplification"]["factor"] == pytest.approx(
            record["amplification"]["change"] / record["amplification"]["seen"]
        )
    with pytest.raises(UseError, match="give the base"):
        describe(state, count_intruders=1)
