"""Halo: the tokens of a block of the grid attend to their block and to a halo around it.

    o_i = softmax_j(scale * q_i . k_j) v_j,    j in block(i) + halo of block(i) + tokens outside the grid

The grid is cut into blocks of `block` x `block` tokens from its top left corner; the last ones are smaller where that
does not divide the grid. The halo of a block is the frame of `halo` rows and columns around it, cut by the
border. Tokens outside the grid (text, class, registers, reference images) are seen by everything and see
everything. The paper's backbones add relative positions to the logits; a pretrained host has positions of its own.

Paper: 'Scaling Local Self-Attention for Parameter Efficient Visual Backbones' - https://arxiv.org/abs/2103.12731
"""

from dataclasses import dataclass

from torch import Tensor

from vision_attn.grid import Grid
from vision_attn.kernels.backend import PerAxis, per_axis
from vision_attn.kernels.dense import biased_attention
from vision_attn.kernels.window import Haloed, window_attention
from vision_attn.processors.base import AttnSpec, Layer, Processor, register


@register(
    tests={"halo": dict(block=4, halo=1)},
    demo=[dict(block=8, halo=3)],
    bench={"halo b8 h3": dict(block=8, halo=3)},
    draws_untrained=True,
)
@dataclass(frozen=True)
class Halo(AttnSpec):
    """Blocks of `block` x `block` tokens that see `halo` tokens beyond each side.

    It has no parameters. A query sees `(block + 2 * halo)^2` keys of the grid, fewer at the border. In the middle of a
    block it sees equally far on all sides, at a side of the block only `halo` tokens beyond it.

    Args:
        block: Side of a block in tokens, at least 1; or a (height, width) pair.
        halo: Tokens beyond each side, at least 0; or a (vertical, horizontal) pair.
    """

    block: PerAxis = 8
    halo: PerAxis = 3

    def __post_init__(self) -> None:
        for name, least in (("block", 1), ("halo", 0)):
            pair = per_axis(getattr(self, name), name, least)
            object.__setattr__(self, name, pair[0] if pair[0] == pair[1] else pair)

    @property
    def cells(self) -> Haloed:
        """The operator's cells."""
        return Haloed(self.block, self.halo)

    def build(self, layer: Layer) -> "HaloAttention":
        """Return the processor of one layer."""
        return HaloAttention(self, layer)

    def attended(self, grid: Grid) -> float:
        """Return the mean share of tokens that one token attends to."""
        outside = grid.prefix + grid.suffix
        return (self.cells.pairs(grid) + outside * (grid.image_tokens + grid.tokens)) / grid.tokens**2

    @property
    def calls(self) -> float:
        """One kernel; for tokens outside the grid also dense attention, and joining in PyTorch."""
        return 3.0


class HaloAttention(Processor):
    """`window_attention` over blocks with halos."""

    heads_alike = True

    def __init__(self, spec: Halo, layer: Layer) -> None:
        super().__init__()
        self.spec, self.backend = spec, layer.backend

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, mask: Tensor | None = None, scale: float | None = None
    ) -> Tensor:
        """Attend in blocks: see `Processor.forward`."""
        return window_attention(q, k, v, grid, self.spec.cells, mask=mask, scale=scale, backend=self.backend)

    def biased(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, bias: Tensor, scale: float | None = None) -> Tensor:
        """Attend in blocks, with a bias for each pair of tokens: see `Processor.biased`."""
        return biased_attention(q, k, v, grid, self.spec.cells.allowed(grid, q.device), bias, scale=scale)
