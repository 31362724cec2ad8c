"""Bottleneck adapters: counts of the papers, the formula at each placement, where exactly they stand."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from core import tiny
from formats.families import IDS, build, outputs, randomise
from torch import nn
from transformers import BertConfig, BertModel

import deltaw
from deltaw.core.attach import adapters
from deltaw.core.errors import ConfigError, TargetError
from deltaw.core.host import HostSpec
from deltaw.core.targets import plan
from deltaw.methods.bottleneck import Bottleneck, BottleneckAdapter


def count(width: int, **fields: object) -> int:
    with torch.device("meta"):
        adapter = Bottleneck(**fields).build(HostSpec((width, width), linear=False))  # type: ignore[arg-type]
    return sum(parameter.numel() for parameter in adapter.parameters())


def test_counts_of_the_reference() -> None:
    assert count(48, rank=4) == 436
    assert count(48, rank=4, placement="parallel") == 384
    gpt3 = {1: 7_078_080, 4: 21_234_432, 8: 40_109_568, 16: 77_859_840, 64: 304_361_472}
    assert {r: 192 * count(12288, rank=r) for r in gpt3} == gpt3  # two in each of 96 layers


@pytest.mark.parametrize(("width", "rank"), [(1, 1), (7, 3), (100, 50), (768, 64)])
def test_default_width_fits_the_layer(width: int, rank: int) -> None:
    assert Bottleneck().at("", HostSpec((width, width), linear=False)).rank == rank


@pytest.mark.parametrize(
    ("placement", "activation", "function"),
    [
        ("houlsby", None, F.gelu),
        ("pfeiffer", None, F.relu),
        ("houlsby", "silu", F.silu),
        ("pfeiffer", "tanh", torch.tanh),
        ("houlsby", "none", lambda x: x),
    ],
)
def test_serial_formula(placement: str, activation: str | None, function: object) -> None:
    """h + W_up σ(W_down h + b₁) + b₂, at the output of GPT-2's FFN."""
    model = build("gpt2")
    mlp, x = model.transformer.h[0].mlp, torch.randn(2, 5, 32)
    h = mlp(x)
    deltaw.attach(model, Bottleneck(rank=5, placement=placement, activation=activation), targets=r".*\.0\.mlp")  # type: ignore[arg-type]
    randomise(model)
    (a,) = adapters(model).values()
    expected = h + function(h @ a.down.T + a.down_bias) @ a.up.T + a.up_bias  # type: ignore[operator]
    torch.testing.assert_close(mlp(x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("activation", [None, "relu"])
def test_parallel_formula(activation: str | None) -> None:
    """FFN(x) + W_up σ(W_down x), σ the identity unless asked for."""
    model = build("llama")
    mlp, x = model.model.layers[1].mlp, torch.randn(2, 5, 32)
    y = mlp(x)
    deltaw.attach(model, Bottleneck(rank=5, placement="parallel", activation=activation), targets=r".*\.1\.mlp")  # type: ignore[arg-type]
    randomise(model)
    (a,) = adapters(model).values()
    hidden = x @ a.down.T
    expected = y + (hidden if activation is None else hidden.relu()) @ a.up.T
    torch.testing.assert_close(mlp(x), expected, rtol=1e-5, atol=1e-6)


class HoulsbyLayer(nn.Module):
    """A BERT layer written out, with adapters where Houlsby et al. draw them (figure 2): after each dropout, before
    each residual add."""

    def __init__(self, layer: nn.Module, attention: nn.Module, feed_forward: nn.Module):
        super().__init__()
        self.layer, self.adapters = layer, nn.ModuleList([attention, feed_forward])

    def adapted(self, which: int, h: torch.Tensor) -> torch.Tensor:
        a = self.adapters[which]
        return h + F.gelu(h @ a.down.T + a.down_bias) @ a.up.T + a.up_bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inside, out = self.layer.attention, self.layer.output
        h = inside.output.dropout(inside.output.dense(inside.self(x)[0]))
        x = inside.output.LayerNorm(self.adapted(0, h) + x)
        h = out.dropout(out.dense(self.layer.intermediate(x)))
        return out.LayerNorm(self.adapted(1, h) + x)


def test_bert_adapters_stand_between_dropout_and_residual() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    model = BertModel(BertConfig(**sizes, vocab_size=64, hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.0))
    layer, x = model.encoder.layer[0], torch.randn(2, 5, 32)
    deltaw.attach(model, Bottleneck(rank=5), targets="all-linear")
    randomise(model)
    plain = HoulsbyLayer(copy.deepcopy(layer), *adapters(model).values())
    for part in (plain.layer.attention.output, plain.layer.output):
        part.__class__ = part.base_class
    for model_is_training in (False, True):  # in training the same masks fall in the same places
        layer.train(model_is_training)
        plain.train(model_is_training)
        torch.manual_seed(1)
        y = layer(x)
        torch.manual_seed(1)
        torch.testing.assert_close(y, plain(x), rtol=1e-5, atol=1e-6)


def test_bert_parallel_reads_the_input_of_the_whole_ffn() -> None:
    model = build("bert")
    layer, x = model.bert.encoder.layer[0], torch.randn(2, 5, 32)
    deltaw.attach(model, Bottleneck(rank=5, placement="parallel"), targets="mlp", layers=0)
    randomise(model)
    (a,) = adapters(model).values()
    into = layer.attention(x)[0]
    ffn = layer.output.dense(layer.intermediate(into))
    expected = layer.output.LayerNorm(ffn + into @ a.down.T @ a.up.T + into)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)


def test_initial_values() -> None:
    spec = HostSpec((512, 512), linear=False)
    zero = Bottleneck(rank=64).build(spec)
    assert isinstance(zero, BottleneckAdapter)
    assert not zero.up.any() and float(zero.down.detach().abs().max()) <= 512**-0.5 and zero.down.std() > 0
    for std in (1e-2, 1e-3):
        normal = Bottleneck(rank=64, init="normal", init_std=std).build(spec)
        for matrix in (normal.down, normal.up):
            assert float(matrix.detach().abs().max()) <= 2 * std
            assert abs(float(matrix.detach().std()) / std - 0.88) < 0.02  # σ of a normal cut at 2σ
        assert not normal.up_bias.any() and not normal.down_bias.any()


def test_the_papers_start_is_near_the_base_and_not_at_it() -> None:
    model = build("bert")
    before = outputs("bert", model)
    deltaw.attach(model, Bottleneck(rank=8, init="normal"), targets="all-linear")
    difference = float((outputs("bert", model) - before).abs().max())
    assert 0 < difference < 1e-2 * float(before.abs().max())


@pytest.mark.parametrize("family", ["llama", "qwen", "gpt2", "bert"])
@pytest.mark.parametrize(("placement", "per_layer"), [("houlsby", 2), ("pfeiffer", 1), ("parallel", 1)])
def test_adapters_per_layer(family: str, placement: str, per_layer: int) -> None:
    planned = plan(build(family), Bottleneck(placement=placement), "all-linear")  # type: ignore[arg-type]
    assert len(planned) == 2 * per_layer
    assert len(plan(build(family), Bottleneck(placement=placement), "mlp")) == 2  # type: ignore[arg-type]


def test_presets_names_and_layers() -> None:
    model = build("llama")
    assert plan(model, Bottleneck(), "attention").paths == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert plan(model, Bottleneck(), "all-linear", exclude="attention").paths == plan(model, Bottleneck(), "mlp").paths
    assert plan(model, Bottleneck(), "mlp", layers=1).paths == ["model.layers.1.mlp"]
    assert plan(model, Bottleneck(), "self_attn").paths == plan(model, Bottleneck(), "attention").paths
    assert plan(model, Bottleneck(), "layers.1").paths == ["model.layers.1.self_attn", "model.layers.1.mlp"]
    with pytest.raises(TargetError, match=r"'q_proj' matches 2 modules \(Linear\), none of which can carry bottleneck"):
        plan(model, Bottleneck(), "q_proj")
    with pytest.raises(TargetError, match=r"none of which can carry bottleneck"):
        plan(model, Bottleneck(placement="pfeiffer"), "attention")
    with pytest.raises(TargetError, match=r"none of which can carry bottleneck"):
        plan(tiny.model("t5"), Bottleneck(), "all-linear")


def test_norms_and_head_are_trained_beside() -> None:
    model = build("bert")
    before = outputs("bert", model)
    planned = deltaw.attach(
        model, Bottleneck(rank=4, train_norms=True, modules_to_save=("classifier",)), targets="all-linear"
    )
    norms, head = 2 * 32 * 5, 32 * 3 + 3  # embeddings and two in each of two layers
    assert planned.trainable == 4 * (2 * 4 * 32 + 4 + 32) + norms + head
    assert torch.equal(outputs("bert", model), before)
    model(input_ids=IDS, labels=torch.tensor([0, 2])).loss.backward()
    gradients = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert "bert.encoder.layer.0.output.LayerNorm.adapters.default.weight.copy" in gradients
    assert "classifier.adapters.default.bias.copy" in gradients
    assert all(".adapters." in name for name in gradients)


def test_norms_of_any_class() -> None:
    """A norm is known by its vector weight: RMSNorms of a model's own class count, biases of linear layers do not."""
    planned = plan(build("qwen"), Bottleneck(train_norms=True), "all-linear")
    trained = [target.site.path for target in planned.targets if target.method.name == "full"]
    assert len(trained) == 5 and all("norm" in path for path in trained)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"rank": 0}, "rank=0 is not a whole number"),
        ({"placement": "before"}, "placement='before' is none of houlsby, pfeiffer, parallel"),
        ({"activation": "swish"}, "activation='swish' is none of gelu"),
        ({"init": "zeros"}, "init='zeros' is none of zero, normal"),
        ({"init_std": 0}, "init_std=0 is not a positive number"),
        ({"modules_to_save": "classifier"}, "must be a list of names"),
        ({"train_norms": 1}, "neither true nor false"),
    ],
)
def test_bad_fields(fields: dict, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Bottleneck(**fields)
    assert words in str(caught.value)


def test_a_bottleneck_is_no_wider_than_the_layer() -> None:
    assert plan(build("llama"), Bottleneck(rank=32), "mlp").trainable > 0
    with pytest.raises(TargetError, match=r"rank 33 is wider than the layer's 32 features"):
        plan(build("llama"), Bottleneck(rank=33), "mlp")


def test_the_placement_survives_copies() -> None:
    """Which sublayers it asks for is part of the method wherever it comes from."""
    method = Bottleneck(placement="pfeiffer", rank=4)
    again = deltaw.core.method.from_dict(method.to_dict())
    for other in (again, pickle.loads(pickle.dumps(method)), copy.deepcopy(method)):
        assert (
            other == method
            and plan(build("llama"), other, "all-linear").paths == plan(build("llama"), method, "mlp").paths
        )
