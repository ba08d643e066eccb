"""The backward of local attention in Triton: no atomics, so that equal inputs give equal gradients.

    p_ij = 2^(s_ij log2(e) - lse_i),  ds_ij = p_ij (do_i . v_j - delta_i),  delta_i = do_i . o_i - dlse_i log2(e)
    dq_i = scale sum_j ds_ij k_j,  dk_j = scale sum_i ds_ij q_i,  dv_j = sum_i p_ij do_i

Three launches: delta; dq, whose programs own queries; dk and dv, whose programs own keys. As in the forward, programs
of the tokens outside the grid come first and are split where few heads would leave them running alone.
"""

# ruff: noqa: ANN001, ANN202, PLR0915  # the compiler of a kernel reads no annotations
# mypy: disable-error-code="no-untyped-def"

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from vision_attn.kernels.local.bias_gradient import bias_gradient
from vision_attn.kernels.local.call import Call, Tiles, token_strides
from vision_attn.kernels.local.forward import config
from vision_attn.kernels.local.key_gradients import key_gradients
from vision_attn.kernels.local.plan import plan_queries
from vision_attn.kernels.local.tiles import (
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
    key_range,
    load_rows,
    next_tile,
    sequence_tile,
    shared_seen,
    square_penalty,
    store_rows,
)
from vision_attn.kernels.triton.launching import Kernel

# Found on one H200 with torch 2.11.0 and triton 3.6.0; keys as in the forward.
_CONFIGS: dict[tuple[int, int, float], Tiles] = {
    (2, 64, 12): Tiles((8, 8), (8, 8), 4, 2),
    (2, 64, math.inf): Tiles((8, 8), (8, 8), 4, 3),
    (2, 128, 9): Tiles((8, 8), (8, 8), 4, 2),
    (2, 128, 13): Tiles((8, 8), (4, 8), 4, 2),
    (2, 128, math.inf): Tiles((8, 8), (8, 8), 4, 2),
    (2, 256, math.inf): Tiles((8, 8), (4, 8), 4, 2),
    (4, 64, math.inf): Tiles((4, 8), (4, 8), 4, 2),
    (4, 128, math.inf): Tiles((4, 8), (4, 8), 4, 1),
    (4, 256, math.inf): Tiles((4, 4), (4, 8), 4, 1),
}


@Kernel
@triton.jit
def _delta(
    do, o, dlse, delta, do_b, do_n, do_h, N, heads, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    DLSE: tl.constexpr,
):  # fmt: skip
    """delta_i = do_i . o_i - dlse_i log2(e), `[B, H, N]`."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    bh = tl.program_id(1)
    b, h = (bh // heads).to(tl.int64), bh % heads
    index, place = tl.minimum(row, N - 1), bh.to(tl.int64) * N + row
    d_out = load_rows(do + b * do_b + h.to(tl.int64) * do_h, index, do_n, D, BLOCK_D).to(tl.float32)
    out = load_rows(o + (b * N * heads + h) * D, index, heads * D, D, BLOCK_D).to(tl.float32)
    value = tl.sum(d_out * out, 1)
    if DLSE:
        value -= tl.load(dlse + place, mask=row < N, other=0.0) * LOG2E
    tl.store(delta + place, value, mask=row < N)


@triton.jit
def _sequence(
    q, d_out, lse, delta, dq, k, v, k_box, v_box, mask_row, b, h, first, stop, k_stride, v_stride, prefix, image, c,
    LEN: tl.constexpr, RAGGED: tl.constexpr, MASK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Meet the tokens `first .. stop - 1` of a sequence."""
    for j in tl.range(first, stop, LEN):
        keys = sequence_tile(k, k_box, b, h, j, stop, k_stride, LEN, D, BLOCK_D, TMA)
        values = sequence_tile(v, v_box, b, h, j, stop, v_stride, LEN, D, BLOCK_D, TMA)
        p = tl.math.exp2(tl.dot(q, tl.trans(keys), input_precision=PRECISION) * c - lse[:, None])
        if RAGGED or MASK:
            seen = shared_seen(j + tl.arange(0, LEN), stop, mask_row, prefix, image, MASK)
            p = tl.where(seen[None, :], p, 0.0)
        dp = tl.dot(d_out, tl.trans(values), input_precision=PRECISION)
        ds = (p * (dp - delta[:, None])).to(keys.dtype)
        dq = tl.dot(ds, keys, dq, input_precision=PRECISION)
    return dq


