"""Layers that share an x are found by a trial of the module's forward, computed together, and give what each by itself does."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import diffusers
import pytest
import torch
import transformers as t
from torch import Tensor, nn

import deltaw
from deltaw.core.attach import adapters
from deltaw.fusion import fused as fusing
from deltaw.fusion import siblings as by_siblings
from deltaw.fusion.siblings import KEY, FusedSiblings

IDS = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(0))
PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
LATENT = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
STATES = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
TEXT: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2, "use_cache": False,
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32,
    "patch_size": 16,
}  # fmt: skip
QKV = ("q_proj", "k_proj", "v_proj")


def llama(**more: Any) -> Any:
    return t.LlamaForCausalLM(t.LlamaConfig(**{**TEXT, **more}))


def bart() -> Any:
    sides = {
        f"{s}_{n}": v
        for s in ("encoder", "decoder")
        for n, v in (("layers", 1), ("attention_heads", 4), ("ffn_dim", 48))
    }
    return t.BartModel(t.BartConfig(vocab_size=64, d_model=32, max_position_embeddings=64, use_cache=False, **sides))


def unet() -> Any:
    return diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(32, 32), layers_per_block=1, norm_num_groups=8,
        cross_attention_dim=32, attention_head_dim=8, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip


def by_ids(model: Any) -> Tensor:
    return model(input_ids=IDS)[0]  # type: ignore[no-any-return]


def by_both(model: Any) -> Tensor:
    return model(input_ids=IDS, decoder_input_ids=IDS)[0]  # type: ignore[no-any-return]


MODELS: dict[str, tuple[Callable[[], Any], Callable[[Any], Tensor], set[tuple[str, ...]]]] = {
    "Llama": (llama, by_ids, {QKV}),
    "Qwen3": (lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**TEXT, head_dim=8)), by_ids, {QKV}),  # norms between them
    "Gemma3": (lambda: t.Gemma3ForCausalLM(t.Gemma3TextConfig(**TEXT, head_dim=8)), by_ids, {QKV}),
    "OPT": (lambda: t.OPTForCausalLM(t.OPTConfig(vocab_size=64, hidden_size=32, ffn_dim=48, num_hidden_layers=1,
                                                 num_attention_heads=4, word_embed_proj_dim=32)), by_ids, {QKV}),
    "BERT": (lambda: t.BertModel(t.BertConfig(**{**TEXT, "pad_token_id": 0})), by_ids, {("query", "key", "value")}),
    # q, k and v of itself, k and v of the other side; a gate of another form than Llama's
    "T5": (lambda: t.T5ForConditionalGeneration(t.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, feed_forward_proj="gated-gelu",
        use_cache=False, decoder_start_token_id=0)), by_both, {("q", "k", "v"), ("k", "v"), ("wi_0", "wi_1")}),
    "BART": (bart, by_both, {QKV, QKV[1:]}),
    "CLIP's vision": (lambda: t.CLIPVisionModel(t.CLIPVisionConfig(**VISION)), lambda m: m(pixel_values=PIXELS)[0], {QKV}),
    "ViT": (lambda: t.ViTModel(t.ViTConfig(**VISION)), lambda m: m(pixel_values=PIXELS)[0], {QKV}),
    "a U-Net": (unet, lambda m: m(LATENT, 1, encoder_hidden_states=STATES)[0], {("to_q", "to_k", "to_v"), ("to_k", "to_v")}),
}  # fmt: skip


def tuned(model: Any, method: Any = None, name: str = "default", targets: Any = "all-linear") -> Any:
    deltaw.attach(model.eval(), method or deltaw.LoRA(rank=4, alpha=6.0), targets=targets, name=name)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    return model


def gradients(model: Any, run: Callable[[Any], Tensor] = by_ids) -> dict[str, Tensor | None]:
    torch.manual_seed(5)
    wanted = {name: p for name, p in model.named_parameters() if p.requires_grad}
    y = run(model)
    total = (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(3))).sum()
    total.backward()  # checkpoints of the older kind know nothing else
    found = {name: p.grad for name, p in wanted.items()}
    for parameter in wanted.values():
        parameter.grad = None
    return {"y": y.detach(), **found}


def close(ours: dict[str, Tensor | None], theirs: dict[str, Tensor | None]) -> None:
    largest = max(float(g.norm()) for g in theirs.values() if g is not None)
    for name, right in theirs.items():
        mine = ours[name]
        assert (mine is None) == (right is None), name
        if mine is not None and right is not None:
            assert float((mine - right).norm()) <= 1e-4 * float(right.norm()) + 1e-6 * largest, name


def groups(model: nn.Module) -> set[tuple[str, ...]]:
    """Names of the layers of every group that a trial found."""
    return {
        tuple(next(name for name, child in module._modules.items() if child is layer) for layer in group)
        for module in model.modules()
        for form in module.__dict__.get(KEY, {}).values()
        for group in form
    }


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Sizes of the groups that were computed together."""
    found: list[int] = []
    own = by_siblings.siblings

    def siblings(x: Tensor, layers: Any) -> Any:
        found.append(len(layers))
        return own(x, layers)

    monkeypatch.setattr(by_siblings, "siblings", siblings)
    yield found


