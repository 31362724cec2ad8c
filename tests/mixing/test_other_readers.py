"""Mixes as files that PEFT loads to the same function, and where PEFT's own mixes go wrong."""

import json
from pathlib import Path

import peft
import pytest
import torch
from core import tiny
from torch import Tensor, nn

import deltaw
from deltaw.core.errors import UseError
from deltaw.core.method import Site
from deltaw.core.state import AdapterState, delta
from deltaw.formats import directory
from deltaw.methods.dora import DoRA
from deltaw.methods.lora import LoRA
from deltaw.mixing import blocks, dare, exact, svd, ties
from deltaw.ship.readback import must_be

WEIGHTS = [0.7, -0.3, 1.1]
METHODS = (
    LoRA(rank=4, alpha=6.0, rank_pattern={"q_proj": 2, "layers.1.mlp.up_proj": 7}, alpha_pattern={"v_proj": 3.0}),
    LoRA(rank=3, alpha=5.0, rslora=True),
    LoRA(rank=2, init="pissa"),
)


def parts(model: nn.Module) -> list[AdapterState]:
    found = []
    for number, (method, targets) in enumerate(zip(METHODS, ("all-linear", "attention", "mlp"), strict=True)):
        deltaw.attach(model, method, targets=targets, name=f"a{number}")
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(0.1 * torch.randn_like(parameter))
        found.append(deltaw.extract(model, f"a{number}"))
    return found


def mixes(states: list[AdapterState]) -> dict[str, AdapterState]:
    return {
        "exact": exact(states, WEIGHTS),
        "svd": svd(states, WEIGHTS, energy=0.9)[0],
        "ties": ties(states, WEIGHTS, 0.5)[0],
        "dare": dare(states, WEIGHTS, 0.5, rank=5)[0],
        "blocks": exact(*blocks(states, WEIGHTS, {"attention@1": [0.5, 0.0, 0.0], "up_proj": [0.0, 1.0, -1.0]})),
    }


def test_peft_loads_every_mix_to_the_same_function(tmp_path: Path) -> None:
    """Unlike ranks by module, negative weights, rsLoRA's √r and the alphas: all in the file."""
    model, ids = tiny.model("llama"), tiny.ids()
    states, base = parts(model), tiny.model("llama")(ids).logits
    with deltaw.use(model, {f"a{number}": weight for number, weight in enumerate(WEIGHTS)}):
        live = model(ids).logits
    for name, mixed in mixes(states).items():
        directory.write(mixed, tmp_path / name)
        assert must_be(mixed, tmp_path / name) < 1e-6
        config = json.loads((tmp_path / name / "adapter_config.json").read_text())
        assert bool(config["rank_pattern"]) == (name != "dare")  # the ranks do differ, or this shows nothing
        tuned = peft.PeftModel.from_pretrained(tiny.model("llama"), str(tmp_path / name))
        assert float((tuned(ids).logits - base).abs().max()) > 0.05
        twin = tiny.model("llama")
        deltaw.load(twin, tmp_path / name)
        torch.testing.assert_close(tuned(ids).logits, twin(ids).logits, rtol=1e-4, atol=1e-4)
        if name == "exact":
            torch.testing.assert_close(tuned(ids).logits, live, rtol=1e-4, atol=1e-4)


