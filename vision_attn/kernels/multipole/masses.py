"""What is added to the logits of the means of multipole attention in Triton: the logarithms of what they stand for."""

# the compiler of a kernel reads no annotations
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def"

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from vision_attn.kernels.multipole.pyramid import MeanTiles, Sized, pyramid
from vision_attn.kernels.multipole.tiles import tile_of_means
from vision_attn.kernels.triton.launching import Bound, Kernel, next_power, planned
from vision_attn.kernels.triton.rows import HIDDEN, LOG2E

_HEADS = 8  # of a program


@Kernel
@triton.jit
def _masses(
    mass, table, chosen, found, first_cell, heads, batch_heads, height, width, cell, near, columns, cells, tiles,
    across, mass_levels,
    PER_CELL: tl.constexpr, BLOCK: tl.constexpr, SKIP: tl.constexpr, LEN: tl.constexpr, EXACT: tl.constexpr,
    EXACT_BLOCK: tl.constexpr, MASS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """What is added to the logits of the means that one cell meets in `HEADS` heads, in units of log2: see `masses`.

    Launch: the cells from `first_cell` on.

    Inputs: mass `[heads, mass_levels]`, whose rows repeat; table as in `Pyramid.table`; chosen `[B, H, cells, EXACT]`;
    `tiles` of `LEN` rows as in `MeanTiles`, `across` to a row of parents.
    Outputs: found `[batch_heads, cells, tiles * LEN]`.
    """
    own = first_cell + tl.program_id(0)
    own_y, own_x = own // columns, own % columns
    e = tl.arange(0, EXACT_BLOCK)  # [EXACT_BLOCK]
    wide: tl.constexpr = 2 * PER_CELL
    for i in tl.range(0, tiles):
        level, block_y, block_x, skipped = tile_of_means(i, own_y, own_x, near, across, SKIP, LEN)
        n = skipped + tl.arange(0, LEN)  # [LEN], of a row of blocks
        bx, inner = block_x + n // BLOCK, n % BLOCK  # [LEN]
        y, x = block_y * wide + inner // wide, bx * wide + inner % wide  # [LEN]
        down, columns_of_means = tl.load(table + 4 * level + 2), tl.load(table + 4 * level + 3)
        seen = (inner < wide * wide) & (block_y >= 0) & (bx >= 0) & (y < down) & (x < columns_of_means)  # [LEN]
        seen = seen & (bx <= (own_x >> (level + 1)) + near)
        far = (tl.abs(y // PER_CELL - (own_y >> level)) > near) | (tl.abs(x // PER_CELL - (own_x >> level)) > near)
        side = (cell // PER_CELL) << level
        y0, x0 = y * side, x * side  # [LEN]
        y1, x1 = tl.minimum(y0 + side, height), tl.minimum(x0 + side, width)  # [LEN]
        whole = tl.where(seen & far, (y1 - y0) * (x1 - x0), 0)  # [LEN]
        for i_head in tl.range(0, HEADS):
            bh = tl.program_id(1) * HEADS + i_head
            bh = tl.minimum(bh, batch_heads - 1)  # the last program writes the last head again
            count = whole  # [LEN]
            if EXACT > 0:
                other = tl.load(
                    chosen + (bh.to(tl.int64) * cells + own) * EXACT + e, mask=e < EXACT, other=cells
                )  # [EXACT_BLOCK]
                ey0, ex0 = other // columns * cell, other % columns * cell  # [EXACT_BLOCK]
                ey1 = tl.where(other < cells, tl.minimum(ey0 + cell, height), 0)  # [EXACT_BLOCK]
                ex1 = tl.where(other < cells, tl.minimum(ex0 + cell, width), 0)  # [EXACT_BLOCK]
                tall = tl.minimum(y1[:, None], ey1[None, :]) - tl.maximum(y0[:, None], ey0[None, :])
                broad = tl.minimum(x1[:, None], ex1[None, :]) - tl.maximum(x0[:, None], ex0[None, :])
                count -= tl.sum(tl.maximum(tall, 0) * tl.maximum(broad, 0), 1)
            value = tl.log2(tl.maximum(count, 1).to(tl.float32))  # [LEN]
            if MASS:
                offset = tl.load(mass + bh % heads * mass_levels + tl.minimum(level, mass_levels - 1))
                value += offset.to(tl.float32) * LOG2E
            value = tl.where(count > 0, value, HIDDEN)
            tl.store(found + ((bh.to(tl.int64) * cells + own) * tiles + i) * LEN + tl.arange(0, LEN), value)


def masses(chosen: Tensor, mass: Tensor | None, size: Sequence[int], tiles: MeanTiles) -> Tensor:
    """Return what is added to the logits of means, in units of log2: hugely negative for rows that a cell does not see.

    A mean stands for the tokens of its square that are in none of the exact cells.

    Args:
        chosen: Exact cells, int32 `[B, H, C, exact]`.
        mass: Learned offsets `[H, levels]` as of `Cells.mass`, or None.
        size: Height, width, prefix, suffix, cell, near, pool, and the rows of cells that attend if not all do.
        tiles: The tiles of means that a cell meets.

    Returns:
        float32 `[B * H, C, rows of all tiles]`; `[1, C, rows]` where all heads agree.
    """
    B, H, C, exact = chosen.shape
    heads = 1 if exact == 0 and mass is None else B * H
    found = torch.empty((heads, C, tiles.count * tiles.length), dtype=torch.float32, device=chosen.device)
    if found.numel():
        call = Sized((chosen, mass), (*size, tiles.length, tiles.across, tiles.skip, tiles.count))
        _plan_masses(call)(found if mass is None else mass, pyramid(size).table(chosen.device), chosen, found)
    return found


@planned
def _plan_masses(call: Sized) -> Bound:
    (chosen, mass), (*size, length, across, skip, count) = call.tensors, call.numbers
    B, H, C, exact = chosen.shape
    rows = pyramid(size)
    first, stop = size[7:] or (0, rows.cells[0])
    heads = 1 if exact == 0 and mass is None else B * H
    each = min(heads, _HEADS)
    numbers = dict(
        first_cell=first * rows.cells[1], heads=H if mass is None else len(mass), batch_heads=heads,
        height=rows.height, width=rows.width, cell=rows.cell, near=rows.near, columns=rows.cells[1], cells=C,
        tiles=count, across=across, mass_levels=1 if mass is None else mass.shape[1],
        PER_CELL=rows.per_cell, BLOCK=rows.block, SKIP=skip, LEN=length, EXACT=exact,
        EXACT_BLOCK=next_power(max(exact, 1)), MASS=mass is not None, HEADS=each, num_warps=1 if length < 64 else 2,
    )  # fmt: skip
    return Bound(_masses, ((stop - first) * rows.cells[1], math.ceil(heads / each)), (), numbers)