@pytest.mark.parametrize("family", MODELS)
def test_what_shares_an_x_is_found_and_computed_together(family: str, computed: list[int]) -> None:
    build, run, expected = MODELS[family]
    torch.manual_seed(0)
    model = build()
    linear = ["to_q", "to_k", "to_v", "to_out.0"] if family == "a U-Net" else "all-linear"
    plain = gradients(tuned(model, targets=linear), run)
    classes = [type(module) for module in model.modules()]
    with deltaw.fused(model):
        close(gradients(model, run), plain)
        assert groups(model) == expected and set(computed) >= {len(group) for group in expected}
        first = len(computed)
        close(gradients(model, run), plain)  # by what is known now
        assert len(computed) == 2 * first
        with torch.no_grad():
            run(model)
        assert len(computed) == 2 * first
    assert [type(module) for module in model.modules()] == classes and not groups(model)
    close(gradients(model, run), plain)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_block_that_is_computed_again(reentrant: bool, computed: list[int]) -> None:
    model = tuned(llama()).train()
    plain = gradients(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with deltaw.fused(model):
        found = gradients(model)  # the first call, the trial among it
        assert set(computed) == {2, 3}
    close(found, plain)


def one(model: Any) -> Any:
    return model.model.layers[0].self_attn


def doubled(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    return (2 * args[0],)


def second(model: Any) -> None:
    tuned(model, name="second")
    deltaw.use(model, {"default": 1.0, "second": 0.5})
    for adapter in adapters(model).values():
        adapter.requires_grad_(True)


UNFIT: dict[str, Callable[[Any], Any]] = {
    "two live adapters": second,
    "a strength": lambda m: deltaw.use(m, {"default": 0.5}),
    "none": lambda m: deltaw.use(m, {}) and m.lm_head.weight.requires_grad_(True),
    "dropout": lambda m: [(setattr(a, "dropout", 0.3), a.train()) for a in adapters(m).values()],
    "another x for one of them": lambda m: one(m).k_proj.register_forward_pre_hook(doubled),
    "a changed output": lambda m: one(m).q_proj.register_forward_hook(lambda _, __, y: 2 * y),
    "a trained base": lambda m: one(m).v_proj.weight.requires_grad_(True),
    "one of them gone": lambda m: setattr(one(m), "k_proj", nn.Linear(32, 16, bias=False).requires_grad_(False)),
    "a row's adapter each": lambda m: (
        tuned(m, name="other"),
        m.requires_grad_(True),
        deltaw.use(m, ["default", "other"]),
    ),
}


@pytest.mark.parametrize("case", UNFIT)
def test_what_comes_after_fusing_is_not_missed(case: str) -> None:
    torch.manual_seed(0)
    model = tuned(llama())
    with deltaw.fused(model):
        gradients(model)  # the trial was before
        UNFIT[case](model)
        inside = gradients(model)
    close(inside, gradients(model))


@pytest.mark.parametrize(
    "method",
    [deltaw.DoRA(rank=4, dropout=0.3), deltaw.LoRA(rank=4, dropout=0.3), deltaw.core.method.get("full")()],
)
def test_other_methods_compute_by_themselves(method: Any, computed: list[int]) -> None:
    model = tuned(llama(), method).train()
    plain = gradients(model)
    with deltaw.fused(model):
        close(gradients(model), plain)
    assert not computed


@pytest.mark.parametrize(
    "method", [deltaw.DoRA(rank=4), deltaw.LoRA(rank=4, init="pissa"), deltaw.LoRA(rank=4, rslora=True)]
)
def test_methods_that_are_a_gain_and_two_factors(method: Any, computed: list[int]) -> None:
    torch.manual_seed(0)
    model = tuned(llama(attention_bias=True), method).train()
    plain = gradients(model)
    with deltaw.fused(model):
        close(gradients(model), plain)
    assert set(computed) == {2, 3}


def test_layers_that_are_not_adapted_stay_out(computed: list[int]) -> None:
    model = tuned(llama(), targets=["q_proj", "v_proj"])
    plain = gradients(model)
    with deltaw.fused(model):
        close(gradients(model), plain)
        assert groups(model) == {("q_proj", "v_proj")} and set(computed) == {2}


def test_autocast_compiling_and_copies() -> None:
    model = tuned(llama(num_hidden_layers=1))
    plain = gradients(model)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = gradients(model)
        with deltaw.fused(model):
            close(gradients(model), rounded)
    with deltaw.fused(model):
        close(gradients(model), plain)
        close(gradients(copy.deepcopy(model)), plain)
        torch.compiler.reset()
        compiled = torch.compile(one(model), backend="aot_eager", fullgraph=True)
        x, turns = torch.randn(2, 5, 32), (torch.ones(1, 5, 8), torch.zeros(1, 5, 8))
        torch.testing.assert_close(compiled(x, turns, None)[0], one(model)(x, turns, None)[0])


class Odd(nn.Module):
    """One that gives layers other things, and asks for what nothing has in a trial."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor, changed: bool = False, again: Tensor | None = None) -> Tensor:
        a = self.a(x) + torch.rand(())
        if changed:
            x.add_(1.0)
        b = self.b(x) * (1 if again is None else self.c(again))
        if float(b.sum()) > 0:  # nothing stands for a number
            return a
        return a + b + self.d(x)


def test_a_trial_keeps_to_what_is_sure(computed: list[int]) -> None:
    torch.manual_seed(0)
    model = tuned(Odd(), targets=["a", "b", "c", "d"])

    def run(changed: bool, same: bool) -> Callable[[Any], Tensor]:
        def act(model: Any) -> Tensor:
            x = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
            return model(x, changed, x if same else x.clone())  # type: ignore[no-any-return]

        return act

    for changed, same, sizes in ((False, False, [2]), (False, True, [3]), (True, True, [])):
        computed.clear()
        with deltaw.fused(model):
            if changed:  # autograd refuses to use an x that was changed, and so does the fused one
                for _ in range(2):
                    with pytest.raises(RuntimeError, match="inplace operation"):
                        gradients(model, run(changed, same))
            else:
                inside = gradients(model, run(changed, same))
        assert computed == sizes
        if not changed:
            close(inside, gradients(model, run(changed, same)))


def test_a_trial_draws_no_random_numbers() -> None:
    model, x = tuned(Odd(), targets=["a", "b", "c", "d"]), torch.randn(3, 8)
    torch.manual_seed(7)
    plain, state = model(x), torch.get_rng_state()
    with deltaw.fused(model):
        torch.manual_seed(7)
        torch.testing.assert_close(model(x), plain)
        assert torch.equal(torch.get_rng_state(), state)


def test_too_many_forms_of_a_call_are_not_tried(computed: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(by_siblings, "FORMS", 1)
    model = tuned(Odd(), targets=["a", "b", "c", "d"])
    x = torch.randn(3, 8)
    with deltaw.fused(model):
        model(x)
        assert computed == [2]
        model(x, False, x)
        assert computed == [2]
        model(x)
        assert computed == [2, 2]


class Three(nn.Module):
    """q, k and v, and something between them."""

    def __init__(self, between: Callable[["Three", Tensor], Any] = lambda m, x: None) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        x = 1 * x
        q = self.q(x)
        self.between(self, x)
        return q.detach() + self.k(x) * self.v(x)


def unseen(m: Three, x: Tensor) -> None:
    torch.nn.functional.relu(x, inplace=True)


def elsewhere(m: Three, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        return
    deltaw.use(m, {"default": 0.5})


def heavier(layer: nn.Module, args: tuple[Tensor]) -> None:
    layer.weight.data.mul_(1.0 if getattr(layer, "heavy", False) else 3.0)  # type: ignore[union-attr, operator]
    layer.heavy = True  # type: ignore[assignment]


@pytest.mark.parametrize("between", [unseen, elsewhere])
def test_what_happens_between_two_layers_counts(between: Callable[[Three, Tensor], Any]) -> None:
    torch.manual_seed(0)
    model, x = tuned(Three(between), targets=["q", "k", "v"]), torch.randn(3, 8)

    def run(model: Any) -> Tensor:
        deltaw.use(model, "default")
        return model(x)  # type: ignore[no-any-return]

    plain = gradients(model, run)
    with deltaw.fused(model):
        close(gradients(model, run), plain)


class Partly(Three):
    def __init__(self, act: str) -> None:
        super().__init__()
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x)
        if self.act == "no gradient":
            with torch.no_grad():
                beside = self.k(x) * self.v(x)
            return q + beside
        if self.act == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                return q + self.k(x) * self.v(x)
        return q + torch.utils.checkpoint.checkpoint(lambda x: self.k(x) * self.v(x), x, use_reentrant=False)  # type: ignore[no-any-return]


@pytest.mark.parametrize("act", ["no gradient", "autocast", "a checkpoint"])
def test_a_part_under_other_circumstances(act: str) -> None:
    torch.manual_seed(0)
    model, x = tuned(Partly(act), targets=["q", "k", "v"]), torch.randn(3, 8)
    plain = gradients(model, lambda m: m(x))
    with deltaw.fused(model):
        close(gradients(model, lambda m: m(x)), plain)


def test_a_hook_that_writes_a_weight_is_waited_for(computed: list[int]) -> None:
    torch.manual_seed(0)
    model, x = tuned(Three(), targets=["q", "k", "v"]), torch.randn(3, 8)
    model.k.register_forward_pre_hook(heavier)
    other = copy.deepcopy(model)
    plain = gradients(other, lambda m: m(x))
    with deltaw.fused(model):
        close(gradients(model, lambda m: m(x)), plain)
    assert not computed


class Counting(Three):
    def __init__(self, kind: str) -> None:
        super().__init__()
        if kind == "a buffer":
            self.register_buffer("calls", torch.zeros(()))
        else:
            self.calls: Any = {"a list": [], "a table": {}, "an object": torch.nn.utils.rnn}[kind]

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.calls, Tensor):
            self.calls += 1
        elif isinstance(self.calls, list):
            self.calls.append(x)
        elif isinstance(self.calls, dict):
            self.calls.setdefault(x.shape, x)
        return super().forward(x)


@pytest.mark.parametrize("kind", ["a buffer", "a list", "a table", "an object"])
def test_a_module_with_something_to_write_to_is_not_tried(kind: str, computed: list[int]) -> None:
    model, x = tuned(Counting(kind), targets=["q", "k", "v"]), torch.randn(3, 8)
    with deltaw.fused(model):
        model(x)
    calls = model.calls
    assert not computed and (len(calls) if isinstance(calls, list | dict) else 1) == 1
    assert not isinstance(calls, Tensor) or float(calls) == 1


class Endless(Three):
    def forward(self, x: Any) -> Tensor:
        q = self.q(x)
        torch.set_grad_enabled(False)
        n = x
        while hasattr(n, "module"):
            n = n.module
        torch.set_grad_enabled(True)
        return q + self.k(x)  # type: ignore[no-any-return]


def test_a_trial_ends_and_gives_back_what_it_set() -> None:
    model, x = tuned(Endless(), targets=["q", "k", "v"]), torch.randn(3, 8)
    plain = gradients(model, lambda m: m(x))
    with deltaw.fused(model):
        close(gradients(model, lambda m: m(x)), plain)
        assert torch.is_grad_enabled()


def test_fused_within_fused(computed: list[int]) -> None:
    model = tuned(llama())
    plain, classes = gradients(model), [type(module) for module in model.modules()]
    with deltaw.fused(model), deltaw.fused(model) as number:
        assert number == 0
        close(gradients(model), plain)
        assert computed
    assert [type(module) for module in model.modules()] == classes


def test_a_failure_inside_gives_the_classes_back() -> None:
    model = tuned(llama())
    with pytest.raises(RuntimeError, match="inside"), fusing.fused(model):
        raise RuntimeError("inside")
    assert not any(isinstance(module, FusedSiblings) for module in model.modules())
