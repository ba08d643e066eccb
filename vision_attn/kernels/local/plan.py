"""How the large launches of local attention are laid out: programs, parts, TMA boxes, arguments.

All three (output, dq, dk and dv) have programs for tiles of the grid, and programs with a long loop for the tokens
outside it. Calls alike share a plan: Python would take longer to work it out than a GPU to run it.
"""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from vision_attn.kernels.local.call import Call, Tiles, token_strides
from vision_attn.kernels.triton.launching import Bound, Kernel, planned
from vision_attn.kernels.triton.plan import Box, Plan, box_strides, sequence_box, uses_boxes


@planned
def plan_queries(call: Call, kernel: Kernel, tiles: Tiles, *others: Tensor) -> Plan:
    """Plan a launch whose programs own queries and walk keys; `others` are tensors of the launch beside the call's."""
    pooled = 0 if call.pooled_k is None else call.pooled_k.shape[1]
    pooled_k, pooled_v = (call.k, call.v) if call.pooled_k is None else (call.pooled_k, call.pooled_v)
    strided = call.q, call.k, call.v, *others, pooled_k, pooled_v
    more = dict(pooled=pooled, POOLED=pooled > 0)
    return _plan(call, kernel, tiles, (tiles.queries, tiles.keys), (call.k, call.v), strided, more)


@planned
def plan_keys(call: Call, kernel: Kernel, tiles: Tiles, do: Tensor) -> Plan:
    """Plan a launch whose programs own keys and walk queries and the output's gradient."""
    return _plan(call, kernel, tiles, (tiles.keys, tiles.queries), (call.q, do), (call.q, call.k, call.v, do), {})


def _plan(
    call: Call, kernel: Kernel, tiles: Tiles, order: Sequence[tuple[int, int]], walked: Sequence[Tensor],
    strided: Sequence[Any], more: dict[str, Any],
) -> Plan:  # fmt: skip
    """Plan a launch; `order` is the tile that a program owns and the one that it walks by."""
    B, N, H, _ = call.q.shape
    _, _, prefix, suffix = call.size
    own, other = order
    M, LEN = math.prod(own), math.prod(other)
    blocks = B * H * math.ceil(call.outside / M)
    grid_programs = B * H * call.tiles(own)
    parts, length = call.splits(blocks, N, grid_programs * call.work(own), LEN) if blocks else (1, N)
    parts = math.ceil(N / length)
    tma = uses_boxes(walked)
    boxes: list[Box | None] = [None] * 4
    if tma:
        if call.outside:
            boxes[:2] = [sequence_box(t, LEN, call.block_d) for t in walked]
        boxes[2:] = [grid_box(t, call.size, call.steps, other, call.block_d) for t in walked]
    named = dict(
        mask_b=0 if call.mask is None else call.mask.stride(0) * (call.mask.shape[0] > 1), batch=B,
        row_programs=blocks * parts, part_length=length, together=call.together,
        TALL=tiles.queries[0], WIDE=tiles.queries[1], KEY_TALL=tiles.keys[0], KEY_WIDE=tiles.keys[1],
        MASK=call.mask is not None, BIAS=call.bias_block, PREFIX=prefix > 0, SUFFIX=suffix > 0,
        RAGGED_PREFIX=prefix % LEN > 0, RAGGED_N=N % LEN > 0, PARTS=parts, TMA=tma,
        num_warps=tiles.warps, num_stages=tiles.stages, **call.numbers(), **more,
    )  # fmt: skip
    strides = tuple(stride for t in strided for stride in token_strides(t))
    return Plan(Bound(kernel, (blocks * parts + grid_programs,), strides, named), parts, tuple(boxes))


def grid_box(t: Tensor, size: Sequence[int], steps: Sequence[int], tile: tuple[int, int], block_d: int) -> Box:
    """Boxes of a tile of one head of a sub-grid; rows and columns beyond it read as zero.

    TMA has five axes: batch, row, column, channel, and one in units of 16 bytes for head and sub-grid together
    (`grid_lane`). Where a dilation does not divide a side, some sub-grids are shorter by one. Theirs is counted from
    one step before the grid and starts at 1, so that all end at the same coordinate and none is read beyond the grid.
    """
    (height, width, prefix, _), (step_y, step_x) = size, steps
    b, n, h, d = box_strides(t)
    unit = 16 // t.element_size()
    ahead = step_y * (height % step_y > 0) * width + step_x * (width % step_x > 0)
    last = (ahead + (step_y - 1) * width + step_x - 1) * n + (t.shape[2] - 1) * h
    sides = [math.ceil(height / step_y), math.ceil(width / step_x)]
    return Box(
        (prefix - ahead) * n, [t.shape[0], *sides, last // unit + 1, t.shape[3]],
        [b, step_y * width * n, step_x * n, unit, d], [1, *tile, 1, block_d],
    )  # fmt: skip
