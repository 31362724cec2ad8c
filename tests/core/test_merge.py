"""Writing ΔW into weights: exact, never silently nothing, never into a second place, undone to the bit."""

import pytest
import torch
from torch import nn

from core import tiny
from deltaw.core.attach import adapters, attach, detach, extract, insert
from deltaw.core.errors import MergeError, UseError
from deltaw.core.host import Host, WeightHost, host_of
from deltaw.core.merge import merge, unmerge
from deltaw.core.method import Method, Site, get
from deltaw.core.method import names as methods
from deltaw.core.route import live, use
from deltaw.core.state import delta
from deltaw.methods.dora import DoRA
from deltaw.methods.full import Full
from deltaw.methods.ia3 import IA3
from deltaw.methods.lora import LoRA
from deltaw.methods.token_rows import TokenRows


def stir(model: nn.Module, size: float = 0.3) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(size * torch.randn_like(parameter))


def adapted(*methods: Method, layer: nn.Module | None = None) -> nn.Sequential:
    model = nn.Sequential(layer or nn.Linear(6, 5))
    for name, method in zip("abc", methods, strict=False):
        attach(model, method, targets="0", name=name)
        stir(model)
    return model


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5"])
@torch.no_grad()
def test_a_merged_model_is_a_plain_one(family: str) -> None:
    model, ids = tiny.model(family), tiny.ids()
    inputs = {"input_ids": ids, "decoder_input_ids": ids} if family == "t5" else {"input_ids": ids}
    classes = [type(module) for module in model.modules()]
    keys, flags = list(model.state_dict()), [p.requires_grad for p in model.parameters()]
    base = model(**inputs).logits
    attach(model, LoRA(rank=4, alpha=6), targets="all-linear")
    stir(model, 0.1)
    tuned = model(**inputs).logits
    report = merge(model)
    assert (tuned - base).abs().max() > 1e-2
    torch.testing.assert_close(model(**inputs).logits, tuned, atol=1e-5, rtol=1e-4)
    assert [type(module) for module in model.modules()] == classes
    assert list(model.state_dict()) == keys and [p.requires_grad for p in model.parameters()] == flags
    assert report.changed == report.weights > 0 and 0 < report.change < 10


def test_the_report_measures_what_was_written() -> None:
    model = adapted(LoRA(rank=2))
    before = model[0].weight.detach().clone()
    report = merge(model, "a")
    change = (model[0].weight.detach() - before).norm() / before.norm()
    assert report.change == pytest.approx(float(change), rel=1e-5) and (report.weights, report.changed) == (1, 1)


def test_nothing_to_merge_is_an_error() -> None:
    model = nn.Sequential(nn.Linear(6, 5))
    attach(model, LoRA(rank=2), targets="0", name="fresh")
    with pytest.raises(MergeError, match="merging 'fresh' would change no weight at all"):
        merge(model, "fresh")
    attach(model, DoRA(rank=2), targets="0", name="dora")
    with pytest.raises(MergeError, match="merging 'dora' would change no weight at all"):
        merge(model, "dora")
    half = nn.Sequential(nn.Linear(6, 5)).bfloat16()
    attach(half, LoRA(rank=2), targets="0")
    stir(half, 1e-5)
    with pytest.raises(MergeError, match="too small for the weights' dtype"):
        merge(half)
    with pytest.raises(UseError, match="no adapter 'x' is attached"):
        merge(model, "x")
    with pytest.raises(MergeError, match="nothing to unmerge"):
        unmerge(model)


