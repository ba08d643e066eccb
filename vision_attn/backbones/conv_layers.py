"""What families of convolutional blocks share, on maps `[B, C, height, width]`: merging, MLP and last projection."""

from typing import Any

import torch
import torch.nn.functional as F
from timm.models import register_notrace_module
from torch import Tensor, nn


@register_notrace_module
class PointwiseConv2d(nn.Conv2d):
    """A 1 x 1 convolution that computes one matrix product on channels-last maps.

    The product also adds the bias. After a convolution, cuDNN adds it in a second pass over the output.

    Args:
        in_channels: Channels of the map.
        out_channels: Channels of the result.
        **dd: Device and dtype of the parameters.
    """

    def __init__(self, in_channels: int, out_channels: int, **dd: Any) -> None:
        super().__init__(in_channels, out_channels, 1, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Return a map `[B, out_channels, height, width]`; it is channels-last if `x` is."""
        if not x.is_contiguous(memory_format=torch.channels_last):
            return self._conv_forward(x, self.weight, self.bias)
        return F.linear(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class ConvMerging(nn.Module):
    """A strided 3 x 3 convolution and a batch norm, which halve a map's sides, rounded up."""

    def __init__(
        self, dim: int, out_dim: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.reduction = nn.Conv2d(dim, out_dim, 3, stride=2, padding=1, device=device, dtype=dtype)
        self.norm = nn.BatchNorm2d(out_dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return the merged map."""
        return self.norm(self.reduction(x))


class ConvolvedFfn(nn.Module):
    """An MLP whose hidden channels pass through a depth-wise convolution with a skip connection.

    y = GELU(fc1(x)),    o = fc2(y + dwconv(y))
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        *,
        drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.fc1 = PointwiseConv2d(dim, hidden, device=device, dtype=dtype)
        self.act = nn.GELU()
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, device=device, dtype=dtype)
        self.fc2 = PointwiseConv2d(hidden, dim, device=device, dtype=dtype)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the shape of `x`."""
        x = self.act(self.fc1(x))
        return self.drop(self.fc2(self.drop(x + self.dwconv(x))))


class Projection(nn.Module):
    """The last layer before pooling: a 1 x 1 convolution, a batch norm and SiLU."""

    def __init__(
        self, dim: int, out_dim: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.proj = PointwiseConv2d(dim, out_dim, device=device, dtype=dtype)
        self.norm = nn.BatchNorm2d(out_dim, device=device, dtype=dtype)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        """Return the projected map."""
        return self.act(self.norm(self.proj(x)))