@Kernel
@triton.jit
def _query_gradients(
    q, k, v, do, pooled_k, pooled_v, dq, lse, delta, part, bias, mask, k_seq, v_seq, k_grid, v_grid,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, do_b, do_n, do_h, pk_b, pk_n, pk_h, pv_b, pv_n, pv_h, mask_b,
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
    acc = tl.zeros([M, BLOCK_D], tl.float32)
    if pid < row_programs:
        blocks = tl.cdiv(outside, M)
        slice_ = (pid // blocks) % PARTS
        bh = pid // (blocks * PARTS)
        b, h = bh // heads, bh % heads
        wide_b, wide_h = b.to(tl.int64), h.to(tl.int64)
        rank = (pid % blocks) * M + n
        keep = rank < outside
        token = tl.minimum(tl.where(rank < prefix, rank, rank + image), N - 1)
        q_rows = load_rows(q + wide_b * q_b + wide_h * q_h, token, q_n, D, BLOCK_D)
        d_out = load_rows(do + wide_b * do_b + wide_h * do_h, token, do_n, D, BLOCK_D)
        lse_rows = tl.load(lse + bh.to(tl.int64) * N + token)
        delta_rows = tl.load(delta + bh.to(tl.int64) * N + token)
        k += wide_b * k_b + wide_h * k_h
        v += wide_b * v_b + wide_h * v_h
        first = slice_ * part_length
        acc = _sequence(
            q_rows, d_out, lse_rows, delta_rows, acc, k, v, k_seq, v_seq, mask + b * mask_b, b, h, first,
            tl.minimum(first + part_length, N), k_n, v_n, prefix, image, c,
            LEN, RAGGED_N, MASK, D, BLOCK_D, TMA and (PREFIX or SUFFIX), PRECISION,
        )  # fmt: skip
        if PARTS == 1:
            store_rows(dq + (wide_b * N * heads + h) * D, token, heads * D, acc * scale, keep, D, BLOCK_D)
        else:
            place = (slice_ * batch + b).to(tl.int64) * outside * heads + h
            store_rows(part + place * D, rank, heads * D, acc * scale, keep, D, BLOCK_D)
    else:
        pid -= row_programs
        b, h, group_y, group_x, length_y, length_x, y0, x0 = grid_program(
            pid, heads, together, height, width, step_y, step_x, TALL, WIDE
        )
        bh = b * heads + h
        wide_b, wide_h = b.to(tl.int64), h.to(tl.int64)
        k_lane = grid_lane(h, group_y, group_x, length_y, length_x, height, width, step_y, step_x, k_n, k_h, UNIT)
        v_lane = grid_lane(h, group_y, group_x, length_y, length_x, height, width, step_y, step_x, v_n, v_h, UNIT)
        qy, qx = y0 + n // WIDE, x0 + n % WIDE
        keep = (qy < length_y) & (qx < length_x)
        token = tl.where(keep, grid_tokens(qy, qx, group_y, group_x, step_y, step_x, prefix, width), prefix)
        q_rows = load_rows(q + wide_b * q_b + wide_h * q_h, token, q_n, D, BLOCK_D)
        d_out = load_rows(do + wide_b * do_b + wide_h * do_h, token, do_n, D, BLOCK_D)
        lse_rows = tl.load(lse + bh.to(tl.int64) * N + token)
        delta_rows = tl.load(delta + bh.to(tl.int64) * N + token)
        k += wide_b * k_b + wide_h * k_h
        v += wide_b * v_b + wide_h * v_h
        mask_row = mask + b * mask_b
        if PREFIX:
            acc = _sequence(
                q_rows, d_out, lse_rows, delta_rows, acc, k, v, k_seq, v_seq, mask_row, b, h, 0, prefix, k_n, v_n,
                prefix, image, c, LEN, RAGGED_PREFIX, MASK, D, BLOCK_D, TMA, PRECISION,
            )  # fmt: skip
        if SUFFIX:
            acc = _sequence(
                q_rows, d_out, lse_rows, delta_rows, acc, k, v, k_seq, v_seq, mask_row, b, h, prefix + image, N, k_n,
                v_n, prefix, image, c, LEN, True, MASK, D, BLOCK_D, TMA, PRECISION,
            )  # fmt: skip
        if POOLED:
            acc = _sequence(
                q_rows, d_out, lse_rows, delta_rows, acc, pooled_k + wide_b * pk_b + wide_h * pk_h,
                pooled_v + wide_b * pv_b + wide_h * pv_h, pooled_k, pooled_v, mask_row, b, h,
                0, pooled, pk_n, pv_n, 0, 0, c, LEN, True, False, D, BLOCK_D, False, PRECISION,
            )  # fmt: skip
        y1, x1 = tl.minimum(y0 + TALL, length_y) - 1, tl.minimum(x0 + WIDE, length_x) - 1
        start_y, stop_y = key_range(y0, y1, length_y, KY, reach, DISC)
        start_x, stop_x = key_range(x0, x1, length_x, KX, reach, DISC)
        count = count_tiles(start_y, stop_y, y0, y1, x0, x1, start_x, stop_x, length_x, limit, KEY_TALL, KEY_WIDE, DISC)
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
            values = grid_tile(
                v, v_grid, b, v_lane, row, column, length_y, length_x, group_y, group_x, step_y, step_x,
                prefix, height, width, v_n, KEY_TALL, KEY_WIDE, D, BLOCK_D, TMA,
            )  # fmt: skip
            s = tl.dot(q_rows, tl.trans(keys), input_precision=PRECISION) * c - lse_rows[:, None]
            ky, kx = coordinate(row, j // KEY_WIDE, DISC)[None, :], coordinate(column, j % KEY_WIDE, DISC)[None, :]
            if DISC:
                s += disc_penalty(py, px, ky, kx, length_y, length_x, limit)
            else:
                penalty = square_penalty(py, px, ky, kx, length_y, length_x, KY, KX)
                if BIAS:
                    s += bias_of(table, py, px, ky, kx, length_y, length_x, KY, KX, BIAS)
                s += penalty
            p = tl.math.exp2(s)
            dp = tl.dot(d_out, tl.trans(values), input_precision=PRECISION)
            ds = (p * (dp - delta_rows[:, None])).to(keys.dtype)
            acc = tl.dot(ds, keys, acc, input_precision=PRECISION)
            row, column, stop = next_tile(
                row, column, stop, y0, y1, x0, x1, start_x, stop_x, length_x, limit, KEY_TALL, KEY_WIDE, DISC
            )
        store_rows(dq + (wide_b * N * heads + h) * D, token, heads * D, acc * scale, keep, D, BLOCK_D)


@functools.cache
def _second_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def backward(call: Call, do: Tensor, dlse: Tensor | None, o: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
    """Return the gradients of q, k, v, pooled_k, pooled_v and bias; empty for what is None."""
    q = call.q
    B, N, H, D = q.shape
    if not q.numel():
        optional = (q.new_empty(0) if t is None else torch.zeros_like(t) for t in (call.pooled_k, call.pooled_v))
        bias = q.new_empty(0) if call.bias is None else torch.zeros_like(call.bias)
        return *(q.new_empty(q.shape) for _ in range(3)), *optional, bias
    delta = torch.empty_like(lse)
    _delta[(math.ceil(N / 32), B * H)](
        do, o, lse if dlse is None else dlse.contiguous(), delta, *token_strides(do), N, H, ROWS=32, D=D,
        BLOCK_D=call.block_d, DLSE=dlse is not None, num_warps=4,
    )  # fmt: skip
    dq = q.new_empty(q.shape)
    if q.is_cuda:  # the programs of dq fill the last wave of those of dk and dv
        current, other = torch.cuda.current_stream(q.device), _second_stream(q.device)
        other.wait_stream(current)
        dk, dv, pooled_dk, pooled_dv = key_gradients(call, do, lse, delta)
        with torch.cuda.stream(other):
            _fill_dq(dq, call, do, lse, delta)
        current.wait_stream(other)
    else:
        _fill_dq(dq, call, do, lse, delta)
        dk, dv, pooled_dk, pooled_dv = key_gradients(call, do, lse, delta)
    dbias = q.new_empty(0)
    if call.bias is not None:
        dbias = bias_gradient(call, do, lse, delta)
    return dq, dk, dv, pooled_dk, pooled_dv, dbias


def _fill_dq(dq: Tensor, call: Call, do: Tensor, lse: Tensor, delta: Tensor) -> None:
    q, k, v = call.q, call.k, call.v
    B, _, H, D = q.shape
    plan = plan_queries(call, _query_gradients, config(call, _CONFIGS), do)
    part = q.new_empty((plan.parts, B, call.outside, H, D), dtype=torch.float32) if plan.parts > 1 else lse
    plan.run(
        q, k, v, do, k if call.pooled_k is None else call.pooled_k, v if call.pooled_v is None else call.pooled_v, dq,
        lse, delta, part, lse if call.bias is None else call.bias, lse if call.mask is None else call.mask,
        boxed=(k, v, k, v),
    )  # fmt: skip
    if plan.parts > 1:
        call.put_outside(dq, part.sum(0))
