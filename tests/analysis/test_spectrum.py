"""Spectra: known ones come back, cuts lose what the spectrum says, and methods without factors take the dense way."""

import math

import pytest
import torch

from analysis.made import attached, lora, orthonormal, small
from deltaw.analysis import Spectrum, costly, describe, directions, spectra
from deltaw.core.host import HostSpec
from deltaw.core.method import Site
from deltaw.core.state import AdapterState, delta
from deltaw.methods.dora import DoRA
from deltaw.methods.full import Full
from deltaw.methods.loha import LoHa
from deltaw.methods.lora import LoRA
from deltaw.methods.mora import MoRA
from deltaw.mixing import to_lora


def test_equal_directions_count_each() -> None:
    found = Spectrum((3.0, 3.0, 3.0, 3.0))
    assert found.effective_rank == pytest.approx(4) and found.stable_rank == pytest.approx(4)
    assert found.energy == pytest.approx((0.25, 0.5, 0.75, 1.0)) and found.rank(0.5) == 2 and found.rank(0.51) == 3
    assert found.norm == pytest.approx(6.0)


def test_one_direction_is_rank_one_and_nothing_is_rank_zero() -> None:
    one, none = Spectrum((2.0, 0.0)), Spectrum((0.0, 0.0))
    assert (one.effective_rank, one.stable_rank, one.full_rank, one.rank(0.99)) == (1.0, 1.0, 1, 1)
    assert (none.effective_rank, none.stable_rank, none.full_rank, none.rank(0.9), none.energy) == (0, 0, 0, 0, ())


def test_the_entropy_of_roy_and_vetterli() -> None:
    values = (4.0, 2.0, 1.0)
    p = [v / 7 for v in values]
    assert Spectrum(values).effective_rank == pytest.approx(math.exp(-sum(x * math.log(x) for x in p)))
    assert Spectrum(values).stable_rank == pytest.approx(21 / 16)
    assert 1 < Spectrum(values).stable_rank < Spectrum(values).effective_rank < 3


def test_a_known_spectrum_comes_back_from_the_factors() -> None:
    wanted = (5.0, 2.0, 0.5, 0.01)
    state = lora(orthonormal(40, 4), wanted, orthonormal(30, 4, 1))
    (site,) = state.methods
    (found,) = spectra(state)[site]  # type: ignore[misc]
    assert found.values == pytest.approx(wanted, rel=1e-5)
    svd = directions(state, site)
    assert svd is not None
    torch.testing.assert_close(
        (svd.u * svd.s) @ svd.vt, delta(state, site, torch.zeros(40, 30)).double(), atol=1e-6, rtol=1e-5
    )
    torch.testing.assert_close(svd.u.T @ svd.u, torch.eye(4, dtype=torch.float64))


def test_factors_of_more_rank_than_the_change_has() -> None:
    u, v = orthonormal(20, 2), orthonormal(20, 2, 1)
    twice = lora(torch.cat([u, u], 1), (1.0, 2.0, 1.0, 2.0), torch.cat([v, v], 1))
    (found,) = next(iter(spectra(twice).values()))  # type: ignore[arg-type]
    assert len(found.values) == 4 and found.full_rank == 2 and found.values[:2] == pytest.approx((4.0, 2.0), rel=1e-5)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_cut_loses_what_the_energy_says(rank: int) -> None:
    state = attached(small(), LoRA(rank=4, alpha=3))
    _, report = to_lora(state, rank=rank)
    for site, each in spectra(state).items():
        assert each is not None
        assert report.sites[site].error ** 2 == pytest.approx(1 - each[0].energy[rank - 1], abs=1e-6)


