"""VeRA: W' = W + diag(b)·B·diag(d)·A, A and B random and frozen.  Kopiczko et al. 2024, arXiv 2310.11454.

A and B are the same for all layers; only b [m] and d [r] are trained. There is no scale.

    A [r, N], B [M, r]     for the largest adapted layer, N inputs and M outputs; a layer takes A[:, :n] and B[:m]
    A ~ U(±√6/√N), B ~ U(±√6/√r), A first, from one CPU generator with `seed`: PEFT's procedure, its very numbers
    b = 0, d = d_initial at the start, so that ΔW = 0 while b has a gradient

A and B are drawn again wherever they are needed: they are no parameters or buffers, and in no file of ours. All layers
share one copy per device for as long as one of them lives. N and M belong to the method (`in_features`,
`out_features`), so that an adapter stays what it is when it is put beside larger layers.
Convolutions: n = in × kernel. The rank may be above both sizes of a layer, as in the paper (1024 on 768).
"""

import dataclasses
import math
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from deltaw.core.adapter import Adapter, Factors, WeightAdapter, compute_dtype
from deltaw.core.host import HostSpec
from deltaw.core.method import Method, Site, register


class Projections:
    """A [r, N] and B [M, r] on one device, fp32; elsewhere than on the CPU with the drawn pair they were copied from."""

    def __init__(self, a: Tensor, b: Tensor, drawn: "Projections | None" = None):
        self.a, self.b, self.drawn = a, b, drawn


_ALIVE: "weakref.WeakValueDictionary[tuple[Any, ...], Projections]" = weakref.WeakValueDictionary()


def projections(seed: int, rank: int, inputs: int, outputs: int, device: torch.device | str = "cpu") -> Projections:
    """The one pair of this seed and these sizes on a device, drawn unless some adapter holds it already."""
    device = torch.device(device)
    key = (seed, rank, inputs, outputs)
    found = _ALIVE.get((*key, device))
    if found is None:
        with torch.inference_mode(False), torch.no_grad():  # tensors made in inference could not be trained with later
            if device.type in ("cpu", "meta"):
                a, b = (
                    torch.empty(n, m, device=device, dtype=torch.float32) for n, m in ((rank, inputs), (outputs, rank))
                )
                found = Projections(a, b)
            else:
                drawn = projections(*key)  # held, or every layer that moves would draw it again
                found = Projections(drawn.a.to(device), drawn.b.to(device), drawn)
            if device.type == "cpu":
                generator = torch.Generator("cpu").manual_seed(seed)
                for matrix in (found.a, found.b):
                    bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(matrix.shape[1]))  # in PEFT's order
                    matrix.uniform_(-bound, bound, generator=generator)
        _ALIVE[(*key, device)] = found
    return found


class VeRAAdapter(WeightAdapter):
    def __init__(self, spec: HostSpec, key: tuple[int, int, int, int], d_initial: float, dropout: float = 0.0):
        super().__init__()
        self.key, self.shape, self.dropout = key, spec.shape, dropout
        self.vera_lambda_b = nn.Parameter(torch.zeros(spec.shape[0], dtype=torch.float32))
        self.vera_lambda_d = nn.Parameter(torch.full((key[1],), d_initial, dtype=torch.float32))
        self.shared = projections(*key, self.vera_lambda_b.device)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles leave A and B out, and find or draw them again."""
        return {name: value for name, value in self.__dict__.items() if name != "shared"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.shared = projections(*self.key, self.vera_lambda_b.device)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        result = super()._apply(fn, recurse)
        self.shared = projections(*self.key, self.vera_lambda_b.device)
        return result

    def factors(self) -> Factors:
        outputs, inputs = self.shape[0], math.prod(self.shape[1:])
        a = self.vera_lambda_d[:, None] * self.shared.a[:, :inputs]  # [r, n]
        return Factors(a, self.vera_lambda_b[:, None] * self.shared.b[:outputs], 1.0)  # [m, r]

    def merged(self, weight: Tensor) -> Tensor:
        a, b, _ = self.factors()
        return weight + (b.to(weight.dtype) @ a.to(weight.dtype)).view(weight.shape)

    def branch(self, host: Any, x: Tensor) -> Tensor:
        return self.weighted(host, x, None)

    def weighted(self, host: Any, x: Tensor, strength: Tensor | None) -> Tensor:
        dtype = compute_dtype(host, x)
        a, b, _ = self.factors()
        b = b if strength is None else strength * b
        x = self.dropped(x)
        kernel = self.shape[2:]
        a, b = a.view(-1, *self.shape[1:]), b.view(*b.shape, *[1] * len(kernel))
        return host.low_rank(x, a.to(dtype), b.to(dtype))


@register("vera")
@dataclass(frozen=True, kw_only=True)
class VeRA(Method):
    suits = "many small adapters of one base; learning rates ten times LoRA's"

    rank: int = 256
    """Rank r of the frozen matrices; a layer trains m + r numbers, so it can be large."""
    d_initial: float = 0.1
    """Value that d starts from; b starts at zero."""
    dropout: float = 0.0
    """Dropout on the input of the branch only, in training."""
    seed: int = 0
    """Seed of the frozen matrices (PEFT: projection_prng_key)."""
    in_features: int | None = None
    """Inputs that A is drawn for. Default: those of the largest adapted layer."""
    out_features: int | None = None
    """Outputs that B is drawn for. Default: those of the largest adapted layer."""

    def invalid(self) -> Sequence[str]:
        sizes = (("rank", self.rank), ("in_features", self.in_features), ("out_features", self.out_features))
        found = [
            f"{name}={value!r} is not a whole number of at least 1"
            for name, value in sizes
            if (value is not None or name == "rank") and not (type(value) is int and value >= 1)
        ]
        if type(self.seed) is not int or not 0 <= self.seed < 2**63:
            found.append(f"seed={self.seed!r} is not a whole number of at least 0")
        for name, value, fits in (
            ("d_initial", self.d_initial, lambda v: math.isfinite(v) and v != 0),
            ("dropout", self.dropout, lambda v: 0.0 <= v < 1.0),
        ):
            if isinstance(value, bool) or not isinstance(value, int | float) or not fits(value):
                found.append(f"{name}={value!r} is not {'in [0, 1)' if name == 'dropout' else 'a number other than 0'}")
        return found

    def unfit(self, spec: HostSpec) -> str | None:
        for field, size, has in (
            ("in_features", self.in_features, spec.fan_in),
            ("out_features", self.out_features, spec.shape[0]),
        ):
            if size is not None and size < has:
                return f"{field}={size} is below its {has}: give at least that, or leave it out"
        return None

    def over(self, specs: Mapping[Site, HostSpec]) -> Self:
        inputs = self.in_features or max((spec.fan_in for spec in specs.values()), default=None)
        outputs = self.out_features or max((spec.shape[0] for spec in specs.values()), default=None)
        return dataclasses.replace(self, in_features=inputs, out_features=outputs)

    def at(self, path: str, spec: HostSpec) -> Self:
        return self if self.in_features and self.out_features else self.over({Site(path): spec})

    def build(self, spec: HostSpec) -> Adapter:
        method = self.at("", spec)
        assert method.in_features is not None and method.out_features is not None
        key = (method.seed, method.rank, method.in_features, method.out_features)
        return VeRAAdapter(spec, key, method.d_initial, method.dropout)
