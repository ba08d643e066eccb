"""Super token attention: tokens join super tokens around them, these attend to each other, and tokens read them back.

    w_im = softmax_m(f_i . s_m / sqrt(C)),    m in the 3 x 3 super tokens around the cell of i
    s_m = sum_i w_im f_i / sum_i w_im,        at first the mean of cell m; f_i = sqrt(C) k_i / |k_i| over all heads
    x_m = sum_i w_im x_i / sum_i w_im         for x = q, k, v
    o_i = sum_m w_im o_m,    o_m = softmax_n(scale * q_m . k_n) v_n,    n in super tokens + tokens outside the grid

One association w serves all heads, and no gradient flows through it, both as the authors have it. Their f are the
layer's input after its norm, and their super tokens are projected to queries, keys and values. Here f are the keys,
which the host has projected, and queries, keys and values are averaged: the same where the host neither normalises nor
rotates them after the projection. Tokens outside the grid attend densely. Cells at the right and bottom border are
smaller where `size` does not divide the grid.

Paper: 'Vision Transformer with Super Token Sampling' - https://arxiv.org/abs/2211.11167
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vision_attn._checks import check_int
from vision_attn.grid import Grid
from vision_attn.kernels.backend import full_precision
from vision_attn.kernels.dense import around, dense_attention, full_mask, outside, with_dense_rows
from vision_attn.kernels.window import from_cells, inside_cells, to_cells
from vision_attn.processors.base import AttnSpec, Layer, Processor, register


@register(
    tests={"super-token": dict(size=2), "super-token-twice": dict(size=3, iterations=2)},
    bench={"super token": {}},
)
@dataclass(frozen=True)
class SuperToken(AttnSpec):
    """Attention among super tokens. It has no parameters; a pretrained host needs training.

    Args:
        size: Side of a super token's cell in tokens; 1 is the host's own attention, as in the authors' code.
        iterations: How often the association is computed; each time after the first from the super tokens of the last.
    """

    size: int = 8
    iterations: int = 1

    def __post_init__(self) -> None:
        check_int("size", self.size, 1)
        check_int("iterations", self.iterations, 1)

    def build(self, layer: Layer) -> "SuperTokenAttention":
        """Return the processor of one layer."""
        return SuperTokenAttention(self)

    def cells(self, grid: Grid) -> int:
        """Return how many super tokens a grid has."""
        return -(-grid.height // self.size) * -(-grid.width // self.size)

    def attended(self, grid: Grid) -> float:
        """Return the mean share of tokens, or of super tokens, that one token attends to."""
        rest = grid.prefix + grid.suffix
        return (grid.image_tokens * (self.cells(grid) + rest) + rest * grid.tokens) / grid.tokens**2

    def flops(self, grid: Grid, layer: Layer) -> float:
        """Return the operations of the association, of both ways through it, and of the attention."""
        cells, rest = self.cells(grid), grid.prefix + grid.suffix
        association = 9 * grid.image_tokens * 2 * (2 * self.iterations - 1)
        through = 9 * grid.image_tokens * 2 * 4  # q, k and v in, the output back
        attention = 4 * (cells * (cells + rest) + rest * grid.tokens)
        return (association + through + attention) * layer.num_heads * layer.head_dim

    @property
    def passes(self) -> float:
        """Several, because sums of nine parts are written and read in float32."""
        return 12.0 + 8.0 * self.iterations

    @property
    def calls(self) -> float:
        """PyTorch's operations of the association, and of both ways through it."""
        return 85.0 + 20.0 * self.iterations


