"""Local attention in 8 bits in PyTorch: `vision_attn/kernels/eight_bits.py` says what is rounded how."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vision_attn.grid import Grid
from vision_attn.kernels.backend import custom_op
from vision_attn.kernels.dense import full_mask, outside
from vision_attn.kernels.eight_bits import Blocks, Rounded, dense_rows, rounded_dense, rounded_weights, rows_outside
from vision_attn.kernels.local.portable import HIDDEN, attend_grid

if TYPE_CHECKING:
    from vision_attn.kernels.local import Window


def _rounded(q: Tensor, k: Tensor, v: Tensor, grid: Grid, window: "Window") -> Rounded:
    return Rounded.of(q, k, v, Blocks.of(grid, window.geometry(grid)[2]), window.precision)


def eight_bit_attention_torch(
    q: Tensor, k: Tensor, v: Tensor, grid: Grid, window: "Window", mask: Tensor | None, scale: float
) -> Tensor:
    """Run `local_attention` with a `precision` on checked inputs, in memory O(N * window)."""
    x, image = _rounded(q, k, v, grid, window), grid.image
    hidden = None if mask is None else (~mask).float() * HIDDEN
    o = torch.empty_like(x.q)
    o[:, image] = rounded_grid_attention(
        x.q[:, image], x.k[:, image], x.v[:, image], outside(x.k, grid), outside(x.v, grid), hidden,
        [grid.height, grid.width], *window.geometry(grid), scale,
    )  # fmt: skip
    dense_rows(o, x, grid, rows_outside(grid), mask, scale)
    return o.to(q.dtype)


def eight_bit_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, grid: Grid, window: "Window", mask: Tensor | None, scale: float
) -> Tensor:
    """The same by a dense mask."""
    x = _rounded(q, k, v, grid, window)
    seen = torch.ones(1, 1, grid.tokens, grid.tokens, dtype=torch.bool, device=q.device)
    seen[..., grid.image, grid.image] = window.allowed(grid, q.device)
    whole = full_mask(mask, grid, 0)
    return rounded_dense(x.q, x.k, x.v, seen if whole is None else seen & whole, scale).to(q.dtype)


@custom_op("vision_attn::local_grid_rounded")
def rounded_grid_attention(
    q: Tensor, k: Tensor, v: Tensor, k_shared: Tensor, v_shared: Tensor, hidden: Tensor | None, size: Sequence[int],
    radius: float, kernel: Sequence[int], steps: Sequence[int], scale: float,
) -> Tensor:  # fmt: skip
    """Attend as `grid_attention` does, without a bias and cells, and with the weights of `rounded_weights`."""
    return attend_grid(
        q, k, v, k_shared, v_shared, None, hidden, size, radius, kernel, steps, 0, scale, rounded_weights
    )


@rounded_grid_attention.register_fake
def _(q: Tensor, *args: object) -> Tensor:
    return q.new_empty(q.shape)
