"""Every trap in which an adapter would be ignored, applied twice or written where it does not belong: a guard each."""

import copy
import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from core import tiny
from deltaw.core import route
from deltaw.core.attach import attach, detach, extract, insert, trainable
from deltaw.core.carried import here
from deltaw.core.errors import DeltawError, MergeError, TargetError, UseError
from deltaw.core.merge import merge, unmerge
from deltaw.core.route import use
from deltaw.core.state import AdapterState
from deltaw.infer.loss import SFTLoss
from deltaw.methods.full import Full
from deltaw.methods.lora import LoRA
from deltaw.methods.token_rows import TokenRows

LORA = LoRA(rank=4, alpha=6)


def moved(state: AdapterState, path: str) -> AdapterState:
    """A state of one site, at another path."""
    (site,) = state.methods
    there = site._replace(path=path)
    parts = {part: {there: getattr(state, part)[site]} for part in ("methods", "tensors", "specs")}
    return dataclasses.replace(state, **parts)


def stir(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.3 * torch.randn_like(parameter))


# Trap 1: code that reads `.weight` itself


def test_attention_of_torch_refuses_also_an_inserted_adapter() -> None:
    """`attach` is refused in test_targets; a file that names out_proj is refused as well."""
    layer = nn.TransformerEncoderLayer(16, 2, 32)
    attach(layer, LORA, targets="linear1")
    state = extract(layer)
    wrong = moved(state, "self_attn.out_proj")
    with pytest.raises(DeltawError, match=r"MultiheadAttention.forward reads its weight itself"):
        insert(nn.TransformerEncoderLayer(16, 2, 32), wrong)


@pytest.mark.parametrize("targets", ["linear1", "linear2", ["linear1", "linear2"]], ids=str)
@pytest.mark.parametrize("stacked", [False, True])
def test_fast_path_of_the_encoder_is_off_while_attached(targets: Any, stacked: bool) -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval() if stacked else nn.Sequential(layer).eval()
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        fast = model(x)
    with torch.enable_grad():
        torch.testing.assert_close(model(x), fast)  # the plain path, the same to rounding
    attach(model, LORA, targets=targets)
    stir(model)
    with torch.no_grad():
        tuned = model(x)
    assert (tuned - fast).abs().max() > 1e-2
    torch.testing.assert_close(model(x), tuned)
    detach(model)
    with torch.no_grad():
        assert torch.equal(model(x), fast)


def test_a_head_adapter_reaches_the_loss() -> None:
    model, ids = tiny.model("llama"), tiny.ids()
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    before = SFTLoss(model)(batch)[0]
    attach(model, LORA, targets="lm_head")
    stir(model)
    loss, count = SFTLoss(model)(batch)
    plain = F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(loss, plain)
    assert abs(float(loss.detach() - before.detach())) > 1e-2 and count == ids[:, 1:].numel()


def test_trained_copies_of_a_recurrent_layer() -> None:
    """nn.LSTM keeps a second list of its weights: a copy that only replaced the parameter would be ignored."""
    model, x = nn.Sequential(nn.LSTM(6, 5)), torch.randn(3, 2, 6)
    before = model(x)[0]
    attach(model, Full(), targets="0")
    assert torch.equal(model(x)[0], before)
    stir(model)
    y = model(x)[0]
    assert (y - before).abs().max() > 1e-2
    y.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    detach(model)
    assert torch.equal(model(x)[0], before)


# Trap 2: forward on the instance


class Counting(ModelHook):
    def __init__(self) -> None:
        self.calls = 0

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return args, kwargs


def test_hooks_of_accelerate_and_adapters_work_together() -> None:
    plain = nn.Sequential(nn.Linear(6, 5))
    patched, hook, x = copy.deepcopy(plain), Counting(), torch.randn(3, 6)
    base = plain(x)
    add_hook_to_module(patched[0], hook)
    attach(patched, LORA, targets="0")
    stir(patched)
    insert(plain, extract(patched))
    assert torch.equal(patched(x), plain(x)) and hook.calls == 1
    other = copy.deepcopy(patched)
    assert torch.equal(other(x), plain(x))
    detach(patched)
    assert torch.equal(patched(x), base) and hook.calls == 2
    assert type(remove_hook_from_module(patched[0])) is nn.Linear
    assert torch.equal(patched(x), base) and hook.calls == 2


