"""The gradients of the means of multipole attention in Triton, level by level, without atomics.

A program owns a square of means of one level and walks the cells that see them, from one cell of each of the level's
cells; so all programs of all levels meet about as many queries, and their parts are added in a fixed order.
"""

# the compiler of a kernel reads no annotations
# ruff: noqa: ANN001, ANN202, PLR0915
# mypy: disable-error-code="no-untyped-def"

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vision_attn.kernels.launches import Launch
from vision_attn.kernels.multipole.op import Call
from vision_attn.kernels.multipole.tiles import cell_tile, grid_boxes, inner_tile, mean_row, tile_tokens
from vision_attn.kernels.triton.launching import Kernel, launch_of, layout, next_power, strides_of, thrice
from vision_attn.kernels.triton.rows import HIDDEN, LOG2E, head_of, load_rows, store_rows


@triton.jit
def add_dkv(k_rows, v_rows, q_rows, do_rows, lse_cols, delta_cols, bias, dk_rows, dv_rows, c, PRECISION: tl.constexpr):
    """Add what a tile of queries gives to dk and dv `[keys, BLOCK_D]`; bias `[keys, queries]` or broadcasts to it.

    Also returns ds `[keys, queries]`.
    """
    s = tl.dot(k_rows, tl.trans(q_rows), input_precision=PRECISION) * c + (bias - lse_cols[None, :])
    p = tl.math.exp2(s)  # [keys, queries]
    dv_rows = tl.dot(p.to(do_rows.dtype), do_rows, dv_rows, input_precision=PRECISION)
    dp = tl.dot(v_rows, tl.trans(do_rows), input_precision=PRECISION)  # [keys, queries]
    ds = p * (dp - delta_cols[None, :])  # [keys, queries]
    dk_rows = tl.dot(ds.to(q_rows.dtype), q_rows, dk_rows, input_precision=PRECISION)
    return dk_rows, dv_rows, ds


