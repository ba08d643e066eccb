"""The forward of local attention in Triton: output and log-sum-exp of every query in one launch.

A program of the grid owns a tile of queries: it meets the keys that all queries share, without a mask where it can,
then walks the tiles of its window. The programs of the tokens outside the grid, whose loops are the longest, come first
in the launch; where few heads would leave them running alone, their keys are split and the parts merged.
"""

# ruff: noqa: ANN001, ANN202, PLR0915  # the compiler of a kernel reads no annotations
# mypy: disable-error-code="no-untyped-def"

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from vision_attn.kernels.local.call import Call, Tiles
from vision_attn.kernels.local.plan import plan_queries
from vision_attn.kernels.local.tiles import (
    HIDDEN,
    LOG2E,
    LOWEST,
    band_columns,
    bias_of,
    bias_table,
    coordinate,
    count_tiles,
    disc_penalty,
    grid_lane,
    grid_program,
    grid_tile,
    grid_tokens,
    key_range,
    load_rows,
    next_tile,
    sequence_tile,
    shared_seen,
    square_penalty,
    store_rows,
)
from vision_attn.kernels.triton.launching import Kernel

# Found on one H200 with torch 2.11.0 and triton 3.6.0. Keys: bytes of an element, channels at most, window columns at
# most.
_CONFIGS: dict[tuple[int, int, float], Tiles] = {
    (2, 32, 9): Tiles((4, 8), (8, 8), 2, 2),
    (2, 64, math.inf): Tiles((8, 8), (8, 8), 4, 2),
    (2, 128, 9): Tiles((8, 8), (8, 8), 4, 3),
    (2, 128, 13): Tiles((8, 8), (4, 8), 4, 3),
    (2, 128, math.inf): Tiles((8, 8), (8, 8), 4, 3),
    (2, 256, math.inf): Tiles((8, 8), (4, 8), 4, 2),
    (4, 64, math.inf): Tiles((8, 8), (4, 8), 4, 2),
    (4, 128, math.inf): Tiles((4, 8), (4, 8), 4, 2),
    (4, 256, math.inf): Tiles((4, 4), (4, 8), 4, 1),
}


def config(call: Call, table: dict[tuple[int, int, float], Tiles]) -> Tiles:
    """Return the first entry that fits the dtype, the head and the window."""
    size = call.q.element_size()
    return next(t for (b, d, span), t in table.items() if b == size and call.block_d <= d and call.span <= span)


