"""Every registered method × every host, through one suite. A new method is tested by being registered."""

import contextlib
import dataclasses
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from contract import suite
from contract.hosts import HOSTS, HostCase
from contract.matrix import COUNT, MATRIX
from deltaw.core.attach import attach
from deltaw.core.errors import ConfigError, TargetError
from deltaw.core.host import HostSpec, WeightHost, host_of
from deltaw.core.method import Method, get, names
from deltaw.core.plan import Target
from deltaw.core.route import use
from deltaw.core.targets import plan
from deltaw.methods.inits import STARTS
from deltaw.methods.lora import LoRA, LoRAAdapter

OURS = [name for name in names() if get(name).__module__.startswith("deltaw.")]


def refusal(method: Method, case: HostCase) -> str | None:
    try:
        plan(case.net(), method, "layer")
    except TargetError as error:
        return str(error)
    return None


def has(name: str, *fields: str) -> bool:
    return {field.name for field in dataclasses.fields(get(name))} >= set(fields)


def configs(name: str, case: HostCase) -> dict[str, Method]:
    """The default, and where there is a rank: α ≠ r, r = 1, r = min(m, n), a rank that divides nothing."""
    make: Any = get(name)
    found: dict[str, Method] = {"default": make()}
    if has(name, "rank", "alpha"):
        spec = host_of(case.make()).spec
        smallest = min(spec.shape[0], spec.fan_in)
        found |= {
            "r4": make(rank=4, alpha=6.0),
            "r1": make(rank=1, alpha=3.0),
            "r5": make(rank=5, alpha=2.0),
            f"r=min={smallest}": make(rank=smallest, alpha=5.0),
        }
    elif has(name, "rank") and make.host is WeightHost:
        spec = host_of(case.make()).spec
        ranks = {f"r{rank}": make(rank=rank) for rank in (1, 2, 5)}
        found |= {label: method for label, method in ranks.items() if method.unfit(spec) is None}
    if has(name, "rslora"):
        found["rs"] = make(rank=4, alpha=6.0, rslora=True)
    for init in splits(name):
        small = min(host_of(case.make()).spec.shape[0], host_of(case.make()).spec.fan_in)
        split = make(rank=min(3, small), alpha=5.0, init=init)
        found |= {init: split} if split.unfit(host_of(case.make()).spec) is None else {}
    if has(name, "tokens"):
        found["rows"] = make(tokens=tokens(case))
    if has(name, "placement"):
        found |= {place: make(placement=place, rank=5) for place in ("houlsby", "pfeiffer", "parallel")}
    if has(name, "length"):
        found["one"] = make(length=1)
    if has(name, "coft"):
        found |= {"coft": make(coft=True, eps=0.7), "share": make(share=True), "series": make(terms=5)}
    if has(name, "levels"):
        found["level"] = make(levels=1)
    return found


def tokens(case: HostCase) -> tuple[int, ...]:
    """Three rows of the table, in no order, where it has so many."""
    host = host_of(case.make())
    size = 0 if host is None else host.spec.shape[int(host.spec.lookup)]
    return tuple(t % size for t in (7, 0, 23)) if size > 23 else (0,)


def splits(name: str) -> list[str]:
    """Starts that take factors from the weight, where the method has them."""
    found = []
    for init in STARTS if has(name, "init") else ():
        with contextlib.suppress(ConfigError):
            found.append(get(name)(init=init).init)  # type: ignore[call-arg, attr-defined]
    return found


def main(name: str, case: HostCase) -> Method:
    """The one configuration that the slower checks run."""
    make: Any = get(name)
    if has(name, "rank", "alpha"):
        return make(rank=4, alpha=6.0)
    return make(tokens=tokens(case)) if has(name, "tokens") else make()


PAIRS = [(name, host) for name in OURS for host in HOSTS if refusal(get(name)(), HOSTS[host]) is None]
EVERY = [
    pytest.param(method, HOSTS[host], id=f"{name}-{host}-{label}")
    for name, host in PAIRS
    for label, method in configs(name, HOSTS[host]).items()
]
ONE = [pytest.param(main(name, HOSTS[host]), HOSTS[host], id=f"{name}-{host}") for name, host in PAIRS]
ONE += [
    pytest.param(configs(name, HOSTS[host])["parallel"], HOSTS[host], id=f"{name}-{host}-parallel")
    for name, host in PAIRS
    if has(name, "placement")
]
ONE += [
    pytest.param(get(name)(rank=3, alpha=5.0, init=init), HOSTS["linear"], id=f"{name}-linear-{init}")  # type: ignore[call-arg]
    for name in OURS
    for init in splits(name)
]


