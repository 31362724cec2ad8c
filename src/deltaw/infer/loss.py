"""Cross-entropy on the supervised positions only, through the model's own head module, in checkpointed chunks.

    hidden [B, T, H] → rows that predict a label [N, H] → head(rows) [N, V] → Σ −log p(label)

Full logits of all positions are the largest tensor of a training step, and those of prompts and padding are thrown
away. The head is called as a module, so that adapters and hooks on it work. Models whose logits are not simply
head(hidden) (soft caps, scales) are found by a probe and computed through the model's own forward.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

CHUNK_VALUES = 1 << 24  # logits held at once: 64 MB in fp32


class SFTLoss:
    """Callable on a batch: (summed loss, number of supervised tokens). Made once per model; probes it at once."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.body = getattr(model, "base_model", model)
        self.head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        self.gathers = self.head is not None and self.body is not model and self._head_is_all()

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
        size = max(64, CHUNK_VALUES // self.head.weight.shape[0])
        if len(wanted) <= size:
            return self._sum(hidden, wanted), count
        total = hidden.new_zeros((), dtype=torch.float32)
        for rows, targets in zip(hidden.split(size), wanted.split(size), strict=True):
            total = total + checkpoint(self._sum, rows, targets, use_reentrant=False)
        return total, count

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
