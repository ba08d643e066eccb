"""The means of multipole attention in Triton, and their gradient, without the host.

The finest means read every key and value once; those of the second level are made of them, and those of all further
levels of the second. Rows are those of `pyramid.py`.
"""

# the compiler of a kernel reads no annotations
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def"

import math
from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from vision_attn.kernels.multipole.pyramid import Pyramid, Sized, pyramid
from vision_attn.kernels.multipole.tiles import area, mean_row
from vision_attn.kernels.triton.launching import Bound, Kernel, block_of, next_power, planned, strides_of
from vision_attn.kernels.triton.rows import load_rows, own_head, store_rows

_ROWS = 16  # finest means of a program of the gradient
_LOADS = 16  # tokens that are on their way at once
_CHANNELS = 1024  # of all heads, of a program


@triton.jit
def _channels(D: tl.constexpr, CHANNELS: tl.constexpr):
    """The channels of all heads that a program owns, `[CHANNELS]`: which one, head, and channel of the head."""
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)  # [CHANNELS]
    return c, c // D, c % D


@triton.jit
def _sum_tokens(
    base, n_stride, weights, y0, x0, height, width, prefix, keep, SIDE: tl.constexpr, STEP: tl.constexpr,
    RAGGED: tl.constexpr, WEIGHTS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The mean, the least and the largest of the tokens in a square, `[CHANNELS]`.

    `base` are the channels of the first token of the sequence.
    """
    acc = tl.zeros([CHANNELS], tl.float32)  # [CHANNELS]
    low = tl.full([CHANNELS], float("inf"), tl.float32)  # [CHANNELS]
    high = tl.full([CHANNELS], float("-inf"), tl.float32)  # [CHANNELS]
    total = 0.0
    for i in tl.range(0, SIDE * SIDE, STEP):
        for j in tl.static_range(STEP):  # unrolled, so that all loads are on their way at once
            dy, dx = (i + j) // SIDE, (i + j) % SIDE
            y, x = y0 + dy, x0 + dx
            weight = 1.0
            if WEIGHTS:
                weight = tl.exp(tl.load(weights + dy * SIDE + dx).to(tl.float32))
            if RAGGED:
                there = (y < height) & (x < width)
                weight = tl.where(there, weight, 0.0)
                y, x = tl.where(there, y, y0), tl.where(there, x, x0)
            token = (prefix + y * width + x).to(tl.int64)
            row = tl.load(base + token * n_stride, mask=keep, other=0.0).to(tl.float32)  # [CHANNELS]
            acc += weight * row
            total += weight
            low, high = tl.minimum(low, row), tl.maximum(high, row)  # tokens beyond the grid are the first one again
    return acc / total, low, high


@Kernel
@triton.jit
def _finest(
    k, v, means_k, means_v, low, high, weights, k_b, k_n, k_h, v_b, v_n, v_h, heads, height, width, prefix, across,
    blocks, M, finest,
    SIDE: tl.constexpr, PER_CELL: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, RAGGED: tl.constexpr,
    WEIGHTS: tl.constexpr, BOTH: tl.constexpr, BOUNDS: tl.constexpr, D: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One mean of the first level, of k and of v if `BOTH`; with `BLOCK` 0 rows are those of the grid's squares.

    Inputs: k, v `[B, N, H, D]` with strides `_b, _n, _h`; weights `[SIDE, SIDE]`, logarithms.
    Outputs: means_k, means_v `[B, M, H, D]`; with `BOUNDS` low, high `[B, finest, H, D]`, the least and largest keys.
    """
    c, h, d = _channels(D, CHANNELS)  # [CHANNELS]
    b = tl.program_id(2).to(tl.int64)
    y, x = tl.program_id(0) // across, tl.program_id(0) % across
    keep = c < heads * D
    row = y * across + x
    if BLOCK > 0:
        row = mean_row(y, x, 0, blocks, PER_CELL, BLOCK)
    place = (b * M + row) * heads * D + c  # [CHANNELS]
    base = k + b * k_b + h.to(tl.int64) * k_h + d  # [CHANNELS]
    mean, least, most = _sum_tokens(
        base, k_n, weights, y * SIDE, x * SIDE, height, width, prefix, keep, SIDE, STEP, RAGGED, WEIGHTS, CHANNELS
    )
    tl.store(means_k + place, mean.to(means_k.dtype.element_ty), mask=keep)
    if BOUNDS:
        place_of_bound = (b * finest + row) * heads * D + c  # [CHANNELS]
        tl.store(low + place_of_bound, least.to(low.dtype.element_ty), mask=keep)
        tl.store(high + place_of_bound, most.to(high.dtype.element_ty), mask=keep)
    if BOTH:
        base = v + b * v_b + h.to(tl.int64) * v_h + d  # [CHANNELS]
        mean, _, _ = _sum_tokens(
            base, v_n, weights, y * SIDE, x * SIDE, height, width, prefix, keep, SIDE, STEP, RAGGED, WEIGHTS, CHANNELS
        )
        tl.store(means_v + place, mean.to(means_v.dtype.element_ty), mask=keep)


@triton.jit
def _sum_means(
    base, n_stride, y0, x0, number, start, blocks, down, across, side, height, width, keep, PER_CELL: tl.constexpr,
    BLOCK: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The mean of `number` x `number` means of one level from (y0, x0) on, each counted as its tokens."""
    acc = tl.zeros([CHANNELS], tl.float32)  # [CHANNELS]
    total = 0.0
    for i in tl.range(0, number * number, 4):
        for j in tl.static_range(4):
            y, x = y0 + (i + j) // number, x0 + (i + j) % number
            there = (i + j < number * number) & (y < down) & (x < across)
            weight = tl.where(there, area(y, x, side, height, width).to(tl.float32), 0.0)
            row = tl.where(there, mean_row(y, x, start, blocks, PER_CELL, BLOCK), start)
            acc += weight * tl.load(base + row.to(tl.int64) * n_stride, mask=keep, other=0.0).to(tl.float32)
            total += weight
    return acc / total


@Kernel
@triton.jit
def _further(
    means_k, means_v, table, heads, height, width, pool, source, first, M, levels,
    PER_CELL: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One mean of the levels from `first` to `levels` - 1, of those of level `source` inside it.

    Inputs: table `[levels, 4]` as in `Pyramid.table`; the rows of level `source` of means_k, means_v.
    Outputs: a further row of means_k, means_v `[B, M, H, D]`.
    """
    c, _, _ = _channels(D, CHANNELS)  # [CHANNELS]
    keep = c < heads * D
    n, level = tl.program_id(0), first
    for _ in tl.range(0, levels):
        size = tl.load(table + 4 * level + 2) * tl.load(table + 4 * level + 3)
        beyond = (n >= size) & (level < levels - 1)
        n, level = tl.where(beyond, n - size, n), tl.where(beyond, level + 1, level)
    own = table + 4 * level
    y, x = n // tl.load(own + 3), n % tl.load(own + 3)
    row = mean_row(y, x, tl.load(own), tl.load(own + 1), PER_CELL, BLOCK).to(tl.int64)
    below = table + 4 * source
    number = 1 << (level - source)
    base = tl.program_id(2).to(tl.int64) * M * heads * D + c  # [CHANNELS]
    for_k = _sum_means(
        means_k + base, heads * D, y * number, x * number, number, tl.load(below), tl.load(below + 1),
        tl.load(below + 2), tl.load(below + 3), pool << source, height, width, keep, PER_CELL, BLOCK, CHANNELS,
    )  # fmt: skip
    tl.store(means_k + base + row * heads * D, for_k.to(means_k.dtype.element_ty), mask=keep)
    for_v = _sum_means(
        means_v + base, heads * D, y * number, x * number, number, tl.load(below), tl.load(below + 1),
        tl.load(below + 2), tl.load(below + 3), pool << source, height, width, keep, PER_CELL, BLOCK, CHANNELS,
    )  # fmt: skip
    tl.store(means_v + base + row * heads * D, for_v.to(means_v.dtype.element_ty), mask=keep)


@Kernel
@triton.jit
def _cells(
    means_k, low, high, found, heads, height, width, pool, blocks, columns, down, across, cells, M, finest, spread,
    PER_CELL: tl.constexpr, BLOCK: tl.constexpr, SPREAD: tl.constexpr, D: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The key that stands for one cell in the choice, of the finest means inside it.

    It is their mean; with `SPREAD` there are two, moved by the share `spread` of the way to the largest key of each
    channel, and to the least.

    Inputs: means_k `[B, M, H, D]`; low, high `[B, finest, H, D]`.
    Outputs: found `[1 or 2, B, cells, H, D]`.
    """
    c, _, _ = _channels(D, CHANNELS)  # [CHANNELS]
    keep = c < heads * D
    own, b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    mean = _sum_means(
        means_k + b * M * heads * D + c, heads * D, own // columns * PER_CELL, own % columns * PER_CELL, PER_CELL, 0,
        blocks, down, across, pool, height, width, keep, PER_CELL, BLOCK, CHANNELS,
    )  # fmt: skip
    found += (b * cells + own) * heads * D + c  # [CHANNELS]
    if SPREAD:
        least = tl.full([CHANNELS], float("inf"), tl.float32)  # [CHANNELS]
        most = tl.full([CHANNELS], float("-inf"), tl.float32)  # [CHANNELS]
        for i in tl.static_range(PER_CELL * PER_CELL):
            y = tl.minimum(own // columns * PER_CELL + i // PER_CELL, down - 1)
            x = tl.minimum(own % columns * PER_CELL + i % PER_CELL, across - 1)
            row = b * finest + mean_row(y, x, 0, blocks, PER_CELL, BLOCK)
            least = tl.minimum(least, tl.load(low + row * heads * D + c, mask=keep, other=0.0).to(tl.float32))
            most = tl.maximum(most, tl.load(high + row * heads * D + c, mask=keep, other=0.0).to(tl.float32))
        tl.store(found, (mean + spread * (most - mean)).to(found.dtype.element_ty), mask=keep)
        second = found + tl.num_programs(2).to(tl.int64) * cells * heads * D  # [CHANNELS]
        tl.store(second, (mean + spread * (least - mean)).to(found.dtype.element_ty), mask=keep)
    else:
        tl.store(found, mean.to(found.dtype.element_ty), mask=keep)


def cell_keys(means_k: Tensor, low: Tensor, high: Tensor, out: Tensor, size: Sequence[int], spread: float) -> None:
    """Write the keys that stand for cells to `out` `[1 or 2, B, C, H, D]`, two if there is a spread."""
    _plan_cells(Sized((means_k,), (*size, spread)))(means_k, low, high, out)


@planned
def _plan_cells(call: Sized) -> Bound:
    (means_k,), (*size, spread) = call.tensors, call.numbers
    rows, (B, M, H, D) = pyramid(size), means_k.shape
    columns, cells, block = rows.cells[1], math.prod(rows.cells), _channel_block(H, D)
    numbers = dict(
        heads=H, height=rows.height, width=rows.width, pool=rows.pool, blocks=rows.blocks(0)[1], columns=columns,
        down=rows.means(0)[0], across=rows.means(0)[1], cells=cells, M=M, finest=rows.finest, spread=spread,
        PER_CELL=rows.per_cell, BLOCK=rows.block, SPREAD=spread > 0, D=D, CHANNELS=block, num_warps=4,
    )  # fmt: skip
    return Bound(_cells, (cells, math.ceil(H * D / block), B), (), numbers)


def square_means(t: Tensor, out: Tensor, size: Sequence[int]) -> None:
    """Write the means of the tokens of cells to `out` `[B, C, H, D]`."""
    _plan_squares(Sized((t,), tuple(size)))(t, t, out, out, out, out, t)


@planned
def _plan_squares(call: Sized) -> Bound:
    (t,), rows = call.tensors, pyramid(call.numbers)
    cells, columns = math.prod(rows.cells), rows.cells[1]
    return _bound_finest(
        (t, t), call.numbers, side=rows.cell, across=columns, blocks=0, M=cells, programs=cells, PER_CELL=1, BLOCK=0,
        WEIGHTS=False, BOTH=False, BOUNDS=False,
    )  # fmt: skip


def _bound_finest(
    tensors: Sequence[Tensor], size: Sequence[int], *, side: int, across: int, blocks: int, M: int, programs: int,
    **flags: Any,
) -> Bound:  # fmt: skip
    B, _, H, D = tensors[0].shape
    height, width, prefix, *_ = size
    finest = pyramid(size).finest
    block = _channel_block(H, D)
    numbers = dict(
        heads=H, height=height, width=width, prefix=prefix, across=across, blocks=blocks, M=M, finest=finest, SIDE=side,
        STEP=_step(side), RAGGED=height % side > 0 or width % side > 0, D=D, CHANNELS=block, num_warps=4, **flags,
    )  # fmt: skip
    return Bound(_finest, (programs, math.ceil(H * D / block), B), strides_of(*tensors), numbers)


def _channel_block(H: int, D: int) -> int:
    return min(_CHANNELS, next_power(H * D))


def _step(side: int) -> int:
    """How many tokens of a square are loaded at a time: whole rows, a divisor of the square."""
    rows = max(r for r in range(1, side + 1) if side % r == 0 and (r * side <= _LOADS or r == 1))
    return rows * side


def means(
    k: Tensor, v: Tensor, weights: Tensor | None, size: Sequence[int], bounds: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the means of all levels of k and v, each `[B, M, H, D]` in the rows of `pyramid.py`.

    And the least and largest keys of the finest means, `[B, rows of the first level, H, D]`; no rows without `bounds`.
    """
    rows = pyramid(size)
    finest = rows.finest if bounds else 0
    means_k, means_v, low, high = _rows(rows, (k, v, k, k), (rows.rows, rows.rows, finest, finest))
    if means_k.numel():
        _plan_first(Sized((k, v, weights), (*size, bounds, rows.rows)))(
            k, v, means_k, means_v, low, high, k if weights is None else weights.contiguous()
        )
        further_means(means_k, means_v, size)
    return means_k, means_v, low, high


def finest_means(
    k: Tensor, v: Tensor, weights: Tensor | None, size: Sequence[int], bounds: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the same as `means`, of the first level only."""
    rows = pyramid(size)
    finest = rows.finest if bounds else 0
    means_k, means_v, low, high = _rows(rows, (k, v, k, k), (rows.finest, rows.finest, finest, finest))
    _plan_first(Sized((k, v, weights), (*size, bounds, rows.finest)))(
        k, v, means_k, means_v, low, high, k if weights is None else weights.contiguous()
    )
    return means_k, means_v, low, high


def further_means(means_k: Tensor, means_v: Tensor, size: Sequence[int]) -> None:
    """Fill the rows of all further levels of `[B, M, H, D]`, whose first level is there."""
    for launch in _plan_further(Sized((means_k,), tuple(size))):
        launch(means_k, means_v, pyramid(size).table(means_k.device))


def _rows(rows: Pyramid, like: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
    """Return memory for rows of means `[B, count, H, D]`; those that hold no mean are zero."""
    B, _, H, D = like[0].shape
    return [
        (t.new_empty if rows.full else t.new_zeros)((B, count, H, D)) for t, count in zip(like, counts, strict=True)
    ]


@planned
def _plan_first(call: Sized) -> Bound:
    """Plan the launch of the finest means, to `M` rows."""
    (k, v, weights), (*size, bounds, M) = call.tensors, call.numbers
    rows = pyramid(size)
    return _bound_finest(
        (k, v), size, side=rows.pool, across=rows.means(0)[1], blocks=rows.blocks(0)[1], M=M,
        programs=math.prod(rows.means(0)), PER_CELL=rows.per_cell, BLOCK=rows.block, WEIGHTS=weights is not None,
        BOTH=True, BOUNDS=bounds,
    )  # fmt: skip


@planned
def _plan_further(call: Sized) -> list[Bound]:
    """Plan the launches of the means of all further levels."""
    (means_k,), size = call.tensors, call.numbers
    rows, (B, _, H, D) = pyramid(size), means_k.shape
    counts = [math.prod(rows.means(level)) for level in range(rows.levels)]
    block, further = _channel_block(H, D), []
    for source, last in ((0, min(2, rows.levels)), (1, rows.levels)):
        programs = sum(counts[source + 1 : last])
        if programs:
            numbers = dict(
                heads=H, height=rows.height, width=rows.width, pool=rows.pool, source=source, first=source + 1,
                M=rows.rows, levels=last, PER_CELL=rows.per_cell, BLOCK=rows.block, D=D, CHANNELS=block, num_warps=4,
            )  # fmt: skip
            further.append(Bound(_further, (programs, math.ceil(H * D / block), B), (), numbers))
    return further


@Kernel
@triton.jit
def _spread(
    d_means_k, d_means_v, dk, dv, weights, table, heads, N, height, width, prefix, across, first, M, levels,
    POOL: tl.constexpr, PER_CELL: tl.constexpr, BLOCK: tl.constexpr, WEIGHTS: tl.constexpr,
    ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The gradients of the tokens of some finest means, from those of the means of all levels that hold them.

    Inputs: d_means_k, d_means_v `[B, M, H, D]`; weights as in `_finest`, table as in `_further`; `first` finest means,
    `across` in a row.
    Outputs: dk, dv `[B, N, H, D]`, at the grid's tokens.
    """
    bh = tl.program_id(1)
    b, h = bh // heads, bh % heads
    mean = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    keep = mean < first
    inside = tl.minimum(mean, first - 1)
    y, x = inside // across, inside % across  # [ROWS]
    d_means_k, d_means_v = own_head(d_means_k, b, h, M, heads, D), own_head(d_means_v, b, h, M, heads, D)
    dk, dv = own_head(dk, b, h, N, heads, D), own_head(dv, b, h, N, heads, D)
    sum_k = tl.zeros([ROWS, BLOCK_D], tl.float32)  # [ROWS, BLOCK_D]
    sum_v = tl.zeros([ROWS, BLOCK_D], tl.float32)  # [ROWS, BLOCK_D]
    own = area(y, x, POOL, height, width).to(tl.float32)  # [ROWS]
    for level in tl.range(0, levels):
        start, blocks = tl.load(table + 4 * level), tl.load(table + 4 * level + 1)
        above = mean_row(y >> level, x >> level, start, blocks, PER_CELL, BLOCK)  # [ROWS]
        share = (own / area(y >> level, x >> level, POOL << level, height, width).to(tl.float32))[:, None]  # [ROWS, 1]
        sum_k += share * load_rows(d_means_k, above, heads * D, D, BLOCK_D).to(tl.float32)
        sum_v += share * load_rows(d_means_v, above, heads * D, D, BLOCK_D).to(tl.float32)
    total = tl.zeros([ROWS], tl.float32)  # [ROWS]
    for i in range(POOL * POOL):
        total += _weight(weights, y, x, i // POOL, i % POOL, height, width, POOL, WEIGHTS)
    for i in range(POOL * POOL):
        weight = _weight(weights, y, x, i // POOL, i % POOL, height, width, POOL, WEIGHTS)  # [ROWS]
        there = (y * POOL + i // POOL < height) & (x * POOL + i % POOL < width)  # [ROWS]
        token = tl.where(there, prefix + (y * POOL + i // POOL) * width + x * POOL + i % POOL, prefix)  # [ROWS]
        share = (weight / total)[:, None]  # [ROWS, 1]
        store_rows(dk, token, heads * D, share * sum_k, keep & there, D, BLOCK_D)
        store_rows(dv, token, heads * D, share * sum_v, keep & there, D, BLOCK_D)


@triton.jit
def _weight(weights, y, x, dy, dx, height, width, POOL: tl.constexpr, WEIGHTS: tl.constexpr):
    """The weight of one token of finest means (y, x), before all are divided by their sum; 0 beyond the grid."""
    weight = tl.where((y * POOL + dy < height) & (x * POOL + dx < width), 1.0, 0.0)
    if WEIGHTS:
        weight *= tl.exp(tl.load(weights + dy * POOL + dx).to(tl.float32))
    return weight


def means_backward(
    d_means_k: Tensor, d_means_v: Tensor, weights: Tensor | None, size: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Return the gradients of k and v `[B, N, H, D]`, zero outside the grid."""
    B, M, H, D = d_means_k.shape
    height, width, prefix, suffix, *_ = size
    rows, N = pyramid(size), height * width + prefix + suffix
    dk, dv = d_means_k.new_zeros((B, N, H, D)), d_means_v.new_zeros((B, N, H, D))
    if not M or not dk.numel():
        return dk, dv
    down, across = rows.means(0)
    first = down * across
    _spread[(triton.cdiv(first, _ROWS), B * H)](
        d_means_k, d_means_v, dk, dv, d_means_k if weights is None else weights.contiguous(),
        rows.table(dk.device), H, N, height, width, prefix, across, first, M, rows.levels, POOL=rows.pool,
        PER_CELL=rows.per_cell, BLOCK=rows.block, WEIGHTS=weights is not None, ROWS=_ROWS, D=D, BLOCK_D=block_of(D),
        num_warps=4,
    )  # fmt: skip
    return dk, dv
