"""Fused MLPs: the same bits and gradients, less kept; the class's own forward wherever fusion does not fit."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as t
from torch import Tensor, nn

import deltaw
from deltaw.core.attach import adapters
from deltaw.fusion.fused import fused
from deltaw.fusion.mlp import FusedMLP, parts_of

SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": None,
}  # fmt: skip
FUSES = ["Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2"]
IDS = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers that share an x compute by themselves: together they are rounded otherwise (tests/fusion/test_siblings.py)."""
    for place in ("mlp", "siblings"):
        monkeypatch.setattr(f"deltaw.fusion.{place}.together", lambda group, x: None)


def build(family: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    torch.manual_seed(0)
    options = {"bos_token_id": 1, "eos_token_id": 2, **options}
    head = {"head_dim": 8} if family.startswith(("Gemma", "Qwen3")) else {}
    config = getattr(t, f"{family}Config")(**{**SIZES, **head, **options})
    return getattr(t, f"{family}ForCausalLM")(config).to(dtype)


def tuned(model: Any, method: deltaw.LoRA | None = None, targets: Any = "all-linear", name: str = "default") -> Any:
    deltaw.attach(model, method or deltaw.LoRA(rank=4, alpha=6.0), targets=targets, name=name)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    return model.train()


def gradients(model: Any) -> list[Tensor]:
    loss = model(input_ids=IDS, labels=IDS).loss
    return [loss.detach(), *torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])]


def kept(model: Any) -> int:
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(input_ids=IDS).logits
    del output
    return sum(found.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FUSES)
def test_the_same_bits_with_less_kept(family: str, dtype: torch.dtype) -> None:
    model = tuned(build(family, dtype))
    plain, before, classes = gradients(model), kept(model), [type(m) for m in model.modules()]
    with fused(model) as number:
        assert number == 2 and isinstance(model.model.layers[0].mlp, FusedMLP)
        again = gradients(model)
        after = kept(model)
        checkpointed = copy.deepcopy(model)
        checkpointed.gradient_checkpointing_enable({"use_reentrant": False})
        recomputed = gradients(checkpointed)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))
    tensors = 2 * 2 * IDS.numel() * 48 * dtype.itemsize  # act(gate) and the product, of two layers
    assert before - after >= tensors
    assert [type(m) for m in model.modules()] == classes and not any(
        "_deltaw_fused" in m.__dict__ for m in model.modules()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", [deltaw.DoRA(rank=4, alpha=6.0), deltaw.LoRA(rank=4, dropout=0.3)])
def test_a_gain_and_dropout_on_the_last_layer(method: deltaw.LoRA, dtype: torch.dtype) -> None:
    model = tuned(build("Llama", dtype), method)
    torch.manual_seed(3)
    plain, before = gradients(model), kept(model)
    with fused(model) as number:
        torch.manual_seed(3)
        again = gradients(model)
        assert number == 2 and before - kept(model) >= 2 * 2 * IDS.numel() * 48 * dtype.itemsize
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_a_frozen_mlp_is_fused_too() -> None:
    model = tuned(build("Llama"), targets="attention")
    plain, before = gradients(model), kept(model)
    with fused(model) as number:
        assert number == 2 and kept(model) < before
        assert all(torch.equal(a, b) for a, b in zip(plain, gradients(model), strict=True))


def two(model: Any) -> None:
    tuned(model, name="second")
    deltaw.use(model, {"default": 1.0, "second": 0.5})
    for adapter in adapters(model).values():
        adapter.requires_grad_(True)


UNFIT: dict[str, Callable[[Any], Any]] = {
    "two live adapters": two,
    "dropout": lambda m: [setattr(a, "dropout", 0.3) for a in adapters(m).values()],
    "a hook on down": lambda m: m.model.layers[0].mlp.down_proj.register_forward_hook(lambda _, __, y: 2 * y),
    "a trained base": lambda m: m.model.layers[0].mlp.down_proj.weight.requires_grad_(True),
}


@pytest.mark.parametrize("case", UNFIT)
def test_what_comes_after_fusing_is_not_missed(case: str) -> None:
    model = tuned(build("Llama"))
    with fused(model) as number:
        assert number == 2
        UNFIT[case](model)
        torch.manual_seed(3)
        inside = gradients(model)
    torch.manual_seed(3)
    assert all(torch.equal(a, b) for a, b in zip(inside, gradients(model), strict=True))


def test_autocast_runs_the_class_s_own_forward() -> None:
    model = tuned(build("Llama"))
    with torch.autocast("cpu", torch.bfloat16):
        plain = gradients(model)
        with fused(model):
            assert all(torch.equal(a, b) for a, b in zip(plain, gradients(model), strict=True))


class Doubled(t.models.llama.modeling_llama.LlamaMLP):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Swapped(nn.Module):
    """Other names, the gate in the second place."""

    def __init__(self) -> None:
        super().__init__()
        self.w3, self.w1, self.w2 = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(self.act(self.w1(x)) * self.w3(x))


class Sum(Swapped):
    def forward(self, x: Tensor) -> Tensor:
        return self.w2(self.act(self.w1(x)) + self.w3(x))


def test_what_is_a_gated_mlp_and_what_is_not() -> None:
    found = parts_of(Swapped().requires_grad_(False))
    assert found is not None and (found.gate, found.up, found.kind) == ("w1", "w3", "gelu")
    config = t.LlamaConfig(**SIZES)
    others = [
        Doubled(config),
        Sum(),
        t.models.llama.modeling_llama.LlamaMLP(t.LlamaConfig(**{**SIZES, "hidden_act": "relu"})),
    ]
    assert [parts_of(module.requires_grad_(False)) for module in others] == [None] * 3
    assert parts_of(Swapped()) is None  # all of it is trained
    with fused(build("Phi3")) as number:  # gate and up in one layer
        assert number == 0
    model = build("Llama")
    deltaw.attach(model, deltaw.core.method.get("bottleneck")(), targets="mlp")
    with fused(model) as number:
        assert number == 0


def test_a_failure_inside_gives_the_classes_back() -> None:
    model = tuned(build("Llama"))
    with pytest.raises(RuntimeError, match="inside"), fused(model):
        raise RuntimeError("inside")
    assert not any(isinstance(module, FusedMLP) for module in model.modules())


def test_it_compiles_in_one_graph() -> None:
    model, x = tuned(build("Llama")).model.layers[0].mlp, torch.randn(2, 3, 32)
    with fused(model) as number:
        assert number == 1
        torch.compiler.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), model(x))
