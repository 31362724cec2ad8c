"""TIES and DARE on ΔW: the papers' rules number by number, PEFT's full-rank variants as oracle, seeds that hold."""

import peft
import pytest
import torch
from torch import Tensor, nn

import deltaw
from deltaw.core.errors import UseError
from deltaw.core.host import HostSpec
from deltaw.core.method import Site
from deltaw.core.state import AdapterState, delta
from deltaw.methods.full import Full
from deltaw.methods.lora import LoRA
from deltaw.mixing import dare, exact, ties
from deltaw.mixing.dare import dropped
from deltaw.mixing.ties import elected, trimmed

HERE = Site("0")
ZERO = torch.zeros(20, 24)


def states(count: int = 3, sites: int = 1) -> list[AdapterState]:
    model = nn.Sequential(*(nn.Linear(24, 20) if n % 2 == 0 else nn.Linear(20, 24) for n in range(sites)))
    found = []
    for rank in range(3, 3 + count):
        deltaw.attach(model, LoRA(rank=rank, alpha=5.0), targets="all-linear", name="one")
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter)
        found.append(deltaw.extract(model, "one"))
        deltaw.detach(model, "one")
    return found


def change(state: AdapterState, site: Site = HERE) -> Tensor:
    return delta(state, site, torch.zeros(state.specs[site].whole))


def test_the_three_steps() -> None:
    """Trim keeps the largest; the sign with more mass wins, whatever the count; the mean is of those that agree."""
    matrix = torch.tensor([[5.0, -1.0, 0.2], [-4.0, 3.0, 0.1]])
    assert trimmed(matrix, 0.5).tolist() == [[5.0, 0.0, 0.0], [-4.0, 3.0, 0.0]]
    assert trimmed(matrix, 0.01).count_nonzero() == 1 and torch.equal(trimmed(matrix, 1.0), matrix)
    parts = [
        torch.tensor([[1.0, -3.0, 0.0, 2.0]]),
        torch.tensor([[1.0, 1.0, 0.0, -2.0]]),
        torch.tensor([[-3.0, 1.0, 4.0, 0.0]]),
    ]
    assert elected(parts).tolist() == [[-3.0, -3.0, 4.0, 0.0]]


def test_ties_is_that_of_peft_on_the_whole_matrix() -> None:
    """PEFT's ties_svd at full rank. Its `ties`, on A and B apart, is another matrix altogether."""
    parts = states()
    model = nn.Sequential(nn.Linear(24, 20))
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=3, lora_alpha=5, target_modules=["0"]), adapter_name="x")  # type: ignore[arg-type]
    for name, rank in (("y", 4), ("z", 5)):
        tuned.add_adapter(name, peft.LoraConfig(r=rank, lora_alpha=5, target_modules=["0"]))
    layer = tuned.base_model.model[0]  # type: ignore[index, union-attr]
    for name, part in zip("xyz", parts, strict=True):
        layer.lora_A[name].weight.data, layer.lora_B[name].weight.data = (
            part.tensors[HERE]["lora_A"],
            part.tensors[HERE]["lora_B"],
        )
    tuned.add_weighted_adapter(["x", "y", "z"], [0.6, 0.6, 0.6], "mix", "ties_svd", svd_rank=20, density=0.3)
    mixed, report = ties(parts, [0.6, 0.6, 0.6], density=0.3)
    torch.testing.assert_close(change(mixed), layer.get_delta_weight("mix"), rtol=1e-3, atol=1e-4)
    assert report.error == 0.0 and mixed.methods[HERE].rank == 20  # type: ignore[attr-defined]


def test_ties_of_one_and_of_all() -> None:
    parts = states()
    whole, _ = ties(parts[:1], [-0.5], density=1.0)
    torch.testing.assert_close(change(whole), -0.5 * change(parts[0]))
    mixed, _ = ties(parts, [1.0, -1.0, 2.0], density=0.4)
    wanted = elected([w * trimmed(change(s), 0.4) for w, s in zip((1.0, -1.0, 2.0), parts, strict=True)])
    torch.testing.assert_close(change(mixed), wanted)


@pytest.mark.parametrize("way", ["ties", "dare"])
def test_a_cut_says_what_it_loses(way: str) -> None:
    parts = states()
    options = {
        "ties": lambda **more: ties(parts, [1.0] * 3, 0.5, **more),
        "dare": lambda **more: dare(parts, [1.0] * 3, 0.5, **more),
    }
    whole, exactly = options[way]()
    assert exactly.error == 0.0
    for more in ({"rank": 6}, {"energy": 0.9}, {"rank": 4, "energy": 0.9}):
        cut, report = options[way](**more)
        values = torch.linalg.svdvals(change(whole).double())
        rank, total = cut.methods[HERE].rank, values.square().sum()  # type: ignore[attr-defined]
        lost = float((values[rank:].square().sum() / total).sqrt())
        assert report.error == pytest.approx(lost, rel=1e-4) and rank <= more.get("rank", 20)
        assert float((change(cut) - change(whole)).norm() / change(whole).norm()) == pytest.approx(lost, rel=1e-4)
        if more == {"energy": 0.9}:
            assert lost**2 <= 0.1 < float(values[rank - 1 :].square().sum() / total)


