"""Subspace similarity and cosines: what is equal is 1, what is random is as chance says, gauges do not matter."""

import pytest
import torch

from analysis.made import attached, lora, orthonormal, small
from deltaw.analysis import by_chance, compare, cosine, directions, inner, phi, phis
from deltaw.core.errors import UseError
from deltaw.core.host import HostSpec
from deltaw.core.method import Site
from deltaw.core.state import AdapterState, delta
from deltaw.methods.dora import DoRA
from deltaw.methods.loha import LoHa
from deltaw.methods.lora import LoRA


def test_a_space_is_its_own_and_orthogonal_spaces_share_nothing() -> None:
    basis = orthonormal(50, 8)
    turned = basis[:, :4] @ orthonormal(4, 4, 7)
    assert phi(basis[:, :4], basis[:, :4]) == pytest.approx(1) and phi(basis[:, :4], turned) == pytest.approx(1)
    assert phi(basis[:, :4], basis[:, 4:]) == pytest.approx(0, abs=1e-12)
    assert phi(basis[:, :2], basis) == pytest.approx(1)  # the smaller one lies within
    assert phi(basis[:, :3], orthonormal(50, 6, 3)) == pytest.approx(phi(orthonormal(50, 6, 3), basis[:, :3]))


def test_phis_are_phi_of_all_beginnings() -> None:
    u, v = orthonormal(20, 3), orthonormal(20, 5, 1)
    table = phis(u, v)
    assert table.shape == (3, 5)
    for i in range(3):
        for j in range(5):
            assert float(table[i, j]) == pytest.approx(phi(u[:, : i + 1], v[:, : j + 1]))


@pytest.mark.parametrize(("i", "j", "d"), [(1, 1, 12), (4, 16, 64), (6, 3, 40)])
def test_chance_is_what_random_spaces_have(i: int, j: int, d: int) -> None:
    found = [phi(orthonormal(d, i, seed), orthonormal(d, j, 5000 + seed)) for seed in range(400)]
    mean, spread = torch.tensor(found).mean(), torch.tensor(found).std() / 20
    assert abs(float(mean) - by_chance(i, j, d)) < 4 * float(spread)
    assert by_chance(4, 16, 256) == 0.0625


def test_inner_products_are_those_of_the_matrices() -> None:
    one, other = (attached(small(), LoRA(rank=r, alpha=5), seed=r) for r in (2, 4))
    for site in one.methods:
        a, b = (delta(s, site, torch.zeros(s.specs[site].shape)).double() for s in (one, other))
        x, y = directions(one, site), directions(other, site)
        assert x is not None and y is not None
        assert inner(x, y) == pytest.approx(float((a * b).sum()), rel=1e-5, abs=1e-6)
        assert cosine(x, y) == pytest.approx(float((a * b).sum() / a.norm() / b.norm()), rel=1e-5, abs=1e-7)
        assert cosine(x, x) == pytest.approx(1)


def test_an_adapter_beside_itself_and_its_double() -> None:
    state = attached(small(), LoRA(rank=3, alpha=6))
    same, twice, against = compare(state, state), compare(state, 2 * state), compare(state, -1.0 * state)
    assert same.cosine == pytest.approx(1) and same.ratio == pytest.approx(1)
    assert twice.cosine == pytest.approx(1) and twice.ratio == pytest.approx(2, rel=1e-5)
    assert against.cosine == pytest.approx(-1, rel=1e-5)
    for found in (same, twice, against):
        for record in found.sites:
            for side in ("left", "right"):
                assert record[side]["all"]["phi"] == pytest.approx(1, abs=1e-5)
    assert "only in" not in str(same)


def test_other_factors_of_the_same_change() -> None:
    """B·M and M⁻¹·A are other tensors and the same ΔW: comparing tensors would call them strangers."""
    state = attached(small(), LoRA(rank=3, alpha=6))
    tensors = {}
    for site, group in state.tensors.items():
        turn = torch.randn(3, 3)
        tensors[site] = {"lora_A": torch.linalg.solve(turn, group["lora_A"]), "lora_B": group["lora_B"] @ turn}
    found = compare(state, AdapterState(state.methods, tensors, state.specs))
    assert found.cosine == pytest.approx(1, abs=1e-4) and all(
        r["right"]["all"]["phi"] == pytest.approx(1, abs=1e-4) for r in found.sites
    )


def test_strangers_share_what_chance_gives() -> None:
    parts = [
        [lora(orthonormal(96, 6, s), (5.0, 4.0, 3.0, 2.0, 1.5, 1.0), orthonormal(64, 6, s + 1), f"layers.{n}.q")
         for n, s in enumerate(range(start, start + 60, 2))]
        for start in (0, 10_000)
    ]  # fmt: skip
    one, other = (
        AdapterState(
            *({k: v for s in states for k, v in getattr(s, name).items()} for name in ("methods", "tensors", "specs"))
        )
        for states in parts
    )
    found = compare(one, other, top=2)
    for side, d in (("left", 96), ("right", 64)):
        for which, k in (("top", 2), ("all", 6)):
            share = found.share(side, which)
            assert share is not None
            assert share[1] == pytest.approx(k / d) and share[0] == pytest.approx(k / d, rel=0.35)
    assert abs(found.cosine or 1) < 0.05


