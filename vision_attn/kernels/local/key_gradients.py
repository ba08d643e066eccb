"""The gradients of keys, values and the relative bias in Triton, without atomics.

dk and dv: a program owns keys and walks the queries that see them. Near a border more queries see a square's key than
elsewhere (`query_range`). Keys that every query sees have the longest loops: they come first in the launch. Pooled keys
have a launch of their own.

    dbias[ry, rx] = sum of ds_ij over the pairs (i, j) with y_j - y_i = ry - K_y + 1 and x_j - x_i = rx - K_x + 1

The bias of a square: a program holds one relative row and a tile of query columns. For a tile of key columns it sums ds
over all rows of the grid first, as two matrix products a row, and adds up the diagonals once at the end.
"""

# ruff: noqa: ANN001, ANN202, PLR0915  # the compiler of a kernel reads no annotations
# mypy: disable-error-code="no-untyped-def"

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vision_attn.kernels.launches import Launch
from vision_attn.kernels.local.op import Call
from vision_attn.kernels.local.tiles import (
    bias_of,
    bias_table,
    coordinates,
    grid_lane,
    grid_program,
    grid_tile,
    grid_tokens,
    next_tile,
    plan_keys,
    square_penalty,
    walk,
    window_start,
    windowed,
)
from vision_attn.kernels.triton.launching import Kernel, block_of, launch_of, strides_of, thrice
from vision_attn.kernels.triton.rows import (
    HIDDEN,
    LOG2E,
    ds_of,
    head_of,
    load_rows,
    load_tile,
    outside_program,
    own_head,
    seen_tokens,
    splits,
    store_rows,
)


@triton.jit
def _step(k_rows, v_rows, q_rows, do_rows, p, delta_rows, dk_rows, dv_rows, PRECISION: tl.constexpr):
    """Add what one tile of queries gives; p is `[M, LEN]`: keys, queries."""
    dv_rows = tl.dot(p.to(do_rows.dtype), do_rows, dv_rows, input_precision=PRECISION)  # [M, BLOCK_D]
    dp = tl.dot(v_rows, tl.trans(do_rows), input_precision=PRECISION)  # [M, LEN]
    ds = (p * (dp - delta_rows[None, :])).to(q_rows.dtype)  # [M, LEN]
    return tl.dot(ds, q_rows, dk_rows, input_precision=PRECISION), dv_rows


