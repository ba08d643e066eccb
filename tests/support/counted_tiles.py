"""Counts the key tiles of a grid inside a Triton kernel, with the functions that the local kernels walk them by."""

import torch
import triton
import triton.language as tl

from vision_attn.kernels.local.op import Call
from vision_attn.kernels.local.tiles import count_tiles, key_range


@triton.jit
def _count(  # noqa: PLR0917, a kernel takes plain values
    out, height, width, limit, reach, KY, KX, across,
    M: tl.constexpr, N: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr, DISC: tl.constexpr,
):  # fmt: skip
    y0, x0 = tl.program_id(0) // across * M, tl.program_id(0) % across * N
    y1, x1 = tl.minimum(y0 + M, height) - 1, tl.minimum(x0 + N, width) - 1
    start_y, stop_y = key_range(y0, y1, height, KY, reach, DISC)
    start_x, stop_x = key_range(x0, x1, width, KX, reach, DISC)
    near = (y0, y1, x0, x1, start_x, stop_x, width, limit)
    count = count_tiles(start_y, stop_y, near, TALL, WIDE, DISC)
    tl.store(out + tl.program_id(0), count)


def kernel_tiles(grid, window, queries, keys):
    """Return how many key tiles all query tiles visit together, for a window without dilation."""
    size, q = (grid.height, grid.width, grid.prefix, grid.suffix), torch.empty(1, grid.tokens, 1, 16)
    radius, kernel, steps = window.geometry(grid)
    numbers = Call(q, q, q, None, None, None, None, size, radius, kernel, steps, 1.0).numbers()
    down, across = -(-grid.height // queries[0]), -(-grid.width // queries[1])
    out = torch.zeros(down * across, dtype=torch.int32)
    _count[(down * across,)](
        out, grid.height, grid.width, numbers["limit"], numbers["reach"], *kernel, across, *queries, *keys, radius > 0
    )
    return int(out.sum())
