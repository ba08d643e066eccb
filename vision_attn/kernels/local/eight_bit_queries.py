"""The launch of local attention in 8 bits, in Triton: see `eight_bit.py` for what it computes.

It is laid out as the forward of `queries.py`. But it reads blocks of tokens as `quantising.py` wrote them: each is one
piece of memory with one scale. So the tiles of keys are the cells of the sub-grid, and a window's walk begins at the
cell that its first key lies in.
"""

# ruff: noqa: ANN001, ANN202, E741, PLR0915  # the compiler of a kernel reads no annotations
# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

from vision_attn.kernels import launches
from vision_attn.kernels.backend import LaunchError
from vision_attn.kernels.launches import Launch, fitting
from vision_attn.kernels.local.eight_bit import CELL, SLOTS
from vision_attn.kernels.local.op import Call
from vision_attn.kernels.local.quantising import blocks_of, position, quantise, rounded
from vision_attn.kernels.local.tiles import (
    band_columns,
    coordinates,
    grid_program,
    key_range,
    tile_tokens,
    windowed,
)
from vision_attn.kernels.triton.launching import Bound, Kernel, hopper, planned
from vision_attn.kernels.triton.rows import (
    LOG2E,
    NO_KEY,
    Box,
    Plan,
    merge_outside,
    outside_program,
    outside_tokens,
    own_head,
    splits,
    store_lse,
    store_rows,
)

_SIDE, _SLOTS = tl.constexpr(CELL), tl.constexpr(SLOTS)
_START = tl.constexpr(-1e10)  # where a running maximum starts: below any true logit, far above any hidden one
# an integer below 2^22 added to these bits of a float32 becomes its mantissa: two instructions that run at full rate
_BITS, _VALUE = tl.constexpr(0x4B400000), tl.constexpr(12582912.0)


@triton.jit
def _block(base, box, place, ROWS: tl.constexpr, WIDTH: tl.constexpr, TMA: tl.constexpr):
    """Block `place` of `[blocks, ROWS, WIDTH]`."""
    if TMA:
        rows = box.load([place * ROWS, 0])
    else:
        n, d = tl.arange(0, ROWS), tl.arange(0, WIDTH)  # [ROWS], [WIDTH]
        rows = tl.load(base + place.to(tl.int64) * (ROWS * WIDTH) + n[:, None] * WIDTH + d[None, :])
    return rows


@triton.jit
def _logits(q_rows, k_rows, c, INT8: tl.constexpr, INTERPRETED: tl.constexpr):
    """Logits of a block of queries and one of keys in base 2, `[64, 64]`."""
    if INT8:
        whole = tl.dot(q_rows, tl.trans(k_rows))  # [64, 64]
        s = (whole + _BITS).to(tl.float32, bitcast=True) - _VALUE
    elif INTERPRETED:
        s = tl.dot(q_rows.to(tl.float32), tl.trans(k_rows.to(tl.float32)), input_precision="ieee")
    else:
        s = tl.dot(q_rows, tl.trans(k_rows))
    return s * c


