"""The invariants of one method on one host, as plain functions: the suite, the mutations and the plug-in tests call
them. Each takes a Method, a HostCase and (for the count) nothing else, and fails by AssertionError.
"""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from contract.hosts import HostCase, Net
from deltaw.core.adapter import WeightAdapter
from deltaw.core.attach import adapters, attach, detach, extract, insert
from deltaw.core.carried import here
from deltaw.core.errors import MergeError, UseError
from deltaw.core.host import host_of
from deltaw.core.merge import current, merge, unmerge
from deltaw.core.method import Method
from deltaw.core.route import adapted_modules, live, use
from deltaw.core.rows import whole
from deltaw.methods.lora import LoRA

Check = Callable[[Method, HostCase], None]


def tuned(method: Method, case: HostCase, name: str = "default") -> Net:
    """A net whose adapter is trained, as far as anyone can tell."""
    net = case.net()
    stir(net, method, name)
    return net


def stir(net: nn.Module, method: Method, name: str, targets: str = "layer") -> None:
    attach(net, method, targets=targets, name=name)
    for parameter in net.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.3 * torch.randn_like(parameter))


def near(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    """Equal to `tolerance`, as a share of the largest value where that is above 1."""
    assert a.shape == b.shape and a.dtype == b.dtype
    a, b = a.detach(), b.detach()
    difference, size = float((a - b).abs().max()), max(1.0, float(b.abs().max()))
    assert difference <= tolerance * size, f"differ by {difference:.3g}, values up to {size:.3g}"


def apart(a: Tensor, b: Tensor) -> None:
    """Really different: what guards every comparison above against comparing nothing with nothing."""
    assert float((a - b).detach().abs().max()) > 1e-3


def weights_hold_it(net: nn.Module, name: str = "default") -> bool:
    """Does the adapter have a ΔW? If not, everything that needs one must be refused, and nothing be touched by that."""
    return all(isinstance(adapter, WeightAdapter) for adapter in adapters(net, name).values())


def with_weights(net: nn.Module, strengths: dict[str, float]) -> nn.Module:
    """The plain net with W + Σ w·ΔW as its weights."""
    plain = copy.deepcopy(net)
    for name in strengths:
        detach(plain, name)
    base = plain.state_dict()
    total = {key: value.clone() for key, value in base.items()}
    for name, w in strengths.items():
        one = copy.deepcopy(net)
        merge(one, name, keep_base=True)
        for key, value in total.items():
            value += w * (one.state_dict()[key] - base[key])
    plain.load_state_dict(total)
    return plain


def refuses_to_merge(net: nn.Module, name: str = "default") -> None:
    weights = {key: value.clone() for key, value in net.state_dict().items()}
    for keep in (False, True):
        with pytest.raises(MergeError, match=r"has no ΔW, no weight can hold it"):
            merge(net, name, keep_base=keep)
    assert all(torch.equal(value, weights[key]) for key, value in net.state_dict().items())


def lost(net: Net, name: str, case: HostCase, x: Tensor) -> Tensor:
    """What merging `name` will lose in the output by rounding: op(x, stored(W') − W'); 0 where a weight holds any value."""
    total = torch.zeros(())
    if case.lossy:
        for site, adapter in adapters(net, name).items():
            host = host_of(net.get_submodule(site.path), site.slot, adapter.method.host)
            whole = current(host) + (adapter.merged(host.weight) - host.weight)
            rounded = host.rounded(whole)
            total = total + host.op(x, rounded - whole)
    return total


@torch.no_grad()
def identity_at_start(method: Method, case: HostCase) -> None:
    net, x = case.net(), case.inputs()
    before = net(x)
    attach(net, method, targets="layer")
    assert torch.equal(net(x), before)


@torch.no_grad()
def merge_is_forward(method: Method, case: HostCase) -> None:
    net, x = tuned(method, case), case.inputs()
    with use(net, {}):
        base = net(x)
    live = net(x)
    apart(live, base)
    if not weights_hold_it(net):
        refuses_to_merge(net)
        assert torch.equal(net(x), live)
        return
    expected = live + lost(net, "default", case, x)
    report = merge(net)
    assert type(net.layer) is type(case.make()) and report.changed == report.weights >= 1
    near(net(x), expected)


@torch.no_grad()
def strength_scales_the_change(method: Method, case: HostCase) -> None:
    net, x = tuned(method, case), case.inputs()
    live = net(x)
    with use(net, {}):
        base = net(x)
    for w in (0.5, -1.0, 2.0):
        if not weights_hold_it(net):
            with pytest.raises(UseError, match=r"without a ΔW .* is 0 or 1"):
                use(net, {"default": w})
            continue
        with use(net, {"default": w}):
            near(net(x), base + w * (live - base) if case.linear else with_weights(net, {"default": w})(x))
    with use(net, {"default": 0.0}):
        assert torch.equal(net(x), base)
    assert torch.equal(net(x), live)


@torch.no_grad()
def two_live_add_up(method: Method, case: HostCase) -> None:
    net, x = tuned(method, case, "a"), case.inputs()
    stir(net, method, "b")
    outputs = []
    for route in ({}, {"a": 1.0}, {"b": 1.0}, {"a": 1.0, "b": 1.0}):
        with use(net, route):
            outputs.append(net(x))
    base, a, b, both = outputs
    apart(a, b)
    if not weights_hold_it(net, "a"):  # their changes do not add: one reads what the other wrote
        apart(both, a)
        apart(both, b)
        detach(net, "b")
        with use(net, "a"):
            assert torch.equal(net(x), a)
        return
    near(both, a + b - base if case.linear else with_weights(net, {"a": 1.0, "b": 1.0})(x))
    expected = both + lost(net, "a", case, x)
    merge(net, "a", keep_base=True)
    with use(net, {"b": 1.0}):  # a is in the weights, b beside them
        near(net(x), expected)
    expected = expected + lost(net, "b", case, x)
    merge(net, "b", keep_base=True)
    near(net(x), expected)
    unmerge(net)
    with use(net, {}):
        assert torch.equal(net(x), base)


@torch.no_grad()
def unmerge_is_exact(method: Method, case: HostCase) -> None:
    net, x = tuned(method, case), case.inputs()
    weights = {key: value.clone() for key, value in net.state_dict().items()}  # scales of quantised weights too
    live = net(x)
    if not weights_hold_it(net):
        refuses_to_merge(net)
        with pytest.raises(MergeError, match=r"nothing to unmerge"):
            unmerge(net)
        return
    for _ in range(2):
        merge(net, keep_base=True)
        assert any(not torch.equal(value, weights[key]) for key, value in net.state_dict().items())
        unmerge(net)
        assert all(torch.equal(value, weights[key]) for key, value in net.state_dict().items())
        assert torch.equal(net(x), live)


@torch.no_grad()
def detach_is_exact(method: Method, case: HostCase) -> None:
    net, x = case.net(), case.inputs()

    def all_of_it() -> list[Any]:
        flags = {path: parameter.requires_grad for path, parameter in net.named_parameters()}
        inside = [(type(module), set(module.__dict__)) for module in net.modules()]
        return [flags, inside, list(net.state_dict())]

    before, weights, output = all_of_it(), {k: v.clone() for k, v in net.state_dict().items()}, net(x)
    stir(net, method, "default")
    apart(net(x), output)
    assert isinstance(net.layer, before[1][1][0])  # an adapted Linear is still a Linear
    assert set(before[2]) <= set(net.state_dict())  # under its old keys
    detach(net)
    assert all_of_it() == before
    assert all(torch.equal(value, weights[key]) for key, value in net.state_dict().items())
    assert torch.equal(net(x), output)


def gradients_reach_the_adapter_only(method: Method, case: HostCase) -> None:
    net, x = case.net(), case.inputs()
    base = {path: parameter.detach().clone() for path, parameter in net.named_parameters()}
    attach(net, method, targets="layer")
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):  # a zero factor hides the gradient of the other one in the first step
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()
    for path, parameter in net.named_parameters():
        if path in base:
            assert parameter.grad is None and torch.equal(parameter, base[path])
        else:
            assert parameter.requires_grad and parameter.grad is not None and parameter.grad.abs().max() > 0


