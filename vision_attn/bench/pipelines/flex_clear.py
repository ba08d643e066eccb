"""CLEAR the way its authors run it: FlexAttention over the raster sequence, the block mask built once.

https://github.com/Huage001/CLEAR compiles `flex_attention` alone and leaves the rest of the model eager. This is that
way of running it, not their code: it takes the place of the host's attention as a processor does.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from vision_attn.bench.local.flex import block_mask, disc_mask
from vision_attn.bench.local.problem import LocalProblem
from vision_attn.grid import Grid
from vision_attn.kernels.local.window import Window
from vision_attn.processors.base import AttnSpec, Layer, Processor


@dataclass(frozen=True, eq=False)
class FlexClear(AttnSpec):
    """A disc by FlexAttention, for one grid.

    Args:
        radius: Radius of the disc in tokens.
        blocks: The mask of the grid.
        run: `flex_attention`, compiled or not.
    """

    radius: float
    blocks: BlockMask
    run: Callable[..., Any]

    @classmethod
    def on(cls, grid: Grid, radius: float, device: torch.device) -> "FlexClear":
        """Build the mask; FlexAttention is compiled on CUDA and, slow and with the whole mask, eager on a CPU."""
        problem = LocalProblem("mask", grid, Window(radius=radius))
        blocks = block_mask(disc_mask(problem, (1, grid.width)), grid.tokens, device)
        run = torch.compile(flex_attention, dynamic=False) if device.type == "cuda" else flex_attention
        return cls(radius, blocks, run)

    def build(self, layer: Layer) -> "FlexClearAttention":
        """Return the processor of one layer."""
        return FlexClearAttention(self)

    def attended(self, grid: Grid) -> float:
        """Return the mean share of tokens that one token attends to."""
        return Window(radius=self.radius).share(grid)


class FlexClearAttention(Processor):
    """One call of FlexAttention."""

    def __init__(self, spec: FlexClear) -> None:
        super().__init__()
        self.spec = spec

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, mask: Tensor | None = None, scale: float | None = None
    ) -> Tensor:
        """Attend inside the disc: see `Processor.forward`.

        Raises:
            ValueError: If there is padding, which the mask does not know.
        """
        if mask is not None:
            raise ValueError("FlexAttention's mask was built without padding")
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return self.spec.run(q, k, v, block_mask=self.spec.blocks, scale=scale).transpose(1, 2)
