"""The gradients that a probe sees are those of the weights, whatever the groups; the base stays as it was."""

import pytest
import torch

from deltaw.core.attach import attach, detach
from deltaw.core.errors import UseError
from deltaw.core.targets import plan
from deltaw.infer.loss import SFTLoss
from deltaw.methods.lora import LoRA
from deltaw.models.base import load_base
from deltaw.planner.allocate import Spectrum
from deltaw.training.probe import Probed, spectra

BATCHES = [
    {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.where(ids % 3 == 0, ids, -100)}
    for ids in torch.randint(0, 4096, (2, 2, 12), generator=torch.Generator().manual_seed(0))
]


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return load_base("tiny", dtype="fp32").model


def test_spectra_are_those_of_autograd(model: torch.nn.Module) -> None:
    planned = plan(model, LoRA(rank=2), ["mlp", "q_proj"], layers=[0, 5])
    found = spectra(model, planned, BATCHES, 8)
    model.requires_grad_(True)
    for batch in BATCHES:
        total, count = SFTLoss(model)(batch)
        (total / count).backward()
    assert list(found) == planned.paths
    for path, spectrum in found.items():
        gradient = model.get_parameter(f"{path}.weight").grad
        assert gradient is not None
        values = torch.linalg.svdvals(gradient.double()).square()
        assert spectrum.energies == pytest.approx(values[:8].tolist(), rel=1e-3, abs=1e-12)
        assert spectrum.total == pytest.approx(float(values.sum()), rel=1e-4)
        assert (spectrum.out, spectrum.into) == gradient.shape
    model.requires_grad_(False)
    model.zero_grad(set_to_none=True)


def test_groups_change_nothing_and_the_base_stays(model: torch.nn.Module) -> None:
    planned = plan(model, LoRA(rank=2), "attention", layers=[1, 2])
    model.train()
    model.get_parameter("model.norm.weight").requires_grad_(True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    whole, parts = (spectra(model, planned, BATCHES, 4, held=held) for held in (1 << 30, 1))
    assert whole == parts
    assert model.training and model.get_parameter("model.norm.weight").requires_grad
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    model.eval().requires_grad_(False)


def test_what_cannot_be_probed_is_said(model: torch.nn.Module) -> None:
    with pytest.raises(UseError, match="linear layers"):
        spectra(model, plan(model, LoRA(rank=2), "embed_tokens"), BATCHES, 4)
    with pytest.raises(UseError, match="needs rows"):
        spectra(model, plan(model, LoRA(rank=2), "q_proj"), [], 4)


@pytest.mark.parametrize("rslora", [False, True])
def test_a_suggestion_keeps_every_scale(model: torch.nn.Module, rslora: bool) -> None:
    planned = plan(model, LoRA(rank=2, alpha=6), "q_proj")
    some = {path: Spectrum(256, 256, [1.0] * 4, 4.0) for path in planned.paths}
    ranks = {path: 1 + number % 3 for number, path in enumerate(planned.paths)}
    found = Probed(some, dict.fromkeys(ranks, 2), ranks, usual=2, scale=3.0, rslora=rslora)
    attached = attach(model, LoRA(rslora=rslora, **found.adapter), targets="q_proj")
    resolved = {t.site.path: t.method for t in attached.targets if isinstance(t.method, LoRA)}
    detach(model)
    assert {path: method.rank for path, method in resolved.items()} == ranks
    assert [method.scale for method in resolved.values()] == pytest.approx([3.0] * len(ranks))
