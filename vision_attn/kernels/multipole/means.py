"""The means of multipole attention in Triton, their gradient, and the choice of exact cells, all without the host.

The finest means read every key and value once; those of all further levels are made of them in one launch. The choice
weighs mean queries against mean keys of cells, and keeps the best of each row while it walks the columns.
"""

# the compiler of a kernel reads no annotations
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def"

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from vision_attn.grid import Grid
from vision_attn.kernels.multipole.cells import Cells, Layout
from vision_attn.kernels.triton.launching import Kernel, block_of, next_power, packed, strides_of
from vision_attn.kernels.triton.rows import HIDDEN, LOG2E, head_of, load_rows, own_head, store_rows

_ROWS = 16  # means, or cells, of a program
_TOKENS = 64  # tokens, or means, of a step of a sum
_CHUNK = 64  # cells of a step of the choice


@triton.jit
def _token_of(mean, dy, dx, height, width, prefix, across, POOL: tl.constexpr):
    """Places in the sequence of one token of each finest mean, and whether there is one."""
    y, x = mean // across * POOL + dy, mean % across * POOL + dx
    there = (y < height) & (x < width)
    return tl.where(there, prefix + y * width + x, prefix), there


@triton.jit
def _weight(weights, dy, dx, there, POOL: tl.constexpr, WEIGHTS: tl.constexpr):
    """The weight of that token, before all are divided by their sum."""
    weight = tl.where(there, 1.0, 0.0)
    if WEIGHTS:
        weight *= tl.exp(tl.load(weights + dy * POOL + dx))
    return weight


