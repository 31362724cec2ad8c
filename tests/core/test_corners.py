"""What goes wrong at the edges of a model: threads, failures half-way, nested roots, ties, names, precision."""

import copy
import io
import math
import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, FalconMambaConfig, LlamaConfig, WavLMConfig

from deltaw.core import place
from deltaw.core.attach import adapters, attach, detach, extract, insert
from deltaw.core.base import identify
from deltaw.core.errors import DeltawError, FileError, TargetError, UseError
from deltaw.core.merge import merge, unmerge
from deltaw.core.route import names, use
from deltaw.methods.dora import DoRA
from deltaw.methods.full import Full
from deltaw.methods.lora import LoRA
from deltaw.methods.token_rows import TokenRows
from deltaw.mixing.exact import exact

LORA = LoRA(rank=2, alpha=4)


def stir(model: nn.Module, name: str = "default", by: float = 0.1) -> None:
    with torch.no_grad():
        for adapter in adapters(model, name).values():
            for p in adapter.parameters():
                p.add_(by * torch.randn_like(p))


def flags(model: nn.Module) -> dict[str, bool]:
    return {path: p.requires_grad for path, p in model.named_parameters()}


def test_threads_with_a_trained_copy_leave_the_base_alone() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    base, x = model[0].weight.detach().clone(), torch.randn(2, 8)
    attach(model, Full(), targets="0")
    stir(model)
    expected, wrong = model(x), []

    def run() -> None:
        with torch.no_grad():
            for _ in range(300):
                if not torch.allclose(model(x), expected):
                    wrong.append(1)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and torch.equal(model[0].weight, base)


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.keys, self.values = nn.Parameter(torch.ones(4)), nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.keys + self.values


def test_parameters_called_like_methods() -> None:
    model, x = nn.Sequential(Named()), torch.randn(2, 4)
    base = model(x)
    attach(model, Full(), targets="0")
    stir(model)
    tuned, state = model(x), extract(model)
    assert {site.slot for site in state.methods} == {"keys", "values"} and not torch.equal(tuned, base)
    detach(model)
    insert(model, state)
    assert torch.equal(model(x), tuned)


def test_a_failure_half_way_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    before, keys = flags(model), list(model.state_dict())
    added = place._add

    def second_fails(module: Any, *rest: Any) -> None:
        added(module, *rest)
        if module is model[1]:
            raise MemoryError

    monkeypatch.setattr(place, "_add", second_fails)
    with pytest.raises(MemoryError):
        attach(model, LORA, targets=["0", "1"])
    assert flags(model) == before and list(model.state_dict()) == keys and names(model) == []
    assert type(model[0]) is nn.Linear and set(model.__dict__) == set(nn.Sequential().__dict__)
    monkeypatch.undo()
    attach(model, LORA, targets=["0", "1"])


def test_token_rows_are_exact_in_bf16() -> None:
    model = nn.Sequential(nn.Embedding(10, 64)).bfloat16()
    ids = torch.tensor([1, 2])
    base = model(ids)
    attach(model, TokenRows(tokens=(1,)), targets="0")
    assert torch.equal(model(ids), base)
    (adapter,) = adapters(model).values()
    with torch.no_grad():
        adapter.rows.normal_(std=0.02)  # type: ignore[union-attr, operator]
    assert torch.equal(model(ids)[0], adapter.rows[0].bfloat16()) and torch.equal(model(ids)[1], base[1])  # type: ignore[index]


@pytest.mark.parametrize("inner_goes_first", [True, False])
def test_nested_roots_give_back_their_own_flags(inner_goes_first: bool) -> None:
    model = nn.ModuleDict({"x": nn.Linear(4, 4), "y": nn.ModuleDict({"z": nn.Linear(4, 4)})})
    before = flags(model)
    attach(model["y"], LORA, targets="z", name="b")
    attach(model, LORA, targets="x", name="a")
    if inner_goes_first:
        detach(model["y"], "b")
        assert not model["y"]["z"].weight.requires_grad
        detach(model, "a")
    else:
        detach(model, "a")
        assert model["x"].weight.requires_grad and not model["y"]["z"].weight.requires_grad
        detach(model["y"], "b")
    assert flags(model) == before


def test_an_adapter_goes_also_through_a_part_of_its_model() -> None:
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    )
    before = flags(model)
    attach(model, LORA, targets="q_proj")
    with pytest.raises(UseError, match="would mix their tensors"):
        model.model.save_pretrained("nowhere")
    pickled = torch.load(_pickled(model), weights_only=False)
    for twin in (copy.deepcopy(model), pickled, model):
        detach(twin if twin is pickled else twin.model)
        assert flags(twin) == before and "save_pretrained" not in {*twin.__dict__, *twin.model.__dict__}
        assert names(twin) == []