def test_any_other_patched_forward_is_refused() -> None:
    def replaced(x: Tensor) -> Tensor:
        return 2 * x

    direct = nn.Sequential(nn.Linear(6, 6))
    direct[0].forward = replaced  # type: ignore[method-assign]
    hooked = nn.Sequential(nn.Linear(6, 6))
    hooked[0].forward = functools.partial(replaced)  # type: ignore[method-assign]
    add_hook_to_module(hooked[0], Counting())  # keeps the first patch as its `_old_forward`
    for model in (direct, hooked):
        with pytest.raises(UseError, match=r"forward was replaced on the instance.*attach before patching"):
            attach(model, LORA, targets="0")
        assert type(model[0]) is nn.Linear and not hasattr(model[0], "adapters")


# Trap 3: tied weights


def test_a_tied_head_is_not_merged_into_the_embedding() -> None:
    model, ids = tiny.model("tied"), tiny.ids()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    embedding = model.model.embed_tokens.weight.clone()
    attach(model, LORA, targets=["lm_head", "q_proj"])
    stir(model)
    queries, tuned = model.model.layers[0].self_attn.q_proj.weight.clone(), model(ids).logits
    with pytest.raises(MergeError, match=r"lm_head\.weight is tied to model\.embed_tokens\.weight, which would change"):
        merge(model)
    assert torch.equal(model.model.embed_tokens.weight, embedding)
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight, queries)  # all faults before the first write
    assert torch.equal(model(ids).logits, tuned)


