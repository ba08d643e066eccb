"""A 1 x 1 convolution as what it is, a linear layer on the channels."""

from typing import Any

import torch
import torch.nn.functional as F
from timm.models import register_notrace_module
from torch import Tensor, nn


@register_notrace_module
class PointwiseConv2d(nn.Conv2d):
    """A 1 x 1 convolution that is one matrix product on channels-last maps.

    There the product adds the bias; a convolution of cuDNN is followed by a pass over its output that does.

    Args:
        in_channels: Channels of the map.
        out_channels: Channels of the result.
        **dd: Device and dtype of the parameters.
    """

    def __init__(self, in_channels: int, out_channels: int, **dd: Any) -> None:
        super().__init__(in_channels, out_channels, 1, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Return a map `[B, out_channels, height, width]`, channels-last if `x` is."""
        if not x.is_contiguous(memory_format=torch.channels_last):
            return self._conv_forward(x, self.weight, self.bias)
        return F.linear(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)
