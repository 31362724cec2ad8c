"""Weights by block: the words, who has a module, every way of mixing, and blocks that name nothing."""

import pytest
import torch
from core import tiny

import deltaw
from deltaw.core.errors import UseError
from deltaw.core.state import AdapterState, delta
from deltaw.methods.lora import LoRA
from deltaw.mixing import blocks, exact, svd, ties


def parts(family: str) -> list[AdapterState]:
    model, found = tiny.model(family), []
    for rank in (2, 3):
        deltaw.attach(model, LoRA(rank=rank), targets="all-linear", name="one")
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter)
        found.append(deltaw.extract(model, "one"))
        deltaw.detach(model, "one")
    return found


def shares(mixed: AdapterState, states: list[AdapterState]) -> dict[str, tuple[float, ...]]:
    """The weights that a mix of two gave each site, found by least squares."""
    found = {}
    for site, spec in mixed.specs.items():
        zero = torch.zeros(spec.shape)
        columns = torch.stack([delta(state, site, zero).flatten() for state in states], 1)
        solved = torch.linalg.lstsq(columns, delta(mixed, site, zero).flatten()[:, None]).solution
        found[str(site)] = tuple(round(float(w), 4) + 0.0 for w in solved.flatten())
    return found


def test_attention_layers_and_names() -> None:
    states = parts("llama")
    given = {"attention@1": [0.0, 2.0], "attention": [1.0, 0.0], "down_proj": [-0.5, 0.25]}
    found = shares(exact(*blocks(states, [0.1, 0.2], given)), states)
    assert len(found) == 14
    for path, weights in found.items():
        wanted = (0.0, 2.0) if "layers.1.self_attn" in path else (1.0, 0.0) if "self_attn" in path else (0.1, 0.2)
        assert weights == ((-0.5, 0.25) if path.endswith("down_proj") else wanted)


@pytest.mark.parametrize(("family", "attention"), [("gpt2", 4), ("bert", 8), ("t5", 24), ("clip", 8)])
def test_attention_and_mlp_are_those_of_targets(family: str, attention: int) -> None:
    """The state has no classes of modules to go by, only paths: it must find what `targets` finds in the model."""
    states, model = parts(family), tiny.model(family)
    for word in ("attention", "mlp"):
        plan = deltaw.attach(model, LoRA(rank=2), targets=word, name="one")
        mixed = exact(*blocks(states, [0.0, 0.0], {word: [1.0, 0.0]}))
        assert {target.site for target in plan.targets} == set(mixed.methods)
        deltaw.detach(model, "one")
        assert word == "mlp" or len(mixed.methods) == attention


def test_every_way_of_mixing() -> None:
    states = parts("llama")
    terms = blocks(states, [1.0, 1.0], {"mlp": [1.0, 0.0], "@0": [0.0, 0.0]})
    cut, report = svd(*terms, 1)
    sparse, _ = ties(*terms, 0.5)
    for mixed in (cut, sparse, exact(*terms)):
        assert len(mixed.methods) == 4 + 3 + 3 and all("layers.1" in s.path or "mlp" in s.path for s in mixed.methods)
    mlp = next(site for site in cut.methods if "layers.1.mlp" in site.path)
    first = delta(states[0], mlp, torch.zeros(states[0].specs[mlp].shape))
    values = torch.linalg.svdvals(first)
    assert report.sites[mlp].error == pytest.approx(float(values[1] / values.square().sum().sqrt()), rel=1e-4)
    one = blocks(states[:1], [1.0], {"attention": [0.5]})
    assert set(shares(exact(*one), states).values()) == {(0.5, 0.0), (1.0, 0.0)}


@pytest.mark.parametrize(
    ("block", "weights", "words"),
    [
        ("atention", [1, 0], r"'atention' names no module of these adapters; did you mean 'attention'"),
        ("q_prj", [1, 0], r"did you mean 'q_proj'"),
        ("attention@2", [1, 0], r"layers \[2\] hold no such module, they are in layers 0 to 1"),
        ("attention@1-0", [1, 0], "is not a range of layer numbers"),
        ("q_proj", [1], "has 1 weight for 2 adapters: give one for each, in their order"),
        ("q_proj", [1, float("nan")], "the weight nan, which is not a finite number"),
        ("q_(proj", [1, 0], "is not a valid regular expression"),
        ("", [1, 0], "'' names no module"),
        ("k_proj", [1, 0], "names only modules that earlier blocks have already: put it before them"),
    ],
)  # fmt: skip
def test_blocks_that_name_nothing(block: str, weights: list[float], words: str) -> None:
    with pytest.raises(UseError, match=words):
        blocks(parts("llama"), [1.0, 1.0], {"[kv]_proj": [1, 1], block: weights})


def test_nothing_left() -> None:
    with pytest.raises(UseError, match="would change nothing at all"):
        blocks(parts("llama"), [0.0, 0.0], {"attention": [0, 0]})
