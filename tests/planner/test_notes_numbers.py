"""Numbers that circulate about LoRA, each computed by our own code: one table, exact where it says so.

Models are outlines of published configurations, written out here: no weight is made. Where a number that circulates is
rounded or wrong, the right one stands beside it.
"""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as t
from torch import nn

from deltaw.core.facts import facts
from deltaw.core.plan import TargetPlan
from deltaw.core.targets import plan
from deltaw.methods.lora import LoRA
from deltaw.planner import arithmetic as a

SEVEN, Q_V = "all-linear", ["q_proj", "v_proj"]
NO_GATE = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
FFN = ["up_proj", "down_proj", "gate_proj"]

CONFIGS = {
    "qwen": t.Qwen3Config(
        vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
    ),
    "llama": t.LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
    ),
    "gemma": t.GemmaConfig(
        vocab_size=256000, hidden_size=2048, intermediate_size=16384, num_hidden_layers=18, num_attention_heads=8,
        num_key_value_heads=1, head_dim=256,
    ),
}  # fmt: skip
GPT3 = 175_255_800_000
"""As the paper counts it."""


class Block(nn.Module):
    """The matrices of a GPT-3 layer, 12288 wide; biases and norms aside."""

    def __init__(self) -> None:
        super().__init__()
        width = 12288
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            self.add_module(name, nn.Linear(width, width, bias=False))
        self.up_proj, self.down_proj = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)


@functools.cache
def model(name: str) -> Any:
    with torch.device("meta"):
        if name == "gpt3":
            return nn.ModuleList(Block() for _ in range(96))
        if name == "clip":
            size = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
            return t.CLIPVisionModel(t.CLIPVisionConfig(image_size=336, patch_size=14, **size))
        return t.AutoModelForCausalLM.from_config(CONFIGS[name])


def square(width: int, bias: bool = False) -> nn.Linear:
    return nn.Linear(width, width, bias=bias, device="meta")


def planned(name: str, rank: int, targets: Any = SEVEN) -> TargetPlan:
    return plan(model(name), LoRA(rank=rank), targets)


def one(width: int, rank: int, bias: bool = False, train_bias: bool = False) -> TargetPlan:
    """LoRA on a single square layer."""
    return plan(square(width, bias), LoRA(rank=rank, bias="all" if train_bias else "none"), "")


def trained(name: str, rank: int, targets: Any = SEVEN) -> int:
    return planned(name, rank, targets).trainable


def percent(name: str, rank: int, targets: Any = SEVEN) -> float:
    found = planned(name, rank, targets)
    return a.share(found.trainable, found.base_parameters)


def weights(name: str, targets: Any) -> int:
    """Numbers in the weights that the targets name."""
    return sum(target.spec.numel for target in planned(name, 1, targets).targets)


def owned(name: str, word: str) -> int:
    """Parameters of modules of a class with this word in its name."""
    found = [f for f in facts(model(name), LoRA()) if word in f.layer]
    return sum(int(torch.Size(shape).numel()) for f in found for shape in f.parameters.values())


def whole(name: str) -> int:
    return planned(name, 1, ["q_proj"]).base_parameters


def layer(width: int, rank: int) -> a.Layer:
    return a.Layer("", width, width, rank)


def factors(width: int, rank: int) -> list[int]:
    """Sizes of A and B."""
    with torch.device("meta"):
        adapter = LoRA(rank=rank).build(one(width, rank).targets[0].spec)
    return [p.numel() for p in adapter.parameters()]


NF4_DOUBLE_BITS = 4 + 8 / 64 + 32 / (64 * 256)
"""Bits of a weight in NF4 with double quantisation: an 8-bit scale for 64 weights, an fp32 one for 256 of those."""


def weight_bytes(parameters: float, bits: float) -> float:
    return parameters * bits / 8


def logits_bytes(tokens: int, vocabulary: int, bits: int = 32) -> int:
    """Of the logits of so many tokens, held at once."""
    return tokens * vocabulary * bits // 8


def times_fewer(whole: float, part: float) -> float:
    return whole / part


def held() -> float:
    """Billions of numbers held in training LoRA with 175 frozen, 0.035 trained, whose own values are left out."""
    gradient_and_moments = 3
    return 175 + gradient_and_moments * 0.035


