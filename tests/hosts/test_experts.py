"""Experts of transformers' mixture models: every implementation, every family of one structure, against dense weights."""

import copy
import functools
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from contract.hosts import HOSTS, routed
from contract.suite import apart, near
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

import deltaw
from deltaw import LoRA
from deltaw.analysis.norms import norms
from deltaw.core.attach import adapters
from deltaw.core.errors import BaseMismatchError, MergeError, TargetError, UseError
from deltaw.core.host import HostSpec, host_of
from deltaw.core.method import Site
from deltaw.core.state import delta

IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
SIZES: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "num_experts_per_tok": 2,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEADS = {"head_dim": 8}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {**HEADS, "intermediate_size": 40, "num_local_experts": 5}),
    "qwen2-moe": (
        "Qwen2Moe",
        {
            "moe_intermediate_size": 40,
            "num_experts": 5,
            "shared_expert_intermediate_size": 16,
            "intermediate_size": 32,
            "decoder_sparse_step": 1,
        },
    ),
    "qwen3-moe": ("Qwen3Moe", {**HEADS, "moe_intermediate_size": 40, "num_experts": 5, "intermediate_size": 32}),
    "gpt-oss": (
        "GptOss",
        {**HEADS, "intermediate_size": 40, "num_local_experts": 5, "sliding_window": 8, "max_position_embeddings": 64},
    ),
    "olmoe": ("Olmoe", {"intermediate_size": 40, "num_experts": 5}),
    "deepseek-v3": (
        "DeepseekV3",
        {
            "num_key_value_heads": 3,
            "intermediate_size": 32,
            "moe_intermediate_size": 40,
            "n_routed_experts": 6,
            "n_group": 2,
            "topk_group": 2,
            "first_k_dense_replace": 1,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 8,
        },
    ),
}


@functools.cache
def _built(family: str) -> Any:
    name, sizes = FAMILIES[family]
    torch.manual_seed(1)
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **sizes})
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3)  # large enough for every part to be heard
    return model.eval()


def build(family: str, implementation: str = "grouped_mm") -> Any:
    model = copy.deepcopy(_built(family))
    model.set_experts_implementation(implementation)
    return model


def stir(model: nn.Module, name: str = "default", targets: Any = "experts", **options: Any) -> None:
    deltaw.attach(model, LoRA(**{"rank": 3, "alpha": 5.0, **options}), targets=targets, name=name)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.2 * torch.randn_like(parameter))


def ids(rows: int = 2, length: int = 6) -> Tensor:
    return torch.randint(3, 48, (rows, length))


def stored(experts: Any, change: Tensor) -> Tensor:
    """A canonical [E, out, in] as the module lays it out."""
    return change.transpose(1, 2) if experts.is_transposed else change


def dense(model: Any, name: str = "default") -> dict[str, Tensor]:
    """W + s·B·A of every adapted weight as one tensor of the graph, by the name of the parameter: the slow way."""
    result = {}
    for site, adapter in adapters(model, name).items():
        module: Any = model.get_submodule(site.path)
        change = adapter.scale * torch.einsum("eor,eri->eoi", adapter.lora_B, adapter.lora_A)
        result[f"{site.path}.{site.slot}"] = module._parameters[site.slot].detach() + stored(module, change)
    return result


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_forward_and_its_gradients_are_those_of_dense_weights(family: str, implementation: str) -> None:
    model, x = build(family, implementation), ids()
    plain = copy.deepcopy(model)
    base = model(x).logits
    stir(model)
    trained = {id(p): p for p in model.parameters() if p.requires_grad}
    live = model(x).logits
    apart(live, base)
    expected = torch.func.functional_call(plain, dense(model), (x,)).logits
    near(live, expected)
    weight = torch.randn_like(live)
    ours = torch.autograd.grad((live * weight).sum(), list(trained.values()))
    theirs = torch.autograd.grad((expected * weight).sum(), list(trained.values()))
    for a, b in zip(ours, theirs, strict=True):
        assert b.abs().max() > 0
        near(a, b)
    with torch.no_grad():
        deltaw.merge(model)
        near(model(x).logits, live)
        assert type(model) is type(plain) and not any("adapters" in key for key in model.state_dict())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_attach_changes_nothing_and_detach_leaves_nothing(family: str, implementation: str) -> None:
    model, x = build(family, implementation), ids()
    output, weights, keys = model(x).logits, copy.deepcopy(model.state_dict()), set(ALL_EXPERTS_FUNCTIONS.valid_keys())
    config, inside = model.config.to_dict(), [(type(m), set(m.__dict__)) for m in model.modules()]
    deltaw.attach(model, LoRA(rank=3), targets="all-linear")
    assert torch.equal(model(x).logits, output)
    detached = copy.deepcopy(model)
    deltaw.detach(detached)
    stir(model, "other")
    apart(model(x).logits, output)
    assert model.config.to_dict() == config and model.config._experts_implementation == implementation
    deltaw.detach(model, "other")
    deltaw.detach(model)
    for free in (model, detached):
        assert torch.equal(free(x).logits, output)
        assert [(type(m), set(m.__dict__)) for m in free.modules()] == inside
        assert all(torch.equal(value, weights[key]) for key, value in free.state_dict().items())
    assert set(ALL_EXPERTS_FUNCTIONS.valid_keys()) == keys