def test_values_that_are_not_finite_are_refused() -> None:
    model = adapted(LoRA(rank=2))
    weight = model[0].weight.clone()
    model[0].adapters["a"]["weight"].lora_A.data[0, 0] = torch.inf
    with pytest.raises(MergeError, match=r"0\.weight: the merged weight is not finite in torch.float32"):
        merge(model, "a")
    half = adapted(LoRA(rank=2), layer=nn.Linear(6, 5).half())
    half[0].adapters["a"]["weight"].lora_A.data.mul_(1e6)  # finite in fp32, not in fp16
    with pytest.raises(MergeError, match=r"not finite in torch\.float16"):
        merge(half, "a")
    assert torch.equal(model[0].weight, weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_restored_to_the_bit(dtype: torch.dtype) -> None:
    """Subtracting instead changes a quarter of the weights."""
    model = adapted(LoRA(rank=4, alpha=6), layer=nn.Linear(64, 48).to(dtype))
    before, host = model[0].weight.detach().clone(), host_of(model[0])
    adapter = model[0].adapters["a"]["weight"]
    merge(model, "a", keep_base=True)
    merged = adapter.merged(before.float()).detach()
    assert torch.equal(model[0].weight, merged.to(dtype))  # fp32 arithmetic, one rounding
    subtracted = (model[0].weight.float() - (merged - before.float())).to(dtype)
    assert (subtracted != before).float().mean() > 0.05
    assert torch.equal(host.weight, before)  # what adapters see stays the base
    unmerge(model)
    assert torch.equal(model[0].weight, before)


PAIRS = [(LoRA(rank=2), LoRA(rank=3)), (LoRA(rank=2), DoRA(rank=2)), (DoRA(rank=2), Full()), (Full(), Full())]


@pytest.mark.parametrize("methods", PAIRS, ids=lambda pair: "-".join(m.name for m in pair))
@torch.no_grad()
def test_two_merges_are_the_sum(methods: tuple[Method, Method]) -> None:
    model, x = adapted(*methods), torch.randn(3, 6)
    before = {path: p.clone() for path, p in model.named_parameters()}
    use(model, {"a": 1.0, "b": 1.0})
    both = model(x)
    merge(model, "a", keep_base=True)
    torch.testing.assert_close(model(x), both, atol=1e-5, rtol=1e-5)  # b is still live, beside the merged weight
    merge(model, "b", keep_base=True)
    torch.testing.assert_close(model(x), both, atol=1e-5, rtol=1e-5)
    assert live(model) == {}
    with pytest.raises(MergeError, match="'a' is merged already"):
        merge(model, "a")
    unmerge(model)
    assert all(torch.equal(p, before[path]) for path, p in model.named_parameters())
    assert torch.equal(model(x), both)


@torch.no_grad()
def test_a_second_one_way_merge_is_refused_where_it_would_not_be_the_sum() -> None:
    x = torch.randn(3, 6)
    plain = adapted(LoRA(rank=2), LoRA(rank=3))
    with use(plain, {"a": 1.0, "b": 1.0}):
        both = plain(x)
    merge(plain, "a")
    merge(plain, "b")
    assert type(plain[0]) is nn.Linear
    torch.testing.assert_close(plain(x), both)
    for second in (DoRA(rank=2), Full()):
        model = adapted(LoRA(rank=2), second)
        with pytest.raises(MergeError, match=r"the change of 'b' depends on this weight .*merge with keep_base=True"):
            merge(model, "a")
    kept = adapted(LoRA(rank=2), LoRA(rank=3))
    merge(kept, "a", keep_base=True)
    with pytest.raises(MergeError, match="another adapter is merged here with its base kept"):
        merge(kept, "b")


def test_tied_modules_are_merged_once_where_that_is_right() -> None:
    """One module reached by two paths is one weight; two modules that share a weight are refused."""
    shared, x = nn.Linear(6, 6), torch.randn(3, 6)
    model = nn.ModuleDict({"first": shared, "second": shared})
    attach(model, LoRA(rank=2), targets="first")
    stir(model)
    tuned = shared(x)
    merge(model)
    torch.testing.assert_close(shared(x), tuned)
    twins = nn.ModuleDict({"first": nn.Linear(6, 6, bias=False), "second": nn.Linear(6, 6, bias=False)})
    twins["second"].weight = twins["first"].weight
    attach(twins, LoRA(rank=2), targets=["first", "second"])
    stir(twins)
    with pytest.raises(MergeError, match=r"first\.weight is tied to second\.weight") as error:
        merge(twins)
    assert len(error.value.faults) == 2


@pytest.mark.parametrize("order", [["embed_tokens"], ["lm_head", "q_proj"]], ids=str)
@torch.no_grad()
def test_token_rows_of_a_tied_table_act_in_both_places(order: list[str]) -> None:
    """Rows belong to the table, and so do the scores of those tokens; they merge into it, ties and all."""
    model, ids = tiny.model("tied"), torch.tensor([[3, 5, 9, 5]])
    table, base = model.model.embed_tokens.weight.clone(), model(ids).logits
    if "lm_head" in order:  # something else sits on the head already
        attach(model, LoRA(rank=2), targets=order, name="other")
        stir(model)
    with_other = model(ids).logits
    attach(model, TokenRows(tokens=(5, 9)), targets="embed_tokens", name="rows")
    with use(model, {"rows": 1.0, **({"other": 1.0} if "lm_head" in order else {})}):
        assert torch.equal(model(ids).logits, with_other)
    stir(model)
    tuned = model(ids).logits
    plain = tiny.model("tied")
    plain.model.embed_tokens.weight[[5, 9]] = adapters(model, "rows")[Site("model.embed_tokens")].rows
    torch.testing.assert_close(tuned, plain(ids).logits, atol=1e-5, rtol=1e-4)
    assert (tuned[..., [5, 9]] - base[..., [5, 9]]).abs().max() > 1e-2
    state = extract(model, "rows")
    assert list(state.methods) == [Site("model.embed_tokens")]
    merge(model, "rows", keep_base=True)
    torch.testing.assert_close(model(ids).logits, tuned, atol=1e-5, rtol=1e-4)
    unmerge(model)
    assert torch.equal(model(ids).logits, tuned) and torch.equal(model.model.embed_tokens.weight, table)
    detach(model, "rows")
    insert(model, state, name="again")
    assert torch.equal(model(ids).logits, tuned)
    merge(model, "again")
    torch.testing.assert_close(model(ids).logits, tuned, atol=1e-5, rtol=1e-4)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("second", [DoRA(rank=2), Full(), TokenRows(tokens=(3, 5))], ids=lambda method: method.name)
def test_a_merge_into_a_tied_table_asks_the_adapters_of_both_places(second: Method) -> None:
    model = tiny.model("tied")
    attach(model, second, targets="lm_head", name="head")
    stir(model)
    attach(model, TokenRows(tokens=(5, 9)), targets="embed_tokens", name="rows")
    stir(model)
    table = model.lm_head.weight.clone()
    with pytest.raises(MergeError, match=r"embed_tokens\.weight: the change of 'head' depends on this weight"):
        merge(model, "rows")
    assert torch.equal(model.lm_head.weight, table)


def test_a_merge_into_the_bias_asks_what_scales_it() -> None:
    """IA3 sits on the weight and scales the bias too."""
    model = nn.Sequential(nn.Linear(6, 5))
    attach(model, IA3(), targets="0", name="scales")
    stir(model)
    attach(model, Full(), targets="0", name="copies")
    adapters(model, "copies")[Site("0", "bias")].copy.data.add_(1.0)
    with pytest.raises(MergeError, match=r"0\.bias: the change of 'scales' depends on this weight"):
        merge(model, "copies")


LAYERS = {
    "linear": (lambda: nn.Linear(24, 16), torch.randn(5, 24).double()),
    "conv": (lambda: nn.Conv2d(4, 8, 3), torch.randn(2, 4, 6, 6).double()),
    "embedding": (lambda: nn.Embedding(10, 16), torch.arange(10)),
}
FITTING = [
    (name, kind)
    for name in methods()
    for kind, (layer, _) in LAYERS.items()
    if get(name).host is WeightHost and get(name)().unfit(host_of(layer()).spec) is None
]


@pytest.mark.parametrize(("name", "kind"), FITTING)
@torch.no_grad()
def test_fp64_stays_fp64(name: str, kind: str) -> None:
    """What is computed for the merge, beside the layer and for a file agree far below fp32's precision."""
    build, x = LAYERS[kind]
    layer = build()
    model = nn.Sequential(layer).double()
    attach(model, get(name)(), targets="0")
    stir(model)
    host, base, (site,) = host_of(layer), layer.weight.clone(), extract(model).methods
    change = delta(extract(model), site, host.weight)
    with use(model, {}):
        plain = model(x)
    with use(model, {"default": 0.5}):
        half = model(x)
    tuned = model(x)
    torch.testing.assert_close(half, 0.5 * (plain + tuned), atol=1e-13, rtol=1e-13)
    merge(model, keep_base=True)
    torch.testing.assert_close(model(x), tuned, atol=1e-13, rtol=1e-13)
    written = host.stored.detach() - base
    torch.testing.assert_close(change, written.T if kind == "embedding" else written, atol=1e-13, rtol=1e-13)


@torch.no_grad()
def test_the_base_is_kept_once_for_all_merges_and_readers(monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[Host] = []
    keep = Host.keep
    monkeypatch.setattr(Host, "keep", lambda host: (copies.append(host), keep(host))[1])
    model = tiny.model("tied")
    table = model.lm_head.weight.clone()
    for name, tokens in {"a": (5,), "b": (9,)}.items():
        attach(model, TokenRows(tokens=tokens), targets="embed_tokens", name=name)
        stir(model)
    merge(model, "a", keep_base=True)
    place = model.model.embed_tokens._deltaw.pristine
    late = nn.ModuleDict({"model": model, "tied": nn.Linear(32, 64, bias=False)})  # comes after the first merge
    late["tied"].weight = model.lm_head.weight
    attach(late, LoRA(rank=2), targets="tied", name="late")
    merge(late, "b", keep_base=True)
    assert len(copies) == 1 and late["tied"]._deltaw.pristine["weight"] is place["weight"]
    unmerge(late)
    assert torch.equal(model.lm_head.weight, table)


@torch.no_grad()
def test_token_rows_attached_to_the_tied_head_merge_as_well() -> None:
    """The embedding comes first in the model, and holds the table in another layout."""
    model, ids = tiny.model("tied"), torch.tensor([[3, 5, 9, 5]])
    attach(model, TokenRows(tokens=(5, 9)), targets="lm_head")
    stir(model)
    tuned = model(ids).logits
    merge(model)
    torch.testing.assert_close(model(ids).logits, tuned, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_strengths_of_the_others_survive_a_merge() -> None:
    model = adapted(LoRA(rank=2), LoRA(rank=2), LoRA(rank=2))
    use(model, {"a": 1.0, "b": 0.5})
    merge(model, "a")
    assert live(model) == {"b": 0.5}
    detach(model, "b")
    detach(model, "c")
    assert type(model[0]) is nn.Linear
