"""States made by hand: a matrix of known singular values as an adapter, and random adapters on a small model."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

import deltaw
from deltaw.core.host import HostSpec
from deltaw.core.method import Method, Site
from deltaw.core.state import AdapterState
from deltaw.methods.lora import LoRA


def orthonormal(d: int, k: int, seed: int = 0) -> Tensor:
    """[d, k] in fp64, uniformly random."""
    draw = torch.randn(d, k, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.linalg.qr(draw)[0]


def lora(u: Tensor, s: Sequence[float], v: Tensor, path: str = "layers.0.q", alpha: float = 6.0) -> AdapterState:
    """u [out, k] · diag(s) · v [in, k]ᵀ as a LoRA whose α/r is not 1."""
    rank = len(s)
    b = u * torch.tensor(s, dtype=torch.float64) * (rank / alpha)
    site, spec = Site(path), HostSpec((u.shape[0], v.shape[0]))
    tensors = {"lora_A": v.T.float().contiguous(), "lora_B": b.float().contiguous()}
    return AdapterState({site: LoRA(rank=rank, alpha=alpha)}, {site: tensors}, {site: spec})


def attached(model: nn.Module, method: Method, seed: int = 0, **options: object) -> AdapterState:
    """Random values in every tensor of an adapter on all linear layers."""
    deltaw.attach(model, method, targets="all-linear", name="made", **options)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            with torch.no_grad():
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    state = deltaw.extract(model, "made")
    deltaw.detach(model, "made")
    return state


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 17), nn.Linear(17, 20))
