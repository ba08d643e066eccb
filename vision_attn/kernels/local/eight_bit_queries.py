"""The launch of local attention in 8 bits, in Triton: see `vision_attn/kernels/eight_bits.py` for what it computes.

It is laid out as the forward of `queries.py`. But it reads blocks of tokens as `quantising.py` wrote them: each is one
piece of memory with one scale. So the tiles of keys are the cells of the sub-grid, and a window's walk begins at the
cell that its first key lies in.
"""

# ruff: noqa: ANN001, ANN202, E741  # the compiler of a kernel reads no annotations
# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

from vision_attn.kernels.eight_bits import CELL, SLOTS, Blocks
from vision_attn.kernels.launches import Launch, fitting
from vision_attn.kernels.local.op import Call
from vision_attn.kernels.local.tiles import (
    band_columns,
    coordinates,
    grid_program,
    key_range,
    tile_tokens,
    windowed,
)
from vision_attn.kernels.triton.eight_bits import (
    attend_outside,
    block_boxes,
    check_blocks,
    flat,
    kind_of,
    load_block,
    meet_blocks,
    nothing_met,
    refuse_other_gpus,
    rounded_logits,
    run_blocks,
    update_rounded,
    values_met,
)
from vision_attn.kernels.triton.launching import Bound, Kernel, planned, strides_of
from vision_attn.kernels.triton.quantising import interpreted, quantise, round_queries
from vision_attn.kernels.triton.rows import LOG2E, Plan, own_head, splits, store_rows

_SIDE, _SLOTS = tl.constexpr(CELL), tl.constexpr(SLOTS)


@triton.jit
def _columns(row, near, DISC: tl.constexpr):
    """First column of the first cell, and end, of what the band of cells from `row` on holds for the own cell."""
    start, stop = band_columns(row, near, _SIDE, DISC)
    return start // _SIDE * _SIDE, stop


@triton.jit
def _walk(y0, x0, sub, window, DISC: tl.constexpr):
    """The cells that the cell at (y0, x0) meets: as `tiles.walk`, but no cell is cut."""
    _, _, length_y, length_x = sub
    KY, KX, reach, limit = window
    y1, x1 = tl.minimum(y0 + _SIDE, length_y) - 1, tl.minimum(x0 + _SIDE, length_x) - 1
    start_y, stop_y = key_range(y0, y1, length_y, KY, reach, DISC)
    start_x, stop_x = key_range(x0, x1, length_x, KX, reach, DISC)
    near = (y0, y1, x0, x1, start_x, stop_x, length_x, limit)
    row = start_y // _SIDE * _SIDE
    bands = tl.cdiv(stop_y - row, _SIDE)
    count = bands * 0
    for band in tl.range(0, bands):
        start, stop = _columns(row + band * _SIDE, near, DISC)
        count += tl.cdiv(stop - start, _SIDE)
    # a sub-grid may have fewer cells than the largest: its last programs own no token
    count = tl.where((y0 < length_y) & (x0 < length_x), count, 0)
    column, stop = _columns(row, near, DISC)
    return count, row, column, stop, near


