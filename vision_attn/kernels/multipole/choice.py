"""The choice of the exact cells of multipole attention in Triton, without the host.

Mean queries are weighed against mean keys of cells, tile by tile; the best of each row are kept on the way.
"""

# the compiler of a kernel reads no annotations
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def"

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from vision_attn.kernels.multipole.means import cell_keys, square_means
from vision_attn.kernels.multipole.pyramid import Sized, pyramid
from vision_attn.kernels.multipole.tiles import area
from vision_attn.kernels.triton.launching import Bound, Kernel, block_of, next_power, planned
from vision_attn.kernels.triton.rows import load_rows, own_head


@triton.jit
def _ordered(s, place, LEN: tl.constexpr):
    """Logits as int32 that sort alike, with `place` (0 .. LEN - 1) in the lowest bits: the first of equals leads."""
    bits = s.to(tl.int32, bitcast=True)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (bits & -LEN) | (LEN - 1 - place)


@Kernel
@triton.jit
def _choose(
    mean_q, keys, chosen, heads, batch, height, width, cell, near, columns, cells, own, before, scale,
    EXACT: tl.constexpr, EXACT_BLOCK: tl.constexpr, SPREAD: tl.constexpr, ROWS: tl.constexpr, LEN: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The further cells that some cells weigh most.

    Inputs: mean_q `[B, own, H, D]` of the cells from `before` on; keys `[1, B, cells, H, D]`, with `SPREAD`
    `[2, B, cells, H, D]`, the first for positive channels of a query, the second for negative ones.
    Outputs: chosen `[B, H, own, EXACT]`, `cells` for none.
    """
    bh = tl.program_id(1)
    b, h = bh // heads, bh % heads
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    mean_q, first = own_head(mean_q, b, h, own, heads, D), own_head(keys, b, h, cells, heads, D)
    second = own_head(keys, b + batch, h, cells, heads, D)
    q_rows = load_rows(mean_q, tl.minimum(row, own - 1), heads * D, D, BLOCK_D)  # [ROWS, BLOCK_D]
    e = tl.arange(0, EXACT_BLOCK)  # [EXACT_BLOCK]
    n = tl.arange(0, LEN)  # [LEN]
    # the best so far, each with its cell in the lower half; places that are not asked for hold what is never replaced
    none = tl.full([ROWS, EXACT_BLOCK], -(2**31), tl.int64) << 32  # [ROWS, EXACT_BLOCK]
    best = tl.where((e < EXACT)[None, :], none + e[None, :], 2**63 - 1)  # [ROWS, EXACT_BLOCK]
    for j in tl.range(0, cells, LEN):
        column = j + n  # [LEN]
        inside = tl.minimum(column, cells - 1)  # [LEN]
        k_rows = load_rows(first, inside, heads * D, D, BLOCK_D)  # [LEN, BLOCK_D]
        if SPREAD:
            s = tl.dot(
                tl.maximum(q_rows, 0.0).to(k_rows.dtype), tl.trans(k_rows), input_precision="tf32x3"
            )  # [ROWS, LEN]
            k_rows = load_rows(second, inside, heads * D, D, BLOCK_D)  # [LEN, BLOCK_D]
            s = tl.dot(tl.minimum(q_rows, 0.0).to(k_rows.dtype), tl.trans(k_rows), s, input_precision="tf32x3")
        else:
            s = tl.dot(q_rows, tl.trans(k_rows), input_precision="tf32x3")  # [ROWS, LEN]
        s *= scale
        y, x = column // columns, column % columns  # [LEN]
        s += tl.log(tl.maximum(area(y, x, cell, height, width), 1).to(tl.float32))[None, :]
        close = (tl.abs(((before + row) // columns)[:, None] - y[None, :]) <= near) & (
            tl.abs(((before + row) % columns)[:, None] - x[None, :]) <= near
        )  # [ROWS, LEN]
        rank = tl.where(close | (column >= cells)[None, :], -(2**31), _ordered(s, n[None, :], LEN))  # [ROWS, LEN]
        top, least = tl.max(rank, 1), tl.min(best, 1)  # [ROWS]
        found = (top.to(tl.int64) << 32) + (j + LEN - 1 - (top & (LEN - 1)))  # [ROWS]
        better = (top > -(2**31)) & (top > (least >> 32))  # [ROWS]
        while tl.max(better.to(tl.int32), 0) > 0:  # some row has a better one in this tile
            best = tl.where(better[:, None] & (best == least[:, None]), found[:, None], best)
            rank = tl.where(rank == top[:, None], -(2**31), rank)
            top, least = tl.max(rank, 1), tl.min(best, 1)  # [ROWS]
            found = (top.to(tl.int64) << 32) + (j + LEN - 1 - (top & (LEN - 1)))  # [ROWS]
            better = (top > -(2**31)) & (top > (least >> 32))  # [ROWS]
    index = tl.where((best >> 32) > -(2**31), best & 0x7FFFFFFF, cells).to(tl.int32)  # [ROWS, EXACT_BLOCK]
    place = chosen + (bh.to(tl.int64) * own + row[:, None]) * EXACT + e[None, :]
    tl.store(place, index, mask=(row < own)[:, None] & (e < EXACT)[None, :])


def choose(
    q: Tensor, means_k: Tensor, low: Tensor, high: Tensor, size: Sequence[int], exact: int, spread: float, scale: float
) -> Tensor:
    """Return int32 `[B, H, C, exact]`: see `choose_cells`.

    Args:
        q: Queries `[B, N, H, D]`.
        means_k: Means of keys `[B, M, H, D]`, in the rows of `pyramid.py`.
        low: The least keys of the finest means `[B, rows, H, D]`; any without a spread.
        high: The largest ones.
        size: Height, width, prefix, suffix, cell, near, pool.
        exact: How many cells are chosen.
        spread: How much the spread of a cell's keys counts.
        scale: Factor of the logits.
    """
    B, _, H, D = q.shape
    cells = math.prod(pyramid(size).cells)
    mean_q, keys = q.new_empty((B, cells, H, D)), q.new_empty((1 + (spread > 0), B, cells, H, D))
    if mean_q.numel() and exact:
        square_means(q, mean_q, size)
        cell_keys(means_k, low, high, keys, size, spread)
    return choose_rows(mean_q, keys, size, 0, exact, scale)


def choose_rows(mean_q: Tensor, keys: Tensor, size: Sequence[int], before: int, exact: int, scale: float) -> Tensor:
    """Return int32 `[B, H, n, exact]` for the n cells from `before` on.

    Args:
        mean_q: Their mean queries `[B, n, H, D]`.
        keys: The keys that stand for all cells, as of `cell_keys`.
        size: As for `choose`.
        before: The cells before them.
        exact: As for `choose`.
        scale: As for `choose`.
    """
    B, own, H, _ = mean_q.shape
    chosen = mean_q.new_empty((B, H, own, exact), dtype=torch.int32)
    if chosen.numel():
        if scale < 0:  # a bound on products is one for queries of the other sign
            mean_q, scale = -mean_q, -scale
        _plan(Sized((mean_q,), (*size[:7], exact, len(keys) > 1, before, scale)))(mean_q, keys, chosen)
    return chosen


@planned
def _plan(call: Sized) -> Bound:
    """Plan the launch for mean queries `[B, n, H, D]` of the cells from `before` on."""
    (q,), (height, width, _, _, cell, near, _, exact, spread, before, scale) = call.tensors, call.numbers
    (B, own, H, D), cells = q.shape, math.prod(pyramid(call.numbers).cells)
    block = block_of(D)
    small = block * q.element_size() <= 512
    rows, length = (64 if small else 16), (64 if small else 16)
    numbers = dict(
        heads=H, batch=B, height=height, width=width, cell=cell, near=near, columns=math.ceil(width / cell),
        cells=cells, own=own, before=before, scale=scale, EXACT=exact, EXACT_BLOCK=next_power(exact), SPREAD=spread,
        ROWS=rows, LEN=length,
        D=D, BLOCK_D=block, num_warps=4,
    )  # fmt: skip
    return Bound(_choose, (math.ceil(own / rows), B * H), (), numbers)
