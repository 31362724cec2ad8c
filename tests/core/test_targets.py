"""Which modules a target means, on the families people adapt; and what is said when it means none."""

import dataclasses
import re

import pytest
import torch
import transformers
from torch import nn

from core import tiny
from deltaw.core.attach import attach
from deltaw.core.errors import ConfigError, TargetError
from deltaw.core.layers import parse_layers
from deltaw.core.targets import plan
from deltaw.methods.full import Full
from deltaw.methods.lora import LoRA
from deltaw.methods.token_rows import TokenRows

LORA = LoRA(rank=4, alpha=8)

PRESETS = {
    "llama": {
        "attention": "model.layers.*.self_attn.{q_proj,k_proj,v_proj,o_proj}",
        "mlp": "model.layers.*.mlp.{gate_proj,up_proj,down_proj}",
        "rest": "",
    },
    "gpt2": {
        "attention": "transformer.h.*.attn.{c_attn,c_proj}",
        "mlp": "transformer.h.*.mlp.{c_fc,c_proj}",
        "rest": "",
    },
    "bert": {
        "attention": "bert.encoder.layer.*.attention.self.{query,key,value} bert.encoder.layer.*.attention.output.dense",
        "mlp": "bert.encoder.layer.*.intermediate.dense bert.encoder.layer.*.output.dense",
        "rest": "bert.pooler.dense",
    },
    "t5": {
        "attention": "encoder.block.*.layer.*.SelfAttention.{q,k,v,o} "
        "decoder.block.*.layer.*.SelfAttention.{q,k,v,o} decoder.block.*.layer.*.EncDecAttention.{q,k,v,o}",
        "mlp": "encoder.block.*.layer.*.DenseReluDense.{wi,wo} decoder.block.*.layer.*.DenseReluDense.{wi,wo}",
        "rest": "",
    },
    "clip": {
        "attention": "text_model.encoder.layers.*.self_attn.{k_proj,v_proj,q_proj,out_proj} "
        "vision_model.encoder.layers.*.self_attn.{k_proj,v_proj,q_proj,out_proj}",
        "mlp": "text_model.encoder.layers.*.mlp.{fc1,fc2} vision_model.encoder.layers.*.mlp.{fc1,fc2}",
        "rest": "visual_projection text_projection",
    },
}


def expand(patterns: str) -> set[str]:
    """'a.{b,c} d' → {'a.b', 'a.c', 'd'}"""
    found = set()
    for pattern in patterns.split():
        stem, _, leaves = pattern.partition("{")
        found |= {stem + leaf for leaf in leaves.rstrip("}").split(",")}
    return found


def folded(paths: list[str]) -> set[str]:
    return {re.sub(r"(?<=\.)\d+(?=\.)", "*", path) for path in paths}


@pytest.mark.parametrize("family", PRESETS)
def test_presets_take_the_layers_they_name_and_never_the_head(family: str) -> None:
    model, expected = tiny.model(family), {name: expand(text) for name, text in PRESETS[family].items()}
    for preset in ("attention", "mlp"):
        assert folded(plan(model, LORA, preset).paths) == expected[preset]
    everything = plan(model, LORA, "all-linear")
    assert folded(everything.paths) == expected["attention"] | expected["mlp"] | expected["rest"]
    assert len(everything.paths) == len(set(everything.paths)) == len(everything)
    both = plan(model, LORA, ["attention", "mlp"])
    assert folded(both.paths) == expected["attention"] | expected["mlp"]


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("q_proj", ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]),
        ("self_attn.q_proj", ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]),
        ("model.layers.1.mlp.up_proj", ["model.layers.1.mlp.up_proj"]),
        (r".*layers\.1\..*(q|k)_proj", ["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.k_proj"]),
        (["o_proj", r".*\.o_.*"], ["model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj"]),
        ("lm_head", ["lm_head"]),
        ("embed_tokens", ["model.embed_tokens"]),
    ],
    ids=str,
)
def test_names_paths_and_patterns(targets: str | list[str], expected: list[str]) -> None:
    assert plan(tiny.model("llama"), LORA, targets).paths == expected


