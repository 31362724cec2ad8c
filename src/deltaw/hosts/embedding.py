"""nn.Embedding: a table of rows, y = E[ids]; as a linear layer on one-hot ids its weight is W = Eᵀ: [dim, vocab].

Subclasses that scale their rows (Gemma, BART, M2M: `embed_scale`) scale the change too: y = embed_scale · E[ids].
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltaw.core.host import HostSpec, Map, WeightHost, register


@register(nn.Embedding)
class EmbeddingHost(WeightHost):
    module: nn.Embedding

    @property
    def spec(self) -> HostSpec:
        return HostSpec(tuple(self.weight.shape), lookup=True)

    @property
    def weight(self) -> Tensor:
        return self.parameter.T  # stored [vocab, dim]

    def write(self, weight: Tensor) -> None:
        super().write(weight.T)

    def op(self, x: Tensor, weight: Tensor) -> Tensor:
        whole = weight.shape[1] == self.module.num_embeddings
        return self._scaled(F.embedding(x, weight.T, padding_idx=self.module.padding_idx if whole else None))

    def low_rank(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        rows = F.embedding(x, a.T, padding_idx=self.module.padding_idx)  # ids → [T, r]; padding learns nothing
        return self._scaled(rows @ b.T)  # [T, dim]

    def act(
        self, x: Tensor, dense: Callable[[], Tensor], vectors: Map | None = None, columns: Map | None = None
    ) -> Tensor:
        if columns is None:
            return self.op(x, dense())
        y, padding = columns(x), self.module.padding_idx  # ids → [T, dim]
        if padding is not None:
            y = torch.where((x == padding).unsqueeze(-1), y.detach(), y)  # padding learns nothing
        return self._scaled(y)

    def _scaled(self, y: Tensor) -> Tensor:
        scale = getattr(self.module, "embed_scale", None)
        if scale is None:
            return y
        return y * (scale.to(y.dtype) if isinstance(scale, Tensor) else scale)

    def probe(self) -> Tensor:
        return torch.arange(min(4, self.parameter.shape[0]))

    def fault(self) -> str | None:
        if self.module.max_norm is not None:
            return "an embedding with max_norm rewrites its own weight in every forward"
        return super().fault()