@torch.no_grad()
def extract_and_insert_are_exact(method: Method, case: HostCase) -> None:
    net, x = tuned(method, case), case.inputs()
    live, state = net(x), extract(net)
    detach(net)
    insert(net, state, name="again")
    assert torch.equal(net(x), live)
    again = extract(net, "again")
    assert again.methods == state.methods
    for site, tensors in state.tensors.items():
        assert tensors.keys() == again.tensors[site].keys()
        assert all(torch.equal(tensor, again.tensors[site][name]) for name, tensor in tensors.items())
    assert not any(parameter.requires_grad for path, parameter in net.named_parameters() if ".adapters." in path)


@torch.no_grad()
def deepcopy_is_independent(method: Method, case: HostCase) -> None:
    net, x = tuned(method, case), case.inputs()
    live = net(x)
    other = copy.deepcopy(net)
    assert torch.equal(other(x), live) and type(other.layer) is type(net.layer)
    for parameter in other.parameters():
        parameter.add_(1)
    apart(other(x), live)
    assert torch.equal(net(x), live)
    detach(other)
    assert torch.equal(net(x), live)
    if weights_hold_it(net):
        expected = live + lost(net, "default", case, x)
        merge(net)
        near(net(x), expected)


@torch.no_grad()
def pickle_round_trip(method: Method, case: HostCase) -> None:
    net, x = tuned(method, case), case.inputs()
    live, file = net(x), io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    for other in (pickle.loads(pickle.dumps(net)), torch.load(file, weights_only=False)):
        assert torch.equal(other(x), live)
        with use(other, {}):
            apart(other(x), live)
        detach(other)
        assert type(other.layer) is type(case.make())