def _pickled(model: nn.Module) -> io.BytesIO:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return buffer


def test_names_of_the_bases_own_are_left_alone() -> None:
    class Mine(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 4)
            self.merged, self.live, self.entries, self.pristine = False, True, 3, {}

    model = nn.Sequential(Mine())
    attach(model, LORA, targets="0")
    use(model, {"default": 0.5})
    stir(model)
    merge(model, keep_base=True)
    unmerge(model)
    detach(model)
    assert (model[0].merged, model[0].live, model[0].entries, model[0].pristine) == (False, True, 3, {})


class Tied(nn.Module):
    def __init__(self, head_first: bool = False, kind: type[nn.Module] = nn.Linear) -> None:
        super().__init__()
        head, table = kind(8, 12, bias=False), nn.Embedding(12, 8)
        for name, module in (("head", head), ("emb", table)) if head_first else (("emb", table), ("head", head)):
            self.add_module(name, module)
        self.head.weight = self.emb.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.emb(ids))


@pytest.mark.parametrize("head_first", [False, True])
@pytest.mark.parametrize("before", [False, True], ids=["alone", "after LoRA on the head"])
def test_token_rows_act_wherever_the_table_is_read(head_first: bool, before: bool) -> None:
    model, ids = Tied(head_first), torch.arange(12)[None]
    if before:
        attach(model, LORA, targets="head")
    attach(model, TokenRows(tokens=(3, 5)), targets="emb")
    stir(model)
    state, tuned = extract(model), model(ids)
    rows = state.tensors[next(s for s, m in state.methods.items() if isinstance(m, TokenRows))]["rows"]
    assert [str(s) for s, m in state.methods.items() if isinstance(m, TokenRows)] == ["emb"]
    scores = F.linear(model.emb(ids), rows)
    if not before:
        assert torch.allclose(tuned[..., [3, 5]], scores, atol=1e-6)
    other = Tied(head_first)
    other.load_state_dict({k: v for k, v in model.state_dict().items() if "adapters" not in k})
    insert(other, state)
    assert torch.allclose(other(ids), tuned, atol=1e-6)


def test_token_rows_refuse_a_reader_they_cannot_act_in() -> None:
    class Strange(nn.Module):
        def __init__(self, n: int, m: int, bias: bool) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(m, n))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight.T

    model = Tied(kind=Strange)
    with pytest.raises(TargetError, match=r"tied to the weight of a Strange, where token_rows cannot act"):
        attach(model, TokenRows(tokens=(1,)), targets="emb")
    assert type(model.emb) is nn.Embedding


@pytest.mark.parametrize("method", [LORA, DoRA(rank=2, alpha=4)])
def test_a_merge_that_keeps_the_base_keeps_it_for_every_reader(method: LoRA) -> None:
    model, ids = Tied(), torch.arange(12)[None]
    attach(model, method, targets="head", name="a")
    stir(model, "a")
    attach(model, TokenRows(tokens=(3,)), targets="emb", name="rows")
    stir(model, "rows")
    use(model, {"a": 1.0, "rows": 1.0})
    both = model(ids)
    merge(model, "rows", keep_base=True)
    assert torch.allclose(model(ids), both, atol=1e-5)
    unmerge(model)
    use(model, {"a": 1.0, "rows": 1.0})
    assert torch.equal(model(ids), both)


def test_a_base_that_is_not_there() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    attach(model, LORA, targets="0")
    state = extract(model)
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(FileError, match="the base's weights are not there"):
        insert(empty, state)
    with pytest.raises(UseError, match="starts from the base's weights, which are not there"):
        attach(empty, DoRA(rank=2), targets="0")
    attach(empty, LORA, targets="0")  # shapes are enough for a plan


def test_replaced_modules_are_missed() -> None:
    model = nn.ModuleDict({"body": nn.Linear(4, 4), "head": nn.Linear(4, 4)})
    attach(model, LORA, targets=["body", "head"])
    model["head"] = nn.Linear(4, 5)
    with pytest.raises(UseError, match="was attached to head, where it is no longer"):
        extract(model)
    detach(model)
    attach(model, LORA, targets="head")


def test_padding_learns_nothing() -> None:
    model = nn.Sequential(nn.Embedding(6, 4, padding_idx=0))
    attach(model, LoRA(rank=2), targets="0")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(3):
        (model(torch.tensor([0, 1, 2])) - 1).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    y = model(torch.tensor([0, 1]))
    assert not y[0].any() and (y[1] - model[0].weight[1]).abs().max() > 0.1


