"""What the kernels of local attention share: how launches are laid out, tiles of the grid, and who sees whom.

All large launches (output, dq, dk and dv) have programs for tiles of the grid, and programs with a long loop for the
tokens outside it. Tiles are of rows x columns. The tiles that one tile meets are walked in bands of rows; every band
starts at its own first column. A dilated window is an undilated one on the sub-grid of every `dilation`-th row and
column: all coordinates here are those of a sub-grid. Kernels pass three tuples around:

    whole = (height, width, prefix, step_y, step_x)          the grid, and its dilation
    sub = (group_y, group_x, length_y, length_x)             a sub-grid: its first row and column, and its sides
    window = (KY, KX, reach, limit)                          a square's sides, a disc's reach and largest dy^2 + dx^2
"""

# ruff: noqa: ANN001  # the compiler of a kernel reads no annotations
# mypy: disable-error-code="no-untyped-def"

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vision_attn.kernels.launches import Launch, fitting
from vision_attn.kernels.local.op import Call
from vision_attn.kernels.triton.launching import Bound, Kernel, planned, strides_of
from vision_attn.kernels.triton.rows import (
    LOG2E,
    Box,
    Plan,
    box_strides,
    load_rows,
    sequence_box,
    splits,
    unit_of,
    uses_boxes,
)

OUTSIDE = tl.constexpr(1e20)
SPREAD = tl.constexpr(8589934592.0)  # 2^33
BIAS_NEAR = tl.constexpr(4096)  # entries of a table of relative biases that shared memory holds beside the tiles
FAR = tl.constexpr(1048576.0)  # a coordinate that no disc reaches; (FAR * SPREAD)^2 is finite


@planned
def plan_queries(call: Call, kernel: Kernel, name: str, *others: Tensor) -> Plan:
    """Plan a launch whose programs own queries and walk keys; `others` are tensors of the launch beside the call's."""
    pooled = 0 if call.pooled_k is None else call.pooled_k.shape[1]
    pooled_k = call.k if call.pooled_k is None else call.pooled_k
    pooled_v = call.v if call.pooled_v is None else call.pooled_v
    strided = call.q, call.k, call.v, *others, pooled_k, pooled_v
    made = call.q.dtype, *[torch.float32] * 3
    more = dict(pooled=pooled, POOLED=pooled > 0)
    return _plan(call, kernel, name, (call.k, call.v), strided, made, False, more)


@planned
def plan_keys(call: Call, kernel: Kernel, name: str, do: Tensor) -> Plan:
    """Plan a launch whose programs own keys and walk queries and the output's gradient."""
    made = *[call.q.dtype] * 2, *[torch.float32] * 3
    return _plan(call, kernel, name, (call.q, do), (call.q, call.k, call.v, do), made, True, {})


def _plan(
    call: Call, kernel: Kernel, name: str, walked: tuple[Tensor, Tensor], strided: Sequence[Tensor],
    made: Sequence[torch.dtype], owns_keys: bool, more: dict[str, Any],
) -> Plan:  # fmt: skip
    """Plan the launch that fits, of tensors with strides and others that are yet to be `made`."""
    every = *strided, *made, *(torch.float32 if t is None else t for t in (call.bias, call.mask))

    def attempt(launch: Launch) -> tuple[Plan, int]:
        return _plan_launch(call, kernel, launch, walked, strided, owns_keys, more).needs(*every, boxed=walked * 2)

    return fitting(name, call.q, attempt, channels=call.block_d, columns=call.span)