@Kernel
@triton.jit
def _mean_gradients(
    q, do, means_k, means_v, part_dk, part_dv, part_mass, lse, delta, chosen, mass, q_grid, do_grid,
    q_b, q_n, q_h, do_b, do_n, do_h, mk_b, mk_n, mk_h, mv_b, mv_n, mv_h,
    N, heads, batch, prefix, height, width, cell, near, rows, columns, first_row, stop_row, scale, level, first, size,
    blocks, down, across,
    level_rows, level_columns, tiles_x, mass_heads, mass_levels,
    T: tl.constexpr, SPLIT: tl.constexpr, EXACT: tl.constexpr, EXACT_BLOCK: tl.constexpr, SIDE: tl.constexpr,
    PER_CELL: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, MASS: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of `SIDE` x `SIDE` means of one level, from one cell of each of the level's cells that see them.

    Inputs: q, do `[B, N, H, D]`, means_k, means_v `[B, M, H, D]`, each with strides `_b, _n, _h`; lse, delta
    `[B, H, N]`; chosen `[B, H, C, EXACT]`; mass `[mass_heads, mass_levels]`. The level has `down` x `across` means in
    `size` rows from the `first` on, `blocks` blocks side by side, and `level_rows` x `level_columns` cells of
    `PER_CELL` x `PER_CELL` means.
    Outputs: part_dk, part_dv `[parts, B, size, H, D]`, part_mass `[parts, programs, B, H]`.
    """
    KEYS: tl.constexpr = SIDE * SIDE
    pid, part, bh = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b, h = bh // heads, bh % heads
    c = scale * LOG2E
    whole = (height, width, prefix, cell, rows, columns)
    n = tl.arange(0, KEYS)  # [KEYS]
    first_my, first_mx = pid // tiles_x * SIDE, pid % tiles_x * SIDE
    my, mx = first_my + n // SIDE, first_mx + n % SIDE  # [KEYS]
    keep = (my < down) & (mx < across)
    mean = tl.where(keep, mean_row(my, mx, 0, blocks, PER_CELL, BLOCK), 0)  # [KEYS]
    k_rows = load_rows(head_of(means_k, b, h, mk_b, mk_h), first + mean, mk_n, D, BLOCK_D)  # [KEYS, BLOCK_D]
    v_rows = load_rows(head_of(means_v, b, h, mv_b, mv_h), first + mean, mv_n, D, BLOCK_D)  # [KEYS, BLOCK_D]
    side = (cell // PER_CELL) << level
    y0, x0 = my * side, mx * side  # [KEYS]
    y1, x1 = tl.minimum(y0 + side, height), tl.minimum(x0 + side, width)  # [KEYS]
    cell_y, cell_x = my // PER_CELL, mx // PER_CELL  # [KEYS], of the level
    last_y = tl.minimum(first_my + SIDE, down) - 1
    last_x = tl.minimum(first_mx + SIDE, across) - 1
    # the level's cells whose parent is near that of a key's cell
    from_y = tl.maximum((first_my // PER_CELL // 2 - near) * 2, 0)
    from_x = tl.maximum((first_mx // PER_CELL // 2 - near) * 2, 0)
    to_y = tl.minimum((last_y // PER_CELL // 2 + near) * 2 + 2, level_rows)
    from_y, to_y = tl.maximum(from_y, first_row >> level), tl.minimum(to_y, ((stop_row - 1) >> level) + 1)
    to_x = tl.minimum((last_x // PER_CELL // 2 + near) * 2 + 2, level_columns)
    q, do = head_of(q, b, h, q_b, q_h), head_of(do, b, h, do_b, do_h)
    lse += bh.to(tl.int64) * N
    delta += bh.to(tl.int64) * N
    dk_rows = tl.zeros([KEYS, BLOCK_D], tl.float32)  # [KEYS, BLOCK_D]
    dv_rows = tl.zeros([KEYS, BLOCK_D], tl.float32)  # [KEYS, BLOCK_D]
    dmass = 0.0
    e = tl.arange(0, EXACT_BLOCK)  # [EXACT_BLOCK]
    offset = 0.0
    if MASS:
        offset = tl.load(mass + bh % mass_heads * mass_levels + tl.minimum(level, mass_levels - 1)) * LOG2E
    wide = to_x - from_x
    for i in tl.range(0, tl.maximum(to_y - from_y, 0) * wide * SPLIT * SPLIT):
        at = i // (SPLIT * SPLIT)
        ly, lx = from_y + at // wide, from_x + at % wide
        cy, cx = (ly << level) + (part >> level), (lx << level) + (part & ((1 << level) - 1))
        inside = (cy >= first_row) & (cy < stop_row) & (cx < columns)
        cy, cx = tl.where(inside, cy, 0), tl.where(inside, cx, 0)
        own = cy * columns + cx
        qy, qx = inner_tile(cy, cx, i % (SPLIT * SPLIT), cell, T, SPLIT)
        q_rows = cell_tile(q, q_grid, b, h, qy, qx, whole, q_n, T, D, BLOCK_D, TMA)  # [M, BLOCK_D]
        do_rows = cell_tile(do, do_grid, b, h, qy, qx, whole, do_n, T, D, BLOCK_D, TMA)  # [M, BLOCK_D]
        place, there = tile_tokens(qy, qx, cy, cx, whole, T)  # [M]
        lse_cols = tl.where(there, tl.load(lse + place), -HIDDEN)  # [M]
        delta_cols = tl.load(delta + place)  # [M]
        far = tl.maximum(tl.abs(cell_y - ly), tl.abs(cell_x - lx)) > near  # [KEYS]
        parents = tl.maximum(tl.abs(cell_y // 2 - ly // 2), tl.abs(cell_x // 2 - lx // 2)) <= near  # [KEYS]
        count = (y1 - y0) * (x1 - x0)  # [KEYS]
        if EXACT > 0:
            other = tl.load(
                chosen + (bh.to(tl.int64) * rows * columns + own) * EXACT + e, mask=e < EXACT, other=rows * columns
            )  # [EXACT_BLOCK]
            ey0, ex0 = other // columns * cell, other % columns * cell  # [EXACT_BLOCK]
            ey1 = tl.where(other < rows * columns, tl.minimum(ey0 + cell, height), 0)  # [EXACT_BLOCK]
            ex1 = tl.where(other < rows * columns, tl.minimum(ex0 + cell, width), 0)  # [EXACT_BLOCK]
            tall = tl.minimum(y1[:, None], ey1[None, :]) - tl.maximum(y0[:, None], ey0[None, :])
            broad = tl.minimum(x1[:, None], ex1[None, :]) - tl.maximum(x0[:, None], ex0[None, :])
            count -= tl.sum(tl.maximum(tall, 0) * tl.maximum(broad, 0), 1)
        bias = tl.log2(tl.maximum(count, 1).to(tl.float32)) + offset  # [KEYS]
        bias = tl.where(keep & far & parents & (count > 0) & inside, bias, HIDDEN)
        dk_rows, dv_rows, ds = add_dkv(
            k_rows, v_rows, q_rows, do_rows, lse_cols, delta_cols, bias[:, None], dk_rows, dv_rows, c, PRECISION
        )
        if MASS:
            dmass += tl.sum(ds)
    row = (part * batch + b).to(tl.int64) * size * heads + h
    store_rows(part_dk + row * D, mean, heads * D, dk_rows * scale, keep, D, BLOCK_D)
    store_rows(part_dv + row * D, mean, heads * D, dv_rows, keep, D, BLOCK_D)
    if MASS:
        tl.store(part_mass + (part * tl.num_programs(0) + pid).to(tl.int64) * batch * heads + bh, dmass)


def fill_means(d_means: list[Tensor], d_mass: Tensor, call: Call, do: Tensor, lse: Tensor, delta: Tensor) -> None:
    """Write the gradients of the means of all levels, and of their masses."""
    q = call.q
    B, N, H, D = q.shape
    height, width, prefix, _, cell, near, _ = call.size[:7]
    rows, exact = call.pyramid, call.chosen.shape[3]
    if not rows.levels:
        return
    mass = lse if call.mass is None else call.mass
    strides = (
        *strides_of(q, do, call.means_k, call.means_v), N, H, B, prefix, height, width, cell, near, *rows.cells,
        *call.rows,
    )  # fmt: skip
    least = 16 if thrice(q) == "ieee" else 1  # AMD has no narrower tiles
    more = dict(
        EXACT=exact, EXACT_BLOCK=next_power(max(least, exact)), PER_CELL=rows.per_cell, BLOCK=rows.block, D=D,
        BLOCK_D=call.block_d, MASS=call.mass is not None, PRECISION=thrice(q),
    )  # fmt: skip

    def of(launch: Launch) -> tuple[int, tuple[Any, Any], dict[str, Any]]:
        """Return the side of a square of means, boxes of q and do, and arguments by name."""
        T = call.tile(launch)
        side = min(*launch.own, (4 if rows.per_cell == 1 else 8) if call.block_d * q.element_size() <= 256 else 4)
        boxes, tma = grid_boxes(call, do, T)
        named = dict(T=T, SPLIT=call.split(T), SIDE=side, TMA=tma, **launch.options)
        return side, boxes, named

    def needs(launch: Launch) -> int:
        _, boxes, named = of(launch)
        made, counts = [lse.dtype] * 3, (2,) * 11  # the counts of a level are no matter
        return _mean_gradients.needs(
            q, do, call.means_k, call.means_v, *made, lse, delta, call.chosen, mass, *boxes, *strides, call.scale,
            *counts, **named, **more,
        )  # fmt: skip

    constants = cell, *more.values(), layout(q), layout(do)
    side, boxes, named = of(launch_of("multipole.gradients", q, ("means", *constants), needs))
    for level in range(rows.levels):
        (down, across), first, size = rows.means(level), rows.first[level], rows.first[level + 1] - rows.first[level]
        tiles, parts = (math.ceil(down / side), math.ceil(across / side)), 4**level
        new = q.new_empty if rows.full else q.new_zeros
        dk, dv = (new((parts, B, size, H, D), dtype=torch.float32) for _ in range(2))
        part_mass = lse if call.mass is None else lse.new_empty((parts, tiles[0] * tiles[1], B, H))
        _mean_gradients[(tiles[0] * tiles[1], parts, B * H)](
            q, do, call.means_k, call.means_v, dk, dv, part_mass, lse, delta, call.chosen, mass, *boxes, *strides,
            call.scale, level, first, size, rows.blocks(level)[1], down, across,
            *(math.ceil(n / (1 << level)) for n in rows.cells), tiles[1],
            *((1, 1) if call.mass is None else call.mass.shape), **named, **more,
        )  # fmt: skip
        for whole, part in zip(d_means, (dk, dv), strict=True):
            whole[:, first : first + size] = part.sum(0)
        if call.mass is not None:
            by_row = part_mass.sum((0, 1)).view(-1, len(d_mass)).sum(0)
            d_mass[:, min(level, d_mass.shape[1] - 1)] += by_row
