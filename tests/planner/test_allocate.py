"""Ranks by gradient energy: never above the budget, and as much energy as any sharing of it can have."""

import itertools

import pytest
import torch

from deltaw.planner.allocate import Spectrum, allocate, captured, parameters


def spectra(*shapes: tuple[int, int], most: int = 4) -> dict[str, Spectrum]:
    found = {}
    for number, shape in enumerate(shapes):
        energies = torch.rand(most).sort(descending=True).values.square()
        found[f"layer{number}"] = Spectrum(*shape, energies.tolist(), float(energies.sum()) + 0.1)
    return found


@pytest.mark.parametrize("seed", range(5))
def test_of_equal_layers_it_takes_the_best_there_is(seed: int) -> None:
    torch.manual_seed(seed)
    given = spectra((8, 8), (8, 8), (8, 8))
    budget = 16 * 6
    best = max(
        captured(given, dict(zip(given, ranks, strict=True)))
        for ranks in itertools.product(range(1, 5), repeat=3)
        if sum(ranks) <= 6
    )
    found = allocate(given, budget, most=4)
    assert parameters(given, found) == budget and captured(given, found) == pytest.approx(best)


@pytest.mark.parametrize("seed", range(5))
def test_of_unlike_layers_it_is_no_worse_than_one_rank_for_all(seed: int) -> None:
    torch.manual_seed(seed)
    given = spectra((8, 8), (24, 8), (8, 16), (16, 16), most=8)
    uniform = dict.fromkeys(given, 2)
    found = allocate(given, parameters(given, uniform), most=8)
    assert parameters(given, found) <= parameters(given, uniform)
    assert captured(given, found) >= captured(given, uniform) - 0.05  # what no longer fits may be lost
    assert all(1 <= rank <= 8 for rank in found.values())


def test_every_module_keeps_a_rank_and_none_takes_what_it_cannot_use() -> None:
    dead, rich = Spectrum(8, 8, [0.0, 0.0], 0.0), Spectrum(8, 8, [3.0, 2.0], 5.0)
    assert allocate({"dead": dead, "rich": rich}, 16 * 10, most=4) == {"dead": 1, "rich": 2}
    assert dead.captured(1) == 0.0 and rich.captured(1) == 0.6


def test_a_smaller_layer_takes_what_a_larger_one_cannot() -> None:
    large, small = Spectrum(50, 50, [9.0, 900.0 / 101], 20.0), Spectrum(5, 5, [1.0, 0.01], 1.01)
    assert allocate({"large": large, "small": small}, 120, most=2) == {"large": 1, "small": 2}


def test_what_counts_is_energy_per_parameter() -> None:
    large, small = Spectrum(30, 30, [9.0, 3.0], 12.0), Spectrum(10, 10, [9.0, 2.0], 11.0)  # 3/60 against 2/20
    assert allocate({"large": large, "small": small}, 80 + 60, most=2) == {"large": 1, "small": 2}