Row = tuple[str, Callable[[], Any], Any]
TABLE: list[Row] = [
    # T2: one GPT-3 matrix
    ("T2 12288²", lambda: one(12288, 8).base_parameters, 150_994_944),
    ("T2 A and B at r 8", lambda: factors(12288, 8), [98_304, 98_304]),
    ("T2 r 8", lambda: one(12288, 8).trainable, 196_608),
    ("T2 times fewer at r 8", lambda: times_fewer(150_994_944, one(12288, 8).trainable), 768),
    ("T2 per cent at r 8", lambda: round(a.share(one(12288, 8).trainable, 150_994_944), 7), 0.1302083),
    ("T2 r 4", lambda: one(12288, 4).trainable, 98_304),
    ("T2 times fewer at r 4", lambda: times_fewer(150_994_944, one(12288, 4).trainable), 1536),
    # T3, T4, T5: 1024²
    ("T3 r 4", lambda: one(1024, 4).trainable, 8_192),
    ("T3 times fewer", lambda: times_fewer(one(1024, 4).base_parameters, one(1024, 4).trainable), 128),
    ("T3 per cent", lambda: a.share(one(1024, 4).trainable, one(1024, 4).base_parameters), 0.78125),
    ("T3 with the bias in the base", lambda: one(1024, 4, bias=True).base_parameters, 1_049_600),
    ("T3 times fewer, bias frozen", lambda: times_fewer(1_049_600, one(1024, 4, bias=True).trainable), 128.125),
    ("T3 bias trained", lambda: one(1024, 4, True, True).trainable, 9_216),
    (
        "T3 times fewer, bias trained",
        lambda: round(times_fewer(1_049_600, one(1024, 4, True, True).trainable), 4),
        113.8889,
    ),
    ("T3 per cent, bias trained", lambda: round(a.share(one(1024, 4, True, True).trainable, 1_049_600), 7), 0.8780488),
    ("T4 A and B at r 16", lambda: factors(1024, 16), [16_384, 16_384]),
    ("T4 r 16", lambda: one(1024, 16).trainable, 32_768),
    ("T4 times fewer", lambda: times_fewer(1024**2, one(1024, 16).trainable), 32),
    ("T4 per cent", lambda: a.share(one(1024, 16).trainable, 1024**2), 3.125),
    ("T5 r 8", lambda: one(1024, 8).trainable, 16_384),
    ("T5 with W trained by mistake", lambda: one(1024, 8).trainable + one(1024, 8).base_parameters, 1_064_960),
    # T6: break-even ranks
    *((f"T6 {n}²", functools.partial(a.break_even, n, n), n / 2) for n in (768, 1024, 4096, 12288)),
    ("T6 1024×3072", lambda: a.break_even(1024, 3072), 768),
    ("T6 4096×11008", lambda: round(a.break_even(4096, 11008), 2), 2985.22),
    ("T6 both ways", lambda: a.break_even(11008, 4096), a.break_even(4096, 11008)),
    # T16: GPT-3, q and v
    ("T16 matrices", lambda: len(planned("gpt3", 1, Q_V)), 192),
    ("T16 r 1", lambda: trained("gpt3", 1, Q_V), 4_718_592),
    ("T16 r 4", lambda: trained("gpt3", 4, Q_V), 18_874_368),
    ("T16 r 4, per cent", lambda: round(a.share(trained("gpt3", 4, Q_V), GPT3), 7), 0.0107696),
    ("T16 r 4, fp16", lambda: weight_bytes(trained("gpt3", 4, Q_V), 16), 37_748_736),
    ("T16 r 4, fp16 in MiB", lambda: weight_bytes(trained("gpt3", 4, Q_V), 16) / 2**20, 36),
    ("T16 r 8", lambda: trained("gpt3", 8, Q_V), 37_748_736),
    ("T16 r 8, per cent", lambda: round(a.share(trained("gpt3", 8, Q_V), GPT3), 7), 0.0215392),
    ("T16 r 64", lambda: trained("gpt3", 64, Q_V), 301_989_888),
    ("T16 r 64, per cent", lambda: round(a.share(trained("gpt3", 64, Q_V), GPT3), 7), 0.1723138),
    ("T16 r 64, fp16", lambda: weight_bytes(trained("gpt3", 64, Q_V), 16), 603_979_776),
    # T17: bytes of 175,255.8 M parameters, in GB
    ("T17 fp32", lambda: weight_bytes(GPT3, 32) / 1e9, 701.0232),
    ("T17 16 bit", lambda: weight_bytes(GPT3, 16) / 1e9, 350.5116),
    ("T17 at 4.127 bit", lambda: round(weight_bytes(GPT3, 4.127) / 1e9, 4), 90.4101),
    ("T17 NF4 twice quantised, unrounded", lambda: round(weight_bytes(GPT3, NF4_DOUBLE_BITS) / 1e9, 4), 90.4091),
    ("T17 bits of that", lambda: round(NF4_DOUBLE_BITS, 3), 4.127),
    ("T17 4 bit", lambda: weight_bytes(GPT3, 4) / 1e9, 87.6279),
    ("T17 4 bit in GiB", lambda: round(weight_bytes(GPT3, 4) / 2**30, 2), 81.61),
    ("T17 16 B a parameter", lambda: round(a.training_bytes(GPT3) / 1e9, 2), 2_804.09),
    # T18: shares of memory and of time
    ("T18 numbers of full fine-tuning", lambda: 4 * 175, 700),
    ("T18 numbers of LoRA", lambda: round(held(), 9), 175.105),
    ("T18 of all", lambda: round(a.share(held(), 4 * 175), 3), 25.015),
    ("T18 the paper's bytes", lambda: round(a.share(350, 1200), 2), 29.17),
    ("T18 hours of cards", lambda: round(a.share(24, 8 * 72), 2), 4.17),
    ("T18 claimed bytes", lambda: round(a.share(80, 700), 2), 11.43),
    ("T18 eight cards, GB", lambda: 8 * weight_bytes(20e9, 32) / 1e9, 640),
    # T19: Qwen3-0.6B
    ("T19 all", lambda: whole("qwen"), 596_049_920),
    ("T19 linear layers", lambda: weights("qwen", SEVEN), 440_401_920),
    ("T19 embedding", lambda: owned("qwen", "Embedding"), 155_582_464),
    ("T19 norms", lambda: owned("qwen", "RMSNorm"), 65_536),
    ("T19 fp32", lambda: weight_bytes(whole("qwen"), 32), 2_384_199_680),
    ("T19 bf16", lambda: weight_bytes(whole("qwen"), 16), 1_192_099_840),
    ("T19 16 B", lambda: a.training_bytes(whole("qwen"), "fp32"), 9_536_798_720),
    ("T19 12 B", lambda: a.training_bytes(whole("qwen"), "mixed"), 7_152_599_040),
    ("T19 8 B", lambda: a.training_bytes(whole("qwen"), "bf16"), 4_768_399_360),
    # T20: ranks on it
    ("T20 per rank and layer", lambda: trained("qwen", 1) / 28, 22_528),
    *(
        (f"T20 r {rank}", functools.partial(trained, "qwen", rank), count)
        for rank, count in (
            (8, 5_046_272), (16, 10_092_544), (32, 20_185_088), (64, 40_370_176), (128, 80_740_352), (256, 161_480_704),
            (512, 322_961_408),
        )
    ),
    ("T20 r 32, per cent", lambda: round(percent("qwen", 32), 3), 3.386),
    ("T20 r 32, gradients", lambda: weight_bytes(trained("qwen", 32), 32), 80_740_352),
    ("T20 r 32, 16 B", lambda: a.training_bytes(trained("qwen", 32)), 322_961_408),
    ("T20 r 512, per cent", lambda: round(percent("qwen", 512), 2), 54.18),
    ("T20 without gate_proj", lambda: trained("qwen", 32, NO_GATE), 16_515_072),
    ("T20 without gate_proj, gradients", lambda: weight_bytes(trained("qwen", 32, NO_GATE), 32), 66_060_288),
    ("T20 without gate_proj, 16 B", lambda: a.training_bytes(trained("qwen", 32, NO_GATE)), 264_241_152),
    ("T20 q, v at r 32", lambda: trained("qwen", 32, Q_V), 4_587_520),
    # T21: logits
    ("T21 Qwen3", lambda: logits_bytes(2048, 151_936), 1_244_659_712),
    ("T21 Gemma", lambda: logits_bytes(1088, 256_000), 1_114_112_000),
    # T22: Llama-7B
    ("T22 all", lambda: whole("llama"), 6_738_415_616),
    ("T22 q, v at r 8", lambda: trained("llama", 8, Q_V), 4_194_304),
    ("T22 q, v at r 8, fp16", lambda: weight_bytes(trained("llama", 8, Q_V), 16), 8_388_608),
    ("T22 q, v at r 8, per cent", lambda: round(percent("llama", 8, Q_V), 4), 0.0622),
    ("T22 r 8", lambda: trained("llama", 8), 19_988_480),
    ("T22 r 16", lambda: trained("llama", 16), 39_976_960),
    ("T22 r 16, fp16", lambda: weight_bytes(trained("llama", 16), 16), 79_953_920),
    ("T22 r 16, per cent", lambda: round(percent("llama", 16), 4), 0.5933),
    ("T22 r 64", lambda: trained("llama", 64), 159_907_840),
    # T23: Gemma-2B, and what leaks into CLIP-L
    ("T23 all", lambda: whole("gemma"), 2_506_172_416),
    ("T23 per rank and layer", lambda: trained("gemma", 1) / 18, 68_096),
    ("T23 of that, the MLP", lambda: trained("gemma", 1, "mlp") / 18, 55_296),
    ("T23 r 16", lambda: trained("gemma", 16), 19_611_648),
    ("T23 r 64", lambda: trained("gemma", 64), 78_446_592),
    ("T23 r 64, 16 B", lambda: a.training_bytes(trained("gemma", 64)), 1_255_145_472),
    ("T23 r 128", lambda: trained("gemma", 128), 156_893_184),
    ("T23 q, v, o at r 16", lambda: trained("gemma", 16, [*Q_V, "o_proj"]), 3_022_848),
    ("T23 all weights, 16 B", lambda: round(a.training_bytes(whole("gemma")) / 1e9, 3), 40.099),
    ("T23 all weights, 8 B", lambda: round(a.training_bytes(whole("gemma"), "bf16") / 1e9, 3), 20.049),
    ("T23 CLIP-L, q and v at r 16", lambda: trained("clip", 16, Q_V), 1_572_864),
    # T24: what q and v hold
    ("T24 GPT-3", lambda: weights("gpt3", Q_V) / weights("gpt3", SEVEN), 1 / 6),
    ("T24 GPT-3, FFN", lambda: weights("gpt3", FFN[:2]) / weights("gpt3", SEVEN), 2 / 3),
    ("T24 Llama-7B", lambda: round(a.share(weights("llama", Q_V), weights("llama", SEVEN)), 2), 16.58),
    ("T24 Llama-7B, FFN", lambda: round(a.share(weights("llama", FFN), weights("llama", SEVEN)), 2), 66.84),
    ("T24 Qwen3-0.6B, of the linears", lambda: a.share(weights("qwen", Q_V), weights("qwen", SEVEN)), 20),
    ("T24 Qwen3-0.6B, of the model", lambda: round(a.share(weights("qwen", Q_V), whole("qwen")), 2), 14.78),
    # T28, T29: multiplications
    ("T28 12288² r 8, %", lambda: round(100 * a.unmerged_share([layer(12288, 8)]), 4), 0.1302),
    ("T28 4096² r 16, %", lambda: 100 * a.unmerged_share([layer(4096, 16)]), 0.78125),
    ("T28 1024² r 8, %", lambda: 100 * a.unmerged_share([layer(1024, 8)]), 1.5625),
    ("T29 N 4096, R 16", lambda: round(a.training_share([layer(4096, 16)]), 4), 0.6745),
    ("T29 N 4096, R 256", lambda: round(a.training_share([layer(4096, 256)]), 4), 0.7917),
    ("T29 N 1024, R 32", lambda: round(a.training_share([layer(1024, 32)]), 4), 0.7292),
    ("T29 as published", lambda: a.training_share([layer(64, 4)]), pytest.approx((2 * 64**2 + 6 * 64 * 4) / (3 * 64**2))),
]  # fmt: skip


@pytest.mark.parametrize(("compute", "value"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE])
def test_a_number_is_as_computed(compute: Callable[[], Any], value: Any) -> None:
    assert compute() == value
