"""The backward of multipole attention in Triton: no atomics, so that equal inputs give equal gradients.

    p_ij = 2^(s_ij log2(e) - lse_i),  ds_ij = p_ij (dO_i . v_j - delta_i),  delta_i = dO_i . o_i - dlse_i log2(e)
    dq_i = scale sum_j ds_ij k_j,  dk_j = scale sum_i ds_ij q_i,  dv_j = sum_i p_ij dO_i

dq has programs that own queries, as the forward. dk and dv of tokens have programs that own keys: they meet the queries
outside the grid, those of the cells near by, and those of the cells that have chosen theirs, which a sorted list tells.
Those of the means are in `mean_gradients.py`.
"""

# the compiler of a kernel reads no annotations
# ruff: noqa: ANN001, ANN202, PLR0915
# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

from vision_attn.kernels.multipole.masses import masses
from vision_attn.kernels.multipole.mean_gradients import add_dkv, fill_means
from vision_attn.kernels.multipole.op import Call
from vision_attn.kernels.multipole.tiles import (
    cell_tile,
    exact_count,
    exact_tile,
    grid_program,
    mean_tile,
    neighbourhood,
    plan_keys,
    plan_queries,
    tile_tokens,
)
from vision_attn.kernels.triton.launching import Kernel
from vision_attn.kernels.triton.rows import (
    HIDDEN,
    LOG2E,
    delta_of,
    ds_of,
    head_of,
    load_rows,
    load_tile,
    outside_program,
    outside_tokens,
    own_head,
    seen_tokens,
    store_rows,
)


@triton.jit
def _add_dq(q_rows, do_rows, lse_rows, delta_rows, dq_rows, k_rows, v_rows, bias, c, PRECISION: tl.constexpr):
    """Add what a tile of keys gives to dq `[M, BLOCK_D]`; bias `[LEN]` is added to logits in base 2."""
    s = tl.dot(q_rows, tl.trans(k_rows), input_precision=PRECISION) * c + (bias[None, :] - lse_rows[:, None])
    ds = ds_of(tl.math.exp2(s), do_rows, v_rows, delta_rows, PRECISION).to(k_rows.dtype)  # [M, LEN]
    return tl.dot(ds, k_rows, dq_rows, input_precision=PRECISION)