@torch.no_grad()
def test_the_implementation_may_change_while_attached_and_other_models_stay_as_they_are() -> None:
    model, x = build("mixtral", "eager"), ids()
    other = build("mixtral", "eager")
    expected = other(x).logits
    stir(model)
    outputs = []
    for implementation in IMPLEMENTATIONS:
        model.set_experts_implementation(implementation)
        outputs.append(model(x).logits)
        near(outputs[-1], outputs[0])
    apart(outputs[0], expected)
    assert torch.equal(other(x).logits, expected)


def test_the_plan_counts_one_pair_of_factors_for_every_expert() -> None:
    model = build("mixtral")
    planned = deltaw.attach(model, LoRA(rank=3, alpha=5.0), targets="experts")
    gate_up, down = 5 * 3 * (24 + 80), 5 * 3 * (40 + 24)  # E·r(in + out)
    assert planned.trainable == 2 * (gate_up + down) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert "5×80×24" in str(planned) and "mlp.experts:down_proj" in str(planned)
    assert host_of(model.model.layers[0].mlp.experts).spec == HostSpec((80, 24), stack=5)
    assert host_of(build("gpt-oss").model.layers[0].mlp.experts, "down_proj").spec == HostSpec((24, 40), stack=5)
    one = deltaw.attach(build("mixtral"), LoRA(), targets="experts")
    assert {target.method.rank for target in one.targets} == {16}  # that of each expert, not of the stack


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_experts_that_no_token_reaches_get_a_gradient_of_zero(implementation: str) -> None:
    model = build("mixtral", implementation)
    stir(model)
    reached: dict[int, set[int]] = {}
    for number, layer in enumerate(model.model.layers):
        layer.mlp.experts.register_forward_pre_hook(
            lambda module, args, number=number: reached.__setitem__(number, set(args[1].flatten().tolist()))
        )
    model(ids(1, 1)).logits.sum().backward()
    for number, layer in enumerate(model.model.layers):
        assert len(reached[number]) == 2
        for slot in ("gate_up_proj", "down_proj"):
            for parameter in layer.mlp.experts.adapters["default"][slot].parameters():
                assert parameter.grad is not None and parameter.grad.isfinite().all()
                for expert in range(5):
                    assert bool(parameter.grad[expert].any()) is (expert in reached[number])


class _Sizes(TorchDispatchMode):
    """Sizes of all tensors that operations make, those that are views of `known` left out."""

    def __init__(self, known: set[int]):
        super().__init__()
        self.known, self.largest = known, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.largest = max(self.largest, tensor.numel())
        return result


def _step(implementation: str) -> tuple[int, list[int], int]:
    """Largest tensor made in a step, sizes of those saved for backward, and the size of one expert's weight."""
    config = transformers.MixtralConfig(hidden_size=64, intermediate_size=96, num_local_experts=4)
    config._experts_implementation = implementation
    experts = MixtralExperts(config)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.1)
    known = {parameter.untyped_storage().data_ptr() for parameter in experts.parameters()}
    stir(experts, targets="", rank=2)
    x, saved = torch.randn(12, 64, requires_grad=True), []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            saved.append(tensor.numel())
        return tensor

    with _Sizes(known) as sizes, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        routed(experts, x).sum().backward()
    assert x.grad is not None
    return sizes.largest, saved, 96 * 64


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_no_tensor_of_the_size_of_a_weight_is_made_or_saved(implementation: str) -> None:
    largest, saved, weight = _step(implementation)
    assert saved and max(saved) < weight and largest < weight