def test_a_name_is_a_whole_name() -> None:
    """`proj` is not q_proj, `attn` is not c_attn: nothing is hit twice or by accident."""
    for name in ("proj", "attn.c", "roj"):
        with pytest.raises(TargetError, match="no module matched"):
            plan(tiny.model("gpt2"), LORA, name)


def test_exclude_and_layers() -> None:
    model = tiny.model("llama")
    assert plan(model, LORA, "attention", exclude=["k_proj", "model.layers.0"]).paths == [
        f"model.layers.1.self_attn.{name}_proj" for name in "qvo"
    ]
    for layers in ("1", "1-1", [1], {1}):
        assert plan(model, LORA, "q_proj", layers=layers).paths == ["model.layers.1.self_attn.q_proj"]
    assert len(plan(model, LORA, "q_proj", layers="0-1")) == 2
    assert parse_layers("0-3, 7") == {0, 1, 2, 3, 7}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"layers": "1-3"}, "layers [2, 3] hold no target; targets are in layers [0, 1]"),
        ({"layers": "a-b"}, "layers='a-b' is not a range of layer numbers: write for example '0-3,7'"),
        ({"exclude": "x_proj"}, "exclude='x_proj' takes nothing away from the targets"),
    ],
)
def test_selections_that_select_nothing(arguments: dict, sentence: str) -> None:
    with pytest.raises(TargetError, match=re.escape(sentence)):
        plan(tiny.model("llama"), LORA, "all-linear", **arguments)


def test_near_miss_says_what_was_meant() -> None:
    """Trap 8, the exact sentence."""
    config = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_key_value_heads": 1}
    model = transformers.LlamaModel(transformers.LlamaConfig(num_hidden_layers=28, vocab_size=8, **config))
    with pytest.raises(TargetError) as error:
        plan(model, LORA, "q_prj")
    assert error.value.faults == ("no module matched 'q_prj'; did you mean 'q_proj'? (28 modules)",)
    assert str(error.value) == "targets for LoRA: no module matched 'q_prj'; did you mean 'q_proj'? (28 modules)"


def test_a_name_that_resembles_nothing_lists_what_is_there() -> None:
    with pytest.raises(TargetError) as error:
        plan(tiny.model("llama"), LORA, "zzzz")
    assert error.value.faults == (
        "no module matched 'zzzz'; lora fits: q_proj (2), k_proj (2), v_proj (2), o_proj (2), gate_proj (2), "
        "up_proj (2), down_proj (2), embed_tokens (1), lm_head (1)",
    )


def test_a_pattern_that_hits_only_modules_without_a_weight() -> None:
    with pytest.raises(TargetError) as error:
        plan(tiny.model("llama"), LORA, "self_attn")
    assert error.value.faults == (
        "'self_attn' matches 2 modules (LlamaAttention), none of which can carry lora; 8 modules inside can: name those",
    )
    with pytest.raises(TargetError, match=r"'' matches 1 module \(LlamaForCausalLM\).*16 modules inside can"):
        plan(tiny.model("llama"), LORA, "")


def test_all_faults_come_at_once() -> None:
    with pytest.raises(TargetError) as error:
        plan(tiny.model("llama"), LoRA(rank=40), ["q_prj", "zzzz", "k_proj"])
    assert len(error.value.faults) == 3 and "(3 faults)" in str(error.value)
    with pytest.raises(TargetError, match=r"'\(\(' is not a valid regular expression"):
        plan(tiny.model("llama"), LORA, ["q_proj", "(("])
    with pytest.raises(TargetError, match="7 is not a module name"):
        plan(tiny.model("llama"), LORA, ["q_proj", 7])  # type: ignore[list-item]


def test_a_rank_above_both_dimensions() -> None:
    model = nn.Sequential(nn.Linear(32, 48))
    assert plan(model, LoRA(rank=48), "0").trainable == 48 * 80
    with pytest.raises(TargetError, match="rank 49 is above both dimensions, 32 and 48: at most 32 is of use"):
        plan(model, LoRA(rank=49), "0")


