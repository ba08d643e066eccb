"""Triton pieces that the forward and the backward of local attention share: tiles of keys, and who sees whom.

Queries and keys of the grid are cut into tiles of rows x columns. The tiles that one tile needs are walked in bands of
rows; every band starts at its own first needed column. A dilated window is an undilated one on the sub-grid of every
`dilation`-th row and column: all coordinates here are those of the sub-grid.
"""

# ruff: noqa: ANN001, SIM108  # the compiler of a kernel reads no annotations
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

HIDDEN = tl.constexpr(-1e30)
# Where the running maximum starts: below any true logit, far above any hidden one. A maximum over hidden logits alone
# would be the rounded product of one of them, and the fused multiply-add of the exponent its rounding error: infinite.
LOWEST = tl.constexpr(-1e16)
LOG2E = tl.constexpr(1.4426950408889634)
OUTSIDE = tl.constexpr(1e20)
SPREAD = tl.constexpr(8589934592.0)  # 2^33
BIAS_NEAR = tl.constexpr(4096)  # entries of a table of relative biases that shared memory holds beside the tiles
FAR = tl.constexpr(1048576.0)  # a coordinate that no disc reaches; (FAR * SPREAD)^2 is finite


@triton.jit
def load_rows(base, index, stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows `index` as `[len(index), BLOCK_D]`, zero from D on."""
    d = tl.arange(0, BLOCK_D)
    pointers = base + index.to(tl.int64)[:, None] * stride + d[None, :]
    if D == BLOCK_D:
        rows = tl.load(pointers)
    else:
        rows = tl.load(pointers, mask=d[None, :] < D, other=0.0)
    return rows


@triton.jit
def store_rows(base, index, stride, rows, keep, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write `rows` where `keep`, in the dtype of `base`."""
    d = tl.arange(0, BLOCK_D)
    pointers = base + index.to(tl.int64)[:, None] * stride + d[None, :]
    tl.store(pointers, rows.to(base.dtype.element_ty), mask=keep[:, None] & (d[None, :] < D))


@triton.jit
def sequence_tile(
    base, box, b, h, first, stop, stride, LEN: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, TMA: tl.constexpr
):
    """Tokens `first ..` of the sequence `[LEN, BLOCK_D]`; what lies at or beyond `stop` is arbitrary but finite."""
    if TMA:
        rows = box.load([b, first, h, 0]).reshape(LEN, BLOCK_D)
    else:
        rows = load_rows(base, tl.minimum(first + tl.arange(0, LEN), stop - 1), stride, D, BLOCK_D)
    return rows


@triton.jit
def grid_tokens(y, x, group_y, group_x, step_y, step_x, prefix, width):
    """Sequence positions of sub-grid coordinates."""
    return prefix + (group_y + step_y * y) * width + group_x + step_x * x


@triton.jit
def grid_program(pid, heads, together, height, width, step_y, step_x, TALL: tl.constexpr, WIDE: tl.constexpr):
    """What program `pid` of the grid owns: batch and head, sub-grid and its sides, first row and column of its tile.

    `together` heads share a tile's place in the launch: see `Call.together`.
    """
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
    return bh // heads, bh % heads, group_y, group_x, length_y, length_x, y0, x0


@triton.jit
def grid_lane(
    h, group_y, group_x, length_y, length_x, height, width, step_y, step_x, token_stride, head_stride,
    UNIT: tl.constexpr,
):  # fmt: skip
    """Where a head of a sub-grid starts, in units of 16 bytes: the coordinate that `grid_box` has for both."""
    ahead_y, ahead_x = tl.where(height % step_y > 0, step_y, 0), tl.where(width % step_x > 0, step_x, 0)
    y = group_y + ahead_y - step_y * (tl.cdiv(height, step_y) - length_y)
    x = group_x + ahead_x - step_x * (tl.cdiv(width, step_x) - length_x)
    return ((y * width + x) * (token_stride // UNIT) + h * (head_stride // UNIT)).to(tl.int32)


@triton.jit
def grid_tile(
    base, box, b, lane, y, x, length_y, length_x, group_y, group_x, step_y, step_x, prefix, height, width, stride,
    TALL: tl.constexpr, WIDE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """The tile of tokens at (y, x), `[TALL * WIDE, BLOCK_D]`; what lies outside the grid is arbitrary but finite."""
    if TMA:
        y += tl.cdiv(height, step_y) - length_y
        x += tl.cdiv(width, step_x) - length_x
        rows = box.load([b, y, x, lane, 0]).reshape(TALL * WIDE, BLOCK_D)
    else:
        n = tl.arange(0, TALL * WIDE)
        ys, xs = tl.minimum(y + n // WIDE, length_y - 1), tl.minimum(x + n % WIDE, length_x - 1)
        index = grid_tokens(ys, xs, group_y, group_x, step_y, step_x, prefix, width)
        rows = load_rows(base, index, stride, D, BLOCK_D)
    return rows


@triton.jit
def shared_seen(index, stop, mask_row, prefix, image, MASK: tl.constexpr):
    """Which tokens exist (are below `stop`) and are not hidden by the key mask."""
    ok = index < stop
    if MASK:
        outside = (index < prefix) | (index >= prefix + image)
        place = tl.where(index < prefix, index, index - image)
        ok = ok & (tl.load(mask_row + place, mask=ok & outside, other=1) != 0)
    return ok


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
def band_columns(row, y0, y1, x0, x1, start_x, stop_x, length_x, limit, TALL: tl.constexpr, DISC: tl.constexpr):
    """Columns `[from, to)` that rows `row .. row + TALL - 1` hold for the tile `y0 .. y1` x `x0 .. x1`."""
    if DISC:
        dy = tl.maximum(tl.maximum(row - y1, y0 - (row + TALL - 1)), 0)
        # 0.75 more than the integer: an approximate root never falls below the true one
        half = tl.sqrt(tl.maximum(limit - dy * dy, 0.0) + 0.75).to(tl.int32)
        start, stop = tl.maximum(x0 - half, 0), tl.minimum(x1 + half + 1, length_x)
    else:
        start, stop = start_x, stop_x
    return start, stop


@triton.jit
def count_tiles(
    start_y, stop_y, y0, y1, x0, x1, start_x, stop_x, length_x, limit,
    TALL: tl.constexpr, WIDE: tl.constexpr, DISC: tl.constexpr,
):  # fmt: skip
    """How many tiles the bands of rows `start_y .. stop_y - 1` hold."""
    bands = tl.cdiv(stop_y - start_y, TALL)
    if DISC:
        count = bands * 0
        for band in tl.range(0, bands):
            start, stop = band_columns(
                start_y + band * TALL, y0, y1, x0, x1, start_x, stop_x, length_x, limit, TALL, DISC
            )
            count += tl.cdiv(stop - start, WIDE)
    else:
        count = bands * tl.cdiv(stop_x - start_x, WIDE)
    return count


@triton.jit
def next_tile(
    row, column, stop, y0, y1, x0, x1, start_x, stop_x, length_x, limit,
    TALL: tl.constexpr, WIDE: tl.constexpr, DISC: tl.constexpr,
):  # fmt: skip
    """The tile after (row, column) in a band that ends at `stop`, and the end of its band."""
    ended = column + WIDE >= stop
    row = tl.where(ended, row + TALL, row)
    start, stop = band_columns(row, y0, y1, x0, x1, start_x, stop_x, length_x, limit, TALL, DISC)
    return row, tl.where(ended, start, column + WIDE), stop


@triton.jit
def disc_penalty(y0, x0, y1, x1, length_y, length_x, limit):
    """0 where two tokens are in each other's disc, else hugely negative; `y1`, `x1` may lie beyond the grid.

    Coordinates are multiples of SPREAD, a power of two: their squares are exact, and what they exceed the limit by is
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
def coordinate(first, offset, DISC: tl.constexpr):
    """`first + offset`; for a disc in float32 and spread, see `disc_penalty`."""
    if DISC:
        place = first.to(tl.float32) * SPREAD + offset.to(tl.float32) * SPREAD
    else:
        place = first + offset
    return place


@triton.jit
def bias_table(bias, h, KY, KX, BIAS: tl.constexpr):
    """One head's table: its values in units of log2 where they fit beside a tile, else where it lies."""
    size = (2 * KY - 1) * (2 * KX - 1)
    table = bias + h * size
    if BIAS <= BIAS_NEAR:
        n = tl.arange(0, BIAS)
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