def theirs(config: peft.LoraConfig) -> peft.PeftModel:
    """Two adapters of PEFT's on a layer of 64 × 48, as `x` and `y`."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(48, 64), nn.Linear(64, 32))
    tuned = peft.get_peft_model(model, config, adapter_name="x")  # type: ignore[arg-type]
    tuned.add_adapter("y", config)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return tuned


def same(tuned: peft.PeftModel, folder: Path) -> list[AdapterState]:
    tuned.save_pretrained(str(folder))
    return [directory.open_directory(folder / name).state for name in "xy"]


def change(tuned: peft.PeftModel, name: str) -> Tensor:
    return tuned.base_model.model[0].get_delta_weight(name).detach()  # type: ignore[index, union-attr, operator, no-any-return]


def ours(state: AdapterState) -> Tensor:
    return delta(state, "0", torch.zeros(64, 48))


def test_rslora_is_not_scaled_twice(tmp_path: Path) -> None:
    """PEFT's `cat` of two rsLoRAs of rank 4 is √8 too large: the new adapter's own α/√r comes on top."""
    tuned = theirs(peft.LoraConfig(r=4, lora_alpha=8, use_rslora=True, target_modules=["0", "1"]))
    wanted = 0.5 * change(tuned, "x") + 0.5 * change(tuned, "y")
    tuned.add_weighted_adapter(["x", "y"], [0.5, 0.5], "mix", combination_type="cat")
    assert float(change(tuned, "mix").norm() / wanted.norm()) == pytest.approx(8**0.5, rel=1e-3)
    mixed = exact(same(tuned, tmp_path), [0.5, 0.5])
    torch.testing.assert_close(ours(mixed), wanted, rtol=1e-5, atol=1e-5)


def test_rank_patterns_are_read_again(tmp_path: Path) -> None:
    """PEFT's mix of adapters with a rank pattern is written without it, and its own file does not load."""
    config = peft.LoraConfig(r=4, rank_pattern={"1": 2}, alpha_pattern={"1": 5}, target_modules=["0", "1"])
    tuned = theirs(config)
    states = same(tuned, tmp_path / "parts")
    tuned.add_weighted_adapter(["x", "y"], [0.5, 0.5], "mix", combination_type="linear")
    tuned.save_pretrained(str(tmp_path / "theirs"), selected_adapters=["mix"])
    fresh = nn.Sequential(nn.Linear(48, 64), nn.Linear(64, 32))
    with pytest.raises(RuntimeError, match="size mismatch"):
        peft.PeftModel.from_pretrained(fresh, str(tmp_path / "theirs" / "mix"))  # type: ignore[arg-type]
    mixed = exact(states, [0.5, 0.5])
    directory.write(mixed, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(nn.Sequential(nn.Linear(48, 64), nn.Linear(64, 32)), str(tmp_path / "ours"))  # type: ignore[arg-type]
    wanted = 0.5 * change(tuned, "x") + 0.5 * change(tuned, "y")
    torch.testing.assert_close(change(again, "default"), wanted, rtol=1e-5, atol=1e-5)


def test_one_dora_at_weight_one_is_itself(tmp_path: Path) -> None:
    """PEFT mixes its factors and leaves the magnitude; here it goes through its ΔW, and what rank costs is said."""
    model = nn.Sequential(nn.Linear(48, 64), nn.Linear(64, 32))
    deltaw.attach(model, DoRA(rank=4), targets="all-linear")
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    state, x = deltaw.extract(model), torch.randn(5, 48)
    live = model(x)
    deltaw.detach(model)
    tuned = theirs(peft.LoraConfig(r=4, use_dora=True, target_modules=["0", "1"]))
    layer = tuned.base_model.model[0]  # type: ignore[index, union-attr]
    layer.lora_magnitude_vector["x"].weight.data.mul_(1.5)  # type: ignore[union-attr, index, operator]
    before = tuned(torch.ones(1, 48))
    tuned.add_weighted_adapter(["x"], [1.0], "mix", combination_type="cat")
    tuned.set_adapter("mix")
    assert float((tuned(torch.ones(1, 48)) - before).norm() / before.norm()) > 1e-2
    mixed, report = svd([state], [1.0], 48, base=model)
    deltaw.insert(model, mixed)
    assert report.error < 1e-5
    torch.testing.assert_close(model(x), live, rtol=1e-4, atol=1e-4)


@pytest.mark.shared
def test_real_adapters(shared: Path, tmp_path: Path) -> None:
    """A stranger's GPT-2 adapter (Conv1D, its own config) with itself: away it is nothing, halved and doubled it is itself."""
    folder = shared / "adapters" / "anirudh-ak__peft-gpt2" / "model" / "lora_model"
    state = directory.open_directory(folder).state
    mixed = exact([state, state], [1.5, -0.5])
    directory.write(mixed, tmp_path / "mixed")
    assert must_be(mixed, tmp_path / "mixed") < 1e-6
    least, report = svd([state, state], [1.5, -0.5], energy=1.0)
    assert report.error < 1e-6
    ranked = [site for site, method in state.methods.items() if isinstance(method, LoRA)]
    assert ranked and report.sites.keys() == state.methods.keys()
    for site in ranked:
        assert least.methods[site].rank <= state.methods[site].rank  # type: ignore[attr-defined]
        zero = torch.zeros(state.specs[site].shape)
        torch.testing.assert_close(delta(least, site, zero), delta(state, site, zero), rtol=1e-3, atol=1e-6)


@pytest.mark.shared
def test_real_adapters_with_heads_of_their_own(shared: Path, tmp_path: Path) -> None:
    """Two DistilBERT adapters, six classes and two: their heads do not mix, and by block the mix takes one of them."""
    names = ("dayanidhi04__emotion-classification-distilbert-lora", "Tashu014__lora-imdb-distilbert")
    states = [directory.open_directory(shared / "adapters" / name).state for name in names]
    with pytest.raises(UseError, match=r"classifier: the trained copies have different shapes.*--block NAME=1,0"):
        exact(states, [0.5, 0.5])
    mixed = exact(*blocks(states, [0.5, 0.5], {"classifier": [1.0, 0.0]}))
    directory.write(mixed, tmp_path / "mixed")
    assert must_be(mixed, tmp_path / "mixed") < 1e-6
    there = directory.open_directory(tmp_path / "mixed").state
    head, inner = Site("classifier"), Site("pre_classifier")
    assert torch.equal(there.tensors[head]["copy"], states[0].tensors[head]["copy"])
    half = [0.5 * state.tensors[inner]["copy"] for state in states]
    torch.testing.assert_close(there.tensors[inner]["copy"], half[0] + half[1])