def test_matrix_is_complete() -> None:
    """Registering a method or adding a host case fails here until its row or column is written down."""
    assert sorted(MATRIX) == OURS
    assert all(list(row) == list(HOSTS) for row in MATRIX.values())
    assert sorted(COUNT) == OURS
    assert (len(MATRIX), len(HOSTS), sum(value is True for row in MATRIX.values() for value in row.values())) == (
        14,
        22,
        185,
    )


@pytest.mark.parametrize("case", HOSTS.values(), ids=HOSTS)
def test_what_a_weight_can_hold_is_as_written(case: HostCase) -> None:
    """Only where storage is lossy may a check expect a merge to lose anything."""
    host = host_of(case.make())
    if host is None:
        assert not case.lossy
        return
    weight = torch.randn(host.spec.shape)
    lost = host.rounded(weight) - weight
    assert bool(lost.any()) == case.lossy and float(lost.norm()) < 0.15 * float(weight.norm())


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("name", OURS)
def test_support_is_as_written(name: str, host: str) -> None:
    expected, found = MATRIX[name][host], refusal(get(name)(), HOSTS[host])
    if expected is True:
        assert found is None
    else:
        assert isinstance(expected, str) and found is not None and expected in found


@pytest.mark.parametrize("check", suite.EVERY_CONFIG, ids=lambda check: check.__name__)
@pytest.mark.parametrize(("method", "case"), EVERY)
def test_every_config(check: suite.Check, method: Method, case: HostCase) -> None:
    check(method, case)


@pytest.mark.parametrize("check", suite.ONE_CONFIG, ids=lambda check: check.__name__)
@pytest.mark.parametrize(("method", "case"), ONE)
def test_one_config(check: suite.Check, method: Method, case: HostCase) -> None:
    check(method, case)


def forward_only_count(target: Target) -> int:
    """COUNT of one adapter on a sublayer [m, n]: its rank is its width or its number of tokens."""
    method: Any = target.method
    rank = method.rank if hasattr(method, "rank") else method.length
    biases = 0 if getattr(method, "placement", "") == "parallel" else rank + target.spec.shape[0]
    return COUNT[method.name](*target.spec.shape, 1, rank, biases)


@pytest.mark.parametrize(("method", "case"), EVERY)
def test_trainable_count_is_the_formula(method: Method, case: HostCase) -> None:
    """T1: r(m + n), with the kernel on the input side; and that is what the plan said."""
    net = case.net()
    planned = attach(net, method, targets="layer")
    trainable = sum(p.numel() for p in net.parameters() if p.requires_grad)
    if planned.targets[0].site.slot in ("output", "heads"):
        assert trainable == planned.trainable == sum(forward_only_count(target) for target in planned.targets)
        return
    assert trainable == planned.trainable == sum(expected(method, spec, bias) for spec, bias in weights(net.layer))


def weights(layer: torch.nn.Module) -> list[tuple[HostSpec, Tensor | None]]:
    """Every weight of the layer, with its bias."""
    host = host_of(layer)
    if host is None:
        return [
            (HostSpec((sum(p.numel() for p in layer.parameters() if not p.requires_grad), 1)), None)
        ]  # trained whole
    slots = [slot for slot in host.slots if host.has(layer, slot)]
    biases = [getattr(layer, "bias" if slot == "weight" else f"{slot}_bias", None) for slot in slots]
    return [(host_of(layer, slot).spec, bias) for slot, bias in zip(slots, biases, strict=True)]


def expected(method: Any, spec: HostSpec, bias: Tensor | None) -> int:
    """The formula at one weight, or at each of a stack."""
    stack = spec.stack or 1
    rank = len(method.tokens) if hasattr(method, "tokens") else getattr(method, "rank", None)
    if has(method.name, "block"):
        rank = method.at("", spec)
    elif rank is None:
        rank = getattr(method.at("", spec), "rank", None)
    m, n = spec.shape[:2] if not (has(method.name, "tokens") and spec.lookup) else spec.shape[1::-1]
    kernel, extra = spec.fan_in // spec.shape[1], 0 if bias is None else bias.numel() // stack
    return stack * COUNT[method.name](m, n, kernel, rank, extra)