def test_two_states_do_not_fuse_under_one_name() -> None:
    model = nn.ModuleDict({"x": nn.Linear(4, 4), "y": nn.Linear(4, 4)})
    attach(model, LORA, targets="x")
    state = extract(model)
    with pytest.raises(UseError, match="an adapter 'default' is attached already"):
        insert(model, state)


def test_around_a_compiled_model() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    compiled = torch.compile(model, backend="eager")
    attach(compiled, LORA, targets="0")
    state = extract(compiled)
    assert [site.path for site in state.methods] == ["0"]
    with use(compiled, {}):
        assert torch.equal(compiled(torch.ones(1, 4)), model(torch.ones(1, 4)))
    detach(compiled)


def test_ranks_are_judged_where_they_apply() -> None:
    model = nn.ModuleDict({"large": nn.Linear(64, 64), "small": nn.Linear(8, 8)})
    plan = attach(model, LoRA(rank=32, rank_pattern={"small": 4}), targets=["large", "small"])
    assert [t.method.rank for t in plan.targets] == [32, 4]  # type: ignore[attr-defined]
    detach(model)
    with pytest.raises(TargetError, match=r"small.*rank 1000 is above both dimensions"):
        attach(model, LoRA(rank=4, rank_pattern={"small": 1000}), targets=["large", "small"])


def test_mixes_of_more_rank_than_the_weight_has() -> None:
    for layer in (nn.Linear(8, 8), nn.Linear(6, 20), nn.Linear(20, 6), nn.Conv2d(2, 3, 3)):
        model = nn.Sequential(layer)
        states = []
        for _ in range(3):
            attach(model, LoRA(rank=4 if layer.weight.ndim == 2 else 2), targets="0")
            stir(model)
            states.append(extract(model))
            detach(model)
        mixed = exact(states, [0.5, -1.0, 2.0])
        insert(model, mixed)
        x = torch.randn(
            2, *((8,) if layer.weight.shape == (8, 8) else (layer.weight.shape[1], *(5, 5)[: layer.weight.ndim - 2]))
        )
        y = model(x)
        detach(model)
        for state, name in zip(states, "abc", strict=True):
            insert(model, state, name=name)
        with use(model, {"a": 0.5, "b": -1.0, "c": 2.0}):
            assert torch.allclose(model(x), y, atol=1e-5)
        (a,) = mixed.tensors.values()
        assert a["lora_A"].shape[0] <= min(layer.weight.shape[0], layer.weight[0].numel())


@pytest.mark.parametrize("weight", [math.nan, math.inf, True, "1"])
def test_weights_that_cannot_be(weight: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    attach(model, LORA, targets="0")
    state = extract(model)
    with pytest.raises((UseError, TypeError), match=r"finite numbers|unsupported operand|can't multiply"):
        weight * state
    with pytest.raises(UseError, match="weights must be finite numbers"):
        exact([state, state], [1.0, weight])
    assert sum([state, state]).parameters == 2 * state.parameters


def test_states_of_other_shapes() -> None:
    states = []
    for size in (4, 6):
        model = nn.Sequential(nn.Linear(size, 4))
        attach(model, LORA, targets="0")
        states.append(extract(model))
    with pytest.raises(DeltawError, match=r"different (shapes|bases)|two different bases"):
        exact(states, [1, 1])


def test_presets_can_be_excluded() -> None:
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    model = AutoModelForCausalLM.from_config(config)
    plan = attach(model, LORA, targets="all-linear", exclude="attention")
    assert {path.rpartition(".")[2] for path in plan.paths} == {"gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize(
    "options",
    [{"targets": []}, {"targets": "all", "layers": []}, {"targets": "0", "layers": "3-1"}, {"targets": "0", "exclude": ".*"},
     {"targets": None}, {"targets": 5}, {"targets": "0", "layers": "0-99999999"}],
    ids=str,
)  # fmt: skip
def test_nothing_to_adapt_is_an_error_and_touches_nothing(options: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(TargetError) as caught:
        attach(model, LORA, **options)
    assert len(str(caught.value)) < 300 and flags(model) == {"0.weight": True, "0.bias": True}


@pytest.mark.parametrize("wrong", [LoRA, "lora", None])
def test_what_is_not_a_method(wrong: Any) -> None:
    with pytest.raises(UseError, match="is not a method"):
        attach(nn.Linear(2, 2), wrong, targets="")
    with pytest.raises(UseError, match="is not a model"):
        attach("x", LORA, targets="")  # type: ignore[arg-type]
    with pytest.raises(UseError, match="is no route"):
        use(nn.Linear(2, 2), 5)  # type: ignore[arg-type]


def test_originals_move_along() -> None:
    model, x = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 4)), torch.tensor([1, 2])
    attach(model, LORA, targets=["0", "1"], name="a")
    stir(model, "a")
    attach(model, LORA, targets=["0", "1"], name="b")
    stir(model, "b")
    base = model[1].weight.detach().clone()
    use(model, {"a": 1.0, "b": 1.0})
    merge(model, "a", keep_base=True)
    model.to(torch.bfloat16)
    assert model(x).dtype == torch.bfloat16
    unmerge(model)
    assert torch.equal(model[1].weight, base.bfloat16())


