"""The gradients of keys and values in Triton: a program owns keys and walks the queries that see them.

Near a border a square's key is seen by more queries than elsewhere (`query_range`). Keys that every query sees have the
longest loops: they come first in the launch. Pooled keys have a launch of their own.
"""

# ruff: noqa: ANN001, ANN202, PLR0915  # the compiler of a kernel reads no annotations
# mypy: disable-error-code="no-untyped-def"

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from vision_attn.kernels.local.call import Call, Tiles, token_strides
from vision_attn.kernels.local.forward import config
from vision_attn.kernels.local.plan import plan_keys
from vision_attn.kernels.local.tiles import (
    HIDDEN,
    LOG2E,
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
    load_rows,
    next_tile,
    query_range,
    sequence_tile,
    shared_seen,
    square_penalty,
    store_rows,
)
from vision_attn.kernels.triton.launching import Kernel

# Found on one H200 with torch 2.11.0 and triton 3.6.0; keys as in the forward.
_CONFIGS: dict[tuple[int, int, float], Tiles] = {
    (2, 64, 12): Tiles((4, 8), (8, 8), 4, 3),
    (2, 64, math.inf): Tiles((8, 8), (8, 8), 4, 3),
    (2, 128, 14): Tiles((4, 8), (8, 8), 4, 3),
    (2, 128, math.inf): Tiles((8, 8), (8, 8), 4, 2),
    (2, 256, math.inf): Tiles((4, 8), (4, 8), 4, 1),
    (4, 64, math.inf): Tiles((4, 8), (4, 8), 4, 2),
    (4, 128, math.inf): Tiles((4, 8), (4, 8), 4, 1),
    (4, 256, math.inf): Tiles((4, 8), (4, 4), 4, 1),
}


@triton.jit
def _step(keys, values, q_rows, d_out, p, delta, dk, dv, PRECISION: tl.constexpr):
    """Add what one tile of queries gives; `p` is `[keys, queries]`."""
    dv = tl.dot(p.to(d_out.dtype), d_out, dv, input_precision=PRECISION)
    dp = tl.dot(values, tl.trans(d_out), input_precision=PRECISION)
    ds = (p * (dp - delta[None, :])).to(q_rows.dtype)
    return tl.dot(ds, q_rows, dk, input_precision=PRECISION), dv


