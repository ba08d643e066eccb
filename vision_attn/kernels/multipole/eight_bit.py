"""Multipole attention in 8 bits in PyTorch: `vision_attn/kernels/eight_bits.py` says how tokens and weights round.

Means are made of unrounded tokens. A mean key loses the mean of all keys too, and has a scale of its own: the kernel
adds the logarithm of what it stands for to each logit anyway, so that a factor beside it costs nothing. Mean values
have the scales of the values, none of which they exceed.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vision_attn.grid import Grid
from vision_attn.kernels.backend import custom_op, full_precision
from vision_attn.kernels.dense import outside
from vision_attn.kernels.eight_bits import (
    Blocks,
    Rounded,
    dense_rows,
    rounded_to,
    rounded_values,
    rounded_weights,
    rows_outside,
)
from vision_attn.kernels.multipole.cells import Cells, choose_cells, means_of, of_one_head
from vision_attn.kernels.multipole.portable import attend_cells, hidden_keys


class RoundedInputs(NamedTuple):
    """Tokens, and the means of all levels of keys and values `[B, M, H, D]`, with the values of 8 bits in float32."""

    tokens: Rounded
    means_k: Tensor
    means_v: Tensor

    @property
    def all(self) -> tuple[Tensor, ...]:
        """q, k, v and both means."""
        return self.tokens.q, self.tokens.k, self.tokens.v, self.means_k, self.means_v


def rounded_inputs(q: Tensor, k: Tensor, v: Tensor, grid: Grid, cells: Cells) -> RoundedInputs:
    """Round what `multipole_attention` takes."""
    x = Rounded.of(q, k, v, Blocks.of(grid, cell=cells.cell), cells.precision)
    sides = cells.layout(grid, q.device).sides
    means_k, means_v = (means_of(of_one_head(t)[:, grid.image], grid, cells, sides).float() for t in (k, v))
    means_k = means_k - x.k_mean
    top = means_k.abs().amax(3, keepdim=True)
    return RoundedInputs(x, rounded_to(means_k, top, cells.precision), rounded_values(means_v, x.v_scale))


@full_precision
def eight_bit_attention_torch(
    q: Tensor, k: Tensor, v: Tensor, grid: Grid, cells: Cells, mask: Tensor | None, scale: float
) -> Tensor:
    """Run `multipole_attention` with a `precision` on checked inputs."""
    x, means_k, means_v = rounded_inputs(q, k, v, grid, cells)
    o, image = torch.empty_like(x.q), grid.image
    rows: Sequence[slice] = rows_outside(grid)
    if cells.covers(grid):
        rows = (slice(0, grid.tokens),)
    else:
        chosen = choose_cells(q, k, grid, cells, scale=scale) if cells.chosen is None else cells.chosen
        o[:, image] = rounded_grid_multipole(
            x.q[:, image], x.k[:, image], x.v[:, image], outside(x.k, grid), outside(x.v, grid), means_k, means_v,
            cells.mass, hidden_keys(mask, x.q), chosen, [grid.height, grid.width, cells.cell, cells.near, cells.pool],
            scale,
        )  # fmt: skip
    dense_rows(o, x, grid, rows, mask, scale)
    return o.to(q.dtype)


@custom_op("vision_attn::multipole_grid_rounded")
def rounded_grid_multipole(
    q: Tensor, k: Tensor, v: Tensor, k_shared: Tensor, v_shared: Tensor, k_means: Tensor, v_means: Tensor,
    mass: Tensor | None, hidden: Tensor | None, chosen: Tensor, size: Sequence[int], scale: float,
) -> Tensor:  # fmt: skip
    """Attend as `grid_multipole` does, with the weights of `rounded_weights`."""
    return attend_cells(
        q, k, v, k_shared, v_shared, k_means, v_means, mass, hidden, chosen, size, scale, rounded_weights
    )


@rounded_grid_multipole.register_fake
def _(q: Tensor, *args: object) -> Tensor:
    return torch.empty_like(q)