def test_dare_keeps_the_change_on_average() -> None:
    parts, weights = states(2), [1.0, -0.5]
    wanted = change(exact(parts, weights))
    mean = torch.stack([change(dare(parts, weights, 0.5, seed=seed)[0]) for seed in range(200)]).mean(0)
    assert float((mean - wanted).norm() / wanted.norm()) < 0.15  # 1/√200 of a relative spread of 1
    matrix = torch.randn(100, 100)
    sparse = dropped(matrix, 0.3, "any")
    assert sparse.count_nonzero() / 1e4 == pytest.approx(0.3, abs=0.02)
    torch.testing.assert_close(sparse[sparse != 0], matrix[sparse != 0] / 0.3)
    torch.testing.assert_close(change(dare(parts, weights, 1.0)[0]), wanted)


def test_dare_masks_hang_on_seed_and_module_alone() -> None:
    parts = states(2, sites=3)
    first, again, other = (dare(parts, [1.0, 1.0], 0.4, seed=seed)[0] for seed in (1, 1, 2))
    assert torch.equal(change(first), change(again)) and not torch.equal(change(first), change(other))
    kept = Site("2")
    one = [AdapterState({kept: s.methods[kept]}, {kept: s.tensors[kept]}, {kept: s.specs[kept]}) for s in parts]
    assert torch.equal(change(dare(one, [1.0, 1.0], 0.4, seed=1)[0], kept), change(first, kept))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    dare(parts, [1.0, 1.0], 0.4, rank=2)
    assert torch.equal(torch.get_rng_state(), before)
    same = [dropped(change(part), 0.4, f"1 0 {number}") for number, part in enumerate(parts)]
    torch.testing.assert_close(change(dare(parts, [1.0, 1.0], 0.4, seed=1, elect=True)[0]), elected(same))


def test_stacks_of_experts_are_trimmed_one_by_one() -> None:
    spec, site = HostSpec((6, 5), stack=3), Site("experts", "down_proj")
    method, parts = LoRA(rank=2, alpha=2.0), []
    for _ in range(2):
        tensors = {"lora_A": torch.randn(3, 2, 5), "lora_B": torch.randn(3, 6, 2)}
        parts.append(AdapterState({site: method}, {site: tensors}, {site: spec}))
    mixed, _ = ties(parts, [1.0, 1.0], density=0.3)
    for expert in range(3):
        alone = [change(part, site)[expert] for part in parts]
        torch.testing.assert_close(change(mixed, site)[expert], elected([trimmed(one, 0.3) for one in alone]))
    cut, report = ties(parts, [1.0, 1.0], density=0.3, rank=2)
    apart = float((change(cut, site) - change(mixed, site)).norm() / change(mixed, site).norm())
    assert report.error == pytest.approx(apart, rel=1e-4) and cut.tensors[site]["lora_A"].shape == (3, 2, 5)


def test_copies_are_summed_and_faults_are_said() -> None:
    site = Site("norm", "weight")
    copies = [AdapterState({site: Full()}, {site: {"copy": torch.randn(5)}}, {}) for _ in range(2)]
    mixed, report = ties(copies, [0.25, 0.75], 0.5)
    torch.testing.assert_close(
        mixed.tensors[site]["copy"], 0.25 * copies[0].tensors[site]["copy"] + 0.75 * copies[1].tensors[site]["copy"]
    )
    assert report.sites[site].how == "kept"
    parts = states(2)
    with pytest.raises(UseError, match="density=0 is not a share"):
        ties(parts, [1.0, 1.0], 0)
    with pytest.raises(UseError, match=r"density=1\.5 is not a share"):
        dare(parts, [1.0, 1.0], 1.5)
    with pytest.raises(UseError, match=r"energy=2 is not a share"):
        ties(parts, [1.0, 1.0], 0.5, energy=2)
    with pytest.raises(UseError, match="2 states and 1 weights"):
        ties(parts, [1.0], 0.5)
    with pytest.raises(UseError, match="seed='x' is not a whole number"):
        dare(parts, [1.0, 1.0], 0.5, seed="x")  # type: ignore[arg-type]
