"""What the kernels of multipole attention share: how launches are laid out, tiles of cells, and tiles of means.

A cell is cut into tiles of T x T tokens, as few as hold it: one of 8 x 8 for the cell of 8. A program of the grid owns
the queries of one tile. Kernels pass one tuple around:

    whole = (height, width, prefix, cell, rows, columns)     the grid, the side of a cell, rows and columns of cells
"""

# the compiler of a kernel reads no annotations
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def"

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vision_attn.kernels.launches import Launch, fitting
from vision_attn.kernels.multipole.op import Call
from vision_attn.kernels.triton.launching import Bound, Kernel, next_power, planned, strides_of, thrice
from vision_attn.kernels.triton.rows import Box, Plan, box_strides, load_rows, sequence_box, splits, uses_boxes


@planned
def plan_queries(call: Call, kernel: Kernel, name: str, *others: Tensor) -> Plan:
    """Plan a launch whose programs own queries; `others` are tensors of the launch beside the call's."""
    made = torch.float32
    tensors = (
        call.q, call.k, call.v, *others, call.means_k, call.means_v, call.q.dtype, made, made, made, call.chosen, made,
        made if call.mask is None else call.mask, torch.int32,
    )  # fmt: skip

    def attempt(launch: Launch) -> tuple[Plan, int]:
        plan = _plan_queries_launch(call, kernel, launch, others)
        return plan.needs(*tensors, boxed=(call.k, call.v, call.k, call.v, call.means_k, call.means_v))

    return fitting(name, call.q, attempt, channels=call.block_d)


