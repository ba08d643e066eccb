"""Multipole attention of some rows of a grid whose other rows lie elsewhere, in Triton: what is made here and travels.

A slab is whole rows of cells, an even number of them: then the finest means of slab after slab are those of the grid in
the rows of `pyramid.py`. Nothing here has a gradient.
"""

# the compiler of a kernel reads no annotations
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def"

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vision_attn.kernels.multipole.choice import choose_rows
from vision_attn.kernels.multipole.means import cell_keys, finest_means, further_means, square_means
from vision_attn.kernels.multipole.pyramid import pyramid
from vision_attn.kernels.triton.launching import Kernel, block_of, next_power, packed


class SlabMeans(NamedTuple):
    """What the other slabs need to know of one, and its mean queries.

    Attributes:
        finest: Finest means of keys and of values, each `[B, rows, H, D]`, in the rows of `pyramid.py`.
        keys: The keys that stand for its cells in the choice `[1 or 2, B, cells, H, D]`; None without exact cells.
        queries: Mean queries of its cells `[B, cells, H, D]`; None without exact cells.
    """

    finest: tuple[Tensor, Tensor]
    keys: Tensor | None
    queries: Tensor | None


def slab_means(
    q: Tensor, k: Tensor, v: Tensor, weights: Tensor | None, size: Sequence[int], exact: int, spread: float
) -> SlabMeans:
    """Return the means of a slab.

    Args:
        q: Queries of the slab `[B, n, H, D]`.
        k: Keys, like `q`.
        v: Values, like `q`.
        weights: Logarithms of the weights of a mean's tokens `[pool, pool]`, or None.
        size: Height and width of the slab, 0, 0, cell, near, pool.
        exact: How many cells are chosen.
        spread: How much the spread of a cell's keys counts.
    """
    q, k, v = packed(q), packed(k), packed(v)
    means_k, means_v, low, high = finest_means(k, v, weights, size, bool(exact and spread))
    if not exact:
        return SlabMeans((means_k, means_v), None, None)
    B, _, H, D = q.shape
    cells = math.prod(pyramid(size).cells)
    mean_q, keys = q.new_empty((B, cells, H, D)), k.new_empty((1 + (spread > 0), B, cells, H, D))
    square_means(q, mean_q, size)
    cell_keys(means_k, low, high, keys, size, spread)
    return SlabMeans((means_k, means_v), keys, mean_q)