class SuperTokenAttention(Processor):
    """Dense attention among the super tokens of a grid and the tokens outside it."""

    def __init__(self, spec: SuperToken) -> None:
        super().__init__()
        self.spec = spec

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, mask: Tensor | None = None, scale: float | None = None
    ) -> Tensor:
        """Attend through super tokens: see `Processor.forward`."""
        if self.spec.size == 1:
            return dense_attention(q, k, v, mask=full_mask(mask, grid), scale=scale)
        cell, image, heads = (self.spec.size, self.spec.size), grid.image, q.shape[2:]
        rows, columns = (-(-side // self.spec.size) for side in (grid.height, grid.width))

        def cut(t: Tensor) -> Tensor:
            return to_cells(t[:, image], grid, cell).flatten(3).unflatten(1, (rows, columns))

        def joined(t: Tensor) -> Tensor:
            return join(weight, cut(t)).to(t.dtype).flatten(1, 2).unflatten(2, heads)

        weight = associate(
            F.normalize(cut(k).to(torch.promote_types(k.dtype, torch.float32)), dim=-1) * heads.numel() ** 0.5,
            self.spec.iterations,
            inside_cells(grid, cell, q.device),
        )
        keys, values = (around(outside(t, grid), joined(t), grid) for t in (k, v))
        whole = full_mask(mask, Grid(rows, columns, grid.prefix, grid.suffix))
        o = dense_attention(joined(q), keys, values, mask=whole, scale=scale)
        o = read(weight, o.flatten(2).unflatten(1, (rows, columns)))  # [B, rows, columns, L, C]
        o = from_cells(o.to(q.dtype).flatten(1, 2).unflatten(3, heads), grid, cell)
        return with_dense_rows(o, q, k, v, grid, mask=mask, scale=scale)


@full_precision
def associate(f: Tensor, iterations: int, inside: Tensor | None = None, *, padded: bool = False) -> Tensor:
    """Return how much of each token belongs to each of the 3 x 3 super tokens around its cell.

    Args:
        f: Features by cell `[B, rows, columns, L, C]`, zeros at places without a token.
        iterations: At least 1.
        inside: Bool `[rows * columns, L]`: which places hold a token; None if all do.
        padded: Let each border have super tokens of zeros beyond it, which take their share, as in the authors' code.

    Returns:
        `[B, rows, columns, L, 9]` without a gradient, zeros at places without a token.
    """
    f = f.detach()
    rows, columns, L = f.shape[1:4]
    there = None if inside is None else inside.view(rows, columns, L, 1)
    near = surrounding(f.new_ones(1, rows, columns, 1)) > 0  # [1, rows, columns, 1, 9]
    s = f.mean(3) if there is None else f.sum(3) / there.sum(2)
    weight = f
    for again in range(iterations):
        if again:
            s = join(weight, f)
        logits = f @ surrounding(s) * f.shape[-1] ** -0.5
        weight = (logits if padded else logits.masked_fill(~near, -torch.inf)).softmax(-1)
        weight = weight if there is None else weight * there
    return weight


@full_precision
def join(weight: Tensor, t: Tensor) -> Tensor:
    """Average tokens `[B, rows, columns, L, C]` into super tokens `[B, rows, columns, C]`, in the weight's dtype."""
    total = spread(weight.sum(3)[:, :, :, None])
    return spread(t.to(weight.dtype).mT @ weight) / (total + 1e-12)


@full_precision
def read(weight: Tensor, s: Tensor) -> Tensor:
    """Mix super tokens `[B, rows, columns, C]` into the tokens `[B, rows, columns, L, C]` that joined them."""
    return weight @ surrounding(s.to(weight.dtype)).mT


def surrounding(s: Tensor) -> Tensor:
    """Return the super tokens around each `[B, rows, columns, C, 9]`, row by row; zeros beyond the border."""
    near = F.unfold(s.permute(0, 3, 1, 2), 3, padding=1)  # [B, C * 9, rows * columns]
    return near.unflatten(1, (-1, 9)).permute(0, 3, 1, 2).unflatten(1, s.shape[1:3])


def spread(parts: Tensor) -> Tensor:
    """Sum what each super token gets from the cells around it: the transpose of `surrounding`."""
    size = parts.shape[1:3]
    parts = parts.flatten(1, 2).permute(0, 2, 3, 1).flatten(1, 2)  # [B, C * 9, rows * columns]
    return F.fold(parts, size, 3, padding=1).permute(0, 2, 3, 1)
