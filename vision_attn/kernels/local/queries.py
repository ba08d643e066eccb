"""The launches of local attention whose programs own queries, in Triton: the forward, and the gradients of q.

Forward: a program of the grid owns a tile of queries. It meets the keys that all queries share, without a mask where it
can, then walks the tiles of its window. The programs of the tokens outside the grid, whose loops are the longest, come
first in the launch; where few heads would leave them running alone, their keys are split and the parts merged.

    p_ij = 2^(s_ij log2(e) - lse_i),  ds_ij = p_ij (dO_i . v_j - delta_i),  delta_i = dO_i . o_i - dlse_i log2(e)
    dq_i = scale sum_j ds_ij k_j,  dk_j = scale sum_i ds_ij q_i,  dv_j = sum_i p_ij dO_i

Backward: no atomics, so that equal inputs give equal gradients. Three launches: delta; dq, as the forward; dk and dv,
whose programs own keys (`key_gradients.py`).
"""

# ruff: noqa: ANN001, ANN202, E741, PLR0915  # the compiler of a kernel reads no annotations
# mypy: disable-error-code="no-untyped-def"

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from vision_attn.kernels.local.key_gradients import bias_gradient, key_gradients
from vision_attn.kernels.local.op import Call
from vision_attn.kernels.local.tiles import (
    bias_table,
    coordinates,
    grid_lane,
    grid_program,
    grid_tile,
    next_tile,
    plan_queries,
    tile_tokens,
    walk,
    windowed,
)
from vision_attn.kernels.triton.launching import Kernel, floats_of
from vision_attn.kernels.triton.rows import (
    LOG2E,
    NO_KEY,
    START,
    delta_of,
    ds_of,
    head_of,
    load_rows,
    load_tile,
    meet_sequence,
    merge_outside,
    outside_program,
    outside_tokens,
    own_head,
    seen_tokens,
    store_lse,
    store_rows,
    update_raw,
)


