"""Cells with halos, pooled keys, and convolutions over processes: what Halo, HiLo, CLEAR and positions need."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vision_attn.grid import Grid
from vision_attn.kernels.dense import dense_attention
from vision_attn.kernels.image import add_depthwise
from vision_attn.kernels.window import Haloed, window_attention
from vision_attn.parallel.linear import cells_slab
from vision_attn.parallel.local import Halo, Slab
from vision_attn.parallel.outside import Shared
from vision_attn.parallel.ranks import Ranks
from vision_attn.parallel.sums import CellSums, cell_counts, own_cells, own_image, squares


def _slab_of(ranks: Ranks, cells: Haloed, rank: int) -> Slab:
    """Return the rows of the cells that a slice touches, and of those that their halos reach."""
    slab, height, reach = cells_slab(ranks, cells.cell[0], rank), ranks.grid.height, 0
    if slab.first < slab.stop:
        reach = math.ceil(cells.around[0] / cells.cell[0]) * cells.cell[0]
    return Slab(ranks, max(slab.first - reach, 0), min(slab.stop + reach, height))


def window_attention_over(
    tensors: Sequence[Tensor], ranks: Ranks, outside: Shared, cells: Haloed, *, scale: float | None, backend: str
) -> Tensor:
    """Attend from the own tokens of the grid to their cells, the halos of these and the tokens outside the grid.

    Args:
        tensors: Queries, keys and values of the own slice, each `[B, tokens, H, D]`.
        ranks: Who holds what.
        outside: The tokens outside the grid of these heads, which are there.
        cells: The cells and their halos.
        scale: Factor of the logits.
        backend: How the operators run.

    Returns:
        `[B, own tokens of the grid, H, D]`.
    """
    q, k, v = tensors
    slabs = [_slab_of(ranks, cells, rank) for rank in range(ranks.size)]
    slab = slabs[ranks.rank]
    keys, values = Halo([ranks.own_image(t) for t in (k, v)], slabs).wait()
    queries = slab.around(ranks.own_image(q))
    if not queries.shape[1]:
        return queries + keys + values
    count = outside.k.shape[1]
    grid = Grid(slab.grid.height, slab.grid.width, prefix=count)
    sequences = [torch.cat(pair, 1) for pair in ((outside.k, queries), (outside.k, keys), (outside.v, values))]
    o = window_attention(
        sequences[0], sequences[1], sequences[2], grid, cells, mask=outside.mask, scale=scale, backend=backend
    )
    return slab.own(o[:, count:])


class PooledMeans:
    """Means of keys and values over cells of the whole grid, which are under way when this is made."""

    def __init__(self, k: Tensor, v: Tensor, ranks: Ranks, cell: int) -> None:
        self._count = cell_counts(ranks.grid, cell, k.device, torch.promote_types(k.dtype, torch.float32))
        wide = self._count.dtype
        parts = [own_cells(ranks.own_image(t), cell, ranks, wide) for t in (k, v)]
        first, stop = ranks.rows(unit=cell)
        parts = [(part / self._count[:, first:stop]).to(k.dtype) for part in parts]
        self._sums = CellSums(parts, cell, ranks, "pooled")

    def wait(self) -> list[Tensor]:
        """Return the means `[B, cells, H, D]` of keys and of values."""
        return [t.flatten(1, 2) for t in self._sums.wait()]


class PooledSums:
    """Weighted sums of keys and values over cells, which are under way when this is made.

    Args:
        k: Keys of the own slice `[B, tokens, H, D]`.
        v: Values, like `k`.
        ranks: Who holds what.
        weight: Of the tokens of a cell `[cell, cell]`.
        counted: Whether each counts as its tokens outside the disc.
    """

    def __init__(self, k: Tensor, v: Tensor, ranks: Ranks, weight: Tensor, counted: bool) -> None:
        cell = weight.shape[0]
        self.counted = cell if counted else 0
        images = [squares(own_image(ranks.own_image(t), cell, ranks), cell) for t in (k, v)]
        parts = [torch.einsum("byixjhd,ij->byxhd", image, weight.to(k)) for image in images]
        self._sums = CellSums(parts, cell, ranks, "pooled")

    def wait(self) -> list[Tensor]:
        """Return the sums `[B, cells, H, D]` of keys and of values."""
        return [t.flatten(1, 2) for t in self._sums.wait()]


def pooled_attention_over(
    tensors: Sequence[Tensor], ranks: Ranks, outside: Shared, cell: int, *, scale: float | None
) -> Tensor:
    """Attend from the own tokens of the grid to the means of all cells and to the tokens outside the grid."""
    q, k, v = tensors
    means = PooledMeans(k, v, ranks, cell).wait()
    keys, values = (torch.cat(pair, 1) for pair in zip((outside.k, outside.v), means, strict=True))
    mask = outside.mask
    if mask is not None:
        mask = torch.cat([mask, mask.new_ones(len(mask), means[0].shape[1])], 1)[:, None, None]
    return dense_attention(ranks.own_image(q), keys, values, mask=mask, scale=scale)


def add_depthwise_over(o: Tensor, v: Tensor, ranks: Ranks, weight: Tensor, bias: Tensor) -> Tensor:
    """Add the depth-wise convolution of the grid's values to the own outputs: see `add_depthwise`.

    Args:
        o: Outputs of the own slice `[B, tokens, H, D]`.
        v: Values, like `o`.
        ranks: Who holds what.
        weight: `[C, 1, kernel_size, kernel_size]`.
        bias: `[C]`.
    """
    reach, height = weight.shape[-1] // 2, ranks.grid.height
    rows = [ranks.rows(rank) for rank in range(ranks.size)]
    slabs = [Slab(ranks, max(a - reach, 0), min(b + reach, height)) if b > a else Slab(ranks, a, a) for a, b in rows]
    slab = slabs[ranks.rank]
    (values,) = Halo([ranks.own_image(v)], slabs, "convolution").wait()
    if not ranks.count(ranks.image):
        return o + (values.sum() + weight.sum() + bias.sum()) * 0
    local = add_depthwise(torch.zeros_like(values), values, slab.grid, weight, bias)
    return o + ranks.together(torch.zeros_like(ranks.own_outside(o)), slab.own(local))