def test_the_attention_of_torch_is_refused_by_name_and_left_out_of_presets() -> None:
    model = nn.TransformerEncoderLayer(16, 2, 32)
    sentence = (
        "MultiheadAttention.forward reads its weight itself instead of calling it, an adapter there would be ignored"
    )
    for method in (LORA, Full()):
        with pytest.raises(TargetError, match=sentence):
            plan(model, method, "out_proj")
    with pytest.raises(TargetError, match=sentence):
        plan(model, LoRA(rank=2, bias="all"), "linear1")
    for both in (["out_proj", "all-linear"], ["all-linear", "out_proj"]):  # a preset leaves out what it took itself
        with pytest.raises(TargetError, match=sentence):
            plan(model, LORA, both)
    chosen = plan(model, LORA, "all-linear")
    assert chosen.paths == ["linear1", "linear2"]
    assert chosen.notes == (f"left out self_attn.out_proj: {sentence}",) and chosen.notes[0] in str(chosen)


class Scaled(nn.Linear):
    """A subclass that computes something else: no x·Wᵀ + b."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 3 * super().forward(input)


class Renamed(nn.Linear):
    """A subclass with a forward of its own that computes the same."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return input @ self.weight.T + self.bias


def test_subclasses_are_probed() -> None:
    model = nn.ModuleDict({"scaled": Scaled(8, 6), "renamed": Renamed(8, 6), "norm": nn.Embedding(9, 4, max_norm=1.0)})
    assert plan(model, LORA, "renamed").paths == ["renamed"]
    with pytest.raises(TargetError, match=r"scaled: Scaled computes something else than x·Wᵀ \+ b"):
        plan(model, LORA, "scaled")
    with pytest.raises(TargetError, match="max_norm rewrites its own weight"):
        plan(model, LORA, "norm")


def test_patterns_for_ranks_and_alphas() -> None:
    method = LoRA(
        rank=8, alpha=16, rank_pattern={"q_proj": 2, r"layers\.1\.self_attn\.v_proj": 3}, alpha_pattern={"v_proj": 5}
    )
    chosen = {
        t.site.path: (t.method.rank, t.method.alpha)
        for t in plan(tiny.model("llama"), method, ["q_proj", "v_proj"]).targets
    }
    assert chosen == {
        "model.layers.0.self_attn.q_proj": (2, 16.0),
        "model.layers.0.self_attn.v_proj": (8, 5.0),
        "model.layers.1.self_attn.q_proj": (2, 16.0),
        "model.layers.1.self_attn.v_proj": (3, 5.0),
    }
    with pytest.raises(TargetError, match="rank_pattern 'q_prj' matches no adapted module; did you mean 'q_proj'"):
        plan(tiny.model("llama"), LoRA(rank_pattern={"q_prj": 2}), "q_proj")
    with pytest.raises(TargetError, match="matches no adapted module"):  # PEFT's rule: a whole name, not a part
        plan(tiny.model("llama"), LoRA(rank_pattern={"proj": 2}), "q_proj")
    with pytest.raises(ConfigError, match=r"alpha_pattern: '\(\(' is not a valid regular expression"):
        LoRA(alpha_pattern={"((": 2})


def test_a_plan_prints_as_a_table() -> None:
    assert str(plan(tiny.model("llama"), LORA, ["q_proj", "lm_head"])) == (
        "module                           layer   shape  method  rank  count  trainable\n"
        "model.layers.*.self_attn.q_proj  Linear  32×32  lora    4     2      512\n"
        "lm_head                          Linear  64×32  lora    4     1      384\n"
        "3 adapters, 896 trainable, 4.568 % of the base's 19,616"
    )