def _plan_queries_launch(call: Call, kernel: Kernel, launch: Launch, others: Sequence[Tensor]) -> Plan:
    B, N, H, D = call.q.shape
    height, width, prefix, suffix, cell, near, _ = call.size[:7]
    T, tiles, columns = call.tile(launch), call.tiles(launch.length), call.pyramid.cells[1]
    split = call.split(T)
    M, LEN = T * T, launch.length
    first_cell, own_cells = call.rows[0] * columns, (call.rows[1] - call.rows[0]) * columns
    grid_programs = B * H * own_cells * split**2
    blocks = 0 if call.partial else B * H * -(-call.outside // M)
    met = (2 * near + 1) ** 2 * cell**2 + call.chosen.shape[3] * cell**2 + tiles.count * tiles.length + call.outside
    parts, length = splits(call.q, blocks, N, grid_programs * met, LEN)
    tma = uses_boxes((call.k, call.v, call.means_k, call.means_v) if tiles.count else (call.k, call.v))
    boxes: list[Box | None] = [None] * 6
    if tma:
        if call.outside:
            boxes[:2] = [sequence_box(t, LEN, call.block_d) for t in (call.k, call.v)]
        boxes[2:4] = [grid_box(t, call.size, T, call.block_d) for t in (call.k, call.v)]
        if tiles.count:
            boxes[4:] = [sequence_box(t, tiles.length, call.block_d) for t in (call.means_k, call.means_v)]
    numbers: dict[str, Any] = dict(
        mask_b=0 if call.mask is None else call.mask.stride(0) * (call.mask.shape[0] > 1), N=N, heads=H, batch=B,
        prefix=prefix, height=height, width=width, outside=call.outside, cell=cell, near=near,
        rows=call.pyramid.cells[0], columns=columns, first_cell=first_cell, own_cells=own_cells,
        means=call.means_k.shape[1], tiles=tiles.count,
        scale=call.scale, row_programs=blocks * parts, part_length=length,
        together=call.together, parts=parts, T=T, SPLIT=split, EXACT=call.chosen.shape[3],
        EXACT_BLOCK=next_power(max(1, call.chosen.shape[3])), LEN=LEN, MEANS=tiles.length if tiles.count else 0, D=D,
        BLOCK_D=call.block_d, MASK=call.mask is not None, ALIKE=call.alike, PREFIX=prefix > 0, SUFFIX=suffix > 0,
        RAGGED=call.ragged(T), RAGGED_PREFIX=prefix % LEN > 0, TMA=tma,
        PRECISION=thrice(call.q), **launch.options,
    )  # fmt: skip
    strides = strides_of(call.q, call.k, call.v, *others, call.means_k, call.means_v)
    return Plan(Bound(kernel, (blocks * parts + grid_programs,), strides, numbers), parts, tuple(boxes), launch)


@planned
def plan_keys(call: Call, kernel: Kernel, name: str, do: Tensor) -> Plan:
    """Plan a launch whose programs own keys and walk queries and the output's gradient."""
    q, k, v, made = call.q, call.k, call.v, torch.float32
    mask = made if call.mask is None else call.mask
    tensors = q, k, v, do, k.dtype, v.dtype, made, made, made, torch.int32, torch.int32, mask

    def attempt(launch: Launch) -> tuple[Plan, int]:
        return _plan_keys_launch(call, kernel, launch, do).needs(*tensors, boxed=(q, do, q, do))

    return fitting(name, q, attempt, channels=call.block_d)


def _plan_keys_launch(call: Call, kernel: Kernel, launch: Launch, do: Tensor) -> Plan:
    B, N, H, D = call.q.shape
    height, width, prefix, suffix, cell, near, _ = call.size[:7]
    T, C, exact = call.tile(launch), call.count, call.chosen.shape[3]
    split = call.split(T)
    grid_programs = B * H * C * split**2
    blocks = B * H * -(-call.outside // (T * T))
    met = ((2 * near + 1) ** 2 + exact) * cell**2 + call.outside
    first_query, stop_query = call.queries
    span = max(stop_query - first_query, 1)
    parts, length = splits(call.q, blocks, span, grid_programs * met, launch.length)
    tma = uses_boxes((call.q, do))
    boxes: list[Box | None] = [None] * 4
    if tma:
        if call.outside:
            boxes[:2] = [sequence_box(t, launch.length, call.block_d) for t in (call.q, do)]
        boxes[2:] = [grid_box(t, call.size, T, call.block_d) for t in (call.q, do)]
    numbers: dict[str, Any] = dict(
        mask_b=0 if call.mask is None else call.mask.stride(0) * (call.mask.shape[0] > 1), N=N, heads=H, batch=B,
        prefix=prefix, height=height, width=width, outside=call.outside, cell=cell, near=near,
        rows=call.pyramid.cells[0], columns=call.pyramid.cells[1], first_row=call.rows[0], stop_row=call.rows[1],
        first_query=first_query, stop_query=stop_query, scale=call.scale, row_programs=blocks * parts,
        part_length=length, together=call.together, parts=parts, T=T, SPLIT=split, EXACT=exact, LEN=launch.length, D=D,
        BLOCK_D=call.block_d, MASK=call.mask is not None,
        PREFIX=prefix > 0 and not call.partial, SUFFIX=suffix > 0, RAGGED=call.ragged(T), TMA=tma,
        PRECISION=thrice(call.q), **launch.options,
    )  # fmt: skip
    strides = strides_of(call.q, call.k, call.v, do)
    return Plan(Bound(kernel, (blocks * parts + grid_programs,), strides, numbers), parts, tuple(boxes), launch)


def grid_boxes(call: Call, do: Tensor, tile: int) -> tuple[tuple[Any, Any], bool]:
    """Return tiles of the grid's q and do for TMA, and whether it can fetch them; else the tensors."""
    if not uses_boxes((call.q, do)):
        return (call.q, do), False
    q_box, do_box = (grid_box(t, call.size, tile, call.block_d).of(t) for t in (call.q, do))
    return (q_box, do_box), True


def grid_box(t: Tensor, size: Any, tile: int, block_d: int) -> Box:
    """Return boxes of a tile of one head of the grid; rows and columns beyond it read as zero."""
    height, width, prefix, *_ = size
    b, n, h, d = box_strides(t)
    return Box(
        prefix * n, [t.shape[0], height, width, *t.shape[2:]], [b, width * n, n, h, d], [1, tile, tile, 1, block_d]
    )


@triton.jit
def grid_program(pid, heads, together, whole, first_cell, own_cells, T: tl.constexpr, SPLIT: tl.constexpr):
    """What program `pid` of the grid owns, which is of the `own_cells` cells from `first_cell` on.

    Batch entry, head, number of both; its cell, the cell's row and column; first row and column of its tile.

    `together` heads share a tile's place in the launch: see `Call.together`.
    """
    _, _, _, side, _, columns = whole
    member = pid % together
    pid = pid // together
    inner = pid % (SPLIT * SPLIT)
    pid = pid // (SPLIT * SPLIT)
    cell = first_cell + pid % own_cells
    bh = pid // own_cells * together + member
    cell_y, cell_x = cell // columns, cell % columns
    y0, x0 = inner_tile(cell_y, cell_x, inner, side, T, SPLIT)
    return bh // heads, bh % heads, bh, cell, cell_y, cell_x, y0, x0


@triton.jit
def tile_tokens(y0, x0, cell_y, cell_x, whole, T: tl.constexpr):
    """Places in the sequence of a tile's tokens, `[T * T]`, and whether they are of the cell and the grid."""
    height, width, prefix, side, _, _ = whole
    n = tl.arange(0, T * T)  # [T * T]
    y, x = y0 + n // T, x0 + n % T  # [T * T]
    there = (y < tl.minimum(cell_y * side + side, height)) & (x < tl.minimum(cell_x * side + side, width))
    return tl.where(there, prefix + y * width + x, prefix), there


@triton.jit
def cell_tile(
    base, box, b, h, y0, x0, whole, stride, T: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, TMA: tl.constexpr
):
    """The tile of tokens at (y0, x0), `[T * T, BLOCK_D]`; outside the grid it is arbitrary but finite."""
    if TMA:
        rows = box.load([b, y0, x0, h, 0]).reshape(T * T, BLOCK_D)
    else:
        height, width, prefix, _, _, _ = whole
        n = tl.arange(0, T * T)  # [T * T]
        y, x = tl.minimum(y0 + n // T, height - 1), tl.minimum(x0 + n % T, width - 1)  # [T * T]
        rows = load_rows(base, prefix + y * width + x, stride, D, BLOCK_D)
    return rows


@triton.jit
def neighbourhood(cell_y, cell_x, near, first_row, stop_row, whole):
    """First row, first column, and columns of the cells near a cell in some rows of cells, and how many there are."""
    _, _, _, _, _, columns = whole
    y0, x0 = tl.maximum(cell_y - near, first_row), tl.maximum(cell_x - near, 0)
    y1, x1 = tl.minimum(cell_y + near, stop_row - 1) + 1, tl.minimum(cell_x + near, columns - 1) + 1
    return y0, x0, x1 - x0, tl.maximum(y1 - y0, 0) * (x1 - x0)


@triton.jit
def inner_tile(cell_y, cell_x, inner, side, T: tl.constexpr, SPLIT: tl.constexpr):
    """First row and column of tile `inner` of a cell of `side` tokens."""
    return cell_y * side + inner // SPLIT * T, cell_x * side + inner % SPLIT * T


@triton.jit
def _quotient(n, divisor):
    """Compute `n // divisor` for n below 2^21; to divide integers takes 20 instructions, and a tile needs it twice."""
    return ((n.to(tl.float32) + 0.5) * (1.0 / divisor)).to(tl.int32)


@triton.jit
def exact_tile(i, near_cells, first_y, first_x, across, chosen, whole, T: tl.constexpr, SPLIT: tl.constexpr):
    """Row and column of the cell of tile i of near cells, then chosen ones; and the tile's first row and column."""
    _, _, _, side, _, columns = whole
    n = i // (SPLIT * SPLIT)
    other = tl.load(chosen + n - near_cells, mask=n >= near_cells, other=0)
    row, chosen_y = _quotient(n, across), _quotient(other, columns)
    cell_y = tl.where(n < near_cells, first_y + row, chosen_y)
    cell_x = tl.where(n < near_cells, first_x + n - row * across, other - chosen_y * columns)
    y0, x0 = inner_tile(cell_y, cell_x, i % (SPLIT * SPLIT), side, T, SPLIT)
    return cell_y, cell_x, y0, x0


@triton.jit
def exact_block(i, near_cells, first_y, first_x, across, chosen, columns, SPLIT: tl.constexpr):
    """Number of tile i of near cells, then chosen ones, where tiles are counted cell by cell."""
    n = i // (SPLIT * SPLIT)
    other = tl.load(chosen + n - near_cells, mask=n >= near_cells, other=0)
    row = _quotient(n, across)
    cell = tl.where(n < near_cells, (first_y + row) * columns + first_x + n - row * across, other)
    return cell * (SPLIT * SPLIT) + i % (SPLIT * SPLIT)


@triton.jit
def exact_count(chosen, cells, EXACT: tl.constexpr, EXACT_BLOCK: tl.constexpr):
    """How many cells are chosen; those that are none come last."""
    e = tl.arange(0, EXACT_BLOCK)  # [EXACT_BLOCK]
    found = tl.load(chosen + e, mask=e < EXACT, other=cells)  # [EXACT_BLOCK]
    return tl.sum((found < cells).to(tl.int32), 0)


@triton.jit
def mean_row(y, x, start, blocks, PER_CELL: tl.constexpr, BLOCK: tl.constexpr):
    """The row of mean (y, x) of a level that starts at row `start` and has `blocks` blocks side by side."""
    wide: tl.constexpr = 2 * PER_CELL
    return start + (y // wide * blocks + x // wide) * BLOCK + y % wide * wide + x % wide


@triton.jit
def area(y, x, side, height, width):
    """Tokens of square (y, x) of those of `side` tokens that the grid is cut into."""
    return tl.minimum(height - y * side, side) * tl.minimum(width - x * side, side)


@triton.jit
def tile_of_means(i, own_y, own_x, near, across, SKIP: tl.constexpr, LEN: tl.constexpr):
    """Level, row of blocks, first column of blocks, and rows left out from there, of tile i of those a cell meets.

    The cell is (own_y, own_x); `across` tiles hold the blocks of one row of parents: see `MeanTiles`.
    """
    span = 2 * near + 1
    each = span * across
    if SKIP:
        each -= 1
    level, j = i // each, i % each
    if SKIP:
        j += (j >= near * span + near).to(tl.int32)
    return level, (own_y >> (level + 1)) - near + j // across, (own_x >> (level + 1)) - near, j % across * LEN


@triton.jit
def mean_tile(
    base, box, b, h, first, rows, stride, LEN: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, TMA: tl.constexpr
):
    """`LEN` rows of means from `first` on, `[LEN, BLOCK_D]`; outside the `rows` there are, arbitrary but finite."""
    if TMA:
        found = box.load([b, first, h, 0]).reshape(LEN, BLOCK_D)
    else:
        index = tl.maximum(tl.minimum(first + tl.arange(0, LEN), rows - 1), 0)  # [LEN]
        found = load_rows(base, index, stride, D, BLOCK_D)
    return found
