"""The positional branch of several papers: a depth-wise convolution of the values over the grid.

Paper: 'CSWin Transformer' (LePE) - https://arxiv.org/abs/2107.00652
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision_attn.grid import Grid
from vision_attn.processors.image import on_image


class DepthwiseBranch(nn.Module):
    """A depth-wise `kernel_size` x `kernel_size` convolution with zero padding, zero at the start.

    Attributes:
        weight: `[C, 1, kernel_size, kernel_size]`.
        bias: `[C]`.
    """

    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels, 1, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, o: Tensor, v: Tensor, grid: Grid) -> Tensor:
        """Add the convolution of the grid's values to the grid's outputs, both `[B, N, H, D]`."""
        return add_depthwise(o, v, grid, self.weight, self.bias)


def add_depthwise(o: Tensor, v: Tensor, grid: Grid, weight: Tensor, bias: Tensor) -> Tensor:
    """Add the convolution of the grid's values, channel by channel, to the grid's outputs.

    Args:
        o: Outputs `[B, N, H, D]`.
        v: Values `[B, N, H, D]`.
        grid: Where the image tokens lie.
        weight: `[C, 1, kernel_size, kernel_size]`, with an odd side.
        bias: `[C]`.

    Returns:
        `[B, N, H, D]`.
    """

    def convolve(image: Tensor) -> Tensor:
        return F.conv2d(image, weight.to(v), bias.to(v), padding=weight.shape[-1] // 2, groups=weight.shape[0])

    local = on_image(v[:, grid.image], grid, convolve)
    outside = grid.prefix + grid.suffix
    return o + (F.pad(local, (0, 0, 0, 0, grid.prefix, grid.suffix)) if outside else local)