def test_saved_activations_are_small() -> None:
    """Beside what the base saves: x·A of every row, and A and B themselves; x is that of the base."""
    x = torch.randn(12, 24, requires_grad=True)
    sizes = {}
    for rank in (0, 2):
        layer, seen = HOSTS["experts-transposed"].make(), {}
        layer.requires_grad_(False)
        if rank:
            stir(layer, targets="", rank=rank)

        def pack(tensor: Tensor, seen: dict[int, int] = seen) -> Tensor:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 4
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = routed(layer, x)
        sizes[rank] = sum(seen.values())
        del y
    rows, padded = 24, 4  # two experts for each of 12 tokens; grouped_mm wants ranks of whole 16 bytes
    factors = 5 * padded * (24 + 80 + 40 + 24)
    assert sizes[2] - sizes[0] <= 2 * factors + 2 * rows * padded + rows * (24 + 40)


@torch.no_grad()
def test_two_adapters_live_with_strengths_and_mixed_are_one_sum() -> None:
    model, x = build("qwen3-moe"), ids()
    plain = copy.deepcopy(model)
    stir(model, "a")
    stir(model, "b", rank=2, rslora=True)
    with deltaw.use(model, {"a": 0.5, "b": -2.0}):
        live = model(x).logits
    weights = dense(model, "a")
    for key, changed in dense(model, "b").items():
        base = plain.get_parameter(key)
        weights[key] = base + 0.5 * (weights[key] - base) - 2.0 * (changed - base)
    near(live, torch.func.functional_call(plain, weights, (x,)).logits)
    state = 0.5 * deltaw.extract(model, "a") + -2.0 * deltaw.extract(model, "b")
    site = Site("model.layers.1.mlp.experts", "down_proj")
    assert state.methods[site].rank == 5
    deltaw.insert(model, state, name="mixed")
    near(model(x).logits, live)
    base = plain.get_parameter(f"{site.path}.{site.slot}")
    change = delta(state, site, base)
    near(change, weights[f"{site.path}.{site.slot}"] - base)
    assert norms(state)[site] == pytest.approx(float(change.norm()), rel=1e-5)
    assert state.factors(site).b.shape == (5, 24, 5)
    with pytest.raises(UseError, match=r"was made for \(5, 24, 40\)"):
        delta(state, site, base[0])
    large = deltaw.extract(model, "a")
    for _ in range(4):
        large = large + large  # 48 columns where 24 are of use
    assert large.methods[site].rank == 24
    near(delta(large, site, base), 16 * delta(deltaw.extract(model, "a"), site, base))


@torch.no_grad()
@pytest.mark.parametrize("family", ["mixtral", "gpt-oss"])
def test_save_and_load(family: str, tmp_path: Path) -> None:
    model, x = build(family), ids()
    stir(model, targets="all-linear")
    live = model(x).logits
    deltaw.save(model, tmp_path / "adapter")
    again = build(family)
    deltaw.load(again, tmp_path / "adapter")
    assert torch.equal(again(x).logits, live)
    ours, theirs = deltaw.extract(model), deltaw.extract(again)
    assert ours.methods == theirs.methods and ours.specs == theirs.specs
    changed = build(family)
    changed.model.layers[0].mlp.experts.down_proj.add_(1.0)
    with pytest.raises(BaseMismatchError, match=r"the values of .*experts.down_proj"):
        deltaw.load(changed, tmp_path / "adapter")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_generation(implementation: str) -> None:
    model, x = build("mixtral", implementation), ids(2, 4)
    stir(model)
    wanted = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    live = model.generate(x, **wanted)
    with deltaw.use(model, {}):
        assert not torch.equal(model.generate(x, **wanted), live)
    deltaw.merge(model)
    assert torch.equal(model.generate(x, **wanted), live)


