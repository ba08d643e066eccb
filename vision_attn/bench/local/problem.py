"""One case of local attention: a grid, a window, heads and a dtype."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vision_attn.bench.candidate import Inputs
from vision_attn.bench.local.check import errors
from vision_attn.bench.local.flops import needed_pairs
from vision_attn.grid import Grid
from vision_attn.kernels.local.window import Window

# What a candidate can compute.
LOCAL, DENSE, UNDILATED = "the same function", "dense attention", "the same window without dilation"
_SHORT = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


@dataclass(frozen=True)
class LocalProblem:
    """Local attention of batch 1; see `Problem`.

    Args:
        group: The table it belongs to.
        grid: Where the image tokens lie.
        window: Disc or square, without bias and pooled keys.
        peers: Names of the candidates besides ours.
        backward: Names of the candidates whose backward is timed too.
        heads: H.
        head_dim: D.
        dtype: Name of a torch dtype.
    """

    group: str
    grid: Grid
    window: Window
    peers: tuple[str, ...] = ()
    backward: tuple[str, ...] = ()
    heads: int = 24
    head_dim: int = 128
    dtype: str = "bfloat16"

    @property
    def name(self) -> str:
        """As in 'disc-128-r16', 'dilated-128-k7', 'square-64-k13-d64-fp16'."""
        window, side = self.window, f"{self.grid.height}"
        if self.grid.height != self.grid.width:
            side += f"x{self.grid.width}"
        if window.radius is not None:
            words = ["disc", side, f"r{window.radius}"]
        else:
            words = ["square" if window.steps == (1, 1) else "dilated", side, f"k{window.kernel[0]}"]
        words += [f"d{self.head_dim}"] if self.head_dim != 128 else []
        return "-".join([*words, *([_SHORT[self.dtype]] if self.dtype != "bfloat16" else [])])

    @property
    def label(self) -> str:
        """As in '128 x 128, radius 16, D 128, bf16'."""
        window = self.window
        size = f"radius {window.radius}" if window.radius is not None else f"K {window.kernel[0]}"
        size += "" if window.radius is not None or window.steps == (1, 1) else f", dilation {window.steps[0]}"
        return f"{self.grid.height} x {self.grid.width}, {size}, D {self.head_dim}, {_SHORT[self.dtype]}"

    def shape(self) -> dict[str, Any]:
        """Return batch, heads, channels, dtype, grid and window."""
        window: dict[str, Any] = dict(radius=self.window.radius)
        if self.window.radius is None:
            window = dict(kernel_size=list(self.window.kernel), dilation=list(self.window.steps))
        grid = dict(height=self.grid.height, width=self.grid.width, prefix=self.grid.prefix, suffix=self.grid.suffix)
        return dict(batch=1, heads=self.heads, head_dim=self.head_dim, dtype=self.dtype, **grid, **window)

    def twin(self) -> "LocalProblem":
        """Return a small problem of the same kind: fewer heads, a smaller grid, a window of at most 8 or 13 tokens."""
        window = self.window
        if window.radius is not None:
            window = Window(radius=min(window.radius, 8))
        else:
            window = Window(kernel_size=min(13, *window.kernel), dilation=window.dilation)
        grid = Grid(32, 48, min(self.grid.prefix, 128), min(self.grid.suffix, 128))
        return replace(self, group="twin", grid=grid, window=window, heads=min(self.heads, 3), peers=(), backward=())

    def inputs(self, device: torch.device) -> Inputs:
        """Draw q, k, v and the cotangent of o from a normal distribution."""
        draw = torch.Generator(device).manual_seed(0)
        shape = 1, self.grid.tokens, self.heads, self.head_dim
        q, k, v, do = (torch.randn(shape, generator=draw, device=device, dtype=self.torch_dtype) for _ in range(4))
        return Inputs((q, k, v), do)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype that `dtype` names."""
        return getattr(torch, self.dtype)

    def errors(self, computes: str, run: Callable[..., Tensor], inputs: Inputs, gradients: bool) -> dict[str, float]:
        """Check a candidate that computes one of `LOCAL`, `DENSE`, `UNDILATED`."""
        window: Window | None = {LOCAL: self.window, DENSE: None, UNDILATED: self.undilated()}[computes]
        return errors(run, inputs, self.grid, window, gradients)

    def undilated(self) -> Window:
        """The window without its dilation."""
        return self.window if self.window.radius is not None else Window(kernel_size=self.window.kernel)

    def needed_flop(self, gradients: bool) -> int:
        """Count 4 D operations per attended pair and head, 10 D for the gradients."""
        return (10 if gradients else 4) * self.head_dim * self.heads * needed_pairs(self.grid, self.window)
