"""LLaMA-Adapter: counts, the formula written out densely, positions, PEFT's AdaptionPrompt beside it."""

import math
from typing import Any

import pytest
import torch
import transformers
from core import tiny
from formats.families import GQA, IDS, build, outputs, randomise
from torch import Tensor

import deltaw
from deltaw.core.attach import adapters
from deltaw.core.errors import ConfigError, TargetError
from deltaw.core.host import HostSpec
from deltaw.core.targets import plan
from deltaw.methods.llama_adapter import LlamaAdapter
from deltaw.methods.lora import LoRA


def test_counts_of_the_paper() -> None:
    with torch.device("meta"):
        adapter = LlamaAdapter().build(HostSpec((32, 4096), linear=False))
    prompt, gate = (30 * parameter.numel() for parameter in (adapter.prompt, adapter.gate))
    assert (prompt, gate) == (1_228_800, 960)


def test_initial_values() -> None:
    adapter = LlamaAdapter(length=64).build(HostSpec((4, 128), linear=False))
    assert not adapter.gate.any()
    assert abs(float(adapter.prompt.detach().std()) - 1) < 0.03 and abs(float(adapter.prompt.detach().mean())) < 0.03


def heads(x: Tensor, count: int) -> Tensor:
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Each pair (i, i + d/2) of a head's numbers turned by its position's angle."""
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    cos, sin = cos[..., :half], sin[..., :half]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def dense(q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, prompt_v: Tensor, gate: Tensor, causal: bool) -> Tensor:
    """softmax(q kᵀ/√d + mask)·v + tanh(g)·softmax(q k_Pᵀ/√d)·v_P, row by row and head by head."""
    out = torch.zeros(q.shape[0], q.shape[2], q.shape[1], q.shape[3])
    scale = 1 / math.sqrt(q.shape[3])
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for t in range(q.shape[2]):
                seen = t + 1 if causal else k.shape[2]
                text = (k[b, h, :seen] @ q[b, h, t] * scale).softmax(0) @ v[b, h, :seen]
                read = (prompt_k[0, h] @ q[b, h, t] * scale).softmax(0) @ prompt_v[0, h]
                out[b, t, h] = text + math.tanh(float(gate[h])) * read
    return out.flatten(2)


def captured(model: Any, attention: Any) -> tuple[tuple[Any, ...], dict[str, Any], Tensor]:
    """What an attention module is called with in the whole model, and what it answers."""
    seen: list[Any] = []
    handle = attention.register_forward_hook(
        lambda m, args, kwargs, y: seen.append((args, kwargs, y)), with_kwargs=True
    )
    with torch.no_grad():
        model(input_ids=IDS)
    handle.remove()
    args, kwargs, y = seen[0]
    return args, kwargs, y[0]


def tuned(family: str, length: int = 5) -> Any:
    model = build(family) if family != "qwen3" else qwen3()
    deltaw.attach(model, LlamaAdapter(length=length), targets="all-linear")
    randomise(model)
    for adapter in adapters(model).values():
        adapter.gate.data.normal_()
    return model


def qwen3() -> Any:
    torch.manual_seed(7)
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**GQA, head_dim=12)).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    return model


@pytest.mark.parametrize("family", ["llama", "qwen", "qwen3"])
@torch.no_grad()
def test_dense_reference_on_grouped_rotary_attention(family: str) -> None:
    model = tuned(family)
    attention = model.model.layers[1].self_attn
    _, kwargs, y = captured(model, attention)
    x, (cos, sin) = kwargs["hidden_states"], kwargs["position_embeddings"]
    adapter, groups = attention.adapters["default"]["heads"], 2
    q_norm = attention.q_norm if family == "qwen3" else lambda x: x
    k_norm = attention.k_norm if family == "qwen3" else lambda x: x
    q = turned(q_norm(heads(attention.q_proj(x), 4)), cos[:, None], sin[:, None])
    k = turned(k_norm(heads(attention.k_proj(x), 2)), cos[:, None], sin[:, None]).repeat_interleave(groups, 1)
    v = heads(attention.v_proj(x), 2).repeat_interleave(groups, 1)
    prompt_k = k_norm(heads(attention.k_proj(adapter.prompt)[None], 2)).repeat_interleave(groups, 1)
    prompt_v = heads(attention.v_proj(adapter.prompt)[None], 2).repeat_interleave(groups, 1)
    expected = attention.o_proj(dense(q, k, v, prompt_k, prompt_v, adapter.gate, causal=True))
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
@torch.no_grad()
def test_two_live_adapters_both_add_to_the_heads(family: str) -> None:
    """Up to the projection both reads add up, whatever the families fuse: compared with one adapter at a time."""
    model = tuned(family)
    deltaw.attach(model, LlamaAdapter(length=3), targets="all-linear", name="more")
    for adapter in adapters(model, "more").values():
        adapter.gate.normal_()
    layer = {
        "llama": "model.layers.0.self_attn",
        "gpt2": "transformer.h.0.attn",
        "bert": "bert.encoder.layer.0.attention.self",
    }
    outputs = {}
    for names in ((), ("default",), ("more",), ("default", "more")):
        deltaw.use(model, dict.fromkeys(names, 1.0))
        outputs[names] = captured(model, model.get_submodule(layer[family]))[2]
    base = outputs[()]
    expected = outputs["default",] + outputs["more",] - base
    torch.testing.assert_close(outputs["default", "more"], expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(outputs["default", "more"], outputs["default",], atol=1e-4)


@torch.no_grad()
def test_dense_reference_on_gpt2() -> None:
    model = tuned("gpt2")
    attention = model.transformer.h[1].attn
    args, _, y = captured(model, attention)
    adapter = attention.adapters["default"]["heads"]
    q, k, v = (heads(part, 4) for part in attention.c_attn(args[0]).split(32, -1))
    _, prompt_k, prompt_v = (heads(part, 4) for part in attention.c_attn(adapter.prompt[None]).split(32, -1))
    expected = attention.c_proj(dense(q, k, v, prompt_k, prompt_v, adapter.gate, causal=True))
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_dense_reference_on_bert() -> None:
    model = tuned("bert")
    attention = model.bert.encoder.layer[1].attention.self
    args, _, y = captured(model, attention)
    adapter = attention.adapters["default"]["heads"]
    q, k, v = (heads(part(args[0]), 4) for part in (attention.query, attention.key, attention.value))
    prompt_k, prompt_v = (heads(part(adapter.prompt[None]), 4) for part in (attention.key, attention.value))
    torch.testing.assert_close(y, dense(q, k, v, prompt_k, prompt_v, adapter.gate, False), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_prompts_have_no_positions_and_queries_do() -> None:
    """Shifting all positions changes what is read from the prompt, and nothing of causal attention itself."""
    model, base = tuned("llama"), build("llama")
    shifted = torch.arange(IDS.shape[1])[None] + 20
    torch.testing.assert_close(base(IDS, position_ids=shifted).logits, base(IDS).logits, rtol=1e-4, atol=1e-5)
    assert float((model(IDS, position_ids=shifted).logits - model(IDS).logits).abs().max()) > 1e-3


@torch.no_grad()
def test_adapters_on_the_projections_count() -> None:
    """A merged LoRA and a live one under the prompts give the same: keys and values go through the modules."""
    model = tuned("llama")
    deltaw.attach(model, LoRA(rank=4, alpha=6), targets="attention", name="lora")
    for adapter in adapters(model, "lora").values():
        adapter.lora_B.normal_(std=0.3)
    deltaw.use(model, {"default": 1.0, "lora": 1.0})
    live = model(IDS).logits
    deltaw.merge(model, "lora")
    torch.testing.assert_close(model(IDS).logits, live, rtol=1e-4, atol=1e-5)
    deltaw.use(model, "default")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@torch.no_grad()
def test_peft_has_one_plain_gate(family: str) -> None:
    """PEFT's function is ours at g = artanh(gate) in every head; on GPT-2 it also leaves out the output projection."""
    import peft

    theirs = peft.get_peft_model(
        build(family), peft.AdaptionPromptConfig(adapter_len=5, adapter_layers=2, task_type="CAUSAL_LM")
    ).eval()
    ours = build(family)
    deltaw.attach(ours, LlamaAdapter(length=5), targets="all-linear")
    prompts = [module for module in theirs.modules() if hasattr(module, "adaption_prompt")]
    for number, (other, adapter) in enumerate(zip(prompts, adapters(ours).values(), strict=True)):
        other.adaption_gate.fill_(0.6 - number)
        adapter.prompt.copy_(other.adaption_prompt[0])
        adapter.gate.copy_(other.adaption_gate.expand(4))
    expected = theirs(input_ids=IDS).logits
    apart = float((outputs(family, ours) - expected).abs().max())
    for adapter in adapters(ours).values():
        adapter.gate.atanh_()
    if family == "llama":
        torch.testing.assert_close(outputs(family, ours), expected, rtol=1e-5, atol=1e-5)
        assert apart > 1e-3  # tanh(0.6) is 0.54
        return
    assert float((outputs(family, ours) - expected).abs().max()) > 1e-3
    for other, block in zip(prompts, theirs.base_model.model.transformer.h, strict=True):
        assert other is block.attn
        block.attn.model.c_proj.weight.copy_(torch.eye(32))  # without a projection both are one function
        block.attn.model.c_proj.bias.zero_()
    for block in ours.transformer.h:
        block.attn.c_proj.weight.copy_(torch.eye(32))
        block.attn.c_proj.bias.zero_()
    torch.testing.assert_close(outputs(family, ours), theirs(input_ids=IDS).logits, rtol=1e-5, atol=1e-5)