@pytest.mark.parametrize(("name", "host"), [(name, host) for name, host in PAIRS if has(name, "dropout")])
def test_dropout_only_in_training_and_only_on_the_branch(name: str, host: str) -> None:
    case = HOSTS[host]
    net, x = case.net(), case.inputs()
    targets = "layer" if case.linear else "layer.down_proj"  # the weight that the output is linear in
    method: Any = main(name, case)
    suite.stir(net, dataclasses.replace(method, dropout=0.5), "default", targets)
    with torch.no_grad(), use(net, {}):
        base = net(x)
        assert torch.equal(net(x), base)  # the base has no dropout, whatever the adapter has
    net.eval()
    steady = net(x)
    assert torch.equal(net(x), steady)
    if HOSTS[host].rounds_input:  # what the adapter adds does not depend on the mode
        with torch.no_grad(), use(net, {}):
            steady = base + (steady - net(x))
    net.train()
    draws = torch.stack([net(x).detach() for _ in range(200)])
    if x.dtype == torch.int64:
        assert torch.equal(draws[0], steady)  # ids cannot be dropped
        return
    assert not torch.equal(draws[0], draws[1])
    error = (draws.mean(0) - steady.detach()).abs() / (draws.std(0) / 200**0.5 + 1e-6)
    assert float(error.max()) < 6  # unbiased: the mean over masks is the output without dropout


@dataclass(frozen=True)
class Mutation:
    """A LoRA with one fault, and the check that must catch it."""

    adapter: type[LoRAAdapter]
    caught_by: suite.Check


class ForgetsScale(LoRAAdapter):
    """The notes' y = W·x + (B·A)·x beside a merge of W + B·A·α/r."""

    def low_rank(self, host: Any, x: Tensor, scale: Any) -> Tensor:
        return host.low_rank(x, self.lora_A, self.lora_B)


class BothRandom(LoRAAdapter):
    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        torch.nn.init.normal_(self.lora_B, std=0.01)


class BothZero(LoRAAdapter):
    """Nothing is random, so nothing ever gets a gradient."""

    def start_from(self, host: Any) -> None:
        torch.nn.init.zeros_(self.lora_A)


class RoundsBase(LoRAAdapter):
    """Rounds what it does not own."""

    def start_from(self, host: Any) -> None:
        host.stored.data.copy_(host.stored.data.bfloat16())


MUTATIONS = {
    "forgets α/r": Mutation(ForgetsScale, suite.merge_is_forward),
    "both random": Mutation(BothRandom, suite.identity_at_start),
    "both zero": Mutation(BothZero, suite.gradients_reach_the_adapter_only),
    "touches the base": Mutation(RoundsBase, suite.detach_is_exact),
}


@pytest.mark.parametrize("fault", MUTATIONS)
def test_the_suite_catches(fault: str) -> None:
    """T27 and its sisters: a check that a wrong method passes is worth nothing."""
    mutation = MUTATIONS[fault]

    @dataclass(frozen=True, kw_only=True)
    class Mutant(LoRA):
        def build(self, spec: HostSpec) -> LoRAAdapter:
            method = self.at("", spec)
            return method.start(mutation.adapter(spec, method.rank, method.scale), spec)

    mutation.caught_by(LoRA(rank=32, alpha=64), HOSTS["linear"])
    with pytest.raises(AssertionError):
        mutation.caught_by(Mutant(rank=32, alpha=64), HOSTS["linear"])


def test_forgotten_scale_doubles_the_merged_change() -> None:
    """T27 in numbers: r 32, α 64, merged ΔW is twice what the unscaled forward adds."""
    layer, x = torch.nn.Linear(32, 48), torch.randn(9, 32)
    host = host_of(layer)
    adapter = ForgetsScale(host.spec, 32, 64 / 32)
    torch.nn.init.normal_(adapter.lora_A)
    torch.nn.init.normal_(adapter.lora_B)
    merged = host.op(x, adapter.merged(layer.weight) - layer.weight)
    torch.testing.assert_close(merged, 2 * adapter.branch(host, x), rtol=1e-4, atol=1e-3)