def test_planning_is_pure() -> None:
    model = tiny.model("llama")
    before = [(path, type(module), set(module.__dict__)) for path, module in model.named_modules()]
    flags, state = [p.requires_grad for p in model.parameters()], torch.get_rng_state()
    first = plan(model, LORA, "all-linear")
    assert [(path, type(module), set(module.__dict__)) for path, module in model.named_modules()] == before
    assert [p.requires_grad for p in model.parameters()] == flags and torch.equal(torch.get_rng_state(), state)
    assert str(attach(model, LORA, targets="all-linear")) == str(first)


def test_adapters_are_no_targets() -> None:
    """Planning on an adapted model sees the base only, by its own class names and counts."""
    model = tiny.model("llama")
    first = plan(model, LORA, ["attention", "embed_tokens"])
    attach(model, LORA, targets=["attention", "embed_tokens"], name="a")
    assert str(plan(model, LORA, ["attention", "embed_tokens"])) == str(first)
    whole = plan(model, Full(), "self_attn")
    assert whole.paths == [f"model.layers.{i}.self_attn.{n}_proj" for i in (0, 1) for n in "qkvo"]
    assert not [t for t in plan(model, LoRA(rank=2, bias="all"), "q_proj").targets if "adapters" in t.site.path]


def test_biases_and_whole_modules_are_companions() -> None:
    model = tiny.model("bert")
    plain = plan(model, LoRA(rank=2), "query")
    own = plan(model, LoRA(rank=2, bias="lora_only"), "query")
    assert {str(t.site) for t in own.targets} - {str(t.site) for t in plain.targets} == {
        f"bert.encoder.layer.{i}.attention.self.query:bias" for i in (0, 1)
    }
    every = plan(model, LoRA(rank=2, bias="all"), "query")
    biases = [path for path, _ in tiny.model("bert").named_parameters() if path.endswith("bias")]
    assert [str(t.site) for t in every.targets if t.site.slot == "bias"] == [
        b.removesuffix(".bias") + ":bias" for b in biases
    ]
    head = plan(model, LoRA(rank=2, modules_to_save=("classifier",)), "query")
    assert {str(t.site) for t in head.targets if t.method.name == "full"} == {"classifier", "classifier:bias"}
    assert head.trainable == plain.trainable + 2 * 32 + 2
    with pytest.raises(ConfigError, match=r"modules_to_save='clasifier' matches no module .*did you mean 'classifier'"):
        plan(model, LoRA(rank=2, modules_to_save=("clasifier",)), "query")


def test_a_plan_has_every_site_once() -> None:
    model = tiny.model("llama")
    once = plan(model, LORA, ["q_proj", "all-linear", "self_attn.q_proj"])
    with pytest.raises(TargetError, match=r"self_attn\.q_proj is planned 2 times: leave all but one out"):
        dataclasses.replace(once, targets=(*once.targets, once.targets[0]))


def test_token_rows_leave_no_gap_after_the_vocabulary() -> None:
    assert plan(tiny.model("llama"), TokenRows(tokens=(3, 63)), "embed_tokens").trainable == 2 * 32
    assert plan(tiny.model("llama"), TokenRows(tokens=(3, 65, 64)), "embed_tokens").trainable == 3 * 32  # two new ones
    with pytest.raises(TargetError, match=r"tokens \[65\] are outside the vocabulary of 64, new ones would be 64"):
        plan(tiny.model("llama"), TokenRows(tokens=(3, 65)), "embed_tokens")


@pytest.mark.parametrize(
    ("targets", "rank", "trainable"),
    [("all-linear", 8, 5_046_272), ("all-linear", 32, 20_185_088), (["q_proj", "v_proj"], 32, 4_587_520)],
    ids=str,
)
def test_a_large_model_is_planned_without_weights(targets: str | list[str], rank: int, trainable: int) -> None:
    """T20: Qwen3-0.6B from its config alone."""
    config = transformers.Qwen3Config(
        hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8,
        head_dim=128, vocab_size=151_936, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.Qwen3ForCausalLM(config)
    chosen = plan(model, LoRA(rank=rank, alpha=2 * rank), targets)
    assert chosen.trainable == trainable and chosen.base_parameters == 596_049_920
