"""nn.Conv1d, Conv2d, Conv3d: y = W * x + b, W: [out, in/groups, *kernel].

Low rank: A is a convolution with the layer's own kernel into r channels, B a 1×1 convolution back to `out`:
ΔW = (B·A).view(W.shape). With groups, every group shares A and has its own rows of B, so that ΔW has W's shape.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltaw.core.host import HostSpec, WeightHost, register


@register(nn.Conv1d, nn.Conv2d, nn.Conv3d)
class ConvHost(WeightHost):
    module: nn.Conv1d | nn.Conv2d | nn.Conv3d

    @property
    def spec(self) -> HostSpec:
        return HostSpec(tuple(self.weight.shape), groups=self.module.groups)

    @property
    def out_dim(self) -> int:
        return -self.parameter.ndim + 1  # channels stand before the spatial dimensions

    def op(self, x: Tensor, weight: Tensor) -> Tensor:
        return self.module._conv_forward(x, weight, None)  # the layer's stride, padding (and mode), dilation, groups

    def low_rank(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        groups, conv = self.module.groups, self.module._conv_forward
        if groups == 1:
            return _pointwise(conv(x, a, None), b)
        y = conv(x, a.repeat(groups, *[1] * (a.ndim - 1)), None)  # [N, g·r, …]: A once per group
        return _pointwise(y, b, groups)  # [N, out, …]

    def probe(self) -> Tensor:
        module = self.module
        spatial = [2 * d * (k - 1) + 3 for k, d in zip(module.kernel_size, module.dilation, strict=True)]
        return torch.randn(2, module.in_channels, *spatial)


def _pointwise(x: Tensor, b: Tensor, groups: int = 1) -> Tensor:
    """1×1 convolution with b: [out, r, 1, …]."""
    conv = (F.conv1d, F.conv2d, F.conv3d)[b.ndim - 3]
    return conv(x, b, groups=groups)