def test_a_stack_is_seen_weight_by_weight() -> None:
    site = Site("experts", "up_proj")
    tensors = {"lora_A": torch.randn(3, 2, 8), "lora_B": torch.randn(3, 12, 2)}
    state = AdapterState({site: LoRA(rank=2, alpha=4.0)}, {site: tensors}, {site: HostSpec((12, 8), stack=3)})
    each = spectra(state)[site]
    assert each is not None and len(each) == 3
    for e in range(3):
        dense = 2.0 * tensors["lora_B"][e] @ tensors["lora_A"][e]
        assert each[e].values == pytest.approx(torch.linalg.svdvals(dense)[:2].tolist(), rel=1e-4)
    (record,) = describe(state)
    assert len(record["each"]) == 3 and record["norm"] == pytest.approx(math.hypot(*(one.norm for one in each)))
    assert record["effective_rank"] == pytest.approx(sum(one.effective_rank for one in each) / 3)


def test_a_convolution_is_a_matrix_of_its_patches() -> None:
    site = Site("conv")
    tensors = {"lora_A": torch.randn(2, 3, 3, 3), "lora_B": torch.randn(6, 2, 1, 1)}
    state = AdapterState({site: LoRA(rank=2, alpha=2.0)}, {site: tensors}, {site: HostSpec((6, 3, 3, 3))})
    (found,) = spectra(state)[site]  # type: ignore[misc]
    dense = delta(state, site, torch.zeros(6, 3, 3, 3)).flatten(1)
    assert found.values == pytest.approx(torch.linalg.svdvals(dense)[:2].tolist(), rel=1e-4)


@pytest.mark.parametrize("method", [LoHa(rank=5), MoRA(rank=4)])
def test_changes_without_factors_that_need_no_base(method) -> None:
    state = attached(small(), method)
    assert all(one is None for one in spectra(state).values())
    work = costly(state, with_base=False)
    assert work.sites == set(state.methods) and 0 < work.seconds < 5
    for record, site in zip(describe(state, work=work), state.methods, strict=True):
        dense = delta(state, site, torch.zeros(state.specs[site].shape))
        assert record["norm"] == pytest.approx(float(dense.norm()), rel=1e-5) and record["unknown"] is None
        assert record["spectrum"][:3] == pytest.approx(torch.linalg.svdvals(dense)[:3].tolist(), rel=1e-4)
    assert all(record["norm"] is None and record["unknown"] for record in describe(state))  # nobody asked


def test_changes_that_depend_on_the_base_need_it() -> None:
    model = small()
    state = attached(model, DoRA(rank=2))
    assert not costly(state, with_base=False).sites
    bare = describe(state, work=costly(state, with_base=False))
    assert {record["unknown"] for record in bare} == {"depends on the base"}
    work = costly(state, with_base=True)
    assert work.sites == set(state.methods)
    for record, site in zip(
        describe(state, lambda s: model[int(s.path)].weight.detach(), work=work), state.methods, strict=True
    ):
        weight = model[int(site.path)].weight.detach()
        dense = delta(state, site, weight)
        assert record["norm"] == pytest.approx(float(dense.norm()), rel=1e-5)
        assert record["of_base"] == pytest.approx(float(dense.norm() / weight.norm()), rel=1e-5)
        assert record["spectrum"] == pytest.approx(torch.linalg.svdvals(dense).tolist(), rel=1e-3, abs=1e-5)


def test_a_trained_copy_beside_its_base() -> None:
    site, weight = Site("norm"), torch.randn(9)
    state = AdapterState({site: Full()}, {site: {"copy": weight + 0.5}}, {site: HostSpec((9,), linear=False)})
    (record,) = describe(state, work=costly(state, with_base=False))
    assert record["norm"] is None and record["unknown"] == "depends on the base"
    (record,) = describe(state, lambda s: weight)
    assert record["norm"] == pytest.approx(1.5) and record["spectrum"] is None


def test_wide_factors_are_decomposed_where_that_is_asked_for() -> None:
    state = lora(orthonormal(150, 80), tuple(range(80, 0, -1)), orthonormal(120, 80, 1))
    (site,) = state.methods
    (bare,) = describe(state)
    assert bare["norm"] == pytest.approx(math.hypot(*range(81)), rel=1e-4) and bare["spectrum"] is None
    work = costly(state, with_base=False)
    assert work.sites == {site} and work.seconds > 0
    (record,) = describe(state, work=work)
    assert record["spectrum"][:2] == pytest.approx((80, 79), rel=1e-4) and len(record["spectrum"]) == 64