class ReadsItsHead(nn.Module):
    """Tied, and it computes with the weight of its head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lm_head = nn.Embedding(10, 8), nn.Linear(8, 10, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(self.embed(ids), self.lm_head.weight)


class Calls(ReadsItsHead):
    """The same with a head that is called."""

    def forward(self, ids: Tensor) -> Tensor:
        return self.lm_head(self.embed(ids))


def test_guards_see_the_modules_that_an_adapter_reaches_by_a_tie() -> None:
    rows = TokenRows(tokens=(1, 2))
    sentence = r"embed: it is tied to lm_head, where token_rows must act too: ReadsItsHead.forward reads its weight"
    with pytest.raises(TargetError, match=sentence):
        attach(ReadsItsHead(), rows, targets="embed")
    good = Calls()
    attach(good, rows, targets="embed")
    with pytest.raises(DeltawError, match=sentence):
        insert(ReadsItsHead(), extract(good))
    owner, patched = Calls(), Calls()
    owner.lm_head.adapters = nn.Linear(1, 1)
    patched.lm_head.forward = lambda x: x  # type: ignore[method-assign]
    for model, said in ((owner, "an attribute 'adapters'"), (patched, "its forward was replaced on the instance")):
        for action in (lambda m: attach(m, rows, targets="embed"), lambda m: insert(m, extract(good))):
            with pytest.raises(UseError, match=f"lm_head: .*{said}"):
                action(model)
        assert type(model.embed) is nn.Embedding and type(model.lm_head) is nn.Linear
    scaled = Calls()
    scaled.lm_head.__class__ = Doubled
    with pytest.raises(TargetError, match=r"embed: it is tied to lm_head, where token_rows must act too: .*Doubled"):
        attach(scaled, rows, targets="embed")


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


# Trap 4: the order of operations


@pytest.fixture
def one_process(tmp_path: Path) -> Any:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_attach_before_sharding(one_process: None) -> None:
    model, ids = tiny.model("llama"), tiny.ids()
    attach(model, LORA, targets="all-linear")
    stir(model)
    before, keys = model(ids).logits, list(model.state_dict())
    for block in model.model.layers:
        fully_shard(block)
    fully_shard(model)
    after = model(ids).logits
    torch.testing.assert_close(after, before)
    assert list(model.state_dict()) == keys
    after.sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


def test_attach_after_sharding_is_refused(one_process: None) -> None:
    model = tiny.model("llama")
    fully_shard(model)
    with pytest.raises(UseError, match="attach after quantising and before sharding"):
        attach(model, LORA, targets="all-linear")


# Trap 5: third parties that test the class name


def test_after_detach_every_class_is_itself() -> None:
    model = tiny.model("gpt2")
    before = {path: type(module) for path, module in model.named_modules()}
    attach(model, LORA, targets=["all-linear", "wte"])
    changed = {path for path, module in model.named_modules() if path in before and type(module) is not before[path]}
    assert len(changed) == 9
    assert all(isinstance(model.get_submodule(path), before[path]) for path in changed)
    detach(model)
    assert {path: type(module) for path, module in model.named_modules()} == before


# Trap 6: recompiles


def test_every_live_set_is_compiled_once_and_strengths_are_free() -> None:
    graphs = 0

    def counting(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    model, x = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)), torch.randn(3, 6)
    for name in ("a", "b"):
        attach(model, LORA, targets=["0", "1"], name=name)
        stir(model)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend=counting)

    def runs(*routes: dict[str, float]) -> int:
        before = graphs
        for wanted in routes:
            with torch.no_grad(), use(model, wanted):
                torch.testing.assert_close(compiled(x), model(x))
        return graphs - before

    assert runs({"a": 1.0}, {"b": 1.0}, {"a": 1.0, "b": 1.0}) == 3
    assert runs({"a": 1.0}, {"b": 1.0}, {"a": 1.0, "b": 1.0}, {"b": 1.0}) == 0
    assert runs({"a": 0.2}, {"a": 0.3}, {"a": -4.0}, {"a": 2}) == 1
    assert runs({"a": 0.2, "b": 0.3}, {"a": 0.7, "b": 0.1}) == 1


# Trap 7: the cached tuple


def test_what_is_live_is_always_a_fresh_lookup() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))

    def assert_live(expected: dict[str, float]) -> None:
        for module in route.adapted_modules(model):
            entries = [(name, entry) for name, group in here(module).entries.items() for entry in group]
            fresh = {id(adapter) for name, (adapter, _, _) in entries if name in expected}
            assert {id(adapter) for adapter, _, _ in here(module).live} == fresh
            assert all(
                adapter is module.adapters[adapter.name][host.slot] and host.module is module
                for adapter, host, _ in here(module).live
            )
            for adapter, _, strength in here(module).live:
                assert (1.0 if strength is None else float(strength)) == pytest.approx(expected[adapter.name])

    attach(model, LORA, targets=["0", "1"], name="a")
    stir(model)
    assert_live({"a": 1.0})
    attach(model, LORA, targets="1", name="b")
    stir(model)
    assert_live({"b": 1.0})
    use(model, {"a": 0.5, "b": 1.0})
    assert_live({"a": 0.5, "b": 1.0})
    copied = copy.deepcopy(model)
    use(copied, {})
    assert_live({"a": 0.5, "b": 1.0})
    merge(model, "a", keep_base=True)
    assert_live({"b": 1.0})
    unmerge(model)
    assert_live({"a": 1.0, "b": 1.0})
    detach(model, "b")
    assert_live({"a": 1.0})
    use(model, {})
    assert_live({})
    insert(model, extract(model, "a"), name="c")
    assert_live({"c": 1.0})


# save_pretrained: traps.md 6


def test_save_pretrained_is_refused_while_attached(tmp_path: Path) -> None:
    model, ids = tiny.model("llama"), tiny.ids()
    base = model(ids).logits
    attach(model, LORA, targets="all-linear")
    stir(model)
    for other in (model, copy.deepcopy(model)):
        with pytest.raises(UseError, match=r"deltaw.save\(model, path\) writes the adapter"):
            other.save_pretrained(tmp_path / "mixed")
    assert not (tmp_path / "mixed").exists()
    tuned = model(ids).logits
    merged = copy.deepcopy(model)
    merge(merged)
    detach(model)
    for name, plain, expected in (("base", model, base), ("merged", merged, tuned)):
        plain.save_pretrained(tmp_path / name)
        again, report = transformers.LlamaForCausalLM.from_pretrained(tmp_path / name, output_loading_info=True)
        assert not report["unexpected_keys"] and not report["missing_keys"] and not report["mismatched_keys"]
        torch.testing.assert_close(again(ids).logits, expected, atol=1e-5, rtol=0)


# Names, doubles, half-done work


@pytest.mark.parametrize("name", ["", "a.b", "a b", "../x", "type", "forward", "keys"])
def test_names_that_cannot_be(name: str) -> None:
    model = nn.Sequential(nn.Linear(6, 5))
    with pytest.raises(UseError, match="an adapter cannot be called"):
        attach(model, LORA, targets="0", name=name)
    assert type(model[0]) is nn.Linear


def test_attaching_again_adds_to_the_adapter_but_never_twice_to_a_layer() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    attach(model, LORA, targets="0")
    stir(model)
    first = extract(model)
    attach(model, LoRA(rank=2), targets="1")
    both = extract(model)
    assert [site.path for site in both.methods] == ["0", "1"]
    assert all(torch.equal(t, both.tensors[s][n]) for s, group in first.tensors.items() for n, t in group.items())
    assert sum(p.requires_grad for p in model.parameters()) == 4
    with pytest.raises(UseError, match="0 already carries adapter 'default'"):
        attach(model, LORA, targets=["0"])
    assert sum(p.requires_grad for p in model.parameters()) == 4


def test_a_merged_adapter_is_left_alone() -> None:
    """It would act twice: in the weights and beside them."""
    model, x = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)), torch.randn(3, 6)
    attach(model, LORA, targets="0")
    stir(model)
    tuned = model(x)
    merge(model, keep_base=True)
    actions = (trainable, detach, lambda m: attach(m, LORA, targets="1"), lambda m: insert(m, extract(m)))
    for action in actions:
        with pytest.raises(UseError, match="'default' is merged into the weights: unmerge the model first"):
            action(model)
    with pytest.raises(UseError, match="'default' is merged into the weights"):
        use(model, "default")
    torch.testing.assert_close(model(x), tuned)


def test_modules_with_adapters_or_parametrizations_of_their_own() -> None:
    owner, weird = nn.Linear(6, 5), nn.utils.parametrizations.weight_norm(nn.Linear(6, 5))
    owner.adapters = {}  # type: ignore[assignment]
    with pytest.raises(UseError, match="an attribute 'adapters' or parametrizations of its own"):
        attach(nn.Sequential(owner), LORA, targets="0")
    with pytest.raises((UseError, TargetError)):
        attach(nn.Sequential(weird), LORA, targets="0")


def test_insert_wants_every_tensor_and_finite_ones() -> None:
    model = nn.Sequential(nn.Linear(6, 5))
    attach(model, LORA, targets="0")
    state = extract(model)
    (site,) = state.methods
    good = dict(state.tensors[site])
    wrong = {
        "lora_B is missing, expected (5, 4)": {"lora_A": good["lora_A"]},
        "extra is (1,), expected no such tensor in lora": {**good, "extra": torch.zeros(1)},
        "lora_A is (4, 5), expected (4, 6) for this 5×6 layer": {**good, "lora_A": torch.zeros(4, 5)},
        "lora_B holds NaN or infinite values": {**good, "lora_B": torch.full((5, 4), torch.nan)},
    }
    for sentence, tensors in wrong.items():
        plain = nn.Sequential(nn.Linear(6, 5))
        with pytest.raises(ValueError) as error:
            insert(plain, dataclasses.replace(state, tensors={site: tensors}))
        assert sentence in str(error.value)
        assert type(plain[0]) is nn.Linear and not [k for k in plain.__dict__ if k.startswith("_deltaw")]
    with pytest.raises(DeltawError, match="1: the model has no such module"):
        insert(nn.Sequential(nn.Linear(6, 5)), moved(state, "1"))
    with pytest.raises(DeltawError, match="LayerNorm cannot carry lora"):
        insert(nn.Sequential(nn.LayerNorm(6)), state)


# Flags: detach restores what attach froze, in whatever order parts of a model were adapted


@pytest.mark.parametrize("inner_first", [True, False])
def test_flags_come_back_when_parts_are_adapted_on_their_own(inner_first: bool) -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 5)), nn.Linear(5, 4))
    model[0][1].bias.requires_grad_(False)
    flags = {path: p.requires_grad for path, p in model.named_parameters()}
    steps = [lambda: attach(model[0], LORA, targets="0", name="inner"), lambda: attach(model, LORA, targets="1")]
    for step in steps if inner_first else reversed(steps):
        step()
    use(model[0], "inner")  # leaves an index on the inner module
    detach(model)
    for path, p in model.named_parameters():  # the inner one still wants its part frozen, and only that
        if path in flags:
            assert p.requires_grad is (False if path.startswith("0.") else flags[path])
    detach(model, "inner")
    assert {path: p.requires_grad for path, p in model.named_parameters()} == flags
    plain = set(nn.Sequential().__dict__)
    assert set(model.__dict__) == plain and set(model[0].__dict__) == plain