def test_targets() -> None:
    model = build("llama")
    paths = ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert plan(model, LlamaAdapter(), "all-linear").paths == plan(model, LlamaAdapter(), "attention").paths == paths
    assert plan(model, LlamaAdapter(), "all-linear", layers=1).paths == paths[1:]  # the upper layers
    with pytest.raises(TargetError, match=r"none of which can carry llama_adapter"):
        plan(model, LlamaAdapter(), "mlp")
    with pytest.raises(TargetError, match=r"none of which can carry llama_adapter"):
        plan(tiny.model("t5"), LlamaAdapter(), "all-linear")


def test_cross_attention_takes_no_prompts() -> None:
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=64, add_cross_attention=True)
    model = transformers.GPT2LMHeadModel(config)
    planned = plan(model, LlamaAdapter(), "all-linear")
    assert planned.paths == ["transformer.h.0.attn"] and "cross-attention" in str(planned)
    with pytest.raises(TargetError, match=r"prompts stand in self-attention"):
        plan(model, LlamaAdapter(), "crossattention")


def test_an_attention_with_a_forward_of_its_own_is_refused() -> None:
    class Mine(type(build("llama").model.layers[0].self_attn)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    model = build("llama")
    model.model.layers[0].self_attn.__class__ = Mine
    with pytest.raises(TargetError, match=r"Mine brings a forward of its own"):
        plan(model, LlamaAdapter(), "layers.0.self_attn")
    planned = plan(model, LlamaAdapter(), "all-linear")
    assert planned.paths == ["model.layers.1.self_attn"] and "left out model.layers.0.self_attn" in str(planned)


@pytest.mark.parametrize("length", [0, 1.5, True])
def test_bad_length(length: Any) -> None:
    with pytest.raises(ConfigError, match=r"is not a whole number of at least 1"):
        LlamaAdapter(length=length)