@triton.jit
def _sequence(
    q_rows, do_rows, lse_rows, delta_rows, dq_rows, k, v, k_box, v_box, mask, b, h, first, stop, k_n, v_n, prefix,
    image, c, LEN: tl.constexpr, MASK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Meet the tokens `first .. stop - 1` of a sequence."""
    for j in tl.range(first, stop, LEN):
        k_rows = load_tile(k, k_box, b, h, j, stop, k_n, LEN, D, BLOCK_D, TMA)  # [LEN, BLOCK_D]
        v_rows = load_tile(v, v_box, b, h, j, stop, v_n, LEN, D, BLOCK_D, TMA)  # [LEN, BLOCK_D]
        seen = seen_tokens(j + tl.arange(0, LEN), stop, mask, prefix, image, MASK)  # [LEN]
        dq_rows = _add_dq(
            q_rows, do_rows, lse_rows, delta_rows, dq_rows, k_rows, v_rows, tl.where(seen, 0.0, HIDDEN), c, PRECISION
        )
    return dq_rows


@Kernel
@triton.jit
def _query_gradients(
    q, k, v, do, means_k, means_v, dq, lse, delta, part_dq, chosen, masses, mask, mean_rows,
    k_seq, v_seq, k_grid, v_grid, means_k_box, means_v_box,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, do_b, do_n, do_h, mk_b, mk_n, mk_h, mv_b, mv_n, mv_h, mask_b,
    N, heads, batch, prefix, height, width, outside, cell, near, rows, columns, first_cell, own_cells, means, tiles,
    scale, row_programs, part_length, together, parts,
    T: tl.constexpr, SPLIT: tl.constexpr, EXACT: tl.constexpr, EXACT_BLOCK: tl.constexpr, LEN: tl.constexpr,
    MEANS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    MASK: tl.constexpr, ALIKE: tl.constexpr, PREFIX: tl.constexpr,
    SUFFIX: tl.constexpr, RAGGED: tl.constexpr, RAGGED_PREFIX: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients dq of a tile of queries: of the grid, or of the tokens outside it over a part of the keys.

    Inputs: do `[B, N, H, D]`, lse, delta `[B, H, N]`; all else as in the forward.
    Outputs: dq `[B, N, H, D]`; of the tokens outside the grid part_dq `[parts, B, outside, H, D]` if there are several
    parts.
    """
    M: tl.constexpr = T * T
    pid = tl.program_id(0)
    image = height * width
    c = scale * LOG2E
    dq_rows = tl.zeros([M, BLOCK_D], tl.float32)  # [M, BLOCK_D]
    if pid < row_programs:
        b, h, bh, part, rank, keep, token = outside_program(pid, outside, heads, N, prefix, image, M, parts)
        q_rows = load_rows(head_of(q, b, h, q_b, q_h), token, q_n, D, BLOCK_D)  # [M, BLOCK_D]
        do_rows = load_rows(head_of(do, b, h, do_b, do_h), token, do_n, D, BLOCK_D)  # [M, BLOCK_D]
        lse_rows = tl.load(lse + bh.to(tl.int64) * N + token)  # [M]
        delta_rows = tl.load(delta + bh.to(tl.int64) * N + token)  # [M]
        first = part * part_length
        dq_rows = _sequence(
            q_rows, do_rows, lse_rows, delta_rows, dq_rows, head_of(k, b, h, k_b, k_h), head_of(v, b, h, v_b, v_h),
            k_seq, v_seq, mask + b * mask_b, b, h, first, tl.minimum(first + part_length, N), k_n, v_n, prefix, image,
            c, LEN, MASK, D, BLOCK_D, TMA and (PREFIX or SUFFIX), PRECISION,
        )  # fmt: skip
        if parts == 1:
            store_rows(own_head(dq, b, h, N, heads, D), token, heads * D, dq_rows * scale, keep, D, BLOCK_D)
        else:
            place = (part * batch + b).to(tl.int64) * outside * heads + h
            store_rows(part_dq + place * D, rank, heads * D, dq_rows * scale, keep, D, BLOCK_D)
    else:
        whole = (height, width, prefix, cell, rows, columns)
        b, h, bh, own, cell_y, cell_x, y0, x0 = grid_program(
            pid - row_programs, heads, together, whole, first_cell, own_cells, T, SPLIT
        )
        token, keep = tile_tokens(y0, x0, cell_y, cell_x, whole, T)  # [M]
        q_rows = load_rows(head_of(q, b, h, q_b, q_h), token, q_n, D, BLOCK_D)  # [M, BLOCK_D]
        do_rows = load_rows(head_of(do, b, h, do_b, do_h), token, do_n, D, BLOCK_D)  # [M, BLOCK_D]
        lse_rows = tl.load(lse + bh.to(tl.int64) * N + token)  # [M]
        delta_rows = tl.load(delta + bh.to(tl.int64) * N + token)  # [M]
        k, v = head_of(k, b, h, k_b, k_h), head_of(v, b, h, v_b, v_h)
        mask += b * mask_b
        if PREFIX:
            dq_rows = _sequence(
                q_rows, do_rows, lse_rows, delta_rows, dq_rows, k, v, k_seq, v_seq, mask, b, h, 0, prefix, k_n, v_n,
                prefix, image, c, LEN, MASK, D, BLOCK_D, TMA, PRECISION,
            )  # fmt: skip
        if SUFFIX:
            dq_rows = _sequence(
                q_rows, do_rows, lse_rows, delta_rows, dq_rows, k, v, k_seq, v_seq, mask, b, h, prefix + image, N, k_n,
                v_n, prefix, image, c, LEN, MASK, D, BLOCK_D, TMA, PRECISION,
            )  # fmt: skip
        first_y, first_x, across, near_cells = neighbourhood(cell_y, cell_x, near, 0, rows, whole)
        chosen += (bh.to(tl.int64) * rows * columns + own) * EXACT
        count = near_cells + exact_count(chosen, rows * columns, EXACT, EXACT_BLOCK)
        for i in tl.range(0, count * SPLIT * SPLIT):
            key_y, key_x, ky, kx = exact_tile(i, near_cells, first_y, first_x, across, chosen, whole, T, SPLIT)
            k_rows = cell_tile(k, k_grid, b, h, ky, kx, whole, k_n, T, D, BLOCK_D, TMA)  # [M, BLOCK_D]
            v_rows = cell_tile(v, v_grid, b, h, ky, kx, whole, v_n, T, D, BLOCK_D, TMA)  # [M, BLOCK_D]
            bias = tl.zeros([M], tl.float32)  # [M]
            if RAGGED:
                _, there = tile_tokens(ky, kx, key_y, key_x, whole, T)  # [M]
                bias = tl.where(there, 0.0, HIDDEN)
            dq_rows = _add_dq(q_rows, do_rows, lse_rows, delta_rows, dq_rows, k_rows, v_rows, bias, c, PRECISION)
        if MEANS:
            means_k, means_v = head_of(means_k, b, h, mk_b, mk_h), head_of(means_v, b, h, mv_b, mv_h)
            mean_rows += own.to(tl.int64) * tiles
            masses += (tl.where(ALIKE, 0, bh).to(tl.int64) * rows * columns + own) * tiles * MEANS
            for i in tl.range(0, tiles):
                first = tl.load(mean_rows + i)
                k_rows = mean_tile(means_k, means_k_box, b, h, first, means, mk_n, MEANS, D, BLOCK_D, TMA)
                v_rows = mean_tile(means_v, means_v_box, b, h, first, means, mv_n, MEANS, D, BLOCK_D, TMA)
                bias = tl.load(masses + i * MEANS + tl.arange(0, MEANS))  # [MEANS]
                dq_rows = _add_dq(q_rows, do_rows, lse_rows, delta_rows, dq_rows, k_rows, v_rows, bias, c, PRECISION)
        token, keep = tile_tokens(
            y0, x0, cell_y, cell_x, whole, T
        )  # [M], anew: kept over the loops it would take registers
        store_rows(own_head(dq, b, h, N, heads, D), token, heads * D, dq_rows * scale, keep, D, BLOCK_D)


@triton.jit
def _meet_queries(
    k_rows, v_rows, dk_rows, dv_rows, q, do, q_box, do_box, lse, delta, b, h, first, stop, q_n, do_n, bias, c,
    LEN: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Meet the queries `first .. stop - 1` of the sequence; lse and delta are those of a head; bias `[keys, 1]`."""
    for j in tl.range(first, stop, LEN):
        q_rows = load_tile(q, q_box, b, h, j, stop, q_n, LEN, D, BLOCK_D, TMA)  # [LEN, BLOCK_D]
        do_rows = load_tile(do, do_box, b, h, j, stop, do_n, LEN, D, BLOCK_D, TMA)  # [LEN, BLOCK_D]
        n = j + tl.arange(0, LEN)  # [LEN]
        lse_cols = tl.load(lse + n, mask=n < stop, other=-HIDDEN)  # [LEN], no weight beyond the end
        delta_cols = tl.load(delta + n, mask=n < stop, other=0.0)  # [LEN]
        dk_rows, dv_rows, _ = add_dkv(
            k_rows, v_rows, q_rows, do_rows, lse_cols, delta_cols, bias, dk_rows, dv_rows, c, PRECISION
        )
    return dk_rows, dv_rows


@Kernel
@triton.jit
def _key_gradients(
    q, k, v, do, dk, dv, lse, delta, part_dkv, listed, starts, mask, q_seq, do_seq, q_grid, do_grid,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, do_b, do_n, do_h, mask_b,
    N, heads, batch, prefix, height, width, outside, cell, near, rows, columns, first_row, stop_row, first_query,
    stop_query, scale, row_programs, part_length, together, parts,
    T: tl.constexpr, SPLIT: tl.constexpr, EXACT: tl.constexpr, LEN: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, MASK: tl.constexpr, PREFIX: tl.constexpr, SUFFIX: tl.constexpr, RAGGED: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients dk and dv of a tile of keys: of the grid, or of the tokens outside it over a part of the queries.

    Inputs: q, k, v, do `[B, N, H, D]`, each with strides `_b, _n, _h`; lse, delta `[B, H, N]`; listed `[B, H, C *
    EXACT]`, the cells that chose each cell, and starts `[B, H, C + 1]`, where the list of each cell begins; mask `[B,
    outside]` with its stride. Tokens outside the grid meet the queries `first_query .. stop_query - 1`.
    Boxes: q_seq, do_seq of the sequence, q_grid, do_grid of the grid; with `TMA` only.
    Outputs: dk, dv `[B, N, H, D]`; of the tokens outside the grid part_dkv `[parts, 2, B, outside, H, D]` if there are
    several parts.
    """
    M: tl.constexpr = T * T
    pid = tl.program_id(0)
    image = height * width
    c = scale * LOG2E
    dk_rows = tl.zeros([M, BLOCK_D], tl.float32)  # [M, BLOCK_D]
    dv_rows = tl.zeros([M, BLOCK_D], tl.float32)  # [M, BLOCK_D]
    if pid < row_programs:
        b, h, bh, part, rank, keep, token = outside_program(pid, outside, heads, N, prefix, image, M, parts)
        k_rows = load_rows(head_of(k, b, h, k_b, k_h), token, k_n, D, BLOCK_D)  # [M, BLOCK_D]
        v_rows = load_rows(head_of(v, b, h, v_b, v_h), token, v_n, D, BLOCK_D)  # [M, BLOCK_D]
        seen = keep
        if MASK:
            seen = seen & (tl.load(mask + b * mask_b + rank, mask=keep, other=0) != 0)
        first = first_query + part * part_length
        stop = tl.minimum(first + part_length, stop_query)
        dk_rows, dv_rows = _meet_queries(
            k_rows, v_rows, dk_rows, dv_rows, head_of(q, b, h, q_b, q_h), head_of(do, b, h, do_b, do_h), q_seq, do_seq,
            lse + bh.to(tl.int64) * N, delta + bh.to(tl.int64) * N, b, h, first, stop, q_n,
            do_n, tl.where(seen, 0.0, HIDDEN)[:, None], c, LEN, D, BLOCK_D, TMA and (PREFIX or SUFFIX), PRECISION,
        )  # fmt: skip
        if parts == 1:
            token = outside_tokens(rank, prefix, image)  # [M]
            store_rows(own_head(dk, b, h, N, heads, D), token, heads * D, dk_rows * scale, keep, D, BLOCK_D)
            store_rows(own_head(dv, b, h, N, heads, D), token, heads * D, dv_rows, keep, D, BLOCK_D)
        else:
            of_dk = (part.to(tl.int64) * 2 * batch + b) * outside * heads + h
            of_dv = ((part.to(tl.int64) * 2 + 1) * batch + b) * outside * heads + h
            store_rows(part_dkv + of_dk * D, rank, heads * D, dk_rows * scale, keep, D, BLOCK_D)
            store_rows(part_dkv + of_dv * D, rank, heads * D, dv_rows, keep, D, BLOCK_D)
    else:
        whole = (height, width, prefix, cell, rows, columns)
        b, h, bh, own, cell_y, cell_x, y0, x0 = grid_program(
            pid - row_programs, heads, together, whole, 0, rows * columns, T, SPLIT
        )
        token, keep = tile_tokens(y0, x0, cell_y, cell_x, whole, T)  # [M]
        k_rows = load_rows(head_of(k, b, h, k_b, k_h), token, k_n, D, BLOCK_D)  # [M, BLOCK_D]
        v_rows = load_rows(head_of(v, b, h, v_b, v_h), token, v_n, D, BLOCK_D)  # [M, BLOCK_D]
        q, do = head_of(q, b, h, q_b, q_h), head_of(do, b, h, do_b, do_h)
        lse += bh.to(tl.int64) * N
        delta += bh.to(tl.int64) * N
        none = tl.zeros([M], tl.float32)[:, None]  # [M, 1]
        if PREFIX:
            dk_rows, dv_rows = _meet_queries(
                k_rows, v_rows, dk_rows, dv_rows, q, do, q_seq, do_seq, lse, delta, b, h, 0, prefix, q_n, do_n, none, c,
                LEN, D, BLOCK_D, TMA, PRECISION,
            )  # fmt: skip
        if SUFFIX:
            dk_rows, dv_rows = _meet_queries(
                k_rows, v_rows, dk_rows, dv_rows, q, do, q_seq, do_seq, lse, delta, b, h, prefix + image, N, q_n, do_n,
                none, c, LEN, D, BLOCK_D, TMA, PRECISION,
            )  # fmt: skip
        first_y, first_x, across, near_cells = neighbourhood(cell_y, cell_x, near, first_row, stop_row, whole)
        count = near_cells
        if EXACT > 0:
            starts += bh.to(tl.int64) * (rows * columns + 1) + own
            begin = tl.load(starts)
            listed += bh.to(tl.int64) * rows * columns * EXACT + begin
            count += tl.load(starts + 1) - begin
        for i in tl.range(0, count * SPLIT * SPLIT):
            query_y, query_x, qy, qx = exact_tile(i, near_cells, first_y, first_x, across, listed, whole, T, SPLIT)
            q_rows = cell_tile(q, q_grid, b, h, qy, qx, whole, q_n, T, D, BLOCK_D, TMA)  # [M, BLOCK_D]
            do_rows = cell_tile(do, do_grid, b, h, qy, qx, whole, do_n, T, D, BLOCK_D, TMA)  # [M, BLOCK_D]
            place, there = tile_tokens(qy, qx, query_y, query_x, whole, T)  # [M]
            lse_cols, delta_cols = tl.load(lse + place), tl.load(delta + place)  # [M]
            if RAGGED:
                lse_cols = tl.where(there, lse_cols, -HIDDEN)
            dk_rows, dv_rows, _ = add_dkv(
                k_rows, v_rows, q_rows, do_rows, lse_cols, delta_cols, none, dk_rows, dv_rows, c, PRECISION
            )
        token, keep = tile_tokens(
            y0, x0, cell_y, cell_x, whole, T
        )  # [M], anew: kept over the loops it would take registers
        store_rows(own_head(dk, b, h, N, heads, D), token, heads * D, dk_rows * scale, keep, D, BLOCK_D)
        store_rows(own_head(dv, b, h, N, heads, D), token, heads * D, dv_rows, keep, D, BLOCK_D)


def backward(call: Call, do: Tensor, dlse: Tensor | None, o: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
    """Return the gradients of q, k, v, means_k, means_v and mass; that of mass is empty for None."""
    q, mass = call.q, call.mass
    means = [torch.zeros(t.shape, dtype=t.dtype, device=q.device) for t in (call.means_k, call.means_v)]
    d_mass = q.new_empty(0, dtype=torch.float32) if mass is None else torch.zeros_like(mass)
    if not q.numel():
        return *(torch.zeros_like(t) for t in (q, call.k, call.v)), *means, d_mass
    delta = delta_of(do, o, dlse, lse)
    dq = _dq(call, do, lse, delta)
    dk, dv = _dkv(call, do, lse, delta)
    fill_means(means, d_mass, call, do, lse, delta)
    return dq, dk, dv, *means, d_mass


def _dq(call: Call, do: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    q, k, v = call.q, call.k, call.v
    B, _, H, D = q.shape
    dq = call.empty(*q.shape, dtype=q.dtype)
    plan = plan_queries(call, _query_gradients, "multipole.gradients", do)
    tiles = call.tiles(plan.tiles.length)
    part_dq = q.new_empty((plan.parts, B, call.outside, H, D), dtype=torch.float32) if plan.parts > 1 else lse
    plan.run(
        q, k, v, do, call.means_k, call.means_v, dq, lse, delta, part_dq, call.chosen,
        masses(call.chosen, call.mass, call.size, tiles), lse if call.mask is None else call.mask,
        call.pyramid.tile_rows(tiles, q.device), boxed=(k, v, k, v, call.means_k, call.means_v),
    )  # fmt: skip
    if plan.parts > 1:
        _put_outside(call, dq, part_dq.sum(0))
    return dq


def _dkv(call: Call, do: Tensor, lse: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v = call.q, call.k, call.v
    B, _, H, D = q.shape
    dk, dv = k.new_empty(k.shape), v.new_empty(v.shape)
    plan = plan_keys(call, _key_gradients, "multipole.gradients", do)
    part_dkv = q.new_empty((plan.parts, 2, B, call.outside, H, D), dtype=torch.float32) if plan.parts > 1 else lse
    listed, starts = _choosers(call.chosen)
    plan.run(
        q, k, v, do, dk, dv, lse, delta, part_dkv, listed, starts, lse if call.mask is None else call.mask,
        boxed=(q, do, q, do),
    )  # fmt: skip
    if plan.parts > 1:
        for t, rows in zip((dk, dv), part_dkv.sum(0).unbind(0), strict=True):
            _put_outside(call, t, rows)
    return dk, dv


def _put_outside(call: Call, t: Tensor, rows: Tensor) -> None:
    """Write the tokens outside the grid, `rows` `[B, prefix + suffix, H, D]`, to `t` `[B, N, H, D]`."""
    height, width, prefix, *_ = call.size
    t[:, :prefix] = rows[:, :prefix]
    t[:, prefix + height * width :] = rows[:, prefix:]


def _choosers(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cells that chose each cell `[B, H, C * exact]`, and where the list of each begins `[B, H, C + 1]`.

    Both int32, and in a fixed order, so that sums are the same each time; those of none come last.
    """
    B, H, C, exact = chosen.shape
    values, order = chosen.flatten(2).sort(dim=-1, stable=True)
    cells = torch.arange(C + 1, dtype=torch.int32, device=chosen.device).expand(B, H, -1).contiguous()
    starts = torch.searchsorted(values, cells, out_int32=True)
    return (order // max(exact, 1)).int().contiguous(), starts