@triton.jit
def _update(s, v_columns, m, l, acc, INTERPRETED: tl.constexpr):
    """Add a block of keys to an online softmax over logits s `[64, 64]`, with values `[BLOCK_D, 64]`."""
    top = tl.maximum(m, tl.ceil(tl.max(s, 1)) - 8)  # [64]
    p = tl.math.exp2(s - top[:, None])  # [64, 64]
    shrink = tl.math.exp2(m - top)  # [64]
    l = l * shrink[:, None] + tl.sum(p.reshape(p.shape[0], p.shape[1] // 8, 8), 1)
    p = position(p)
    if INTERPRETED:
        part = tl.dot(rounded(p), tl.trans(v_columns.to(tl.float32)), input_precision="ieee")
    else:
        part = tl.dot(p.to(tl.float8e4nv), tl.trans(v_columns))
    # tensor cores add in fewer bits than float32: tiles are added outside of them
    return top, l, acc * shrink[:, None] + part


@triton.jit
def _meet_blocks(
    q_rows, c, m, l, acc, k8, v8, k_box, v_box, k_scale, hidden, start, first, stop, BLOCK_D: tl.constexpr,
    TMA: tl.constexpr, INT8: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Meet the blocks `first .. stop - 1` of the head whose blocks begin at `start`."""
    ahead = tl.load(k_scale + start + first)
    for j in tl.range(first, stop):
        k_rows = _block(k8, k_box, start + j, _SLOTS, BLOCK_D, TMA)  # [64, BLOCK_D]
        s = _logits(q_rows, k_rows, c * ahead, INT8, INTERPRETED)  # [64, 64]
        ahead = tl.load(k_scale + start + tl.minimum(j + 1, stop - 1))
        s += tl.load(hidden + j * _SLOTS + tl.arange(0, _SLOTS))[None, :]
        v_columns = _block(v8, v_box, start + j, BLOCK_D, _SLOTS, TMA)  # [BLOCK_D, 64]
        m, l, acc = _update(s, v_columns, m, l, acc, INTERPRETED)
    return m, l, acc


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
    q8, k8, v8, q_scale, k_scale, v_scale, hidden, o, part_o, part_lse, k_box, v_box,
    N, heads, batch, prefix, height, width, outside, blocks, outside_blocks, limit, reach, KY, KX, step_y, step_x,
    scale, row_programs, part_length, together, parts,
    D: tl.constexpr, BLOCK_D: tl.constexpr, DISC: tl.constexpr, TMA: tl.constexpr, INT8: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Output of a block of queries: of a cell of the grid, or of tokens outside it over a part of the blocks of keys.

    Inputs: what `_quantise` wrote, see there; v_scale `[B, H, BLOCK_D]`.
    Boxes: k_box, v_box of one block; with `TMA` only.
    Outputs: o `[B, N, H, D]`; of the tokens outside the grid part_o `[parts, B, H, outside, D]` and part_lse if there
    are several parts.
    Grid and window: see `tiles.py`. A head has `blocks` blocks, the first `outside_blocks` of tokens outside the grid.
    Launch: `row_programs` programs for the tokens outside the grid, each over `part_length` blocks, then those of the
    cells, `together` heads in turn.
    """
    pid = tl.program_id(0)
    image = height * width
    c = scale * LOG2E
    m = tl.full([_SLOTS], _START, tl.float32)  # [64]
    l = tl.zeros([_SLOTS, 8], tl.float32)  # [64, 8]
    acc = tl.zeros([_SLOTS, BLOCK_D], tl.float32)  # [64, BLOCK_D]
    d = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    if pid < row_programs:
        b, h, bh, part, rank, keep, _ = outside_program(pid, outside, heads, N, prefix, image, _SLOTS, parts)
        start = bh * blocks
        own = start + pid % outside_blocks
        q_rows = _block(q8, k_box, own, _SLOTS, BLOCK_D, False)  # [64, BLOCK_D]
        first = part * part_length
        m, l, acc = _meet_blocks(
            q_rows, c * tl.load(q_scale + own), m, l, acc, k8, v8, k_box, v_box, k_scale,
            hidden + b.to(tl.int64) * blocks * _SLOTS, start, first, tl.minimum(first + part_length, blocks),
            BLOCK_D, TMA, INT8, INTERPRETED,
        )  # fmt: skip
        total = tl.maximum(tl.sum(l, 1), NO_KEY)  # [64], a part may hold hidden keys alone
        acc = acc * (1.0 / total)[:, None] * tl.load(v_scale + bh * BLOCK_D + d)[None, :]
        if parts == 1:
            token = outside_tokens(rank, prefix, image)  # [64]
            store_rows(own_head(o, b, h, N, heads, D), token, heads * D, acc, keep, D, BLOCK_D)
        else:
            place = (part * batch * heads + bh).to(tl.int64) * outside
            store_rows(part_o + place * D, rank, D, acc, keep, D, BLOCK_D)
            store_lse(part_lse, place + rank, 0, m, total, keep, False)
    else:
        whole, window = (height, width, prefix, step_y, step_x), (KY, KX, reach, limit)
        b, h, bh, sub, y0, x0, keep, _ = grid_program(pid - row_programs, heads, together, whole, _SIDE, _SIDE)
        start = bh * blocks
        own = start + outside_blocks + _cell(sub, whole, y0, x0)
        q_rows = _block(q8, k_box, own, _SLOTS, BLOCK_D, False)  # [64, BLOCK_D]
        c *= tl.load(q_scale + own)
        m, l, acc = _meet_blocks(
            q_rows, c, m, l, acc, k8, v8, k_box, v_box, k_scale, hidden + b.to(tl.int64) * blocks * _SLOTS, start, 0,
            outside_blocks, BLOCK_D, TMA, INT8, INTERPRETED,
        )  # fmt: skip
        count, row, column, stop, near = _walk(y0, x0, sub, window, DISC)
        qy, qx = coordinates(y0, x0, _SIDE, _SIDE, DISC)  # [64]
        place = start + outside_blocks + _cell(sub, whole, row, column)
        ahead = tl.load(k_scale + place)
        for _i in tl.range(0, count):
            k_rows = _block(k8, k_box, place, _SLOTS, BLOCK_D, TMA)  # [64, BLOCK_D]
            v_columns = _block(v8, v_box, place, BLOCK_D, _SLOTS, TMA)  # [BLOCK_D, 64]
            s = _logits(q_rows, k_rows, c * ahead, INT8, INTERPRETED)  # [64, 64]
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
            m, l, acc = _update(s, v_columns, m, l, acc, INTERPRETED)
        total = tl.maximum(tl.sum(l, 1), NO_KEY)  # [64]
        acc = acc * (1.0 / total)[:, None] * tl.load(v_scale + bh * BLOCK_D + d)[None, :]
        token = tile_tokens(y0, x0, sub, whole, _SIDE, _SIDE)  # [64]
        store_rows(own_head(o, b, h, N, heads, D), token, heads * D, acc, keep, D, BLOCK_D)


def forward(call: Call, precision: str) -> Tensor:
    """Return the output `[B, N, H, D]` with q and k in `precision`."""
    q = call.q
    B, _, H, D = q.shape
    for reason in launches.target_of(q.device).without_eight_bits:
        raise LaunchError(reason)
    o = q.new_empty(q.shape)
    if not o.numel():
        return o
    block_d = max(call.block_d, 32)  # what a product of 8 bits sums over at least
    x = quantise(call, block_d, torch.int8 if precision == "int8" else torch.float8_e4m3fn)
    plan = _plan(call, x.q, x.v)
    part_o = part_lse = x.q_scale
    if plan.parts > 1:
        part_o = q.new_empty((plan.parts, B, H, call.outside, D), dtype=torch.float32)
        part_lse = q.new_empty((1, plan.parts, B, H, call.outside), dtype=torch.float32)
    plan.run(
        x.q, x.k, x.v, x.q_scale, x.k_scale, x.v_scale, x.hidden, o, part_o, part_lse,
        boxed=(x.k.flatten(0, 3), x.v.flatten(0, 3)),
    )  # fmt: skip
    if plan.parts > 1:
        lse = q.new_empty((1, B, H, q.shape[1]), dtype=torch.float32)
        merge_outside(part_o, part_lse, o, lse, call.size[2])
    return o


@planned
def _plan(call: Call, q8: Tensor, v8: Tensor) -> Plan:
    """Plan the launch that fits, for keys like `q8` and values like `v8`."""
    boxed = q8.flatten(0, 3), v8.flatten(0, 3)
    made = q8, q8, v8, *[torch.float32] * 4, call.q.dtype, *[torch.float32] * 2

    def attempt(launch: Launch) -> tuple[Plan, int]:
        if (launch.rows, launch.length) != (SLOTS, SLOTS):
            raise LaunchError(f"a block of 8 bits has {SLOTS} tokens, not {launch.rows} or {launch.length}")
        return _plan_launch(call, launch, q8, boxed).needs(*made, boxed=boxed)

    return fitting("local.eight_bit", call.q, attempt, channels=call.block_d, columns=call.span)


def _plan_launch(call: Call, launch: Launch, q8: Tensor, boxed: tuple[Tensor, Tensor]) -> Plan:
    B, H, blocks, _, block_d = q8.shape
    outside_blocks = blocks_of(call)[1]
    tile = CELL, CELL
    programs, cells = B * H * outside_blocks, B * H * call.tiles(tile)
    parts, length = splits(call.q, programs, blocks * SLOTS, cells * call.work(tile), SLOTS)
    tma = hopper(call.q)
    rows = SLOTS, block_d
    boxes = [
        Box(0, list(t.shape), [t.shape[1], 1], [n, t.shape[1]]) if tma else None
        for t, n in zip(boxed, rows, strict=True)
    ]
    named = dict(
        batch=B, blocks=blocks, outside_blocks=outside_blocks, row_programs=programs * parts,
        part_length=length // SLOTS, together=call.together, parts=parts, TMA=tma, INT8=q8.dtype == torch.int8,
        INTERPRETED=launches.target_of(call.q.device) is launches.INTERPRETER,
        num_warps=launch.warps, num_stages=launch.stages, **call.numbers(),
    )  # fmt: skip
    for name in ("TWO", "PRECISION"):
        del named[name]
    named["BLOCK_D"] = block_d
    bound = Bound(_forward, (programs * parts + cells,), (), named)
    return Plan(bound, parts, tuple(boxes), launch)