def _plan_launch(
    call: Call, kernel: Kernel, launch: Launch, walked: Sequence[Tensor], strided: Sequence[Tensor], owns_keys: bool,
    more: dict[str, Any],
) -> Plan:  # fmt: skip
    B, N, H, _ = call.q.shape
    _, _, prefix, suffix = call.size
    own, other = grid_tiles(launch)
    queries, keys = (other, own) if owns_keys else (own, other)
    M, LEN = launch.rows, launch.length
    blocks = B * H * math.ceil(call.outside / M)
    grid_programs = B * H * call.tiles(own)
    parts, length = splits(call.q, blocks, N, grid_programs * call.work(own), LEN)
    tma = uses_boxes(walked)
    boxes: list[Box | None] = [None] * 4
    if tma:
        if call.outside:
            boxes[:2] = [sequence_box(t, LEN, call.block_d) for t in walked]
        boxes[2:] = [grid_box(t, call.size, call.steps, other, call.block_d) for t in walked]
    named = dict(
        mask_b=0 if call.mask is None else call.mask.stride(0) * (call.mask.shape[0] > 1), batch=B,
        row_programs=blocks * parts, part_length=length, together=call.together, parts=parts,
        TALL=queries[0], WIDE=queries[1], KEY_TALL=keys[0], KEY_WIDE=keys[1],
        MASK=call.mask is not None, BIAS=call.bias_block, PREFIX=prefix > 0, SUFFIX=suffix > 0,
        RAGGED_PREFIX=prefix % LEN > 0, TMA=tma,
        **launch.options, **call.numbers(), **more,
    )  # fmt: skip
    bound = Bound(kernel, (blocks * parts + grid_programs,), strides_of(*strided), named)
    return Plan(bound, parts, tuple(boxes), launch)


