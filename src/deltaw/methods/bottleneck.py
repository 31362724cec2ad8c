"""Bottleneck adapters: y = h + W_up σ(W_down h + b₁) + b₂, h a sublayer's output.  Houlsby et al. 2019, arXiv 1902.00751.

    houlsby     after attention and after the FFN, σ = GELU        Houlsby et al. 2019, arXiv 1902.00751
    pfeiffer    after the FFN only, σ = ReLU                       Pfeiffer et al. 2020, arXiv 2005.00247
    parallel    y = FFN(x) + W_up σ(W_down x), x the FFN's input, no σ and no biases: a low-rank bypass of a whole FFN

W_down [r, d], W_up [d, r]: 2dr + r + d numbers each (parallel: 2dr). No weight can hold the change: it is not mergeable.

Where sources disagree. Start: the paper draws both matrices from N(0, 1e-2²) cut at 2σ, Google's code with σ 1e-3, and the
model starts near the base only; here W_up = 0, so that it starts as the base to the bit, and init: normal gives the
paper's. σ: the paper's GELU, microsoft/LoRA's swish (houlsby) and ReLU (pfeiffer). pfeiffer: the original for BERT also
normalises h + x before the adapter; here it reads h, as in decoders (LLM-Adapters). Houlsby trains LayerNorms and the head
as well, which makes another method of it: train_norms and modules_to_save.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltaw.core.adapter import Adapter, Call
from deltaw.core.block import FeedForwardHost, SublayerHost
from deltaw.core.host import HostSpec
from deltaw.core.method import Method, Owned, Site, register
from deltaw.methods.full import companions

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu, "relu": F.relu, "silu": F.silu, "tanh": torch.tanh, "none": lambda x: x,
}  # fmt: skip
USUAL: Mapping[str, Any] = {"houlsby": "gelu", "pfeiffer": "relu", "parallel": "none"}
"""Placement → its activation."""


class BottleneckAdapter(Adapter):
    def __init__(self, width: int, rank: int, activation: str, parallel: bool):
        super().__init__()
        self.activation, self.parallel = activation, parallel
        self.down = nn.Parameter(torch.zeros(rank, width, dtype=torch.float32))
        self.up = nn.Parameter(torch.zeros(width, rank, dtype=torch.float32))
        if not parallel:
            self.down_bias = nn.Parameter(torch.zeros(rank, dtype=torch.float32))
            self.up_bias = nn.Parameter(torch.zeros(width, dtype=torch.float32))

    def change(self, x: Tensor) -> Tensor:
        """W_up σ(W_down x + b₁) + b₂: [T, d] → [T, r] → [T, d]"""
        b1, b2 = (None, None) if self.parallel else (self.down_bias.to(x.dtype), self.up_bias.to(x.dtype))
        hidden = ACTIVATIONS[self.activation](F.linear(x, self.down.to(x.dtype), b1))
        return F.linear(hidden, self.up.to(x.dtype), b2)

    def forward(self, host: Any, call: Call, strength: Tensor | None, *args: Any, **kwargs: Any) -> Any:
        if self.parallel:
            return host.beside(call, self.change, *args, **kwargs)
        return host.after(call, lambda h: h + self.change(h).to(h.dtype), *args, **kwargs)


@register("bottleneck")
@dataclass(frozen=True, kw_only=True)
class Bottleneck(Method):
    host = SublayerHost
    suits = "adapters as before LoRA, and a bypass of a whole FFN; they stay mounted and cost time in use"

    rank: int | None = None
    """Width r of the bottleneck. Default: 64, or half the layer's width where that is less."""
    placement: Literal["houlsby", "pfeiffer", "parallel"] = "houlsby"
    """Where it stands: houlsby after attention and FFN, pfeiffer after the FFN, parallel beside the whole FFN."""
    activation: Literal["gelu", "relu", "silu", "tanh", "none"] | None = None
    """Between the two matrices. Default: gelu for houlsby, relu for pfeiffer, none for parallel."""
    init: Literal["zero", "normal"] = "zero"
    """How it starts: zero = the up-projection is 0, exactly the base; normal = both N(0, init_std²) cut at 2σ."""
    init_std: float = 1e-2
    """Standard deviation of init: normal (Google's code has 1e-3)."""
    train_norms: bool = False
    """Train all normalisation layers of the model too, as Houlsby et al. do."""
    modules_to_save: tuple[str, ...] = ()
    """Names of modules trained in full and stored with the adapter, e.g. a new classifier."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.placement != "houlsby":
            object.__setattr__(self, "host", FeedForwardHost)

    def invalid(self) -> Sequence[str]:
        found = []
        if self.rank is not None and not (type(self.rank) is int and self.rank >= 1):
            found.append(f"rank={self.rank!r} is not a whole number of at least 1")
        for option, known in (
            ("placement", tuple(USUAL)),
            ("init", ("zero", "normal")),
            ("activation", (None, *ACTIVATIONS)),
        ):
            if getattr(self, option) not in known:
                found.append(
                    f"{option}={getattr(self, option)!r} is none of {', '.join(str(name) for name in known if name)}"
                )
        std = self.init_std
        if not isinstance(std, int | float) or isinstance(std, bool) or not 0 < std < math.inf:
            found.append(f"init_std={std!r} is not a positive number")
        if not isinstance(self.train_norms, bool):
            found.append(f"train_norms={self.train_norms!r} is neither true nor false")
        if isinstance(self.modules_to_save, str):
            found.append(
                f"modules_to_save={self.modules_to_save!r} must be a list of names: [{self.modules_to_save!r}]"
            )
        return found

    def unfit(self, spec: HostSpec) -> str | None:
        width = spec.shape[0]
        if self.rank is None or self.rank <= width:
            return None
        return f"rank {self.rank} is wider than the layer's {width} features: a bottleneck is at most as wide"

    def companions(self, parameters: Owned, targets: Sequence[str]) -> Mapping[Site, Method]:
        return companions("none", self.modules_to_save, parameters, targets, norms=self.train_norms)

    def at(self, path: str, spec: HostSpec) -> Self:
        rank = self.rank or max(1, min(64, spec.shape[0] // 2))
        activation = self.activation or USUAL[self.placement]
        return dataclasses.replace(self, rank=rank, activation=activation, train_norms=False, modules_to_save=())

    def build(self, spec: HostSpec) -> Adapter:
        method = self.at("", spec)
        assert method.rank is not None and method.activation is not None
        width = spec.shape[0]
        adapter = BottleneckAdapter(width, method.rank, method.activation, method.placement == "parallel")
        if self.init == "zero":
            nn.init.uniform_(adapter.down, -1 / math.sqrt(width), 1 / math.sqrt(width))
        else:
            for matrix in (adapter.down, adapter.up):
                nn.init.trunc_normal_(matrix, std=self.init_std, a=-2 * self.init_std, b=2 * self.init_std)
        return adapter