def test_modules_of_only_one_are_listed_and_shapes_must_agree() -> None:
    u, v = orthonormal(12, 2), orthonormal(10, 2, 1)
    one, other = lora(u, (2.0, 1.0), v, "layers.0.q"), lora(u, (2.0, 1.0), v, "layers.0.v")
    with pytest.raises(UseError, match="no module is adapted by both"):
        compare(one, other)
    found = compare(one + other, one)
    assert found.only_a == ["layers.0.v"] and not found.only_b and "only in A: layers.*.v (1 module)" in str(found)
    wide = lora(orthonormal(14, 2), (2.0, 1.0), v, "layers.0.q")
    with pytest.raises(UseError, match=r"different shapes.*layers.0.q: 12×10 and 14×10"):
        compare(one, wide)
    bare = AdapterState(wide.methods, wide.tensors, {})  # a stranger's file that tells no shape: its factors do
    with pytest.raises(UseError, match="12×10 and 14×10"):
        compare(one, bare)


def test_a_change_of_nothing_has_no_direction() -> None:
    state = lora(orthonormal(12, 2), (0.0, 0.0), orthonormal(10, 2, 1))
    found = compare(state, lora(orthonormal(12, 2), (1.0, 1.0), orthonormal(10, 2, 1)))
    assert found.sites[0]["cosine"] is None and found.sites[0]["left"] is None and found.cosine is None
    assert "–" in str(found)


def test_methods_without_factors() -> None:
    from deltaw.analysis import costly

    model = small()
    loha, dora = attached(model, LoHa(rank=5)), attached(model, DoRA(rank=2))
    found = compare(loha, loha, work=(costly(loha, False),) * 2)
    assert found.cosine == pytest.approx(1) and not found.left_out
    bare = compare(dora, dora, work=(costly(dora, False),) * 2)
    assert not bare.sites and set(bare.left_out.values()) == {"dora: depends on the base"}
    assert "not compared, dora: depends on the base: 2 modules" in str(bare)

    def weights(site: Site) -> torch.Tensor:
        return model[int(site.path)].weight.detach()

    based = compare(dora, dora, (weights, weights), work=(costly(dora, True),) * 2)
    assert based.cosine == pytest.approx(1) and len(based.sites) == 2


def test_two_seeds_of_one_task_share_what_random_does_not() -> None:
    """From any start both find the directions of the change that the task wants."""
    import deltaw

    goal = 3 * orthonormal(40, 2, 1).float() @ orthonormal(60, 2, 2).float().T
    model = torch.nn.Sequential(torch.nn.Linear(60, 40, bias=False))
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        deltaw.attach(model, LoRA(rank=4, alpha=4), targets="0", name="a")
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=2e-2)
        for _ in range(40):
            x = torch.randn(64, 60)
            wanted = x @ (model[0].weight + goal).T
            loss = (model(x) - wanted).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        states.append(deltaw.extract(model, "a"))
        deltaw.detach(model, "a")
    found = compare(*states, top=2)
    (left, chance), (right, right_chance) = found.share("left", "top"), found.share("right", "top")  # type: ignore[misc]
    assert left > 8 * chance and right > 8 * right_chance
    strangers = compare(*(attached(model, LoRA(rank=4, alpha=4), seed=seed) for seed in (3, 4)), top=2)
    (by_accident, chance) = strangers.share("left", "top")  # type: ignore[misc]
    assert by_accident < 4 * chance


def test_stacks_of_experts_are_compared_weight_by_weight() -> None:
    site, spec = Site("experts", "up_proj"), HostSpec((12, 8), stack=3)
    parts = [{"lora_A": torch.randn(3, 2, 8), "lora_B": torch.randn(3, 12, 2)} for _ in range(2)]
    states = [AdapterState({site: LoRA(rank=2, alpha=4.0)}, {site: tensors}, {site: spec}) for tensors in parts]
    (record,) = compare(*states).sites
    a, b = (2.0 * (tensors["lora_B"] @ tensors["lora_A"]).double() for tensors in parts)
    assert record["cosine"] == pytest.approx(float((a * b).sum() / a.norm() / b.norm()), rel=1e-5)
    each = [phi(torch.linalg.svd(x)[0][:, :2], torch.linalg.svd(y)[0][:, :2]) for x, y in zip(a, b, strict=True)]
    assert record["left"]["all"]["phi"] == pytest.approx(sum(each) / 3, rel=1e-4)
    assert record["left"]["all"]["chance"] == pytest.approx(2 / 12)
    assert compare(states[0], states[0]).cosine == pytest.approx(1)