@pytest.mark.parametrize("family", ["mixtral", "gpt-oss"])
def test_training_lowers_the_loss(family: str) -> None:
    model, x = build(family).train(), ids(4, 8)
    model.activation_checkpointing_enable({"use_reentrant": False})
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    deltaw.attach(model, LoRA(rank=4, dropout=0.05), targets="experts")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = model(x, labels=x).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    deltaw.detach(model)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


@torch.no_grad()
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_dtypes_of_the_base(implementation: str) -> None:
    # grouped_mm itself has no float64
    for dtype in (torch.bfloat16, torch.float16 if implementation == "grouped_mm" else torch.float64):
        model, x = build("mixtral", implementation).to(dtype), ids()
        base = model(x).logits
        deltaw.attach(model, LoRA(rank=3), targets="experts", name="fresh")
        assert torch.equal(model(x).logits, base)
        stir(model)
        live = model(x).logits
        assert live.dtype == dtype
        apart(live, base)
        deltaw.merge(model)
        near(model(x).logits.float(), live.float(), 1e-6 if dtype == torch.float64 else 5e-2)


@torch.no_grad()
@pytest.mark.parametrize("order", ["copy first", "copy last"])
def test_a_trained_copy_of_the_same_weight(order: str) -> None:
    model, x = build("mixtral"), ids()
    expected = build("mixtral")
    methods = [("lora", LoRA(rank=3)), ("copy", deltaw.Full())]
    for name, method in methods if order == "copy last" else methods[::-1]:
        deltaw.attach(model, method, targets="model.layers.0.mlp.experts", name=name)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    for slot in ("gate_up_proj", "down_proj"):
        weight = expected.model.layers[0].mlp.experts._parameters[slot]
        change = sum(
            delta(deltaw.extract(model, name), Site("model.layers.0.mlp.experts", slot), weight)
            for name in ("lora", "copy")
        )
        weight.add_(change)
    with deltaw.use(model, {"lora": 1.0, "copy": 1.0}):
        near(model(x).logits, expected(x).logits)
    with deltaw.use(model, {"copy": 1.0, "lora": 1.0}):
        near(model(x).logits, expected(x).logits)