@Kernel
@triton.jit
def _finest(
    k, v, means_k, means_v, weights, k_b, k_n, k_h, v_b, v_n, v_h, heads, height, width, prefix, across, first, M,
    POOL: tl.constexpr, WEIGHTS: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The means of the first level: `first` of k and as many of v, out of `M` of all levels.

    Inputs: k, v `[B, N, H, D]` with strides `_b, _n, _h`; weights `[POOL, POOL]`, logarithms.
    Outputs: means_k, means_v `[B, M, H, D]`.
    """
    bh = tl.program_id(1)
    b, h = bh // heads, bh % heads
    mean = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    keep = mean < first
    inside = tl.minimum(mean, first - 1)
    k, v = head_of(k, b, h, k_b, k_h), head_of(v, b, h, v_b, v_h)
    sum_k = tl.zeros([ROWS, BLOCK_D], tl.float32)  # [ROWS, BLOCK_D]
    sum_v = tl.zeros([ROWS, BLOCK_D], tl.float32)  # [ROWS, BLOCK_D]
    total = tl.zeros([ROWS], tl.float32)  # [ROWS]
    for i in tl.static_range(POOL * POOL):  # unrolled, so that all loads are on their way at once
        token, there = _token_of(inside, i // POOL, i % POOL, height, width, prefix, across, POOL)  # [ROWS]
        weight = _weight(weights, i // POOL, i % POOL, there, POOL, WEIGHTS)  # [ROWS]
        sum_k += weight[:, None] * load_rows(k, token, k_n, D, BLOCK_D).to(tl.float32)
        sum_v += weight[:, None] * load_rows(v, token, v_n, D, BLOCK_D).to(tl.float32)
        total += weight
    scale = 1.0 / total[:, None]
    store_rows(own_head(means_k, b, h, M, heads, D), mean, heads * D, sum_k * scale, keep, D, BLOCK_D)
    store_rows(own_head(means_v, b, h, M, heads, D), mean, heads * D, sum_v * scale, keep, D, BLOCK_D)


@triton.jit
def _count(boxes, mean):
    """Tokens of means."""
    tall = tl.load(boxes + 4 * mean + 1) - tl.load(boxes + 4 * mean)
    return (tall * (tl.load(boxes + 4 * mean + 3) - tl.load(boxes + 4 * mean + 2))).to(tl.float32)


@Kernel
@triton.jit
def _further(
    means_k, means_v, boxes, levels, heads, first, M, down, across, POOL: tl.constexpr, ROWS: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One mean of a further level, of the finest means inside it, each counted as its tokens.

    Inputs: boxes `[M + 1, 4]`, levels `[M + 1]`, as in `Layout`; the first `down` x `across` rows of means_k, means_v.
    Outputs: a further row of means_k, means_v `[B, M, H, D]`.
    """
    bh = tl.program_id(1)
    b, h = bh // heads, bh % heads
    mean = first + tl.program_id(0)
    side = 1 << tl.load(levels + mean)
    y0, x0 = tl.load(boxes + 4 * mean) // POOL, tl.load(boxes + 4 * mean + 2) // POOL
    means_k, means_v = own_head(means_k, b, h, M, heads, D), own_head(means_v, b, h, M, heads, D)
    sum_k = tl.zeros([BLOCK_D], tl.float32)  # [BLOCK_D]
    sum_v = tl.zeros([BLOCK_D], tl.float32)  # [BLOCK_D]
    total = 0.0
    for j in tl.range(0, side * side, ROWS):
        n = j + tl.arange(0, ROWS)  # [ROWS]
        y, x = y0 + n // side, x0 + n % side  # [ROWS]
        there = (n < side * side) & (y < down) & (x < across)
        child = tl.where(there, y * across + x, 0)  # [ROWS]
        weight = tl.where(there, _count(boxes, child), 0.0)  # [ROWS]
        sum_k += tl.sum(weight[:, None] * load_rows(means_k, child, heads * D, D, BLOCK_D).to(tl.float32), 0)
        sum_v += tl.sum(weight[:, None] * load_rows(means_v, child, heads * D, D, BLOCK_D).to(tl.float32), 0)
        total += tl.sum(weight, 0)
    row = mean + tl.zeros([1], tl.int32)
    store_rows(means_k, row, heads * D, (sum_k / total)[None, :], row >= 0, D, BLOCK_D)
    store_rows(means_v, row, heads * D, (sum_v / total)[None, :], row >= 0, D, BLOCK_D)


def means(k: Tensor, v: Tensor, weights: Tensor | None, size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return the means of all levels of k and v, each `[B, M, H, D]`: see `means_of`."""
    B, _, H, D = k.shape
    height, width, prefix, *_ = size
    pool, layout = size[6], _layout(size, k.device)
    M = sum(rows * columns for rows, columns in layout.sides)
    found = k.new_empty((B, M, H, D)), v.new_empty((B, M, H, D))
    if not M or not k.numel():
        return found
    (down, across), block = layout.sides[0], block_of(D)
    first = down * across
    weighed = k if weights is None else weights.contiguous()
    _finest[(triton.cdiv(first, _ROWS), B * H)](
        k, v, *found, weighed, *strides_of(k, v), H, height, width, prefix, across, first, M, POOL=pool,
        WEIGHTS=weights is not None, ROWS=_ROWS, D=D, BLOCK_D=block, num_warps=4,
    )  # fmt: skip
    if first < M:
        _, boxes, levels = layout.tables
        _further[(M - first, B * H)](
            *found, boxes, levels, H, first, M, down, across, POOL=pool, ROWS=_TOKENS, D=D, BLOCK_D=block, num_warps=4
        )
    return found


@Kernel
@triton.jit
def _spread(
    d_means_k, d_means_v, dk, dv, weights, boxes, sides, heads, N, height, width, prefix, across, first, M,
    LEVELS: tl.constexpr, POOL: tl.constexpr, WEIGHTS: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The gradients of the tokens of some finest means, from those of the means of all levels that hold them.

    Inputs: d_means_k, d_means_v `[B, M, H, D]`; weights, boxes as in `_finest`, `_further`; sides: where each level
    starts among the means, and its columns `[LEVELS, 2]`.
    Outputs: dk, dv `[B, N, H, D]`, at the grid's tokens.
    """
    bh = tl.program_id(1)
    b, h = bh // heads, bh % heads
    mean = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    keep = mean < first
    inside = tl.minimum(mean, first - 1)
    d_means_k, d_means_v = own_head(d_means_k, b, h, M, heads, D), own_head(d_means_v, b, h, M, heads, D)
    dk, dv = own_head(dk, b, h, N, heads, D), own_head(dv, b, h, N, heads, D)
    sum_k = tl.zeros([ROWS, BLOCK_D], tl.float32)  # [ROWS, BLOCK_D]
    sum_v = tl.zeros([ROWS, BLOCK_D], tl.float32)  # [ROWS, BLOCK_D]
    own = _count(boxes, inside)  # [ROWS]
    for level in range(LEVELS):
        begin, columns = tl.load(sides + 2 * level), tl.load(sides + 2 * level + 1)
        above = begin + (inside // across >> level) * columns + (inside % across >> level)  # [ROWS]
        share = (own / _count(boxes, above))[:, None]  # [ROWS, 1]
        sum_k += share * load_rows(d_means_k, above, heads * D, D, BLOCK_D).to(tl.float32)
        sum_v += share * load_rows(d_means_v, above, heads * D, D, BLOCK_D).to(tl.float32)
    total = tl.zeros([ROWS], tl.float32)  # [ROWS]
    for i in range(POOL * POOL):
        _, there = _token_of(inside, i // POOL, i % POOL, height, width, prefix, across, POOL)  # [ROWS]
        total += _weight(weights, i // POOL, i % POOL, there, POOL, WEIGHTS)
    for i in range(POOL * POOL):
        token, there = _token_of(inside, i // POOL, i % POOL, height, width, prefix, across, POOL)  # [ROWS]
        share = (_weight(weights, i // POOL, i % POOL, there, POOL, WEIGHTS) / total)[:, None]  # [ROWS, 1]
        store_rows(dk, token, heads * D, share * sum_k, keep & there, D, BLOCK_D)
        store_rows(dv, token, heads * D, share * sum_v, keep & there, D, BLOCK_D)


def means_backward(
    d_means_k: Tensor, d_means_v: Tensor, weights: Tensor | None, size: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Return the gradients of k and v `[B, N, H, D]`, zero outside the grid."""
    B, M, H, D = d_means_k.shape
    height, width, prefix, suffix, *_ = size
    pool, layout, N = size[6], _layout(size, d_means_k.device), height * width + prefix + suffix
    dk, dv = d_means_k.new_zeros((B, N, H, D)), d_means_v.new_zeros((B, N, H, D))
    if not M or not dk.numel():
        return dk, dv
    down, across = layout.sides[0]
    first = down * across
    _spread[(triton.cdiv(first, _ROWS), B * H)](
        d_means_k, d_means_v, dk, dv, d_means_k if weights is None else weights.contiguous(), layout.tables[1],
        layout.starts, H, N, height, width, prefix, across, first, M, LEVELS=len(layout.sides), POOL=pool,
        WEIGHTS=weights is not None, ROWS=_ROWS, D=D, BLOCK_D=block_of(D), num_warps=4,
    )  # fmt: skip
    return dk, dv


@Kernel
@triton.jit
def _cell_means(
    q, k, mean_q, mean_k, q_b, q_n, q_h, k_b, k_n, k_h, heads, height, width, prefix, cell, columns, cells,
    ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The mean query and the mean key of one cell.

    Inputs: q, k `[B, N, H, D]` with strides `_b, _n, _h`.
    Outputs: mean_q, mean_k `[B, cells, H, D]` in float32.
    """
    own, bh = tl.program_id(0), tl.program_id(1)
    b, h = bh // heads, bh % heads
    q, k = head_of(q, b, h, q_b, q_h), head_of(k, b, h, k_b, k_h)
    y0, x0 = own // columns * cell, own % columns * cell
    sum_q = tl.zeros([BLOCK_D], tl.float32)  # [BLOCK_D]
    sum_k = tl.zeros([BLOCK_D], tl.float32)  # [BLOCK_D]
    count = 0.0
    for j in tl.range(0, cell * cell, ROWS):
        n = j + tl.arange(0, ROWS)  # [ROWS]
        y, x = y0 + n // cell, x0 + n % cell  # [ROWS]
        there = (n < cell * cell) & (y < height) & (x < width)
        token = tl.where(there, prefix + y * width + x, prefix)  # [ROWS]
        weight = tl.where(there, 1.0, 0.0)[:, None]  # [ROWS, 1]
        sum_q += tl.sum(weight * load_rows(q, token, q_n, D, BLOCK_D).to(tl.float32), 0)
        sum_k += tl.sum(weight * load_rows(k, token, k_n, D, BLOCK_D).to(tl.float32), 0)
        count += tl.sum(tl.where(there, 1.0, 0.0), 0)
    row = own + tl.zeros([1], tl.int32)
    store_rows(own_head(mean_q, b, h, cells, heads, D), row, heads * D, (sum_q / count)[None, :], row >= 0, D, BLOCK_D)
    store_rows(own_head(mean_k, b, h, cells, heads, D), row, heads * D, (sum_k / count)[None, :], row >= 0, D, BLOCK_D)


@Kernel
@triton.jit
def _choose(
    mean_q, mean_k, chosen, heads, height, width, cell, near, columns, cells, scale, EXACT: tl.constexpr,
    EXACT_BLOCK: tl.constexpr, ROWS: tl.constexpr, LEN: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The further cells that some cells weigh most.

    Inputs: mean_q, mean_k `[B, cells, H, D]`.
    Outputs: chosen `[B, H, cells, EXACT]`, `cells` for none.
    """
    bh = tl.program_id(1)
    b, h = bh // heads, bh % heads
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    mean_q, mean_k = own_head(mean_q, b, h, cells, heads, D), own_head(mean_k, b, h, cells, heads, D)
    q_rows = load_rows(mean_q, tl.minimum(row, cells - 1), heads * D, D, BLOCK_D)  # [ROWS, BLOCK_D]
    e = tl.arange(0, EXACT_BLOCK)  # [EXACT_BLOCK]
    # places that are not asked for hold what is never replaced
    best = tl.where(e < EXACT, HIDDEN, -HIDDEN)[None, :] + tl.zeros([ROWS, EXACT_BLOCK], tl.float32)
    index = tl.zeros([ROWS, EXACT_BLOCK], tl.int32) + cells  # [ROWS, EXACT_BLOCK]
    for j in tl.range(0, cells, LEN):
        column = j + tl.arange(0, LEN)  # [LEN]
        k_rows = load_rows(mean_k, tl.minimum(column, cells - 1), heads * D, D, BLOCK_D)  # [LEN, BLOCK_D]
        s = tl.dot(q_rows, tl.trans(k_rows), input_precision="tf32x3") * scale  # [ROWS, LEN]
        y, x = column // columns, column % columns  # [LEN]
        tall, wide = tl.minimum(height - y * cell, cell), tl.minimum(width - x * cell, cell)  # [LEN]
        s += tl.log(tl.maximum(tall * wide, 1).to(tl.float32))[None, :]
        close = (tl.abs((row // columns)[:, None] - y[None, :]) <= near) & (
            tl.abs((row % columns)[:, None] - x[None, :]) <= near
        )  # [ROWS, LEN]
        s = tl.where(close | (column >= cells)[None, :], HIDDEN, s)
        top, place = tl.max(s, 1, return_indices=True)  # [ROWS]
        least = tl.min(best, 1)  # [ROWS]
        while tl.max((top > least).to(tl.int32), 0) > 0:  # some row has a better one in this chunk
            taken = (e[None, :] == tl.argmin(best, 1)[:, None]) & (top > least)[:, None]  # [ROWS, EXACT_BLOCK]
            best = tl.where(taken, top[:, None], best)
            index = tl.where(taken, (j + place)[:, None], index)
            s = tl.where(tl.arange(0, LEN)[None, :] == place[:, None], HIDDEN, s)
            top, place = tl.max(s, 1, return_indices=True)  # [ROWS]
            least = tl.min(best, 1)  # [ROWS]
    place = chosen + (bh.to(tl.int64) * cells + row[:, None]) * EXACT + e[None, :]
    tl.store(place, index, mask=(row < cells)[:, None] & (e < EXACT)[None, :])


@Kernel
@triton.jit
def _masses(
    mass, slots, boxes, levels, chosen, found, heads, height, width, cell, columns, cells, means, slots_n, padded,
    mass_levels, EXACT: tl.constexpr, EXACT_BLOCK: tl.constexpr, MASS: tl.constexpr, LEN: tl.constexpr,
):  # fmt: skip
    """What is added to the logits of the means that one cell sees, in units of log2: see `masses`.

    Inputs: mass `[H, mass_levels]`; slots `[cells, slots_n]`, boxes `[M + 1, 4]` and levels `[M + 1]` as in `Layout`;
    chosen `[B, H, cells, EXACT]`.
    Outputs: found `[programs of the second axis, cells, padded]`.
    """
    own, bh = tl.program_id(0), tl.program_id(1)
    e = tl.arange(0, EXACT_BLOCK)  # [EXACT_BLOCK]
    other = tl.load(chosen + (bh.to(tl.int64) * cells + own) * EXACT + e, mask=e < EXACT, other=cells)  # [EXACT_BLOCK]
    ey0, ex0 = other // columns * cell, other % columns * cell  # [EXACT_BLOCK]
    ey1 = tl.where(other < cells, tl.minimum(ey0 + cell, height), 0)  # [EXACT_BLOCK]
    ex1 = tl.where(other < cells, tl.minimum(ex0 + cell, width), 0)  # [EXACT_BLOCK]
    for j in tl.range(0, padded, LEN):
        n = j + tl.arange(0, LEN)  # [LEN]
        slot = tl.load(slots + own * slots_n + n, mask=n < slots_n, other=means)  # [LEN]
        y0, y1 = tl.load(boxes + 4 * slot), tl.load(boxes + 4 * slot + 1)  # [LEN]
        x0, x1 = tl.load(boxes + 4 * slot + 2), tl.load(boxes + 4 * slot + 3)  # [LEN]
        count = (y1 - y0) * (x1 - x0)  # [LEN]
        if EXACT > 0:
            tall = tl.minimum(y1[:, None], ey1[None, :]) - tl.maximum(y0[:, None], ey0[None, :])  # [LEN, EXACT_BLOCK]
            wide = tl.minimum(x1[:, None], ex1[None, :]) - tl.maximum(x0[:, None], ex0[None, :])  # [LEN, EXACT_BLOCK]
            count -= tl.sum(tl.maximum(tall, 0) * tl.maximum(wide, 0), 1)
        value = tl.log2(tl.maximum(count, 1).to(tl.float32))  # [LEN]
        if MASS:
            level = tl.minimum(tl.load(levels + slot), mass_levels - 1)  # [LEN]
            value += tl.load(mass + bh % heads * mass_levels + level) * LOG2E
        value = tl.where(count > 0, value, HIDDEN)
        tl.store(found + (bh.to(tl.int64) * cells + own) * padded + n, value, mask=n < padded)


def masses(chosen: Tensor, mass: Tensor | None, size: Sequence[int], padded: int) -> Tensor:
    """Return what is added to the logits of means, in units of log2: hugely negative where no token is left of one.

    A mean stands for the tokens of its box that are in none of the exact cells.

    Args:
        chosen: Exact cells, int32 `[B, H, C, exact]`.
        mass: Learned offsets `[H, levels]`, or None.
        size: Height, width, prefix, suffix, cell, near, pool.
        padded: Means of a cell, with what a tile adds.

    Returns:
        float32 `[B * H, C, padded]`; `[1, C, padded]` where all heads agree.
    """
    B, H, C, exact = chosen.shape
    height, width, _, _, cell, *_ = size
    layout = _layout(size, chosen.device)
    heads = 1 if exact == 0 and mass is None else B * H
    found = torch.empty((heads, C, padded), dtype=torch.float32, device=chosen.device)
    slots, boxes, levels = layout.tables
    if found.numel():
        _masses[(C, heads)](
            found if mass is None else mass, slots, boxes, levels, chosen, found, H, height, width, cell,
            layout.size[1], C, len(boxes) - 1, slots.shape[1], padded, 1 if mass is None else mass.shape[1],
            EXACT=exact, EXACT_BLOCK=next_power(max(exact, 1)), MASS=mass is not None, LEN=128, num_warps=2,
        )  # fmt: skip
    return found


def choose(q: Tensor, k: Tensor, size: Sequence[int], exact: int, scale: float) -> Tensor:
    """Return int32 `[B, H, C, exact]`: see `choose_cells`."""
    q, k = packed(q), packed(k)
    B, _, H, D = q.shape
    height, width, prefix, _, cell, near, _ = size
    (rows, columns), block = _layout(size, q.device).size, block_of(D)
    cells = rows * columns
    chosen = q.new_empty((B, H, cells, exact), dtype=torch.int32)
    if not chosen.numel():
        return chosen
    mean_q, mean_k = (q.new_empty((B, cells, H, D), dtype=torch.float32) for _ in range(2))
    _cell_means[(cells, B * H)](
        q, k, mean_q, mean_k, *strides_of(q, k), H, height, width, prefix, cell, columns, cells, ROWS=_TOKENS, D=D,
        BLOCK_D=block, num_warps=4,
    )  # fmt: skip
    _choose[(triton.cdiv(cells, _ROWS), B * H)](
        mean_q, mean_k, chosen, H, height, width, cell, near, columns, cells, scale, EXACT=exact,
        EXACT_BLOCK=next_power(exact), ROWS=_ROWS, LEN=_CHUNK, D=D, BLOCK_D=block, num_warps=4,
    )  # fmt: skip
    return chosen


def _layout(size: Sequence[int], device: torch.device) -> Layout:
    height, width, _, _, cell, near, pool = size
    return Cells(cell, near, pool, 0).layout(Grid(height, width), device)