def rows_of_a_batch_have_their_own_routes(method: Method, case: HostCase) -> None:
    """Each row is what its route alone gives it, whatever is in the adapters of the others; or it is refused."""
    net, x = tuned(method, case, "a"), case.inputs()
    stir(net, method, "b")
    routes = [{"b": -0.6, "a": 0.5}, {"a": 1.0}, {}, {"b": 1.0}, {"a": 0.0}]
    routes = [routes[number % len(routes)] for number in range(len(x))]
    impossible = next(
        (why for m in adapted_modules(net) for a, h, _ in here(m).entries["a"] if (why := whole(a, h))), None
    )
    if impossible:
        with pytest.raises(UseError, match="cannot act in single rows of a batch"):
            use(net, routes)
        return
    expected = []
    for number, route in enumerate(routes):
        with use(net, route):
            expected.append(net(x)[number])
    with use(net, routes):
        y = net(x)
        near(y, torch.stack(expected))
    net.requires_grad_(False)
    with torch.no_grad(), use(net, routes):
        near(net(x), y)  # low-rank ones of a linear layer now side by side, in a bank
        y = net(x)
        with pytest.raises(UseError, match="leave that `use` first"):
            live(net)
        with pytest.raises(UseError, match=rf"the layer sees {len(x) + 1} rows, the route names {len(x)}"):
            net(torch.cat([x, x[:1]]))
        for parameter in here_first(net, "b").parameters():
            parameter.data.fill_(torch.nan)
        broken = net(x)
    mine = [number for number, route in enumerate(routes) if "b" not in route]
    near(broken[mine], y[mine])
    assert bool(broken[0].isnan().any())


def here_first(net: nn.Module, name: str) -> nn.Module:
    return next(iter(adapters(net, name).values()))