def test_a_class_changed_after_attaching_is_not_taken_apart() -> None:
    class Double(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return 2 * w

    model, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4)
    attach(model, LORA, targets="0")
    torch.nn.utils.parametrize.register_parametrization(model[0], "weight", Double())
    y = model(x)
    with pytest.raises(UseError, match="parametrized or sharded after"):
        detach(model)
    assert torch.equal(model(x), y)
    torch.nn.utils.parametrize.remove_parametrizations(model[0], "weight")
    detach(model)
    assert type(model[0]) is nn.Linear


def test_strength_multiplies_before_rounding() -> None:
    model = nn.Sequential(nn.Linear(32, 32, bias=False)).bfloat16()
    with torch.no_grad():
        model[0].weight.zero_()
    attach(model, LoRA(rank=1, alpha=1), targets="0")
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1.0) if p.requires_grad else None
    x = torch.zeros(1, 32, dtype=torch.bfloat16)
    x[0, 0] = 1.0
    with use(model, {"default": 0.3}):
        assert torch.equal(model(x), torch.full((1, 32), 0.3).bfloat16())
    with torch.inference_mode():
        use(model, {"default": 0.5})
    model(x).sum().backward()


def test_fp64_stays_fp64() -> None:
    model, x = nn.Sequential(nn.Linear(16, 16)).double(), torch.randn(4, 16, dtype=torch.float64)
    attach(model, LORA, targets="0")
    stir(model)
    y = model(x)
    merge(model)
    assert (model(x) - y).abs().max() < 1e-13


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_copy_in_another_dtype_is_the_same_base(dtype: torch.dtype) -> None:
    """Also when it is loaded in fp32 again, as on a CPU."""
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    here = identify(model)
    rounded = identify(copy.deepcopy(model).to(dtype).float())
    assert here.difference(rounded) is None is rounded.difference(here)
    for other in (torch.bfloat16, torch.float16):
        assert rounded.difference(identify(copy.deepcopy(model).to(other))) is None or other != dtype
    stranger = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(dtype).float()
    assert "the values of" in str(here.difference(identify(stranger)))


def test_modules_whose_weight_is_read_from_above_are_refused() -> None:
    mamba = AutoModelForCausalLM.from_config(
        FalconMambaConfig(vocab_size=32, hidden_size=16, state_size=4, num_hidden_layers=1)
    )
    plan = attach(mamba, LORA, targets="all-linear")
    assert not any(path.endswith("dt_proj") for path in plan.paths) and "reads its weight itself" in str(plan)
    config = WavLMConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=64,
        conv_dim=(8,),
        conv_stride=(2,),
        conv_kernel=(3,),
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    )
    with pytest.raises(
        TargetError, match=r"q_proj: WavLMAttention\.torch_multi_head_self_attention reads its weight itself"
    ):
        attach(AutoModel.from_config(config), LORA, targets="q_proj")
    lists = nn.Sequential(nn.ParameterList([torch.zeros(3)]))
    with pytest.raises(TargetError, match="ParameterList is never called"):
        attach(lists, Full(), targets="0")
    with pytest.raises(TargetError, match="WeightNorm computes the weight"):
        attach(nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 4))), Full(), targets="0")


def test_presets_choose_the_same_layers_for_every_method() -> None:
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    for preset in ("all-linear", "attention", "mlp"):
        low_rank = attach(AutoModelForCausalLM.from_config(config), LORA, targets=preset)
        whole = attach(AutoModelForCausalLM.from_config(config), Full(), targets=preset)
        assert low_rank.paths == whole.paths


def test_masters_stay_in_fp32_wherever_the_model_goes() -> None:
    model, x = nn.Sequential(nn.Linear(6, 5)), torch.randn(2, 6)
    attach(model, LORA, targets="0")
    stir(model)
    (site,) = extract(model).methods
    before = extract(model).tensors[site]
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        model.to(dtype)
        assert model(x.to(dtype)).dtype == dtype
        assert all(torch.equal(t, before[name]) for name, t in extract(model).tensors[site].items())
    model.half().float().to("meta")
    assert all(p.device.type == "meta" for p in model.parameters())