@triton.jit
def _cell(sub, whole, row, column):
    """The number of a cell among those of a head; one beyond the grid has any."""
    group_y, group_x, _, _ = sub
    height, width, _, step_y, step_x = whole
    down, across = tl.cdiv(tl.cdiv(height, step_y), _SIDE), tl.cdiv(tl.cdiv(width, step_x), _SIDE)
    return ((group_y * step_x + group_x) * down + row // _SIDE) * across + column // _SIDE


@Kernel
@triton.jit
def _forward(
    q, places, k8, v8, k_scale, v_scale, hidden, o, part_o, part_lse, k_box, v_box, q_b, q_n, q_h,
    N, heads, batch, prefix, height, width, outside, blocks, outside_blocks, limit, reach, KY, KX, step_y, step_x,
    scale, row_programs, part_length, together, parts,
    D: tl.constexpr, BLOCK_D: tl.constexpr, DISC: tl.constexpr, TMA: tl.constexpr, INT8: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Output of a block of queries: of a cell of the grid, or of tokens outside it over a part of the blocks of keys.

    Inputs, boxes and outputs: see `attend_outside`.
    Grid and window: see `tiles.py`. A head has `blocks` blocks, the first `outside_blocks` of tokens outside the grid.
    Launch: `row_programs` programs for the tokens outside the grid, each over `part_length` blocks, then those of the
    cells, `together` heads in turn.
    """
    pid = tl.program_id(0)
    if pid < row_programs:
        attend_outside(
            pid, q, places, k8, v8, k_scale, v_scale, hidden, o, part_o, part_lse, k_box, v_box, q_b, q_n, q_h,
            N, heads, batch, prefix, height * width, outside, blocks, outside_blocks, scale, part_length, parts,
            D, BLOCK_D, TMA, INT8, INTERPRETED,
        )  # fmt: skip
    else:
        whole, window = (height, width, prefix, step_y, step_x), (KY, KX, reach, limit)
        b, h, bh, sub, y0, x0, keep, _ = grid_program(pid - row_programs, heads, together, whole, _SIDE, _SIDE)
        m, l, acc = nothing_met(BLOCK_D)
        start = bh * blocks
        own = outside_blocks + _cell(sub, whole, y0, x0)
        q_rows, q_scale = round_queries(
            q, places, b, h, own, q_b, q_n, q_h, D, BLOCK_D, INT8, INTERPRETED
        )  # [64, BLOCK_D]
        c = scale * LOG2E * q_scale
        m, l, acc = meet_blocks(
            q_rows, c, m, l, acc, k8, v8, k_box, v_box, k_scale, hidden + b.to(tl.int64) * blocks * _SLOTS, start, 0,
            outside_blocks, BLOCK_D, TMA, INT8, INTERPRETED,
        )  # fmt: skip
        count, row, column, stop, near = _walk(y0, x0, sub, window, DISC)
        qy, qx = coordinates(y0, x0, _SIDE, _SIDE, DISC)  # [64]
        place = start + outside_blocks + _cell(sub, whole, row, column)
        ahead = tl.load(k_scale + place)
        for _i in tl.range(0, count):
            k_rows = load_block(k8, k_box, place, _SLOTS, BLOCK_D, TMA)  # [64, BLOCK_D]
            v_columns = load_block(v8, v_box, place, BLOCK_D, _SLOTS, TMA)  # [BLOCK_D, 64]
            s = rounded_logits(q_rows, k_rows, c * ahead, INT8, INTERPRETED)  # [64, 64]
            ky, kx = coordinates(row, column, _SIDE, _SIDE, DISC)  # [64]
            s = windowed(
                s, qy[:, None], qx[:, None], ky[None, :], kx[None, :], sub, window, hidden, False, 0, DISC
            )  # [64, 64]
            ended = column + _SIDE >= stop
            row = tl.where(ended, row + _SIDE, row)
            first, stop = _columns(row, near, DISC)
            column = tl.where(ended, first, column + _SIDE)
            # the scale of the next block is there when its product is; after the last one it is any
            place = tl.minimum(start + outside_blocks + _cell(sub, whole, row, column), start + blocks - 1)
            ahead = tl.load(k_scale + place)
            m, l, acc = update_rounded(s, v_columns, m, l, acc, INTERPRETED)
        _, acc = values_met(l, acc, v_scale + bh * BLOCK_D, BLOCK_D)
        token = tile_tokens(y0, x0, sub, whole, _SIDE, _SIDE)  # [64]
        store_rows(own_head(o, b, h, N, heads, D), token, heads * D, acc, keep, D, BLOCK_D)


def forward(call: Call, precision: str) -> Tensor:
    """Return the output `[B, N, H, D]` with q and k in `precision`."""
    q = call.q
    refuse_other_gpus(q)
    if not q.numel():
        return q.new_empty(q.shape)
    block_d = max(call.block_d, 32)  # what a product of 8 bits sums over at least
    x = quantise(call.k, call.v, call.mask, _blocks(call), block_d, kind_of(precision))
    return run_blocks(_plan(call, x.k, x.v), x, q, call.outside, call.size[2], (), flat(x.k, x.v))


def _blocks(call: Call) -> Blocks:
    height, width, prefix, suffix = call.size
    return Blocks((height, width, prefix, suffix), (call.steps[0], call.steps[1]))


@planned
def _plan(call: Call, k8: Tensor, v8: Tensor) -> Plan:
    """Plan the launch that fits, for keys like `k8` and values like `v8`."""
    made = call.q, torch.int32, k8, v8, *[torch.float32] * 3, call.q.dtype, *[torch.float32] * 2

    def attempt(launch: Launch) -> tuple[Plan, int]:
        check_blocks(launch)
        return _plan_launch(call, launch, k8, v8).needs(*made, boxed=flat(k8, v8))

    return fitting("local.eight_bit", call.q, attempt, channels=call.block_d, columns=call.span)


def _plan_launch(call: Call, launch: Launch, k8: Tensor, v8: Tensor) -> Plan:
    B, H, count, _, block_d = k8.shape
    blocks = _blocks(call)
    programs, cells = B * H * blocks.outside, B * H * blocks.cells
    parts, length = splits(call.q, programs, count * SLOTS, cells * call.work((CELL, CELL)), SLOTS)
    boxes = block_boxes(k8, v8)
    named = dict(
        batch=B, blocks=count, outside_blocks=blocks.outside, row_programs=programs * parts,
        part_length=length // SLOTS, together=call.together, parts=parts, TMA=boxes[0] is not None,
        INT8=k8.dtype == torch.int8, INTERPRETED=interpreted(call.q),
        **launch.options, **call.numbers(),
    )  # fmt: skip
    for name in ("TWO", "PRECISION"):
        del named[name]
    named["BLOCK_D"] = block_d
    return Plan(Bound(_forward, (programs * parts + cells,), strides_of(call.q), named), parts, boxes, launch)
