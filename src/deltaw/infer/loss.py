"""Cross-entropy on the supervised positions only, through the model's own head module, chunk by chunk.

    hidden [B, T, H] → rows that predict a label [N, H] → head(rows) [N, V] → Σ −log p(label)

Full logits of all positions are the largest tensor of a training step, and those of prompts and padding are thrown
away. A loss is a number, so its gradient is that of its chunks times what comes from above: each chunk makes its own while
its logits are there, [N, H] of them are kept, and the head is not computed a second time, as checkpointing would. The head
is called as a module, so that adapters on it work, and hooks, which may hold parameters of their own: then chunks are
checkpointed. Models whose logits are not simply head(hidden) (soft caps,
scales) are found by a probe and computed through the model's own forward.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

CHUNK_VALUES = 1 << 22  # logits held at once: 16 MB in fp32; on a CPU more is slower


class Summed(Function):
    """Σ over chunks of part(rows, targets): rows [N, H], targets [N], and what part trains, `parameters`."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        part: Callable[[Tensor, Tensor], Tensor],
        size: int,
        hidden: Tensor,
        wanted: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        total, slopes = hidden.new_zeros((), dtype=torch.float32), torch.empty_like(hidden)
        ours: list[Tensor | None] = [None] * len(parameters)
        for rows, targets, slope in zip(hidden.split(size), wanted.split(size), slopes.split(size), strict=True):
            with torch.enable_grad():
                rows = rows.detach().requires_grad_()
                loss = part(rows, targets)
            first, *rest = torch.autograd.grad(loss, (rows, *parameters), allow_unused=True)
            slope.copy_(first)
            pairs = zip(ours, rest, strict=True)  # not in place: a gradient may be another one's tensor
            ours = [old if new is None else new if old is None else old + new for old, new in pairs]
            total += loss.detach()
        ctx.save_for_backward(slopes, *ours)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        slopes, *ours = ctx.saved_tensors
        scaled = (None if slope is None else (grads[0] * slope.float()).to(slope.dtype) for slope in (slopes, *ours))
        first, *rest = scaled
        return None, None, first, None, *rest


class SFTLoss:
    """Callable on a batch: (summed loss, number of supervised tokens). Made once per model; probes it at once."""

    def __init__(self, model: nn.Module, gathers: bool | None = None, device: str | None = None):
        """gathers: are the logits head(hidden) and nothing else? Tried where it is not said. device: of an outline."""
        self.model = model
        kind = device or next(model.parameters()).device.type
        self.values = CHUNK_VALUES if kind == "cpu" else 4 * CHUNK_VALUES
        self.body = getattr(model, "base_model", model)
        self.head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        there = self.head is not None and self.body is not model
        self.gathers = there and (self._head_is_all() if gathers is None else gathers)

    @torch.no_grad()
    def _head_is_all(self) -> bool:
        """Are the model's logits head(hidden) and nothing else? Tried on a few tokens."""
        device = next(self.model.parameters()).device
        ids = torch.arange(4, device=device).unsqueeze(0)
        training = self.model.training
        self.model.eval()
        try:
            logits = self.model(input_ids=ids, use_cache=False).logits
            ours = self.head(self.body(input_ids=ids, use_cache=False)[0])
        finally:
            self.model.train(training)
        return torch.equal(logits, ours)

    def __call__(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        labels = batch["labels"][:, 1:]  # position t predicts label t + 1
        chosen = labels != -100  # [B, T−1]
        wanted, count = labels[chosen], chosen.sum()  # [N]
        if not self.gathers:
            logits = self.model(**inputs, use_cache=False).logits[:, :-1]
            return F.cross_entropy(logits[chosen].float(), wanted, reduction="sum"), count
        hidden = self.body(**inputs, use_cache=False)[0][:, :-1][chosen]  # [N, H]
        return self.summed(hidden, wanted), count

    def summed(self, hidden: Tensor, wanted: Tensor) -> Tensor:
        """Σ −log p of what is supervised: hidden [N, H], wanted [N]."""
        size = max(64, self.values // self.head.weight.shape[0])
        parts = list(zip(hidden.split(size), wanted.split(size), strict=True))
        if len(parts) == 1:
            return self._sum(hidden, wanted)
        if not torch.is_grad_enabled():
            return torch.stack([self._sum(*part) for part in parts]).sum()
        if any(module._forward_hooks or module._forward_pre_hooks for module in self.head.modules()):
            return torch.stack([checkpoint(self._sum, *part, use_reentrant=False) for part in parts]).sum()
        trained = [parameter for parameter in self.head.parameters() if parameter.requires_grad]
        return Summed.apply(self._sum, size, hidden, wanted, *trained)  # type: ignore[no-any-return]

    def _sum(self, hidden: Tensor, wanted: Tensor) -> Tensor:
        return F.cross_entropy(self.head(hidden).float(), wanted, reduction="sum")


def mean_loss(loss: SFTLoss, batches: Any) -> float:
    """Held-out loss in nats per supervised token over all batches: tokens weigh alike, whatever the batching."""
    device = next(loss.model.parameters()).device
    total, tokens = 0.0, 0
    training = loss.model.training
    loss.model.eval()
    try:
        with torch.no_grad():
            for batch in batches:
                summed, count = loss({k: v.to(device) for k, v in batch.items()})
                total, tokens = total + float(summed), tokens + int(count)
    finally:
        loss.model.train(training)
    return total / tokens
