"""The forward of multipole attention in Triton: output and log-sum-exp of every query in one launch.

A program of the grid owns a tile of queries of one cell, which all see the same keys, so that no mask is needed where
cells are whole: the tokens outside the grid, the cells near by, the chosen cells, and the means. The programs of the
tokens outside the grid, whose loops are the longest, come first in the launch.
"""

# the compiler of a kernel reads no annotations
# ruff: noqa: ANN001, ANN202, PLR0915
# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

from vision_attn.kernels.multipole.masses import masses
from vision_attn.kernels.multipole.op import Call
from vision_attn.kernels.multipole.tiles import (
    cell_tile,
    exact_count,
    exact_tile,
    grid_program,
    mean_tile,
    neighbourhood,
    plan_queries,
    tile_tokens,
)
from vision_attn.kernels.triton.launching import Kernel
from vision_attn.kernels.triton.rows import (
    HIDDEN,
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


@Kernel
@triton.jit
def _forward(
    q, k, v, means_k, means_v, o, lse, part_o, part_lse, chosen, masses, mask, mean_rows,
    k_seq, v_seq, k_grid, v_grid, means_k_box, means_v_box,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, mk_b, mk_n, mk_h, mv_b, mv_n, mv_h, mask_b,
    N, heads, batch, prefix, height, width, outside, cell, near, rows, columns, first_cell, own_cells, means, tiles,
    scale, row_programs, part_length, together, parts,
    T: tl.constexpr, SPLIT: tl.constexpr, EXACT: tl.constexpr, EXACT_BLOCK: tl.constexpr, LEN: tl.constexpr,
    MEANS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    MASK: tl.constexpr, ALIKE: tl.constexpr, PREFIX: tl.constexpr,
    SUFFIX: tl.constexpr, RAGGED: tl.constexpr, RAGGED_PREFIX: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp of a tile of queries: of the grid, or of the tokens outside it over a part of the keys.

    Inputs: q, k, v `[B, N, H, D]`, means_k, means_v `[B, M, H, D]`, each with strides `_b, _n, _h`; chosen `[B, H, C,
    EXACT]`; mask `[B, outside]` with its stride; mean_rows `[C, tiles]` as in `Pyramid.tile_rows`; masses `[B * H, C,
    tiles * MEANS]`, added to the logits of the means that a cell meets, or `[1, C, tiles * MEANS]` if all heads are
    `ALIKE`.
    Boxes: k_seq, v_seq of the sequence, k_grid, v_grid of the grid, means_k_box, means_v_box; with `TMA` only.
    Outputs: o `[B, N, H, D]`, lse `[B, H, N]`; of the tokens outside the grid part_o `[parts, B, H, outside, D]` and
    part_lse if there are several parts.
    Launch: `row_programs` programs for the tokens outside the grid, each over `part_length` keys, then those of
    `own_cells` cells of the grid from `first_cell` on, `together` heads in turn; tiles of `T` x `T` tokens of a cell,
    of `LEN` tokens of the sequence, and of `MEANS` means, 0 if none is met: see `MeanTiles`.
    Flags: what there is, and `RAGGED` if no whole number of tiles covers it.
    """
    SUMS: tl.constexpr = 16 if PRECISION == "ieee" else 8  # AMD has no narrower tiles
    M: tl.constexpr = T * T
    pid = tl.program_id(0)
    image = height * width
    c = scale * LOG2E
    m = tl.full([M], START, tl.float32) * c  # [M]
    l = tl.zeros([M, SUMS], tl.float32)  # noqa: E741  # [M, SUMS]
    acc = tl.zeros([M, BLOCK_D], tl.float32)  # [M, BLOCK_D]
    if pid < row_programs:
        b, h, bh, part, rank, keep, token = outside_program(pid, outside, heads, N, prefix, image, M, parts)
        q_rows = load_rows(head_of(q, b, h, q_b, q_h), token, q_n, D, BLOCK_D)  # [M, BLOCK_D]
        first = part * part_length
        m, l, acc = meet_sequence(  # noqa: E741
            q_rows, m, l, acc, head_of(k, b, h, k_b, k_h), head_of(v, b, h, v_b, v_h), k_seq, v_seq, mask + b * mask_b,
            b, h, first, tl.minimum(first + part_length, N), k_n, v_n, prefix, image, c,
            LEN, True, MASK, D, BLOCK_D, TMA and (PREFIX or SUFFIX), PRECISION,
        )  # fmt: skip
        total = tl.maximum(tl.sum(l, 1), NO_KEY)  # [M], a part may hold hidden keys alone
        acc = acc * (1.0 / total)[:, None]
        if parts == 1:
            token = outside_tokens(rank, prefix, image)  # [M], anew: kept over the loop it would take registers
            store_rows(own_head(o, b, h, N, heads, D), token, heads * D, acc, keep, D, BLOCK_D)
            tl.store(lse + bh.to(tl.int64) * N + token, m + tl.log2(total), mask=keep)
        else:
            place = (part * batch * heads + bh).to(tl.int64) * outside
            store_rows(part_o + place * D, rank, D, acc, keep, D, BLOCK_D)
            tl.store(part_lse + place + rank, m + tl.log2(total), mask=keep)
    else:
        whole = (height, width, prefix, cell, rows, columns)
        b, h, bh, own, cell_y, cell_x, y0, x0 = grid_program(
            pid - row_programs, heads, together, whole, first_cell, own_cells, T, SPLIT
        )
        token, keep = tile_tokens(y0, x0, cell_y, cell_x, whole, T)  # [M]
        q_rows = load_rows(head_of(q, b, h, q_b, q_h), token, q_n, D, BLOCK_D)  # [M, BLOCK_D]
        k, v = head_of(k, b, h, k_b, k_h), head_of(v, b, h, v_b, v_h)
        mask += b * mask_b
        if PREFIX:
            m, l, acc = meet_sequence(  # noqa: E741
                q_rows, m, l, acc, k, v, k_seq, v_seq, mask, b, h, 0, prefix, k_n, v_n, prefix, image, c,
                LEN, RAGGED_PREFIX, MASK, D, BLOCK_D, TMA, PRECISION,
            )  # fmt: skip
        if SUFFIX:
            m, l, acc = meet_sequence(  # noqa: E741
                q_rows, m, l, acc, k, v, k_seq, v_seq, mask, b, h, prefix + image, N, k_n, v_n, prefix, image, c,
                LEN, True, MASK, D, BLOCK_D, TMA, PRECISION,
            )  # fmt: skip
        first_y, first_x, across, near_cells = neighbourhood(cell_y, cell_x, near, 0, rows, whole)
        chosen += (bh.to(tl.int64) * rows * columns + own) * EXACT
        count = near_cells + exact_count(chosen, rows * columns, EXACT, EXACT_BLOCK)
        for i in tl.range(0, count * SPLIT * SPLIT):
            key_y, key_x, ky, kx = exact_tile(i, near_cells, first_y, first_x, across, chosen, whole, T, SPLIT)
            k_rows = cell_tile(k, k_grid, b, h, ky, kx, whole, k_n, T, D, BLOCK_D, TMA)  # [M, BLOCK_D]
            s = tl.dot(q_rows, tl.trans(k_rows), input_precision=PRECISION)  # [M, M]
            if RAGGED:
                _, there = tile_tokens(ky, kx, key_y, key_x, whole, T)  # [M]
                s = tl.where(there[None, :], s, HIDDEN)
            v_rows = cell_tile(v, v_grid, b, h, ky, kx, whole, v_n, T, D, BLOCK_D, TMA)  # [M, BLOCK_D]
            m, l, acc = update_raw(s, v_rows, m, l, acc, c, PRECISION)  # noqa: E741
        if MEANS:
            means_k, means_v = head_of(means_k, b, h, mk_b, mk_h), head_of(means_v, b, h, mv_b, mv_h)
            mean_rows += own.to(tl.int64) * tiles
            masses += (tl.where(ALIKE, 0, bh).to(tl.int64) * rows * columns + own) * tiles * MEANS
            n = tl.arange(0, MEANS)  # [MEANS]
            bias = tl.load(masses + n, mask=(n >= 0) & (tiles > 0), other=0.0)  # [MEANS], one tile ahead
            for i in tl.range(0, tiles):
                first = tl.load(mean_rows + i)
                k_rows = mean_tile(means_k, means_k_box, b, h, first, means, mk_n, MEANS, D, BLOCK_D, TMA)
                s = tl.dot(q_rows, tl.trans(k_rows), input_precision=PRECISION) * c + bias[None, :]  # [M, MEANS]
                bias = tl.load(masses + tl.minimum(i + 1, tiles - 1) * MEANS + n)  # [MEANS]
                v_rows = mean_tile(means_v, means_v_box, b, h, first, means, mv_n, MEANS, D, BLOCK_D, TMA)
                m, l, acc = update_raw(s, v_rows, m, l, acc, 1.0, PRECISION)  # noqa: E741
        total = tl.sum(l, 1)  # [M]
        acc = acc * (1.0 / total)[:, None]
        token, keep = tile_tokens(
            y0, x0, cell_y, cell_x, whole, T
        )  # [M], anew: kept over the loops it would take registers
        store_rows(own_head(o, b, h, N, heads, D), token, heads * D, acc, keep, D, BLOCK_D)
        tl.store(lse + bh.to(tl.int64) * N + token, m + tl.log2(total), mask=keep)


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """Return the output `[B, N, H, D]` and its log-sum-exp in base 2, `[B, H, N]` in float32."""
    q, k, v = call.q, call.k, call.v
    B, N, H, D = q.shape
    o, lse = call.empty(*q.shape, dtype=q.dtype), call.empty(B, H, N, dtype=torch.float32)
    if not o.numel():
        return o, lse
    plan = plan_queries(call, _forward, "multipole.forward")
    tiles = call.tiles(plan.tiles.length)
    part_o = part_lse = lse
    if plan.parts > 1:
        part_o = q.new_empty((plan.parts, B, H, call.outside, D), dtype=torch.float32)
        part_lse = q.new_empty((1, plan.parts, B, H, call.outside), dtype=torch.float32)
    plan.run(
        q, k, v, call.means_k, call.means_v, o, lse, part_o, part_lse, call.chosen,
        masses(call.chosen, call.mass, call.size, tiles), lse if call.mask is None else call.mask,
        call.pyramid.tile_rows(tiles, q.device), boxed=(k, v, k, v, call.means_k, call.means_v),
    )  # fmt: skip
    if plan.parts > 1:
        merge_outside(part_o, part_lse, o, lse, call.size[2])
    return o, lse