def all_means(finest: Sequence[Tensor], size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return means of all levels `[B, M, H, D]` of keys and of values, from those of the first level of the grid."""
    rows = pyramid(size)
    B, _, H, D = finest[0].shape
    means_k, means_v = ((t.new_empty if rows.full else t.new_zeros)((B, rows.rows, H, D)) for t in finest)
    for whole, part in zip((means_k, means_v), finest, strict=True):
        whole[:, : rows.finest] = part
    further_means(means_k, means_v, size)
    return means_k, means_v


def slab_choice(queries: Tensor, keys: Tensor, size: Sequence[int], before: int, exact: int, scale: float) -> Tensor:
    """Return the exact cells, int32 `[B, H, cells of the grid, exact]`: none for cells of other slabs.

    Args:
        queries: Mean queries of the slab's cells.
        keys: The keys that stand for all cells of the grid.
        size: Height and width of the grid, 0, 0, cell, near, pool.
        before: The cells before the slab's.
        exact: How many cells are chosen.
        scale: Factor of the logits.
    """
    found = choose_rows(queries, keys, size, before, exact, scale)
    B, H, own, _ = found.shape
    cells = math.prod(pyramid(size).cells)
    chosen = found.new_full((B, H, cells, exact), cells)
    chosen[:, :, before : before + own] = found
    return chosen


@triton.jit
def _tokens_of_cell(index, heads, cells, columns, height, width, CELL: tl.constexpr, TOKENS: tl.constexpr):
    """Batch entry and head of the cell of a program, its tokens `[TOKENS]`, and which are there."""
    code = tl.load(index + tl.program_id(0))
    c, bh = code % cells, code // cells
    t = tl.arange(0, TOKENS)  # [TOKENS]
    y, x = c // columns * CELL + t // CELL, c % columns * CELL + t % CELL
    return bh // heads, bh % heads, y * width + x, (t < CELL * CELL) & (y < height) & (x < width)


@Kernel
@triton.jit
def _pack(
    k, v, out, index, k_b, k_n, k_h, v_b, v_n, v_h, heads, cells, columns, height, width,
    CELL: tl.constexpr, TOKENS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Copy the keys and values of one cell of one head.

    Inputs: k, v `[B, N, H, D]` with strides `_b, _n, _h`; index `[n]`, cells counted by batch entry, head and cell.
    Outputs: out `[n, 2, CELL * CELL, D]`; zero for tokens beyond the grid.
    """
    b, h, token, there = _tokens_of_cell(index, heads, cells, columns, height, width, CELL, TOKENS)
    t, d = tl.arange(0, TOKENS), tl.arange(0, BLOCK_D)
    out += tl.program_id(0).to(tl.int64) * (2 * CELL * CELL * D)
    place, keep = t[:, None] * D + d[None, :], (t < CELL * CELL)[:, None] & (d < D)[None, :]  # [TOKENS, BLOCK_D]
    token = token[:, None].to(tl.int64)
    rows = tl.load(k + b * k_b + h * k_h + token * k_n + d[None, :], mask=keep & there[:, None], other=0.0)
    tl.store(out + place, rows, mask=keep)
    rows = tl.load(v + b * v_b + h * v_h + token * v_n + d[None, :], mask=keep & there[:, None], other=0.0)
    tl.store(out + CELL * CELL * D + place, rows, mask=keep)


@Kernel
@triton.jit
def _unpack(
    rows, k, v, index, heads, N, cells, columns, height, width, prefix,
    CELL: tl.constexpr, TOKENS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Put the keys and values of one cell of one head where they belong.

    Inputs: rows `[n, 2, CELL * CELL, D]`; index `[n]` as in `_pack`.
    Outputs: k, v `[B, N, H, D]`, whose grid begins at `prefix`.
    """
    b, h, token, there = _tokens_of_cell(index, heads, cells, columns, height, width, CELL, TOKENS)
    t, d = tl.arange(0, TOKENS), tl.arange(0, BLOCK_D)
    rows += tl.program_id(0).to(tl.int64) * (2 * CELL * CELL * D)
    place, keep = t[:, None] * D + d[None, :], there[:, None] & (d < D)[None, :]  # [TOKENS, BLOCK_D]
    own = ((b * N + prefix + token)[:, None] * heads + h) * D + d[None, :]
    tl.store(k + own, tl.load(rows + place, mask=keep, other=0.0), mask=keep)
    tl.store(v + own, tl.load(rows + CELL * CELL * D + place, mask=keep, other=0.0), mask=keep)


def pack_cells(k: Tensor, v: Tensor, index: Tensor, size: Sequence[int]) -> Tensor:
    """Return keys and values of cells, head by head: `[n, 2, cell * cell, D]`.

    Args:
        k: Keys of a slab `[B, N, H, D]`.
        v: Values, like `k`.
        index: Which cells, int64 `[n]`, counted by batch entry, head and cell of the slab.
        size: Height and width of the slab, 0, 0, cell, ...
    """
    k, v = packed(k), packed(v)
    (_, _, H, D), (height, width, _, _, cell, *_) = k.shape, size
    out = k.new_empty((len(index), 2, cell * cell, D))
    if len(index):
        rows, columns = pyramid(size).cells
        _pack[(len(index),)](
            k, v, out, index, *k.stride()[:3], *v.stride()[:3], H, rows * columns, columns, height, width,
            CELL=cell, TOKENS=next_power(cell * cell), D=D, BLOCK_D=block_of(D), num_warps=4,
        )  # fmt: skip
    return out


def unpack_cells(rows: Tensor, k: Tensor, v: Tensor, index: Tensor, size: Sequence[int]) -> None:
    """Write keys and values of cells, as of `pack_cells`, to `[B, N, H, D]` tensors of the grid.

    Args:
        rows: `[n, 2, cell * cell, D]`.
        k: Keys `[B, prefix + height * width, H, D]`, contiguous; written to.
        v: Values, like `k`.
        index: Which cells, int64 `[n]`, counted by batch entry, head and cell of the grid.
        size: Height, width, prefix, 0, cell, ...
    """
    (_, N, H, D), (height, width, prefix, _, cell, *_) = k.shape, size
    if len(index):
        down, columns = pyramid(size).cells
        _unpack[(len(index),)](
            rows, k, v, index, H, N, down * columns, columns, height, width, prefix,
            CELL=cell, TOKENS=next_power(cell * cell), D=D, BLOCK_D=block_of(D), num_warps=4,
        )  # fmt: skip


def listed(flags: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Return the codes of flags that are True, first ones first, and the running count of flags, without the host.

    Args:
        flags: Bool `[n]`.
        codes: int64 `[n]`.

    Returns:
        int64 `[n + 1]`, of which as many count as there are True flags; int64 `[n]`.
    """
    count = flags.cumsum(0)
    place = torch.where(flags, count - 1, len(flags))  # `nonzero` would wait for the GPU
    return codes.new_empty(len(flags) + 1).scatter_(0, place, codes), count
