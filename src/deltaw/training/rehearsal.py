"""A training step without numbers: the code that will train, on tensors that have shapes and no memory (meta device).

    outline of the base + adapters + fused MLPs → forward, loss, backward on [rows, length] ids
        every tensor that comes to life or dies → bytes alive, at the end of the forward and at most
        every operator that computes            → multiplications and bytes moved

So that kernels, checkpointing, methods and architectures need no formula of their own: what is counted is what they do.
A batch with images keeps its numbers until it meets the model: how many patches and which images there are decides shapes.
What no tensor shows is not here: the base's own weights (planner/memory.py), the memory a library takes for itself, and
what an allocator rounds up. Attention goes through the kernel that the device would take, not through the one of the meta
device, which writes out [length, length].
"""

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltaw.core.attach import trainable
from deltaw.core.base import by_path
from deltaw.core.host import host_of
from deltaw.core.parts import find
from deltaw.core.place import place
from deltaw.core.plan import Target
from deltaw.fusion.fused import fused
from deltaw.infer.loss import SFTLoss
from deltaw.training.meter import Meter, attention

NAME = "rehearsal"
FEW = (2, 3)  # layers that stand for many
Given = Mapping[str, Tensor]
"""A batch with its numbers, without labels."""


@dataclass(frozen=True)
class Counted:
    """Of one step: bytes alive beside weights, adapters and optimizer, and what was computed."""

    saved: float
    """After the forward pass: what is kept for the backward pass."""
    forward: float
    """At most, in the forward pass, the loss, and the backward pass."""
    loss: float
    backward: float
    evaluation: float
    """At most in an evaluation of the same rows."""
    gradients: float
    work: tuple[tuple[int, int, float], ...]
    """(floating-point operations, bytes read and written, how many times) of every operator."""
    features: bool = True
    """Is what the batch holds beside ids among it? Where a model asks images for numbers, only its text part is rehearsed."""

    @property
    def peak(self) -> float:
        return max(self.forward, self.loss, self.backward)

    def deeper(self, other: "Counted", times: float) -> "Counted":
        """This and `times` what `other` has more than it."""
        numbers = (f.name for f in dataclasses.fields(self) if f.name not in ("work", "features"))
        grown = {name: (1 - times) * getattr(self, name) + times * getattr(other, name) for name in numbers}
        work = [*((*one, (1 - times) * n) for *one, n in self.work), *((*one, times * n) for *one, n in other.work)]
        return Counted(**grown, work=tuple(work))  # type: ignore[arg-type]