@Kernel
@triton.jit
def _forward(
    q, k, v, pooled_k, pooled_v, o, lse, part_o, part_lse, bias, mask, k_seq, v_seq, k_grid, v_grid,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, pk_b, pk_n, pk_h, pv_b, pv_n, pv_h, mask_b,
    N, heads, batch, prefix, height, width, outside, pooled, limit, reach, KY, KX, step_y, step_x, scale,
    row_programs, part_length, together, parts,
    TALL: tl.constexpr, WIDE: tl.constexpr, KEY_TALL: tl.constexpr, KEY_WIDE: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, DISC: tl.constexpr, MASK: tl.constexpr, BIAS: tl.constexpr, PREFIX: tl.constexpr,
    SUFFIX: tl.constexpr, POOLED: tl.constexpr, RAGGED_PREFIX: tl.constexpr,
    TMA: tl.constexpr, TWO: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp of a tile of queries: of the grid, or of the tokens outside it over a part of the keys.

    Inputs: q, k, v `[B, N, H, D]`, pooled_k, pooled_v `[B, pooled, H, D]`, each with strides `_b, _n, _h`; bias
    `[H, 2 KY - 1, 2 KX - 1]`; mask `[B, outside]` with its stride.
    Boxes: k_seq, v_seq of the sequence, k_grid, v_grid of the grid; with `TMA` only.
    Outputs: o `[B, N, H, D]`, lse `[1 + TWO, B, H, N]`; of the tokens outside the grid part_o
    `[parts, B, H, outside, D]` and part_lse if there are several parts.
    Grid and window: see `tiles.py`.
    Launch: `row_programs` programs for the tokens outside the grid, each over `part_length` keys, then those of the
    grid, `together` heads in turn; tiles of `TALL` x `WIDE` queries and `KEY_TALL` x `KEY_WIDE` keys.
    Flags: what there is, and `RAGGED_` if no whole number of tiles covers it; `TWO` floats of lse, see `store_lse`.
    """
    SUMS: tl.constexpr = 16 if PRECISION == "ieee" else 8  # AMD has no narrower tiles
    M: tl.constexpr = TALL * WIDE
    LEN: tl.constexpr = KEY_TALL * KEY_WIDE
    pid = tl.program_id(0)
    image = height * width
    c = scale * LOG2E
    low = tl.cast(batch, tl.int64) * heads * N
    m = tl.full([M], START, tl.float32) * c  # [M]
    l = tl.zeros([M, SUMS], tl.float32)  # [M, SUMS]
    acc = tl.zeros([M, BLOCK_D], tl.float32)  # [M, BLOCK_D]
    if pid < row_programs:
        b, h, bh, part, rank, keep, token = outside_program(pid, outside, heads, N, prefix, image, M, parts)
        q_rows = load_rows(head_of(q, b, h, q_b, q_h), token, q_n, D, BLOCK_D)  # [M, BLOCK_D]
        first = part * part_length
        m, l, acc = meet_sequence(
            q_rows, m, l, acc, head_of(k, b, h, k_b, k_h), head_of(v, b, h, v_b, v_h), k_seq, v_seq, mask + b * mask_b,
            b, h, first, tl.minimum(first + part_length, N), k_n, v_n, prefix, image, c,
            LEN, True, MASK, D, BLOCK_D, TMA and (PREFIX or SUFFIX), PRECISION,
        )  # fmt: skip
        total = tl.maximum(tl.sum(l, 1), NO_KEY)  # [M], a part may hold hidden keys alone
        acc = acc * (1.0 / total)[:, None]
        if parts == 1:
            token = outside_tokens(rank, prefix, image)  # [M], anew: kept over the loop it would take registers
            store_rows(own_head(o, b, h, N, heads, D), token, heads * D, acc, keep, D, BLOCK_D)
            store_lse(lse, bh.to(tl.int64) * N + token, low, m, total, keep, TWO)
        else:
            place = (part * batch * heads + bh).to(tl.int64) * outside
            store_rows(part_o + place * D, rank, D, acc, keep, D, BLOCK_D)
            store_lse(part_lse, place + rank, tl.cast(parts * batch * heads, tl.int64) * outside, m, total, keep, TWO)
    else:
        whole, window = (height, width, prefix, step_y, step_x), (KY, KX, reach, limit)
        b, h, bh, sub, y0, x0, keep, token = grid_program(pid - row_programs, heads, together, whole, TALL, WIDE)
        k_lane, v_lane = grid_lane(k, h, sub, whole, k_n, k_h), grid_lane(v, h, sub, whole, v_n, v_h)
        q_rows = load_rows(head_of(q, b, h, q_b, q_h), token, q_n, D, BLOCK_D)  # [M, BLOCK_D]
        k, v = head_of(k, b, h, k_b, k_h), head_of(v, b, h, v_b, v_h)
        mask += b * mask_b
        if PREFIX:
            m, l, acc = meet_sequence(
                q_rows, m, l, acc, k, v, k_seq, v_seq, mask, b, h, 0, prefix, k_n, v_n, prefix, image, c,
                LEN, RAGGED_PREFIX, MASK, D, BLOCK_D, TMA, PRECISION,
            )  # fmt: skip
        if SUFFIX:
            m, l, acc = meet_sequence(
                q_rows, m, l, acc, k, v, k_seq, v_seq, mask, b, h, prefix + image, N, k_n, v_n, prefix, image, c,
                LEN, True, MASK, D, BLOCK_D, TMA, PRECISION,
            )  # fmt: skip
        if POOLED:
            m, l, acc = meet_sequence(
                q_rows, m, l, acc, head_of(pooled_k, b, h, pk_b, pk_h), head_of(pooled_v, b, h, pv_b, pv_h), pooled_k,
                pooled_v, mask, b, h, 0, pooled, pk_n, pv_n, 0, 0, c, LEN, True, False, D, BLOCK_D, False, PRECISION,
            )  # fmt: skip
        count, row, column, stop, near = walk(y0, x0, sub, window, TALL, WIDE, KEY_TALL, KEY_WIDE, False, DISC)
        qy, qx = coordinates(y0, x0, TALL, WIDE, DISC)  # [M]
        table = bias_table(bias, h, KY, KX, BIAS)
        for _i in tl.range(0, count):
            k_rows = grid_tile(
                k, k_grid, b, k_lane, row, column, sub, whole, k_n, KEY_TALL, KEY_WIDE, D, BLOCK_D, TMA
            )  # [LEN, BLOCK_D]
            s = tl.dot(q_rows, tl.trans(k_rows), input_precision=PRECISION)  # [M, LEN]
            if BIAS:
                s = s * c
            ky, kx = coordinates(row, column, KEY_TALL, KEY_WIDE, DISC)  # [LEN]
            s = windowed(
                s, qy[:, None], qx[:, None], ky[None, :], kx[None, :], sub, window, table, False, BIAS, DISC
            )  # [M, LEN]
            v_rows = grid_tile(
                v, v_grid, b, v_lane, row, column, sub, whole, v_n, KEY_TALL, KEY_WIDE, D, BLOCK_D, TMA
            )  # [LEN, BLOCK_D]
            m, l, acc = update_raw(s, v_rows, m, l, acc, 1.0 if BIAS else c, PRECISION)
            row, column, stop = next_tile(row, column, stop, near, KEY_TALL, KEY_WIDE, DISC)
        total = tl.sum(l, 1)  # [M]
        acc = acc * (1.0 / total)[:, None]
        token = tile_tokens(y0, x0, sub, whole, TALL, WIDE)  # [M], anew: kept over the loop it would take registers
        store_rows(own_head(o, b, h, N, heads, D), token, heads * D, acc, keep, D, BLOCK_D)
        store_lse(lse, bh.to(tl.int64) * N + token, low, m, total, keep, TWO)


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """Return the output `[B, N, H, D]` and its log-sum-exp in base 2, `[floats, B, H, N]` in float32."""
    q, k, v = call.q, call.k, call.v
    B, N, H, D = q.shape
    o = q.new_empty(q.shape)
    lse = q.new_empty((floats_of(q), B, H, N), dtype=torch.float32)
    if not o.numel():
        return o, lse
    plan = plan_queries(call, _forward, "local.forward")
    part_o = part_lse = lse
    if plan.parts > 1:
        part_o = q.new_empty((plan.parts, B, H, call.outside, D), dtype=torch.float32)
        part_lse = q.new_empty((len(lse), plan.parts, B, H, call.outside), dtype=torch.float32)
    plan.run(
        q, k, v, k if call.pooled_k is None else call.pooled_k, v if call.pooled_v is None else call.pooled_v, o, lse,
        part_o, part_lse, lse if call.bias is None else call.bias, lse if call.mask is None else call.mask,
        boxed=(k, v, k, v),
    )  # fmt: skip
    if plan.parts > 1:
        merge_outside(part_o, part_lse, o, lse, call.size[2])
    return o, lse


@triton.jit
def _sequence(
    q_rows, do_rows, lse_rows, low_rows, delta_rows, dq_rows, k, v, k_box, v_box, mask, b, h, first, stop, k_n, v_n,
    prefix, image, c, LEN: tl.constexpr, RAGGED: tl.constexpr, MASK: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, TMA: tl.constexpr, TWO: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Meet the tokens `first .. stop - 1` of a sequence."""
    for j in tl.range(first, stop, LEN):
        k_rows = load_tile(k, k_box, b, h, j, stop, k_n, LEN, D, BLOCK_D, TMA)  # [LEN, BLOCK_D]
        v_rows = load_tile(v, v_box, b, h, j, stop, v_n, LEN, D, BLOCK_D, TMA)  # [LEN, BLOCK_D]
        s = tl.dot(q_rows, tl.trans(k_rows), input_precision=PRECISION) * c - lse_rows[:, None]  # [M, LEN]
        if TWO:
            s -= low_rows[:, None]
        p = tl.math.exp2(s)  # [M, LEN]
        if RAGGED or MASK:
            seen = seen_tokens(j + tl.arange(0, LEN), stop, mask, prefix, image, MASK)  # [LEN]
            p = tl.where(seen[None, :], p, 0.0)
        ds = ds_of(p, do_rows, v_rows, delta_rows, PRECISION).to(k_rows.dtype)  # [M, LEN]
        dq_rows = tl.dot(ds, k_rows, dq_rows, input_precision=PRECISION)
    return dq_rows


@Kernel
@triton.jit
def _query_gradients(
    q, k, v, do, pooled_k, pooled_v, dq, lse, delta, part_dq, bias, mask, k_seq, v_seq, k_grid, v_grid,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, do_b, do_n, do_h, pk_b, pk_n, pk_h, pv_b, pv_n, pv_h, mask_b,
    N, heads, batch, prefix, height, width, outside, pooled, limit, reach, KY, KX, step_y, step_x, scale,
    row_programs, part_length, together, parts,
    TALL: tl.constexpr, WIDE: tl.constexpr, KEY_TALL: tl.constexpr, KEY_WIDE: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, DISC: tl.constexpr, MASK: tl.constexpr, BIAS: tl.constexpr, PREFIX: tl.constexpr,
    SUFFIX: tl.constexpr, POOLED: tl.constexpr, RAGGED_PREFIX: tl.constexpr,
    TMA: tl.constexpr, TWO: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients dq of a tile of queries: of the grid, or of the tokens outside it over a part of the keys.

    Inputs: q, k, v, do `[B, N, H, D]`, pooled_k, pooled_v `[B, pooled, H, D]`, each with strides `_b, _n, _h`; lse
    `[1 + TWO, B, H, N]`, delta `[B, H, N]`; bias `[H, 2 KY - 1, 2 KX - 1]`; mask `[B, outside]` with its stride.
    Boxes: k_seq, v_seq of the sequence, k_grid, v_grid of the grid; with `TMA` only.
    Outputs: dq `[B, N, H, D]`; of the tokens outside the grid part_dq `[parts, B, outside, H, D]` if there are several
    parts.
    Grid and window: see `tiles.py`. Launch and flags: as in the forward.
    """
    M: tl.constexpr = TALL * WIDE
    LEN: tl.constexpr = KEY_TALL * KEY_WIDE
    pid = tl.program_id(0)
    image = height * width
    c = scale * LOG2E
    low = tl.cast(batch, tl.int64) * heads * N
    dq_rows = tl.zeros([M, BLOCK_D], tl.float32)  # [M, BLOCK_D]
    if pid < row_programs:
        b, h, bh, part, rank, keep, token = outside_program(pid, outside, heads, N, prefix, image, M, parts)
        q_rows = load_rows(head_of(q, b, h, q_b, q_h), token, q_n, D, BLOCK_D)  # [M, BLOCK_D]
        do_rows = load_rows(head_of(do, b, h, do_b, do_h), token, do_n, D, BLOCK_D)  # [M, BLOCK_D]
        lse_rows = tl.load(lse + bh.to(tl.int64) * N + token)  # [M]
        low_rows = tl.load(lse + low + bh.to(tl.int64) * N + token) if TWO else lse_rows  # [M]
        delta_rows = tl.load(delta + bh.to(tl.int64) * N + token)  # [M]
        first = part * part_length
        dq_rows = _sequence(
            q_rows, do_rows, lse_rows, low_rows, delta_rows, dq_rows, head_of(k, b, h, k_b, k_h),
            head_of(v, b, h, v_b, v_h), k_seq, v_seq, mask + b * mask_b, b, h, first,
            tl.minimum(first + part_length, N), k_n, v_n, prefix, image, c, LEN, True, MASK, D, BLOCK_D,
            TMA and (PREFIX or SUFFIX), TWO, PRECISION,
        )  # fmt: skip
        if parts == 1:
            store_rows(own_head(dq, b, h, N, heads, D), token, heads * D, dq_rows * scale, keep, D, BLOCK_D)
        else:
            place = (part * batch + b).to(tl.int64) * outside * heads + h
            store_rows(part_dq + place * D, rank, heads * D, dq_rows * scale, keep, D, BLOCK_D)
    else:
        whole, window = (height, width, prefix, step_y, step_x), (KY, KX, reach, limit)
        b, h, bh, sub, y0, x0, keep, token = grid_program(pid - row_programs, heads, together, whole, TALL, WIDE)
        k_lane, v_lane = grid_lane(k, h, sub, whole, k_n, k_h), grid_lane(v, h, sub, whole, v_n, v_h)
        q_rows = load_rows(head_of(q, b, h, q_b, q_h), token, q_n, D, BLOCK_D)  # [M, BLOCK_D]
        do_rows = load_rows(head_of(do, b, h, do_b, do_h), token, do_n, D, BLOCK_D)  # [M, BLOCK_D]
        lse_rows = tl.load(lse + bh.to(tl.int64) * N + token)  # [M]
        low_rows = tl.load(lse + low + bh.to(tl.int64) * N + token) if TWO else lse_rows  # [M]
        delta_rows = tl.load(delta + bh.to(tl.int64) * N + token)  # [M]
        k, v = head_of(k, b, h, k_b, k_h), head_of(v, b, h, v_b, v_h)
        mask += b * mask_b
        if PREFIX:
            dq_rows = _sequence(
                q_rows, do_rows, lse_rows, low_rows, delta_rows, dq_rows, k, v, k_seq, v_seq, mask, b, h, 0, prefix,
                k_n, v_n, prefix, image, c, LEN, RAGGED_PREFIX, MASK, D, BLOCK_D, TMA, TWO, PRECISION,
            )  # fmt: skip
        if SUFFIX:
            dq_rows = _sequence(
                q_rows, do_rows, lse_rows, low_rows, delta_rows, dq_rows, k, v, k_seq, v_seq, mask, b, h,
                prefix + image, N, k_n, v_n, prefix, image, c, LEN, True, MASK, D, BLOCK_D, TMA, TWO, PRECISION,
            )  # fmt: skip
        if POOLED:
            dq_rows = _sequence(
                q_rows, do_rows, lse_rows, low_rows, delta_rows, dq_rows, head_of(pooled_k, b, h, pk_b, pk_h),
                head_of(pooled_v, b, h, pv_b, pv_h), pooled_k, pooled_v, mask, b, h, 0, pooled, pk_n, pv_n, 0, 0, c,
                LEN, True, False, D, BLOCK_D, False, TWO, PRECISION,
            )  # fmt: skip
        table = bias_table(bias, h, KY, KX, BIAS)
        count, row, column, stop, near = walk(y0, x0, sub, window, TALL, WIDE, KEY_TALL, KEY_WIDE, False, DISC)
        qy, qx = coordinates(y0, x0, TALL, WIDE, DISC)  # [M]
        for _i in tl.range(0, count):
            k_rows = grid_tile(
                k, k_grid, b, k_lane, row, column, sub, whole, k_n, KEY_TALL, KEY_WIDE, D, BLOCK_D, TMA
            )  # [LEN, BLOCK_D]
            v_rows = grid_tile(
                v, v_grid, b, v_lane, row, column, sub, whole, v_n, KEY_TALL, KEY_WIDE, D, BLOCK_D, TMA
            )  # [LEN, BLOCK_D]
            s = tl.dot(q_rows, tl.trans(k_rows), input_precision=PRECISION) * c - lse_rows[:, None]  # [M, LEN]
            if TWO:
                s -= low_rows[:, None]
            ky, kx = coordinates(row, column, KEY_TALL, KEY_WIDE, DISC)  # [LEN]
            s = windowed(
                s, qy[:, None], qx[:, None], ky[None, :], kx[None, :], sub, window, table, False, BIAS, DISC
            )  # [M, LEN]
            ds = ds_of(tl.math.exp2(s), do_rows, v_rows, delta_rows, PRECISION).to(k_rows.dtype)  # [M, LEN]
            dq_rows = tl.dot(ds, k_rows, dq_rows, input_precision=PRECISION)
            row, column, stop = next_tile(row, column, stop, near, KEY_TALL, KEY_WIDE, DISC)
        store_rows(own_head(dq, b, h, N, heads, D), token, heads * D, dq_rows * scale, keep, D, BLOCK_D)


@functools.cache
def _second_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def backward(call: Call, do: Tensor, dlse: Tensor | None, o: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
    """Return the gradients of q, k, v, pooled_k, pooled_v and bias; empty for what is None."""
    q = call.q
    if not q.numel():
        optional = (q.new_empty(0) if t is None else torch.zeros_like(t) for t in (call.pooled_k, call.pooled_v))
        bias = q.new_empty(0) if call.bias is None else torch.zeros_like(call.bias)
        return *(q.new_empty(q.shape) for _ in range(3)), *optional, bias
    delta = delta_of(do, o, dlse, lse)
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
    plan = plan_queries(call, _query_gradients, "local.queries", do)
    part_dq = q.new_empty((plan.parts, B, call.outside, H, D), dtype=torch.float32) if plan.parts > 1 else lse
    plan.run(
        q, k, v, do, k if call.pooled_k is None else call.pooled_k, v if call.pooled_v is None else call.pooled_v, dq,
        lse, delta, part_dq, lse if call.bias is None else call.bias, lse if call.mask is None else call.mask,
        boxed=(k, v, k, v),
    )  # fmt: skip
    if plan.parts > 1:
        call.put_outside(dq, part_dq.sum(0))
