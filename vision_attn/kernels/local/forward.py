"""The forward of local attention in Triton: output and log-sum-exp of every query in one launch.

A program of the grid owns a tile of queries: it meets the keys that all queries share, without a mask where it can,
then walks the tiles of its window. The programs of the tokens outside the grid, whose loops are the longest, come first
in the launch; where few heads would leave them running alone, their keys are split and the parts merged.
"""

# ruff: noqa: ANN001, ANN202, E741, PLR0915  # the compiler of a kernel reads no annotations
# mypy: disable-error-code="no-untyped-def"

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from vision_attn.kernels.local.op import Call
from vision_attn.kernels.local.tiles import (
    Tiles,
    bias_table,
    config,
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
from vision_attn.kernels.triton.launching import Kernel
from vision_attn.kernels.triton.rows import (
    LOG2E,
    NO_KEY,
    START,
    head_of,
    load_rows,
    meet_sequence,
    merge_outside,
    outside_program,
    outside_tokens,
    own_head,
    store_rows,
    update_raw,
)

# Found on one H200 with torch 2.11.0 and triton 3.6.0.
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


@Kernel
@triton.jit
def _forward(
    q, k, v, pooled_k, pooled_v, o, lse, part_o, part_lse, bias, mask, k_seq, v_seq, k_grid, v_grid,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, pk_b, pk_n, pk_h, pv_b, pv_n, pv_h, mask_b,
    N, heads, batch, prefix, height, width, outside, pooled, limit, reach, KY, KX, step_y, step_x, scale,
    row_programs, part_length, together,
    TALL: tl.constexpr, WIDE: tl.constexpr, KEY_TALL: tl.constexpr, KEY_WIDE: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, DISC: tl.constexpr, MASK: tl.constexpr, BIAS: tl.constexpr, PREFIX: tl.constexpr,
    SUFFIX: tl.constexpr, POOLED: tl.constexpr, RAGGED_PREFIX: tl.constexpr, RAGGED_N: tl.constexpr,
    PARTS: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp of a tile of queries: of the grid, or of the tokens outside it over a part of the keys.

    Inputs: q, k, v `[B, N, H, D]`, pooled_k, pooled_v `[B, pooled, H, D]`, each with strides `_b, _n, _h`; bias
    `[H, 2 KY - 1, 2 KX - 1]`; mask `[B, outside]` with its stride.
    Boxes: k_seq, v_seq of the sequence, k_grid, v_grid of the grid; with `TMA` only.
    Outputs: o `[B, N, H, D]`, lse `[B, H, N]`; of the tokens outside the grid part_o `[PARTS, B, H, outside, D]` and
    part_lse if there are several parts.
    Grid and window: see `tiles.py`.
    Launch: `row_programs` programs for the tokens outside the grid, each over `part_length` keys, then those of the
    grid, `together` heads in turn; tiles of `TALL` x `WIDE` queries and `KEY_TALL` x `KEY_WIDE` keys.
    Flags: what there is, and `RAGGED_` if no whole number of tiles covers it.
    """
    M: tl.constexpr = TALL * WIDE
    LEN: tl.constexpr = KEY_TALL * KEY_WIDE
    pid = tl.program_id(0)
    image = height * width
    c = scale * LOG2E
    m = tl.full([M], START, tl.float32) * c  # [M]
    l = tl.zeros([M, 8], tl.float32)  # [M, 8]
    acc = tl.zeros([M, BLOCK_D], tl.float32)  # [M, BLOCK_D]
    if pid < row_programs:
        b, h, bh, part, rank, keep, token = outside_program(pid, outside, heads, N, prefix, image, M, PARTS)
        q_rows = load_rows(head_of(q, b, h, q_b, q_h), token, q_n, D, BLOCK_D)  # [M, BLOCK_D]
        first = part * part_length
        m, l, acc = meet_sequence(
            q_rows, m, l, acc, head_of(k, b, h, k_b, k_h), head_of(v, b, h, v_b, v_h), k_seq, v_seq, mask + b * mask_b,
            b, h, first, tl.minimum(first + part_length, N), k_n, v_n, prefix, image, c,
            LEN, RAGGED_N, MASK, D, BLOCK_D, TMA and (PREFIX or SUFFIX), PRECISION,
        )  # fmt: skip
        total = tl.maximum(tl.sum(l, 1), NO_KEY)  # [M], a part may hold hidden keys alone
        acc = acc * (1.0 / total)[:, None]
        if PARTS == 1:
            token = outside_tokens(rank, prefix, image)  # [M], anew: kept over the loop it would take registers
            store_rows(own_head(o, b, h, N, heads, D), token, heads * D, acc, keep, D, BLOCK_D)
            tl.store(lse + bh.to(tl.int64) * N + token, m + tl.log2(total), mask=keep)
        else:
            place = (part * batch * heads + bh).to(tl.int64) * outside
            store_rows(part_o + place * D, rank, D, acc, keep, D, BLOCK_D)
            tl.store(part_lse + place + rank, m + tl.log2(total), mask=keep)
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
        tl.store(lse + bh.to(tl.int64) * N + token, m + tl.log2(total), mask=keep)


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """Return the output `[B, N, H, D]` and its log-sum-exp in base 2, `[B, H, N]` in float32."""
    q, k, v = call.q, call.k, call.v
    B, N, H, D = q.shape
    o = q.new_empty(q.shape)
    lse = q.new_empty((B, H, N), dtype=torch.float32)
    if not o.numel():
        return o, lse
    plan = plan_queries(call, _forward, config(call, _CONFIGS))
    part_o = part_lse = lse
    if plan.parts > 1:
        part_o = q.new_empty((plan.parts, B, H, call.outside, D), dtype=torch.float32)
        part_lse = q.new_empty((plan.parts, B, H, call.outside), dtype=torch.float32)
    plan.run(
        q, k, v, k if call.pooled_k is None else call.pooled_k, v if call.pooled_v is None else call.pooled_v, o, lse,
        part_o, part_lse, lse if call.bias is None else call.bias, lse if call.mask is None else call.mask,
        boxed=(k, v, k, v),
    )  # fmt: skip
    if plan.parts > 1:
        merge_outside(part_o, part_lse, o, lse, call.size[2])
    return o, lse