class _Decoded(torch.autograd.Function):
    """x Wᵀ + bias with a W that is decoded for this product alone, there and back: what a quantised layer does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # type: ignore[override]
        ctx.weight = weight
        return F.linear(x, torch.empty_like(weight, dtype=x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0] @ torch.empty_like(ctx.weight, dtype=grads[0].dtype), None, None


class QuantizedOutline(nn.Linear):
    """A linear layer whose weight will be loaded in fewer bits."""

    def forward(self, x: Tensor) -> Tensor:
        return _Decoded.apply(x, self.weight, self.bias)  # type: ignore[no-any-return]


def dress(model: nn.Module, targets: Iterable[Target], quantized: Iterable[nn.Module] = ()) -> None:
    """Adapters on an outline: their shapes, not what they start from. quantized: layers in fewer bits."""
    for layer in quantized:
        layer.__class__ = QuantizedOutline
    there, built = by_path(model), []
    for target in targets:
        host = host_of(there[target.site.path], target.site.slot, target.method.host)
        with torch.device("meta"):
            built.append((target.site, target.method.build(target.spec).to(host.device), target.method))
    place(model, NAME, built)
    trainable(model, NAME)


@contextlib.contextmanager
def _checkpointing(model: Any, on: bool) -> Iterator[None]:
    if on:
        model.activation_checkpointing_enable({"use_reentrant": False})
    try:
        yield
    finally:
        if on:
            model.activation_checkpointing_disable()


def rehearse(
    model: Any, rows: int, length: int, *, device: str = "cpu", padded: bool = True, supervised: float = 1.0,
    checkpointing: bool = False, accumulated: bool = False, given: Given | None = None,
) -> Counted:  # fmt: skip
    """A step of a dressed outline, in its own dtype: forward, loss and backward of one batch; an evaluation of it.

    device: cpu or cuda, for the attention kernel; padded: are rows of unlike length, so that a mask is needed;
    supervised: share of the positions that are learnt; accumulated: are gradients of an earlier batch there?
    given: the batch itself, [rows, length], where it holds images.
    """
    options: dict[str, Any] = {"device": device, "supervised": supervised, "accumulated": accumulated}
    ways = [(mask, None) for mask in dict.fromkeys((padded, False))]
    ways = ways if given is None else [(padded, given), *ways]
    with _checkpointing(model, checkpointing):  # of all layers at once, or they would not be alike
        for mask, batch in ways:
            try:
                counted = _by_layers(model, rows, length, padded=mask, given=batch, **options)
            except (
                Exception
            ):  # a model that wants its mask in another form (without one it takes little less), or numbers
                if (mask, batch) == ways[-1]:
                    raise
            else:
                return dataclasses.replace(counted, features=batch is given)
    raise AssertionError("no way was tried")


def _by_layers(model: nn.Module, rows: int, length: int, **options: Any) -> Counted:
    """Where all layers are alike, a few of them stand for all."""
    layers = _alike(model)
    if layers is None:
        return _rehearse(model, rows, length, gathers=_head_is_all(model), **options)
    found, there, gathers = list[Counted](), dict(layers._modules), True
    try:
        for count in FEW:
            layers._modules = dict(list(there.items())[:count])
            if not found:
                gathers = _head_is_all(model)
            found.append(_rehearse(model, rows, length, gathers=gathers, evaluates=not found, **options))
    finally:
        layers._modules = there
    near, far = found
    far = dataclasses.replace(far, evaluation=near.evaluation)  # which keeps nothing of a layer
    return near.deeper(far, (len(there) - FEW[0]) / (FEW[1] - FEW[0]))


def _rehearse(
    model: Any, rows: int, length: int, *, device: str, padded: bool, supervised: float, accumulated: bool,
    gathers: bool, evaluates: bool = True, given: Given | None = None,
) -> Counted:  # fmt: skip
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = sum(p.numel() * p.element_size() for p in parameters)
    if accumulated:
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
    meter, loss = Meter(model), SFTLoss(model, gathers=gathers, device=device)
    count = max(1, round(rows * (length - 1) * supervised))
    peaks = []

    def passed() -> None:
        peaks.append(meter.peak)
        meter.peak = meter.alive

    def indices() -> Tensor:
        return torch.empty(count, dtype=torch.int64, device="meta")

    def forward() -> Tensor:
        """What the loss starts from: [N, H], or [N, V] where the head is not all."""
        if given is None:
            ids = torch.empty(rows, length, dtype=torch.int64, device="meta")
            mask = torch.empty(rows, 1, length, length, dtype=torch.bool, device="meta") if padded else None
            batch: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        else:
            batch = {name: tensor.clone() for name, tensor in given.items()}
        body = loss.body if gathers else model
        return body(use_cache=False, **batch)[0][:, :-1][indices(), indices()]  # type: ignore[no-any-return]

    def lost(chosen: Tensor) -> Tensor:
        if gathers:
            return loss.summed(chosen, indices())
        return F.cross_entropy(chosen.float(), indices(), reduction="sum")

    try:
        with fused(model), attention(device), meter:
            model.train()
            chosen = forward()
            passed()
            peaks.append(meter.alive)
            total = lost(chosen)
            del chosen
            passed()
            total.backward()
            passed()
            work = tuple((done, moved, 1.0) for done, moved in meter.work)
            for parameter in parameters:
                parameter.grad = None
            model.eval()
            meter.peak = meter.alive
            if evaluates:
                with torch.no_grad():
                    lost(forward())
            passed()
    finally:
        for parameter in parameters:
            parameter.grad = None
    extra = gradients if accumulated else 0  # those of the earlier batch, which the meter did not see being made
    first, saved, second, third, evaluation = peaks
    return Counted(saved + extra, first + extra, second + extra, third + extra, evaluation, gradients, work)


@torch.no_grad()
def _head_is_all(model: Any) -> bool:
    """Are the logits head(hidden) and nothing else? By the operators that run, where there are no numbers to compare."""
    loss = SFTLoss(model, gathers=True)
    if not loss.gathers:
        return False
    ids, found = torch.empty(1, 4, dtype=torch.int64, device="meta"), []
    model.eval()
    for act in (
        lambda: model(input_ids=ids, use_cache=False),
        lambda: loss.head(loss.body(input_ids=ids, use_cache=False)[0]),
    ):
        with Meter(model) as meter:
            act()
        found.append(len(meter.work))
    return found[0] == found[1]


def _alike(model: nn.Module) -> nn.ModuleList | None:
    """The largest list of layers that are all alike, if it is long enough to be worth it; none of an image tower, of which
    models read a layer by its number."""
    parts = find(model)
    paths = [(p, m) for p, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) > FEW[1] + 1]
    lists = [m for path, m in paths if parts is None or parts.of(path) != "vision"]
    same = [m for m in lists if len({_signature(layer) for layer in m}) == 1]
    return max(same, key=lambda m: sum(p.numel() for p in m.parameters()), default=None)


def _signature(layer: nn.Module) -> Any:
    """Classes, shapes and plain attributes of a layer and all below it, but for its number and what a pass sets."""
    plain = (bool, int, float, str, type(None))
    return tuple(
        (
            path, type(module), tuple((n, p.shape, p.dtype, p.requires_grad) for n, p in module._parameters.items() if p is not None),
            tuple((n, v) for n, v in vars(module).items() if isinstance(v, plain) and n not in ("layer_idx", "training")),
        )
        for path, module in layer.named_modules()
    )  # fmt: skip