def compiled_is_equal(method: Method, case: HostCase) -> None:
    """inductor, which needs a C++ compiler and seconds for each graph, for LoRA alone."""
    net, x = tuned(method, case), case.inputs()
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    for backend in ("aot_eager", "inductor") if type(method) is LoRA else ("aot_eager",):
        torch.compiler.reset()
        compiled = torch.compile(net, fullgraph=True, backend=backend)
        y = net(x)
        near(compiled(x), y)
        near(torch.cat(grads(compiled(x), trained)), torch.cat(grads(y, trained)))


def checkpointed_is_equal(method: Method, case: HostCase) -> None:
    net, x = tuned(method, case), case.inputs()
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    plain = net(x)
    again = torch.utils.checkpoint.checkpoint(net, x, use_reentrant=False)
    assert torch.equal(again, plain)
    assert torch.equal(torch.cat(grads(again, trained)), torch.cat(grads(plain, trained)))


def grads(y: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
    return [g.flatten() for g in torch.autograd.grad(y.square().mean(), parameters)]


def bf16_base_fp32_adapter(method: Method, case: HostCase) -> None:
    net, x = case.net(), case.inputs()
    expected = copy.deepcopy(net)
    net.bfloat16()
    for rounded, parameter in zip(net.parameters(), expected.parameters(), strict=True):  # the same weights in fp32
        if parameter.is_floating_point():
            parameter.data.copy_(rounded.data)
    x = x.bfloat16() if x.is_floating_point() else x
    base = net(x)
    stir(net, method, "default")
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in trained} == {torch.float32}
    y = net(x)
    assert y.dtype == torch.bfloat16
    assert {g.dtype for g in grads(y, trained)} == {torch.float32}
    apart(y, base)
    state = extract(net)
    insert(expected, state)
    near(y.float(), expected(x.float() if x.is_floating_point() else x), 3e-2)
    if not weights_hold_it(net):
        return
    weights = {path: parameter.clone() for path, parameter in net.named_parameters()}
    merged = y + lost(net, "default", case, x)
    merge(net, keep_base=True)
    near(net(x).float(), merged.float(), 3e-2)
    unmerge(net)
    assert all(torch.equal(parameter, weights[path]) for path, parameter in net.named_parameters())


@torch.no_grad()
def autocast_works(method: Method, case: HostCase) -> None:
    net, x = case.net(), case.inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        base = net(x)
        attach(net, method, targets="layer")
        assert torch.equal(net(x), base)
    detach(net)
    stir(net, method, "default")
    exact = net(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = net(x)
    assert y.dtype == base.dtype
    near(y.float(), exact, 3e-2)


@torch.no_grad()
def modes_have_no_side_effects(method: Method, case: HostCase) -> None:
    """train() and eval() neither merge nor change anything; inference mode works."""
    net, x = tuned(method, case), case.inputs()
    live, weights = net(x), {key: value.clone() for key, value in net.state_dict().items()}
    with use(net, {}):
        base = net(x)
    for mode in (False, True, False):
        if case.rounds_input and not mode:
            with use(net.eval(), {}):
                rough = net(x)
            apart(rough, base)
            near(net(x) - rough, live - base)
        else:
            assert torch.equal(net.train(mode)(x), live)
        assert all(torch.equal(value, weights[key]) for key, value in net.state_dict().items())
    with torch.inference_mode():
        assert torch.equal(net(x), live) or case.rounds_input


EVERY_CONFIG: list[Check] = [identity_at_start, merge_is_forward, strength_scales_the_change, two_live_add_up]
ONE_CONFIG: list[Check] = [
    unmerge_is_exact,
    detach_is_exact,
    gradients_reach_the_adapter_only,
    extract_and_insert_are_exact,
    deepcopy_is_independent,
    pickle_round_trip,
    rows_of_a_batch_have_their_own_routes,
    compiled_is_equal,
    checkpointed_is_equal,
    bf16_base_fp32_adapter,
    autocast_works,
    modes_have_no_side_effects,
]