@triton.jit
def _sequence(
    keys, values, seen, dk, dv, q, do, q_box, do_box, lse, delta, b, h, first, stop, q_stride, do_stride, c,
    LEN: tl.constexpr, RAGGED: tl.constexpr, MASK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Meet the queries `first .. stop - 1` of the sequence."""
    for i in tl.range(first, stop, LEN):
        index = i + tl.arange(0, LEN)
        q_rows = sequence_tile(q, q_box, b, h, i, stop, q_stride, LEN, D, BLOCK_D, TMA)
        d_out = sequence_tile(do, do_box, b, h, i, stop, do_stride, LEN, D, BLOCK_D, TMA)
        if RAGGED:
            index = tl.minimum(index, stop - 1)
        lse_row = tl.load(lse + index)
        delta_row = tl.load(delta + index)
        s = tl.dot(keys, tl.trans(q_rows), input_precision=PRECISION) * c - lse_row[None, :]
        if RAGGED:
            s += tl.where(i + tl.arange(0, LEN) < stop, 0.0, HIDDEN)[None, :]
        p = tl.math.exp2(s)
        if MASK:
            p = tl.where(seen[:, None], p, 0.0)
        dk, dv = _step(keys, values, q_rows, d_out, p, delta_row, dk, dv, PRECISION)
    return dk, dv


@Kernel
@triton.jit
def _key_gradients(
    q, k, v, do, dk, dv, lse, delta, part, bias, mask, q_seq, do_seq, q_grid, do_grid,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, do_b, do_n, do_h, mask_b,
    N, heads, batch, prefix, height, width, outside, limit, reach, KY, KX, step_y, step_x, scale,
    row_programs, part_length, together,
    TALL: tl.constexpr, WIDE: tl.constexpr, KEY_TALL: tl.constexpr, KEY_WIDE: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, DISC: tl.constexpr, MASK: tl.constexpr, BIAS: tl.constexpr, PREFIX: tl.constexpr,
    SUFFIX: tl.constexpr, RAGGED_PREFIX: tl.constexpr, RAGGED_N: tl.constexpr, PARTS: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    M: tl.constexpr = KEY_TALL * KEY_WIDE
    LEN: tl.constexpr = TALL * WIDE
    pid = tl.program_id(0)
    UNIT: tl.constexpr = 128 // q.dtype.element_ty.primitive_bitwidth
    n = tl.arange(0, M)
    image = height * width
    c = scale * LOG2E
    acc_k = tl.zeros([M, BLOCK_D], tl.float32)
    acc_v = tl.zeros([M, BLOCK_D], tl.float32)
    if pid < row_programs:
        blocks = tl.cdiv(outside, M)
        slice_ = (pid // blocks) % PARTS
        bh = pid // (blocks * PARTS)
        b, h = bh // heads, bh % heads
        wide_b, wide_h = b.to(tl.int64), h.to(tl.int64)
        rank = (pid % blocks) * M + n
        keep = rank < outside
        token = tl.minimum(tl.where(rank < prefix, rank, rank + image), N - 1)
        keys = load_rows(k + wide_b * k_b + wide_h * k_h, token, k_n, D, BLOCK_D)
        values = load_rows(v + wide_b * v_b + wide_h * v_h, token, v_n, D, BLOCK_D)
        seen = shared_seen(token, N, mask + b * mask_b, prefix, image, MASK)
        first = slice_ * part_length
        acc_k, acc_v = _sequence(
            keys, values, seen, acc_k, acc_v, q + wide_b * q_b + wide_h * q_h, do + wide_b * do_b + wide_h * do_h,
            q_seq, do_seq, lse + bh.to(tl.int64) * N, delta + bh.to(tl.int64) * N, b, h, first,
            tl.minimum(first + part_length, N), q_n, do_n, c, LEN, RAGGED_N, MASK, D, BLOCK_D,
            TMA and (PREFIX or SUFFIX), PRECISION,
        )  # fmt: skip
        acc_k *= scale
        if PARTS == 1:
            store_rows(dk + (wide_b * N * heads + h) * D, token, heads * D, acc_k, keep, D, BLOCK_D)
            store_rows(dv + (wide_b * N * heads + h) * D, token, heads * D, acc_v, keep, D, BLOCK_D)
        else:
            place = (slice_ * 2 * batch + b).to(tl.int64) * outside * heads + h
            store_rows(part + place * D, rank, heads * D, acc_k, keep, D, BLOCK_D)
            place = ((slice_ * 2 + 1) * batch + b).to(tl.int64) * outside * heads + h
            store_rows(part + place * D, rank, heads * D, acc_v, keep, D, BLOCK_D)
    else:
        pid -= row_programs
        b, h, group_y, group_x, length_y, length_x, y0, x0 = grid_program(
            pid, heads, together, height, width, step_y, step_x, KEY_TALL, KEY_WIDE
        )
        bh = b * heads + h
        wide_b, wide_h = b.to(tl.int64), h.to(tl.int64)
        q_lane = grid_lane(h, group_y, group_x, length_y, length_x, height, width, step_y, step_x, q_n, q_h, UNIT)
        do_lane = grid_lane(h, group_y, group_x, length_y, length_x, height, width, step_y, step_x, do_n, do_h, UNIT)
        ky, kx = y0 + n // KEY_WIDE, x0 + n % KEY_WIDE
        keep = (ky < length_y) & (kx < length_x)
        token = tl.where(keep, grid_tokens(ky, kx, group_y, group_x, step_y, step_x, prefix, width), prefix)
        keys = load_rows(k + wide_b * k_b + wide_h * k_h, token, k_n, D, BLOCK_D)
        values = load_rows(v + wide_b * v_b + wide_h * v_h, token, v_n, D, BLOCK_D)
        q += wide_b * q_b + wide_h * q_h
        do += wide_b * do_b + wide_h * do_h
        lse += bh.to(tl.int64) * N
        delta += bh.to(tl.int64) * N
        if PREFIX:
            acc_k, acc_v = _sequence(
                keys, values, keep, acc_k, acc_v, q, do, q_seq, do_seq, lse, delta, b, h, 0, prefix, q_n, do_n, c,
                LEN, RAGGED_PREFIX, False, D, BLOCK_D, TMA, PRECISION,
            )  # fmt: skip
        if SUFFIX:
            acc_k, acc_v = _sequence(
                keys, values, keep, acc_k, acc_v, q, do, q_seq, do_seq, lse, delta, b, h, prefix + image, N, q_n, do_n,
                c, LEN, True, False, D, BLOCK_D, TMA, PRECISION,
            )  # fmt: skip
        y1, x1 = tl.minimum(y0 + KEY_TALL, length_y) - 1, tl.minimum(x0 + KEY_WIDE, length_x) - 1
        start_y, stop_y = query_range(y0, y1, length_y, KY, reach, DISC)
        start_x, stop_x = query_range(x0, x1, length_x, KX, reach, DISC)
        count = count_tiles(start_y, stop_y, y0, y1, x0, x1, start_x, stop_x, length_x, limit, TALL, WIDE, DISC)
        count = tl.where((y0 < length_y) & (x0 < length_x), count, 0)
        row = start_y
        column, stop = band_columns(row, y0, y1, x0, x1, start_x, stop_x, length_x, limit, TALL, DISC)
        i = tl.arange(0, LEN)
        py, px = coordinate(y0, n // KEY_WIDE, DISC)[:, None], coordinate(x0, n % KEY_WIDE, DISC)[:, None]
        if BIAS:
            table = bias_table(bias, h, KY, KX, BIAS)
        for _i in tl.range(0, count):
            q_rows = grid_tile(
                q, q_grid, b, q_lane, row, column, length_y, length_x, group_y, group_x, step_y, step_x,
                prefix, height, width, q_n, TALL, WIDE, D, BLOCK_D, TMA,
            )  # fmt: skip
            d_out = grid_tile(
                do, do_grid, b, do_lane, row, column, length_y, length_x, group_y, group_x, step_y, step_x,
                prefix, height, width, do_n, TALL, WIDE, D, BLOCK_D, TMA,
            )  # fmt: skip
            qy, qx = tl.minimum(row + i // WIDE, length_y - 1), tl.minimum(column + i % WIDE, length_x - 1)
            place = grid_tokens(qy, qx, group_y, group_x, step_y, step_x, prefix, width)
            lse_row = tl.load(lse + place)
            delta_row = tl.load(delta + place)
            s = tl.dot(keys, tl.trans(q_rows), input_precision=PRECISION) * c - lse_row[None, :]
            qy, qx = coordinate(row, i // WIDE, DISC)[None, :], coordinate(column, i % WIDE, DISC)[None, :]
            if DISC:
                s += disc_penalty(py, px, qy, qx, length_y, length_x, limit)
            else:
                penalty = square_penalty(qy, qx, py, px, length_y, length_x, KY, KX)
                if BIAS:
                    s += bias_of(table, qy, qx, py, px, length_y, length_x, KY, KX, BIAS)
                s += penalty
            p = tl.math.exp2(s)
            acc_k, acc_v = _step(keys, values, q_rows, d_out, p, delta_row, acc_k, acc_v, PRECISION)
            row, column, stop = next_tile(
                row, column, stop, y0, y1, x0, x1, start_x, stop_x, length_x, limit, TALL, WIDE, DISC
            )
        store_rows(dk + (wide_b * N * heads + h) * D, token, heads * D, acc_k * scale, keep, D, BLOCK_D)
        store_rows(dv + (wide_b * N * heads + h) * D, token, heads * D, acc_v, keep, D, BLOCK_D)


@Kernel
@triton.jit
def _pooled_gradients(
    q, do, k, v, part, lse, delta, q_b, q_n, q_h, do_b, do_n, do_h, k_b, k_n, k_h, v_b, v_n, v_h,
    N, heads, batch, prefix, image, pooled, scale, part_length,
    M: tl.constexpr, LEN: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * M + tl.arange(0, M)
    slice_, bh = tl.program_id(1), tl.program_id(2)
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    keep = row < pooled
    index = tl.minimum(row, pooled - 1)
    keys = load_rows(k + b * k_b + h * k_h, index, k_n, D, BLOCK_D)
    values = load_rows(v + b * v_b + h * v_h, index, v_n, D, BLOCK_D)
    acc_k = tl.zeros([M, BLOCK_D], tl.float32)
    acc_v = tl.zeros([M, BLOCK_D], tl.float32)
    first = prefix + slice_ * part_length
    acc_k, acc_v = _sequence(
        keys, values, keep, acc_k, acc_v, q + b * q_b + h * q_h, do + b * do_b + h * do_h, q, do,
        lse + bh.to(tl.int64) * N, delta + bh.to(tl.int64) * N, b, h, first,
        tl.minimum(first + part_length, prefix + image), q_n, do_n, scale * LOG2E, LEN, True, False, D, BLOCK_D, False,
        PRECISION,
    )  # fmt: skip
    place = (slice_ * 2 * batch + b) * pooled * heads + h
    store_rows(part + place * D, row, heads * D, acc_k * scale, keep, D, BLOCK_D)
    place = ((slice_ * 2 + 1) * batch + b) * pooled * heads + h
    store_rows(part + place * D, row, heads * D, acc_v, keep, D, BLOCK_D)


def key_gradients(call: Call, do: Tensor, lse: Tensor, delta: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of k, v, pooled_k and pooled_v; empty for what is None."""
    q, k, v = call.q, call.k, call.v
    B, _, H, D = q.shape
    tiles = config(call, _CONFIGS)
    plan = plan_keys(call, _key_gradients, tiles, do)
    dk, dv = q.new_empty(q.shape), q.new_empty(q.shape)
    part = q.new_empty((plan.parts, 2, B, call.outside, H, D), dtype=torch.float32) if plan.parts > 1 else lse
    plan.run(
        q, k, v, do, dk, dv, lse, delta, part, lse if call.bias is None else call.bias,
        lse if call.mask is None else call.mask, boxed=(q, do, q, do),
    )  # fmt: skip
    if plan.parts > 1:
        for t, rows in zip((dk, dv), part.sum(0), strict=True):
            call.put_outside(t, rows)
    return dk, dv, *_pooled(call, tiles, do, lse, delta)


def _pooled(call: Call, tiles: Tiles, do: Tensor, lse: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v = call.q, call.pooled_k, call.pooled_v
    if k is None or v is None:
        return q.new_empty(0), q.new_empty(0)
    B, N, H, D = q.shape
    height, width, prefix, _ = call.size
    pooled, image = k.shape[1], height * width
    if not pooled:
        return q.new_empty(k.shape), q.new_empty(v.shape)
    M, LEN = math.prod(tiles.keys), math.prod(tiles.queries)
    blocks = math.ceil(pooled / M)
    parts, length = call.splits(B * H * blocks, image, 0, LEN)
    parts = math.ceil(image / length)
    part = q.new_empty((parts, 2, B, pooled, H, D), dtype=torch.float32)
    _pooled_gradients[(blocks, parts, B * H)](
        q, do, k, v, part, lse, delta, *token_strides(q), *token_strides(do), *token_strides(k), *token_strides(v),
        N, H, B, prefix, image, pooled, call.scale, length, M, LEN, D, call.block_d, call.precision,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    dk, dv = part.sum(0).to(q.dtype).unbind(0)
    return dk.clone(), dv.clone()