@torch.no_grad()
def test_threads_take_turns() -> None:
    model, inputs = build("mixtral", "eager"), [ids() for _ in range(8)]
    stir(model)
    expected = [model(x).logits for x in inputs]
    found: dict[int, Tensor] = {}
    threads = [
        threading.Thread(target=lambda i=i, x=x: found.__setitem__(i, _without_grad(model, x)))
        for i, x in enumerate(inputs)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, y in enumerate(expected):
        near(found[i], y)


@torch.no_grad()
def _without_grad(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).logits  # type: ignore[no-any-return]


@pytest.fixture
def implementation() -> Iterator[str]:
    """An implementation of someone else's, that is not a product with its weights."""

    def forward(self: Any, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return torch.einsum("ti,eoi->to", x, self.gate_up_proj)

    ALL_EXPERTS_FUNCTIONS.register("strange", forward)
    yield "strange"
    del ALL_EXPERTS_FUNCTIONS._global_mapping["strange"]


def test_an_implementation_that_is_no_product_is_refused_when_it_runs(implementation: str) -> None:
    layer, x = HOSTS["experts"].make(), torch.randn(7, 24)
    stir(layer, targets="")
    expected = routed(layer, x)
    layer.config._experts_implementation = implementation
    with pytest.raises(
        UseError, match=r"does more with its weights than multiply .*einsum.*set_experts_implementation"
    ):
        routed(layer, x)
    assert isinstance(layer.gate_up_proj, nn.Parameter)  # put back
    layer.config._experts_implementation = "batched_mm"
    assert torch.equal(routed(layer, x), expected)


def test_names_of_single_weights_and_what_presets_take() -> None:
    model = build("qwen2-moe")
    down = deltaw.attach(copy.deepcopy(model), LoRA(), targets="experts.down_proj")
    assert {str(target.site) for target in down.targets} == {f"model.layers.{i}.mlp.experts:down_proj" for i in (0, 1)}
    rest = deltaw.attach(copy.deepcopy(model), LoRA(), targets="experts", exclude="experts.down_proj")
    assert {target.site.slot for target in rest.targets} == {"gate_up_proj"}
    for preset in ("all-linear", "mlp"):
        planned = deltaw.attach(copy.deepcopy(model), LoRA(), targets=preset)
        slots = {(path, t.site.slot) for t in planned.targets for path in [t.site.path.partition("mlp.")[2]] if path}
        assert {("experts", "gate_up_proj"), ("experts", "down_proj"), ("shared_expert_gate", "weight")} <= slots
        assert not any(path == "gate" for path, _ in slots)  # the router is a module of its own
        assert planned.notes == ()
    attention = deltaw.attach(copy.deepcopy(model), LoRA(), targets="attention")
    assert all("self_attn" in path for path in attention.paths)
    router = deltaw.attach(model, LoRA(modules_to_save=("gate",)), targets="experts")
    assert "model.layers.0.mlp.gate" in router.paths


def test_presets_say_what_they_leave_out() -> None:
    model = build("mixtral")
    planned = deltaw.attach(model, deltaw.DoRA(rank=4), targets="all-linear")
    assert planned.notes == (
        "left out model.layers.0.mlp.experts and 1 more: dora has no form for stacks of weights (experts), lora has",
    )
    with pytest.raises(TargetError, match=r"layers.0.mlp.experts and 1 more: dora has no form for stacks"):
        deltaw.attach(build("mixtral"), deltaw.DoRA(rank=4), targets="experts")
    with pytest.raises(TargetError, match=r"leaves nothing to adapt: left out .* no form for stacks"):
        deltaw.attach(nn.Sequential(HOSTS["experts"].make()), deltaw.DoRA(), targets="all-linear")
    with pytest.raises(TargetError, match=r"5×24×40\): rank 50 is above both dimensions, 24 and 40"):
        deltaw.attach(build("mixtral"), LoRA(rank=50), targets="all-linear")


class _OwnExperts(nn.Module):
    """Experts that no library dispatches."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4, 4))
        self.router = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("te,ti,eoi->to", self.router(x).softmax(-1), x, self.weight)


class _OwnForward(MixtralExperts):
    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return hidden_states @ self.gate_up_proj[0].T


@torch.no_grad()
def test_experts_trained_in_full_get_no_factors_as_well(tmp_path: Path) -> None:
    """Both at one site would be one entry of a file."""
    model = build("mixtral")
    stir(model, targets="all-linear", modules_to_save=("experts",))
    state, tokens = deltaw.extract(model), ids()
    assert {m.name for site, m in state.methods.items() if site.path.endswith("experts")} == {"full"}
    assert state.parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    deltaw.save(model, tmp_path / "a")
    again = build("mixtral")
    deltaw.load(again, tmp_path / "a")
    assert torch.equal(again(tokens).logits, model(tokens).logits)


def test_experts_of_other_kinds_are_left_out_with_a_note_or_refused() -> None:
    model = nn.Sequential(_OwnExperts(), nn.Linear(4, 4))
    planned = deltaw.attach(model, LoRA(rank=2), targets="all-linear")
    assert planned.paths == ["0.router", "1"]
    assert planned.notes == ("left out 0: deltaw does not know how a _OwnExperts uses its stacks of weights",)
    config = transformers.MixtralConfig(hidden_size=24, intermediate_size=40, num_local_experts=5)
    with pytest.raises(TargetError, match=r"_OwnForward brings a forward of its own"):
        deltaw.attach(nn.Sequential(_OwnForward(config)), LoRA(), targets="0")
    codes = HOSTS["experts"].net()
    codes.layer.down_proj = nn.Parameter(codes.layer.down_proj.detach().to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(TargetError, match=r"stored as torch.float8_e4m3fn: load the base without quantisation"):
        deltaw.attach(codes, LoRA(), targets="layer")
    spread = HOSTS["experts"].net()
    spread.layer._is_expert_parallel = True
    with pytest.raises(TargetError, match=r"spread over several devices"):
        deltaw.attach(spread, LoRA(), targets="layer")


@torch.no_grad()
def test_a_merge_that_cannot_be_is_refused_before_anything_is_written() -> None:
    model = build("mixtral").to(torch.float16)
    stir(model)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    adapters(model)[Site("model.layers.1.mlp.experts", "down_proj")].lora_B.mul_(1e6)
    with pytest.raises(MergeError, match=r"layers.1.mlp.experts.down_proj: the merged weight is not finite"):
        deltaw.merge(model)
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items() if "adapters" not in k)