@triton.jit
def _sequence(
    k_rows, v_rows, seen, dk_rows, dv_rows, q, do, q_box, do_box, lse, low, delta, b, h, first, stop, q_n, do_n, c,
    LEN: tl.constexpr, RAGGED: tl.constexpr, MASK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    TMA: tl.constexpr, TWO: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Meet the queries `first .. stop - 1` of the sequence."""
    for i in tl.range(first, stop, LEN):
        index = i + tl.arange(0, LEN)  # [LEN]
        q_rows = load_tile(q, q_box, b, h, i, stop, q_n, LEN, D, BLOCK_D, TMA)  # [LEN, BLOCK_D]
        do_rows = load_tile(do, do_box, b, h, i, stop, do_n, LEN, D, BLOCK_D, TMA)  # [LEN, BLOCK_D]
        if RAGGED:
            index = tl.minimum(index, stop - 1)
        lse_rows = tl.load(lse + index)  # [LEN]
        delta_rows = tl.load(delta + index)  # [LEN]
        s = tl.dot(k_rows, tl.trans(q_rows), input_precision=PRECISION) * c - lse_rows[None, :]  # [M, LEN]
        if TWO:
            s -= tl.load(lse + low + index)[None, :]
        if RAGGED:
            s += tl.where(i + tl.arange(0, LEN) < stop, 0.0, HIDDEN)[None, :]
        p = tl.math.exp2(s)  # [M, LEN]
        if MASK:
            p = tl.where(seen[:, None], p, 0.0)
        dk_rows, dv_rows = _step(k_rows, v_rows, q_rows, do_rows, p, delta_rows, dk_rows, dv_rows, PRECISION)
    return dk_rows, dv_rows


@Kernel
@triton.jit
def _key_gradients(
    q, k, v, do, dk, dv, lse, delta, part_dkv, bias, mask, q_seq, do_seq, q_grid, do_grid,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, do_b, do_n, do_h, mask_b,
    N, heads, batch, prefix, height, width, outside, limit, reach, KY, KX, step_y, step_x, scale,
    row_programs, part_length, together, parts,
    TALL: tl.constexpr, WIDE: tl.constexpr, KEY_TALL: tl.constexpr, KEY_WIDE: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, DISC: tl.constexpr, MASK: tl.constexpr, BIAS: tl.constexpr, PREFIX: tl.constexpr,
    SUFFIX: tl.constexpr, RAGGED_PREFIX: tl.constexpr, TMA: tl.constexpr, TWO: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients dk and dv of a tile of keys: of the grid, or of the tokens outside it over a part of the queries.

    Inputs: q, k, v, do `[B, N, H, D]`, each with strides `_b, _n, _h`; lse `[1 + TWO, B, H, N]`, delta `[B, H, N]`;
    bias `[H, 2 KY - 1, 2 KX - 1]`; mask `[B, outside]` with its stride.
    Boxes: q_seq, do_seq of the sequence, q_grid, do_grid of the grid; with `TMA` only.
    Outputs: dk, dv `[B, N, H, D]`; of the tokens outside the grid part_dkv `[parts, 2, B, outside, H, D]` if there are
    several parts.
    Grid and window: see `tiles.py`. Launch and flags: as in the forward.
    """
    M: tl.constexpr = KEY_TALL * KEY_WIDE
    LEN: tl.constexpr = TALL * WIDE
    pid = tl.program_id(0)
    image = height * width
    c = scale * LOG2E
    low = tl.cast(batch, tl.int64) * heads * N
    dk_rows = tl.zeros([M, BLOCK_D], tl.float32)  # [M, BLOCK_D]
    dv_rows = tl.zeros([M, BLOCK_D], tl.float32)  # [M, BLOCK_D]
    if pid < row_programs:
        b, h, bh, part, rank, keep, token = outside_program(pid, outside, heads, N, prefix, image, M, parts)
        k_rows = load_rows(head_of(k, b, h, k_b, k_h), token, k_n, D, BLOCK_D)  # [M, BLOCK_D]
        v_rows = load_rows(head_of(v, b, h, v_b, v_h), token, v_n, D, BLOCK_D)  # [M, BLOCK_D]
        seen = seen_tokens(token, N, mask + b * mask_b, prefix, image, MASK)  # [M]
        first = part * part_length
        dk_rows, dv_rows = _sequence(
            k_rows, v_rows, seen, dk_rows, dv_rows, head_of(q, b, h, q_b, q_h), head_of(do, b, h, do_b, do_h), q_seq,
            do_seq, lse + bh.to(tl.int64) * N, low, delta + bh.to(tl.int64) * N, b, h, first,
            tl.minimum(first + part_length, N), q_n, do_n, c, LEN, True, MASK, D, BLOCK_D,
            TMA and (PREFIX or SUFFIX), TWO, PRECISION,
        )  # fmt: skip
        dk_rows *= scale
        if parts == 1:
            store_rows(own_head(dk, b, h, N, heads, D), token, heads * D, dk_rows, keep, D, BLOCK_D)
            store_rows(own_head(dv, b, h, N, heads, D), token, heads * D, dv_rows, keep, D, BLOCK_D)
        else:
            place = (part * 2 * batch + b).to(tl.int64) * outside * heads + h
            store_rows(part_dkv + place * D, rank, heads * D, dk_rows, keep, D, BLOCK_D)
            place = ((part * 2 + 1) * batch + b).to(tl.int64) * outside * heads + h
            store_rows(part_dkv + place * D, rank, heads * D, dv_rows, keep, D, BLOCK_D)
    else:
        whole, window = (height, width, prefix, step_y, step_x), (KY, KX, reach, limit)
        b, h, bh, sub, y0, x0, keep, token = grid_program(
            pid - row_programs, heads, together, whole, KEY_TALL, KEY_WIDE
        )  # fmt: skip
        q_lane, do_lane = grid_lane(q, h, sub, whole, q_n, q_h), grid_lane(do, h, sub, whole, do_n, do_h)
        k_rows = load_rows(head_of(k, b, h, k_b, k_h), token, k_n, D, BLOCK_D)  # [M, BLOCK_D]
        v_rows = load_rows(head_of(v, b, h, v_b, v_h), token, v_n, D, BLOCK_D)  # [M, BLOCK_D]
        q, do = head_of(q, b, h, q_b, q_h), head_of(do, b, h, do_b, do_h)
        lse += bh.to(tl.int64) * N
        delta += bh.to(tl.int64) * N
        if PREFIX:
            dk_rows, dv_rows = _sequence(
                k_rows, v_rows, keep, dk_rows, dv_rows, q, do, q_seq, do_seq, lse, low, delta, b, h, 0, prefix, q_n,
                do_n, c, LEN, RAGGED_PREFIX, False, D, BLOCK_D, TMA, TWO, PRECISION,
            )  # fmt: skip
        if SUFFIX:
            dk_rows, dv_rows = _sequence(
                k_rows, v_rows, keep, dk_rows, dv_rows, q, do, q_seq, do_seq, lse, low, delta, b, h, prefix + image, N,
                q_n, do_n, c, LEN, True, False, D, BLOCK_D, TMA, TWO, PRECISION,
            )  # fmt: skip
        count, row, column, stop, near = walk(y0, x0, sub, window, KEY_TALL, KEY_WIDE, TALL, WIDE, True, DISC)
        ky, kx = coordinates(y0, x0, KEY_TALL, KEY_WIDE, DISC)  # [M]
        table = bias_table(bias, h, KY, KX, BIAS)
        _, _, length_y, length_x = sub
        i = tl.arange(0, LEN)  # [LEN]
        for _i in tl.range(0, count):
            q_rows = grid_tile(
                q, q_grid, b, q_lane, row, column, sub, whole, q_n, TALL, WIDE, D, BLOCK_D, TMA
            )  # [LEN, BLOCK_D]
            do_rows = grid_tile(
                do, do_grid, b, do_lane, row, column, sub, whole, do_n, TALL, WIDE, D, BLOCK_D, TMA
            )  # [LEN, BLOCK_D]
            qy, qx = tl.minimum(row + i // WIDE, length_y - 1), tl.minimum(column + i % WIDE, length_x - 1)  # [LEN]
            place = grid_tokens(qy, qx, sub, whole)  # [LEN]
            lse_rows = tl.load(lse + place)  # [LEN]
            delta_rows = tl.load(delta + place)  # [LEN]
            s = tl.dot(k_rows, tl.trans(q_rows), input_precision=PRECISION) * c - lse_rows[None, :]  # [M, LEN]
            if TWO:
                s -= tl.load(lse + low + place)[None, :]
            qy, qx = coordinates(row, column, TALL, WIDE, DISC)  # [LEN]
            s = windowed(
                s, ky[:, None], kx[:, None], qy[None, :], qx[None, :], sub, window, table, True, BIAS, DISC
            )  # [M, LEN]
            p = tl.math.exp2(s)  # [M, LEN]
            dk_rows, dv_rows = _step(k_rows, v_rows, q_rows, do_rows, p, delta_rows, dk_rows, dv_rows, PRECISION)
            row, column, stop = next_tile(row, column, stop, near, TALL, WIDE, DISC)
        store_rows(own_head(dk, b, h, N, heads, D), token, heads * D, dk_rows * scale, keep, D, BLOCK_D)
        store_rows(own_head(dv, b, h, N, heads, D), token, heads * D, dv_rows, keep, D, BLOCK_D)


@Kernel
@triton.jit
def _pooled_gradients(
    q, do, k, v, part_dkv, lse, delta, q_b, q_n, q_h, do_b, do_n, do_h, k_b, k_n, k_h, v_b, v_n, v_h,
    N, heads, batch, prefix, image, pooled, scale, part_length,
    M: tl.constexpr, LEN: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, TWO: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients dk and dv of some pooled keys over a part of the grid's queries.

    Inputs: q, do `[B, N, H, D]`, pooled k, v `[B, pooled, H, D]`, each with strides `_b, _n, _h`; lse
    `[1 + TWO, B, H, N]`, delta `[B, H, N]`.
    Outputs: part_dkv `[parts, 2, B, pooled, H, D]`.
    """
    row = tl.program_id(0) * M + tl.arange(0, M)  # [M]
    part, bh = tl.program_id(1), tl.program_id(2)
    b, h = (bh // heads).to(tl.int64), bh % heads
    keep = row < pooled
    index = tl.minimum(row, pooled - 1)  # [M]
    k_rows = load_rows(head_of(k, b, h, k_b, k_h), index, k_n, D, BLOCK_D)  # [M, BLOCK_D]
    v_rows = load_rows(head_of(v, b, h, v_b, v_h), index, v_n, D, BLOCK_D)  # [M, BLOCK_D]
    dk_rows = tl.zeros([M, BLOCK_D], tl.float32)  # [M, BLOCK_D]
    dv_rows = tl.zeros([M, BLOCK_D], tl.float32)  # [M, BLOCK_D]
    first = prefix + part * part_length
    dk_rows, dv_rows = _sequence(
        k_rows, v_rows, keep, dk_rows, dv_rows, head_of(q, b, h, q_b, q_h), head_of(do, b, h, do_b, do_h), q, do,
        lse + bh.to(tl.int64) * N, tl.cast(batch, tl.int64) * heads * N, delta + bh.to(tl.int64) * N, b, h, first,
        tl.minimum(first + part_length, prefix + image), q_n, do_n, scale * LOG2E, LEN, True, False, D, BLOCK_D, False,
        TWO, PRECISION,
    )  # fmt: skip
    place = (part * 2 * batch + b) * pooled * heads + h
    store_rows(part_dkv + place * D, row, heads * D, dk_rows * scale, keep, D, BLOCK_D)
    place = ((part * 2 + 1) * batch + b) * pooled * heads + h
    store_rows(part_dkv + place * D, row, heads * D, dv_rows, keep, D, BLOCK_D)


@triton.jit
def _first_row(offset, length, K):
    """The first row whose window starts at most `offset` rows after it."""
    late = tl.where(offset >= -(K // 2), -offset, length - K - offset)
    return tl.minimum(tl.where(offset >= 0, 0, late), length)


@Kernel
@triton.jit
def _bias_gradient(
    q, k, v, do, lse, delta, bias, part_bias, q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, do_b, do_n, do_h,
    N, heads, batch, prefix, height, width, KY, KX, step_y, step_x, scale,
    WIDE: tl.constexpr, BLOCK_K: tl.constexpr, BIAS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    TWO: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The part that `WIDE` query columns have in one relative row of one head's bias.

    Inputs: q, k, v, do `[B, N, H, D]`, each with strides `_b, _n, _h`; lse `[1 + TWO, B, H, N]`, delta `[B, H, N]`;
    bias `[H, 2 KY - 1, 2 KX - 1]`.
    Outputs: part_bias `[tiles, H, 2 KY - 1, 2 KX - 1]`.
    Grid and window: see `tiles.py`.
    """
    x0, ry, h = tl.program_id(0) * WIDE, tl.program_id(1), tl.program_id(2)
    whole = (height, width, prefix, step_y, step_x)
    i = tl.arange(0, WIDE)  # [WIDE]
    offset = ry - KY + 1
    places = tl.arange(0, BLOCK_K)  # [BLOCK_K]
    total = tl.zeros([BLOCK_K], tl.float32)  # [BLOCK_K]
    table = bias_table(bias, h, KY, KX, BIAS)
    for group in tl.range(0, step_y * step_x):
        group_y, group_x = group // step_x, group % step_x
        length_y, length_x = tl.cdiv(height - group_y, step_y), tl.cdiv(width - group_x, step_x)
        sub = (group_y, group_x, length_y, length_x)
        qx = x0 + i  # [WIDE]
        first_y, stop_y = _first_row(offset, length_y, KY), _first_row(offset - KY, length_y, KY)
        x1 = tl.minimum(x0 + WIDE, length_x) - 1
        first_x = window_start(x0, length_x, KX)
        stop_x = tl.where(x0 < length_x, window_start(x1, length_x, KX) + KX, first_x)
        for column in tl.range(first_x, stop_x, WIDE):
            kx = column + i  # [WIDE]
            acc = tl.zeros([WIDE, WIDE], tl.float32)  # [WIDE, WIDE]
            for batch_entry in tl.range(0, batch):
                b = tl.cast(batch_entry, tl.int64)
                place = (b * heads + h) * N
                for y in tl.range(first_y, stop_y):
                    q_token = grid_tokens(y, tl.minimum(qx, length_x - 1), sub, whole)  # [WIDE]
                    k_token = grid_tokens(y + offset, tl.minimum(kx, length_x - 1), sub, whole)  # [WIDE]
                    q_rows = load_rows(head_of(q, b, h, q_b, q_h), q_token, q_n, D, BLOCK_D)  # [WIDE, BLOCK_D]
                    k_rows = load_rows(head_of(k, b, h, k_b, k_h), k_token, k_n, D, BLOCK_D)  # [WIDE, BLOCK_D]
                    v_rows = load_rows(head_of(v, b, h, v_b, v_h), k_token, v_n, D, BLOCK_D)  # [WIDE, BLOCK_D]
                    do_rows = load_rows(head_of(do, b, h, do_b, do_h), q_token, do_n, D, BLOCK_D)  # [WIDE, BLOCK_D]
                    lse_rows = tl.load(lse + place + q_token)  # [WIDE]
                    delta_rows = tl.load(delta + place + q_token)  # [WIDE]
                    qy, ky = tl.zeros([WIDE], tl.int32) + y, tl.zeros([WIDE], tl.int32) + y + offset  # [WIDE]
                    penalty = square_penalty(
                        qy[:, None], qx[:, None], ky[None, :], kx[None, :], length_y, length_x, KY, KX
                    )  # [WIDE, WIDE]
                    s = tl.dot(q_rows, tl.trans(k_rows), input_precision=PRECISION) * (scale * LOG2E)  # [WIDE, WIDE]
                    s += bias_of(
                        table, qy[:, None], qx[:, None], ky[None, :], kx[None, :], length_y, length_x, KY, KX, BIAS
                    )  # [WIDE, WIDE]
                    s = s + penalty - lse_rows[:, None]  # [WIDE, WIDE]
                    if TWO:
                        low = tl.cast(batch, tl.int64) * heads * N
                        s -= tl.load(lse + low + place + q_token)[:, None]
                    p = tl.math.exp2(s)  # [WIDE, WIDE]
                    acc += ds_of(p, do_rows, v_rows, delta_rows, PRECISION)
            distance = kx[None, :] - qx[:, None]  # [WIDE, WIDE]
            for d in range(1 - WIDE, WIDE):
                value = tl.sum(tl.where(distance == column - x0 + d, acc, 0.0))
                total += tl.where(places == column - x0 + d + KX - 1, value, 0.0)
    rx = 2 * KX - 1
    out = part_bias + ((tl.program_id(0) * heads + h).to(tl.int64) * (2 * KY - 1) + ry) * rx
    tl.store(out + places, total, mask=places < rx)


def key_gradients(call: Call, do: Tensor, lse: Tensor, delta: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of k, v, pooled_k and pooled_v; empty for what is None."""
    q, k, v = call.q, call.k, call.v
    B, _, H, D = q.shape
    plan = plan_keys(call, _key_gradients, "local.keys", do)
    dk, dv = q.new_empty(q.shape), q.new_empty(q.shape)
    part_dkv = q.new_empty((plan.parts, 2, B, call.outside, H, D), dtype=torch.float32) if plan.parts > 1 else lse
    plan.run(
        q, k, v, do, dk, dv, lse, delta, part_dkv, lse if call.bias is None else call.bias,
        lse if call.mask is None else call.mask, boxed=(q, do, q, do),
    )  # fmt: skip
    if plan.parts > 1:
        for t, rows in zip((dk, dv), part_dkv.sum(0), strict=True):
            call.put_outside(t, rows)
    return dk, dv, *_pooled(call, do, lse, delta)


def _pooled(call: Call, do: Tensor, lse: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v = call.q, call.pooled_k, call.pooled_v
    if k is None or v is None:
        return q.new_empty(0), q.new_empty(0)
    B, N, H, D = q.shape
    height, width, prefix, _ = call.size
    pooled, image = k.shape[1], height * width
    if not pooled:
        return q.new_empty(k.shape), q.new_empty(v.shape)

    def numbers(launch: Launch) -> dict[str, Any]:
        _, length = splits(q, B * H * math.ceil(pooled / launch.rows), image, 0, launch.length)
        return dict(part_length=length, M=launch.rows, LEN=launch.length, **launch.options)

    rest = *strides_of(q, do, k, v), N, H, B, prefix, image, pooled, call.scale
    more = dict(D=D, BLOCK_D=call.block_d, TWO=len(lse) == 2, PRECISION=thrice(q))
    launch = launch_of(
        "local.keys", q, ("pooled",), columns=call.span,
        needs=lambda launch: _pooled_gradients.needs(
            q, do, k, v, torch.float32, lse, delta, *rest, **numbers(launch), **more
        ),
    )  # fmt: skip
    blocks = math.ceil(pooled / launch.rows)
    parts, _ = splits(q, B * H * blocks, image, 0, launch.length)
    part_dkv = q.new_empty((parts, 2, B, pooled, H, D), dtype=torch.float32)
    _pooled_gradients[(blocks, parts, B * H)](q, do, k, v, part_dkv, lse, delta, *rest, **numbers(launch), **more)
    dk, dv = part_dkv.sum(0).to(q.dtype).unbind(0)
    return dk.clone(), dv.clone()


def bias_gradient(call: Call, do: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """Return the gradient of the bias, `[H, 2 * K_y - 1, 2 * K_x - 1]`."""
    assert call.bias is not None
    q, k, v, bias = call.q, call.k, call.v, call.bias
    B, N, H, D = q.shape
    height, width, prefix, _ = call.size
    numbers = *strides_of(q, k, v, do), N, H, B, prefix, height, width, *call.kernel, *call.steps, call.scale
    more = dict(
        BLOCK_K=block_of(bias.shape[2]), BIAS=call.bias_block, D=D, BLOCK_D=call.block_d, TWO=len(lse) == 2,
        PRECISION="ieee",
    )  # fmt: skip

    def of(launch: Launch) -> dict[str, Any]:
        return dict(WIDE=launch.rows, **launch.options, **more)

    launch = launch_of(
        "local.bias", q, (bias.dtype, more["BLOCK_K"], call.bias_block),
        lambda launch: _bias_gradient.needs(q, k, v, do, lse, delta, bias, torch.float32, *numbers, **of(launch)),
    )  # fmt: skip
    tiles = math.ceil(math.ceil(width / call.steps[1]) / launch.rows)
    part_bias = q.new_empty((tiles, *bias.shape), dtype=torch.float32)
    _bias_gradient[(tiles, bias.shape[1], H)](q, k, v, do, lse, delta, bias, part_bias, *numbers, **of(launch))
    return part_bias.sum(0).to(bias.dtype)