def grid_tiles(launch: Launch) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the own and the walked tile as rows and columns."""
    (tall, wide), (other_tall, other_wide) = launch.own, launch.walk
    return (tall, wide), (other_tall, other_wide)


def grid_box(t: Tensor, size: Sequence[int], steps: Sequence[int], tile: tuple[int, int], block_d: int) -> Box:
    """Return boxes of a tile of one head of a sub-grid; rows and columns beyond it read as zero.

    TMA has five axes: batch, row, column, channel, and one in units of 16 bytes for head and sub-grid together
    (`grid_lane`). Where a dilation does not divide a side, some sub-grids are shorter by one. Theirs is counted from
    one step before the grid and starts at 1, so that all end at the same coordinate and none is read beyond the grid.
    """
    (height, width, prefix, _), (step_y, step_x) = size, steps
    b, n, h, d = box_strides(t)
    unit = 16 // t.element_size()
    ahead = step_y * (height % step_y > 0) * width + step_x * (width % step_x > 0)
    last = (ahead + (step_y - 1) * width + step_x - 1) * n + (t.shape[2] - 1) * h
    sides = [math.ceil(height / step_y), math.ceil(width / step_x)]
    return Box(
        (prefix - ahead) * n, [t.shape[0], *sides, last // unit + 1, t.shape[3]],
        [b, step_y * width * n, step_x * n, unit, d], [1, *tile, 1, block_d],
    )  # fmt: skip


@triton.jit
def grid_program(pid, heads, together, whole, TALL: tl.constexpr, WIDE: tl.constexpr):
    """What program `pid` of the grid owns.

    Batch entry, head, number of both, sub-grid, first row and column of its tile; and of each row, `[TALL * WIDE]`:
    whether there is a token, and its place in the sequence, that of the grid's first where there is none. `together`
    heads share a tile's place in the launch: see `Call.together`.
    """
    height, width, prefix, step_y, step_x = whole
    member = pid % together
    pid = pid // together
    down, across = tl.cdiv(tl.cdiv(height, step_y), TALL), tl.cdiv(tl.cdiv(width, step_x), WIDE)
    x0 = (pid % across) * WIDE
    pid = pid // across
    y0 = (pid % down) * TALL
    pid = pid // down
    group_x = pid % step_x
    pid = pid // step_x
    group_y = pid % step_y
    bh = pid // step_y * together + member
    length_y, length_x = tl.cdiv(height - group_y, step_y), tl.cdiv(width - group_x, step_x)
    sub = (group_y, group_x, length_y, length_x)
    n = tl.arange(0, TALL * WIDE)  # [TALL * WIDE]
    y, x = y0 + n // WIDE, x0 + n % WIDE  # [TALL * WIDE]
    keep = (y < length_y) & (x < length_x)
    return bh // heads, bh % heads, bh, sub, y0, x0, keep, tl.where(keep, grid_tokens(y, x, sub, whole), prefix)


@triton.jit
def tile_tokens(y0, x0, sub, whole, TALL: tl.constexpr, WIDE: tl.constexpr):
    """Places in the sequence of a tile's tokens, `[TALL * WIDE]`; beyond the sub-grid they are arbitrary."""
    n = tl.arange(0, TALL * WIDE)  # [TALL * WIDE]
    return grid_tokens(y0 + n // WIDE, x0 + n % WIDE, sub, whole)


@triton.jit
def grid_tokens(y, x, sub, whole):
    """Places in the sequence of a sub-grid's coordinates."""
    group_y, group_x, _, _ = sub
    _, width, prefix, step_y, step_x = whole
    return prefix + (group_y + step_y * y) * width + group_x + step_x * x


@triton.jit
def grid_lane(base, h, sub, whole, token_stride, head_stride):
    """Where a head of a sub-grid starts, in units of 16 bytes: the coordinate that `grid_box` has for both."""
    group_y, group_x, length_y, length_x = sub
    height, width, _, step_y, step_x = whole
    ahead_y, ahead_x = tl.where(height % step_y > 0, step_y, 0), tl.where(width % step_x > 0, step_x, 0)
    y = group_y + ahead_y - step_y * (tl.cdiv(height, step_y) - length_y)
    x = group_x + ahead_x - step_x * (tl.cdiv(width, step_x) - length_x)
    unit = unit_of(base)
    return ((y * width + x) * (token_stride // unit) + h * (head_stride // unit)).to(tl.int32)


@triton.jit
def grid_tile(
    base, box, b, lane, y, x, sub, whole, stride, TALL: tl.constexpr, WIDE: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """The tile of tokens at (y, x), `[TALL * WIDE, BLOCK_D]`; outside the grid it is arbitrary but finite."""
    _, _, length_y, length_x = sub
    if TMA:
        height, width, _, step_y, step_x = whole
        y += tl.cdiv(height, step_y) - length_y
        x += tl.cdiv(width, step_x) - length_x
        rows = box.load([b, y, x, lane, 0]).reshape(TALL * WIDE, BLOCK_D)
    else:
        n = tl.arange(0, TALL * WIDE)  # [TALL * WIDE]
        ys, xs = tl.minimum(y + n // WIDE, length_y - 1), tl.minimum(x + n % WIDE, length_x - 1)  # [TALL * WIDE]
        rows = load_rows(base, grid_tokens(ys, xs, sub, whole), stride, D, BLOCK_D)
    return rows


@triton.jit
def window_start(i, length, K):
    """First key of query `i` on an axis: the window is moved inside the grid."""
    return tl.minimum(tl.maximum(i - K // 2, 0), length - K)


@triton.jit
def key_range(first, last, length, K, reach, DISC: tl.constexpr):
    """Keys `[from, to)` of an axis that the queries `first .. last` need."""
    if DISC:
        start, stop = tl.maximum(first - reach, 0), tl.minimum(last + reach + 1, length)
    else:
        start, stop = window_start(first, length, K), window_start(last, length, K) + K
    return start, stop


@triton.jit
def query_range(first, last, length, K, reach, DISC: tl.constexpr):
    """Queries `[from, to)` of an axis that see one of the keys `first .. last`: more of them near a border."""
    if DISC:
        start, stop = tl.maximum(first - reach, 0), tl.minimum(last + reach + 1, length)
    else:
        start = tl.where(first < K, 0, first - K + 1 + K // 2)
        stop = tl.where(last >= length - K, length, last + K // 2 + 1)
    return start, stop


@triton.jit
def walk(
    y0, x0, sub, window, OWN_TALL: tl.constexpr, OWN_WIDE: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr,
    OWN_KEYS: tl.constexpr, DISC: tl.constexpr,
):  # fmt: skip
    """The tiles that the tile at (y0, x0) meets: how many, row and column of the first, the end of its band.

    The last result is what `next_tile` has to know: the rows and columns of the own tile, and the columns it meets.
    """
    _, _, length_y, length_x = sub
    KY, KX, reach, limit = window
    y1, x1 = tl.minimum(y0 + OWN_TALL, length_y) - 1, tl.minimum(x0 + OWN_WIDE, length_x) - 1
    if OWN_KEYS:
        start_y, stop_y = query_range(y0, y1, length_y, KY, reach, DISC)
        start_x, stop_x = query_range(x0, x1, length_x, KX, reach, DISC)
    else:
        start_y, stop_y = key_range(y0, y1, length_y, KY, reach, DISC)
        start_x, stop_x = key_range(x0, x1, length_x, KX, reach, DISC)
    near = (y0, y1, x0, x1, start_x, stop_x, length_x, limit)
    count = count_tiles(start_y, stop_y, near, TALL, WIDE, DISC)
    # a sub-grid may have fewer tiles than the largest: its last programs own no token
    count = tl.where((y0 < length_y) & (x0 < length_x), count, 0)
    column, stop = band_columns(start_y, near, TALL, DISC)
    return count, start_y, column, stop, near


@triton.jit
def band_columns(row, near, TALL: tl.constexpr, DISC: tl.constexpr):
    """Columns `[from, to)` that rows `row .. row + TALL - 1` hold for the own tile."""
    y0, y1, x0, x1, start_x, stop_x, length_x, limit = near
    if DISC:
        dy = tl.maximum(tl.maximum(row - y1, y0 - (row + TALL - 1)), 0)
        # 0.75 more than the integer: an approximate root never falls below the true one
        half = tl.sqrt(tl.maximum(limit - dy * dy, 0.0) + 0.75).to(tl.int32)
        start, stop = tl.maximum(x0 - half, 0), tl.minimum(x1 + half + 1, length_x)
    else:
        start, stop = start_x, stop_x
    return start, stop


@triton.jit
def count_tiles(start_y, stop_y, near, TALL: tl.constexpr, WIDE: tl.constexpr, DISC: tl.constexpr):
    """How many tiles the bands of rows `start_y .. stop_y - 1` hold."""
    _, _, _, _, start_x, stop_x, _, _ = near
    bands = tl.cdiv(stop_y - start_y, TALL)
    if DISC:
        count = bands * 0
        for band in tl.range(0, bands):
            start, stop = band_columns(start_y + band * TALL, near, TALL, DISC)
            count += tl.cdiv(stop - start, WIDE)
    else:
        count = bands * tl.cdiv(stop_x - start_x, WIDE)
    return count


@triton.jit
def next_tile(row, column, stop, near, TALL: tl.constexpr, WIDE: tl.constexpr, DISC: tl.constexpr):
    """The tile after (row, column) in a band that ends at `stop`, and the end of its band."""
    ended = column + WIDE >= stop
    row = tl.where(ended, row + TALL, row)
    start, stop = band_columns(row, near, TALL, DISC)
    return row, tl.where(ended, start, column + WIDE), stop


@triton.jit
def disc_penalty(y0, x0, y1, x1, length_y, length_x, limit):
    """0 where two tokens are in each other's disc, else hugely negative; `y1`, `x1` may lie beyond the grid.

    Coordinates are multiples of SPREAD, a power of two: their squares are exact, and their excess over the limit is
    itself the penalty. So a pair costs three instructions, and no predicates wait while the products run.
    """
    y1 = tl.where(y1 < length_y.to(tl.float32) * SPREAD, y1, FAR * SPREAD)
    x1 = tl.where(x1 < length_x.to(tl.float32) * SPREAD, x1, FAR * SPREAD)
    dy, dx = y1 - y0, x1 - x0
    over = dx * dx - limit * (SPREAD * SPREAD)
    return tl.minimum(-over - dy * dy, 0.0)


@triton.jit
def square_penalty(qy, qx, ky, kx, length_y, length_x, KY, KX):
    """0 where a query sees a key, else hugely negative; a query beyond the grid sees nothing."""
    start_y, start_x = window_start(qy, length_y, KY), window_start(qx, length_x, KX)
    rows = (ky >= start_y) & (ky < start_y + KY) & (qy < length_y)
    columns = (kx >= start_x) & (kx < start_x + KX) & (qx < length_x)
    return tl.where(rows, 0.0, -OUTSIDE) + tl.where(columns, 0.0, -OUTSIDE)


@triton.jit
def coordinates(y, x, TALL: tl.constexpr, WIDE: tl.constexpr, DISC: tl.constexpr):
    """Rows and columns of a tile's tokens, `[TALL * WIDE]` both; for a disc spread in float32: see `disc_penalty`."""
    n = tl.arange(0, TALL * WIDE)  # [TALL * WIDE]
    if DISC:
        ys = y.to(tl.float32) * SPREAD + (n // WIDE).to(tl.float32) * SPREAD
        xs = x.to(tl.float32) * SPREAD + (n % WIDE).to(tl.float32) * SPREAD
    else:
        ys, xs = y + n // WIDE, x + n % WIDE
    return ys, xs


@triton.jit
def windowed(s, own_y, own_x, y, x, sub, window, table, OWN_KEYS: tl.constexpr, BIAS: tl.constexpr, DISC: tl.constexpr):
    """Logits `[own, walked]` with the bias, and hugely negative where a query does not see a key.

    `own_y` and `own_x` are `coordinates` of the own tile as columns, `y` and `x` those of the walked tile as rows.
    """
    _, _, length_y, length_x = sub
    KY, KX, _, limit = window
    if DISC:
        s += disc_penalty(own_y, own_x, y, x, length_y, length_x, limit)
    else:
        if OWN_KEYS:
            qy, qx, ky, kx = y, x, own_y, own_x
        else:
            qy, qx, ky, kx = own_y, own_x, y, x
        penalty = square_penalty(qy, qx, ky, kx, length_y, length_x, KY, KX)
        if BIAS:
            s += bias_of(table, qy, qx, ky, kx, length_y, length_x, KY, KX, BIAS)
        s += penalty
    return s


@triton.jit
def bias_table(bias, h, KY, KX, BIAS: tl.constexpr):
    """One head's table: its values `[BIAS]` in units of log2 where they fit beside a tile, else where it lies."""
    size = (2 * KY - 1) * (2 * KX - 1)
    table = bias + h * size
    if BIAS > 0 and BIAS <= BIAS_NEAR:
        n = tl.arange(0, BIAS)  # [BIAS]
        table = tl.load(table + n, mask=n < size, other=0.0).to(tl.float32) * LOG2E
    return table


@triton.jit
def bias_of(table, qy, qx, ky, kx, length_y, length_x, KY, KX, BIAS: tl.constexpr):
    """Bias of every pair in units of log2; arbitrary where a query does not see the key."""
    # a query beyond the grid has a window too, but no place in the table
    query = tl.minimum(qy, length_y - 1) * (2 * KX - 1) + tl.minimum(qx, length_x - 1)
    place = ky * (2 * KX - 1) + kx + (KY - 1) * (2 * KX - 1) + KX - 1 - query
    place = tl.minimum(tl.maximum(place, 0), (2 * KY - 1) * (2 * KX - 1) - 1)
    if BIAS <= BIAS_NEAR:
        rows: tl.constexpr = place.shape[0]
        columns: tl.constexpr = place.shape[1]
        value = tl.gather(table, place.reshape(rows * columns), 0).reshape(rows, columns)
    else:
        value = tl.load(table + place).to(tl.float32) * LOG2E
    return value
