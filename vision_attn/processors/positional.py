"""The positional parts of several papers: a depth-wise convolution of the values over the grid, and rotation inside.

Papers: 'CSWin Transformer' (LePE) - https://arxiv.org/abs/2107.00652,
'RoFormer' (rotation of features, equation 19) - https://arxiv.org/abs/2104.09864
"""

from typing import Any

import torch
from torch import Tensor, nn

from vision_attn._checks import is_int
from vision_attn.grid import Grid
from vision_attn.kernels.backend import for_inference
from vision_attn.kernels.image import add_depthwise
from vision_attn.kernels.linear import rotate_pairs
from vision_attn.processors.base import Moment


class DepthwiseBranch(nn.Module):
    """A depth-wise `kernel_size` x `kernel_size` convolution with zero padding, zero at the start.

    Args:
        channels: C.
        kernel_size: Its side.
        backend: How it runs; where a gradient is wanted, in PyTorch.

    Attributes:
        weight: `[C, 1, kernel_size, kernel_size]`.
        bias: `[C]`.
    """

    def __init__(self, channels: int, kernel_size: int, backend: str = "auto") -> None:
        super().__init__()
        self.backend = backend
        self.weight = nn.Parameter(torch.zeros(channels, 1, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, o: Tensor, v: Tensor, grid: Grid, gate: Tensor | None = None) -> Tensor:
        """Add the convolution of the grid's values to the grid's outputs, and apply a gate: see `add_depthwise`."""
        weight, bias = (t.to(v.device) for t in (self.weight, self.bias))  # offloading may have parked them elsewhere
        backend = for_inference(self.backend, o, v, weight, bias, gate)
        return add_depthwise(o, v, grid, weight, bias, gate=gate, backend=backend)


def check_kernel_size(size: Any) -> None:
    """Refuse a side of the convolution that is neither odd nor 0.

    Raises:
        TypeError: If it is not an int.
        ValueError: If it is negative or even.
    """
    if not is_int(size):
        raise TypeError(f"kernel_size must be an int, got {size!r}")
    if size < 0 or (size and size % 2 == 0):
        raise ValueError(f"kernel_size must be odd, or 0 for no convolution, got {size}")


def rotation_of(moment: Moment, processor: Any) -> tuple[Tensor, Tensor]:
    """Return cosine and sine `[N, D]` by which the host rotated queries and keys.

    Which channels a host pairs is compared once, because on a GPU the host waits for it, and not while it compiles.

    Args:
        moment: What is known about the forward.
        processor: What needs them; its `spec` is for the error.

    Raises:
        ValueError: If the host does not pass them to its attention, or does not rotate pairs of neighbouring channels.
    """
    if moment.rotary is None:
        raise ValueError(f"{processor.spec} needs a host that passes cosine and sine to its attention, as FLUX does")
    cos, sin = moment.rotary
    capturing = cos.is_cuda and torch.cuda.is_current_stream_capturing()
    if not (torch.compiler.is_compiling() or capturing or getattr(processor, "pairs_neighbours", False)):
        if not torch.equal(cos[:, ::2], cos[:, 1::2]):
            raise ValueError(f"{processor.spec} needs a host that rotates pairs of neighbouring channels, as FLUX does")
        processor.pairs_neighbours = True
    return cos, sin


def unrotated(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Undo the host's rotation of queries or keys `[B, N, H, D]`."""
    cos, sin = rotary
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return rotate_pairs(wide, cos.to(x.device), -sin.to(x.device)).to(x.dtype)