@triton.jit
def _update(s, v, m, l, acc, c, PRECISION: tl.constexpr):  # noqa: E741
    """One step of the online softmax over raw logits `[M, keys]`."""
    top = tl.maximum(m, tl.max(s, 1) * c)
    p = tl.math.exp2(s * c - top[:, None])
    shrink = tl.math.exp2(m - top)
    # eight sums a row that no two threads share: they are added up once, at the end
    l = l * shrink[:, None] + tl.sum(p.reshape(p.shape[0], p.shape[1] // 8, 8), 1)  # noqa: E741
    acc = acc * shrink[:, None]
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    return top, l, acc


@triton.jit
def _sequence(
    q, m, l, acc, k, v, k_box, v_box, mask_row, b, h, first, stop, k_stride, v_stride, prefix, image, c,  # noqa: E741
    LEN: tl.constexpr, RAGGED: tl.constexpr, MASK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Meet the tokens `first .. stop - 1` of a sequence."""
    for j in tl.range(first, stop, LEN):
        keys = sequence_tile(k, k_box, b, h, j, stop, k_stride, LEN, D, BLOCK_D, TMA)
        s = tl.dot(q, tl.trans(keys), input_precision=PRECISION)
        if RAGGED or MASK:
            seen = shared_seen(j + tl.arange(0, LEN), stop, mask_row, prefix, image, MASK)
            s = tl.where(seen[None, :], s, HIDDEN)
        values = sequence_tile(v, v_box, b, h, j, stop, v_stride, LEN, D, BLOCK_D, TMA)
        m, l, acc = _update(s, values, m, l, acc, c, PRECISION)  # noqa: E741
    return m, l, acc


@Kernel
@triton.jit
def _forward(
    q, k, v, pooled_k, pooled_v, o, lse, part, part_lse, bias, mask, k_seq, v_seq, k_grid, v_grid,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, pk_b, pk_n, pk_h, pv_b, pv_n, pv_h, mask_b,
    N, heads, batch, prefix, height, width, outside, pooled, limit, reach, KY, KX, step_y, step_x, scale,
    row_programs, part_length, together,
    TALL: tl.constexpr, WIDE: tl.constexpr, KEY_TALL: tl.constexpr, KEY_WIDE: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, DISC: tl.constexpr, MASK: tl.constexpr, BIAS: tl.constexpr, PREFIX: tl.constexpr,
    SUFFIX: tl.constexpr, POOLED: tl.constexpr, RAGGED_PREFIX: tl.constexpr, RAGGED_N: tl.constexpr,
    PARTS: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    M: tl.constexpr = TALL * WIDE
    LEN: tl.constexpr = KEY_TALL * KEY_WIDE
    pid = tl.program_id(0)
    UNIT: tl.constexpr = 128 // k.dtype.element_ty.primitive_bitwidth
    n = tl.arange(0, M)
    image = height * width
    c = scale * LOG2E
    m = tl.full([M], LOWEST, tl.float32) * c
    l = tl.zeros([M, 8], tl.float32)  # noqa: E741
    acc = tl.zeros([M, BLOCK_D], tl.float32)
    if pid < row_programs:
        blocks = tl.cdiv(outside, M)
        slice_ = (pid // blocks) % PARTS
        bh = pid // (blocks * PARTS)
        b, h = bh // heads, bh % heads
        rank = (pid % blocks) * M + n
        keep = rank < outside
        token = tl.where(rank < prefix, rank, rank + image)
        q_rows = load_rows(q + b.to(tl.int64) * q_b + h.to(tl.int64) * q_h, tl.minimum(token, N - 1), q_n, D, BLOCK_D)
        k += b.to(tl.int64) * k_b + h.to(tl.int64) * k_h
        v += b.to(tl.int64) * v_b + h.to(tl.int64) * v_h
        first = slice_ * part_length
        m, l, acc = _sequence(  # noqa: E741
            q_rows, m, l, acc, k, v, k_seq, v_seq, mask + b * mask_b, b, h, first,
            tl.minimum(first + part_length, N), k_n, v_n, prefix, image, c,
            LEN, RAGGED_N, MASK, D, BLOCK_D, TMA and (PREFIX or SUFFIX), PRECISION,
        )  # fmt: skip
        total = tl.maximum(tl.sum(l, 1), 1e-30)  # a part may hold hidden keys alone
        acc = acc * (1.0 / total)[:, None]
        if PARTS == 1:
            store_rows(o + (b.to(tl.int64) * N * heads + h) * D, token, heads * D, acc, keep, D, BLOCK_D)
            tl.store(lse + bh.to(tl.int64) * N + token, m + tl.log2(total), mask=keep)
        else:
            place = (slice_ * batch * heads + bh).to(tl.int64) * outside
            store_rows(part + place * D, rank, D, acc, keep, D, BLOCK_D)
            tl.store(part_lse + place + rank, m + tl.log2(total), mask=keep)
    else:
        pid -= row_programs
        b, h, group_y, group_x, length_y, length_x, y0, x0 = grid_program(
            pid, heads, together, height, width, step_y, step_x, TALL, WIDE
        )
        bh = b * heads + h
        k_lane = grid_lane(h, group_y, group_x, length_y, length_x, height, width, step_y, step_x, k_n, k_h, UNIT)
        v_lane = grid_lane(h, group_y, group_x, length_y, length_x, height, width, step_y, step_x, v_n, v_h, UNIT)
        qy, qx = y0 + n // WIDE, x0 + n % WIDE
        keep = (qy < length_y) & (qx < length_x)
        token = grid_tokens(qy, qx, group_y, group_x, step_y, step_x, prefix, width)
        q_rows = load_rows(
            q + b.to(tl.int64) * q_b + h.to(tl.int64) * q_h, tl.where(keep, token, prefix), q_n, D, BLOCK_D
        )
        k += b.to(tl.int64) * k_b + h.to(tl.int64) * k_h
        v += b.to(tl.int64) * v_b + h.to(tl.int64) * v_h
        mask_row = mask + b * mask_b
        if PREFIX:
            m, l, acc = _sequence(  # noqa: E741
                q_rows, m, l, acc, k, v, k_seq, v_seq, mask_row, b, h, 0, prefix, k_n, v_n, prefix, image, c,
                LEN, RAGGED_PREFIX, MASK, D, BLOCK_D, TMA, PRECISION,
            )  # fmt: skip
        if SUFFIX:
            m, l, acc = _sequence(  # noqa: E741
                q_rows, m, l, acc, k, v, k_seq, v_seq, mask_row, b, h, prefix + image, N, k_n, v_n, prefix, image, c,
                LEN, True, MASK, D, BLOCK_D, TMA, PRECISION,
            )  # fmt: skip
        if POOLED:
            m, l, acc = _sequence(  # noqa: E741
                q_rows, m, l, acc, pooled_k + b.to(tl.int64) * pk_b + h.to(tl.int64) * pk_h,
                pooled_v + b.to(tl.int64) * pv_b + h.to(tl.int64) * pv_h, pooled_k, pooled_v, mask_row, b, h,
                0, pooled, pk_n, pv_n, 0, 0, c, LEN, True, False, D, BLOCK_D, False, PRECISION,
            )  # fmt: skip
        y1, x1 = tl.minimum(y0 + TALL, length_y) - 1, tl.minimum(x0 + WIDE, length_x) - 1
        start_y, stop_y = key_range(y0, y1, length_y, KY, reach, DISC)
        start_x, stop_x = key_range(x0, x1, length_x, KX, reach, DISC)
        count = count_tiles(start_y, stop_y, y0, y1, x0, x1, start_x, stop_x, length_x, limit, KEY_TALL, KEY_WIDE, DISC)
        # a sub-grid may have fewer tiles than the largest: its last programs have no query
        count = tl.where((y0 < length_y) & (x0 < length_x), count, 0)
        row = start_y
        column, stop = band_columns(row, y0, y1, x0, x1, start_x, stop_x, length_x, limit, KEY_TALL, DISC)
        j = tl.arange(0, LEN)
        py, px = coordinate(y0, n // WIDE, DISC)[:, None], coordinate(x0, n % WIDE, DISC)[:, None]
        if BIAS:
            table = bias_table(bias, h, KY, KX, BIAS)
        for _i in tl.range(0, count):
            keys = grid_tile(
                k, k_grid, b, k_lane, row, column, length_y, length_x, group_y, group_x, step_y, step_x,
                prefix, height, width, k_n, KEY_TALL, KEY_WIDE, D, BLOCK_D, TMA,
            )  # fmt: skip
            s = tl.dot(q_rows, tl.trans(keys), input_precision=PRECISION)
            ky, kx = coordinate(row, j // KEY_WIDE, DISC)[None, :], coordinate(column, j % KEY_WIDE, DISC)[None, :]
            if DISC:
                s += disc_penalty(py, px, ky, kx, length_y, length_x, limit)
            else:
                penalty = square_penalty(py, px, ky, kx, length_y, length_x, KY, KX)
                if BIAS:
                    s = s * c + bias_of(table, py, px, ky, kx, length_y, length_x, KY, KX, BIAS)
                s += penalty
            values = grid_tile(
                v, v_grid, b, v_lane, row, column, length_y, length_x, group_y, group_x, step_y, step_x,
                prefix, height, width, v_n, KEY_TALL, KEY_WIDE, D, BLOCK_D, TMA,
            )  # fmt: skip
            m, l, acc = _update(s, values, m, l, acc, 1.0 if BIAS else c, PRECISION)  # noqa: E741
            row, column, stop = next_tile(
                row, column, stop, y0, y1, x0, x1, start_x, stop_x, length_x, limit, KEY_TALL, KEY_WIDE, DISC
            )
        total = tl.sum(l, 1)
        acc = acc * (1.0 / total)[:, None]
        store_rows(o + (b.to(tl.int64) * N * heads + h) * D, token, heads * D, acc, keep, D, BLOCK_D)
        tl.store(lse + bh.to(tl.int64) * N + token, m + tl.log2(total), mask=keep)


@Kernel
@triton.jit
def _merge(
    part, part_lse, o, lse, N, heads, batch, prefix, image, outside, PARTS: tl.constexpr, ROWS: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Merge the parts of the tokens outside the grid by their log-sum-exp."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    bh = tl.program_id(1)
    keep = row < outside
    top = tl.full([ROWS], HIDDEN, tl.float32)
    for i in range(PARTS):
        place = (i * batch * heads + bh).to(tl.int64) * outside
        top = tl.maximum(top, tl.load(part_lse + place + row, mask=keep, other=0.0))
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for i in range(PARTS):
        place = (i * batch * heads + bh).to(tl.int64) * outside
        weight = tl.math.exp2(tl.load(part_lse + place + row, mask=keep, other=0.0) - top)
        rows = load_rows(part + place * D, tl.minimum(row, outside - 1), D, D, BLOCK_D)
        total += weight
        acc += rows * weight[:, None]
    token = tl.where(row < prefix, row, row + image)
    base = o + ((bh // heads).to(tl.int64) * N * heads + bh % heads) * D
    store_rows(base, token, heads * D, acc / total[:, None], keep, D, BLOCK_D)
    tl.store(lse + bh.to(tl.int64) * N + token, top + tl.log2(total), mask=keep)


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """Return the output `[B, N, H, D]` and its log-sum-exp in base 2, `[B, H, N]` in float32."""
    q, k, v = call.q, call.k, call.v
    B, N, H, D = q.shape
    o = q.new_empty(q.shape)
    lse = q.new_empty((B, H, N), dtype=torch.float32)
    if not o.numel():
        return o, lse
    plan = plan_queries(call, _forward, config(call, _CONFIGS))
    part = part_lse = lse
    if plan.parts > 1:
        part = q.new_empty((plan.parts, B, H, call.outside, D), dtype=torch.float32)
        part_lse = q.new_empty((plan.parts, B, H, call.outside), dtype=torch.float32)
    plan.run(
        q, k, v, k if call.pooled_k is None else call.pooled_k, v if call.pooled_v is None else call.pooled_v, o, lse,
        part, part_lse, lse if call.bias is None else call.bias, lse if call.mask is None else call.mask,
        boxed=(k, v, k, v),
    )  # fmt: skip
    if plan.parts > 1:
        height, width, prefix, _ = call.size
        _merge[(math.ceil(call.outside / 16), B * H)](
            part, part_lse, o, lse, N, H, B, prefix, height * width, call.outside, plan.parts, 16, D, call.block_d,
            num_warps=4,
        )  # fmt: skip
    return o, lse
