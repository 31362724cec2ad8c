"""nn.ConvTranspose2d: stored [in, out, *kernel]; canonical W: [out, in, *kernel], the same operator for any W."""

import torch.nn.functional as F
from torch import Tensor, nn

from deltaw.core.host import HostSpec, WeightHost, register


@register(nn.ConvTranspose2d)
class ConvTransposeHost(WeightHost):
    module: nn.ConvTranspose2d

    @property
    def spec(self) -> HostSpec:
        return HostSpec(tuple(self.weight.shape))

    @property
    def weight(self) -> Tensor:
        return self.parameter.transpose(0, 1)

    def write(self, weight: Tensor) -> None:
        super().write(weight.transpose(0, 1))

    @property
    def out_dim(self) -> int:
        return -3

    def op(self, x: Tensor, weight: Tensor) -> Tensor:
        m = self.module
        w = weight.transpose(0, 1)
        return F.conv_transpose2d(x, w, None, m.stride, m.padding, m.output_padding, m.groups, m.dilation)

    def low_rank(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return F.conv2d(self.op(x, a), b)  # spread into r channels, then 1×1

    def fault(self) -> str | None:
        return "grouped transposed convolutions are not supported" if self.module.groups > 1 else super().fault()
